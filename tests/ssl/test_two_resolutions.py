"""Training on crops of two sizes: every step has one, on all processes, and again after a stop."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from dinov3_ssl.batches import CropBatches
from dinov3_ssl.preflight import parts_problems
from loader_support import ONE, Numbers, assert_same, loader
from run_support import export_bytes, losses, metrics, two_processes
from torch import Tensor
from trainer_support import changed, dataset_of, pretrain, snapshot, steps, trainer

from dinov3_framework import RecipeError, Sample, View
from dinov3_framework.data.loader import Layout
from dinov3_framework.errors import ExitCode

TABLES = (
    "{ratio=0.5, global_size=28, local_size=14, anchor_size=42}",
    "{ratio=0.5, global_size=42, local_size=21, anchor_size=63}",
)
# Without global_size and local_size: those of the recipe are the first table's.
RESOLUTIONS = f"augmentation.resolutions=[{', '.join(TABLES)}]"
GRAM = ("losses.gram.use=gram", "losses.gram.anchor.period=2")
SIDES = {28: (28, 14, 42), 42: (42, 21, 63)}


def maker(layout: Layout = ONE, workers: int = 0, *overrides: str) -> CropBatches:
    task = pretrain(RESOLUTIONS, *overrides)
    return CropBatches(dataset_of(task), task.method.prepare().augmentation, layout, 0, workers)


def side(batch: Any) -> int:
    return int(batch.crops["global"].shape[-1])


# --------------------------------------------------------------------------- the batches
def test_a_step_has_one_size_however_it_is_split() -> None:
    seen = set()
    for step in range(5):
        whole = maker()[step, 0]
        seen.add(side(whole))
        of_views = tuple(whole.crops[view].shape[-1] for view in ("global", "local", "anchor"))
        assert of_views == SIDES[side(whole)]
        parts = [
            maker(Layout(2, rank, 2, ONE.batch_size))[step, micro]
            for micro, rank in itertools.product(range(2), range(2))
        ]
        for view, crops in whole.crops.items():
            assert torch.equal(torch.cat([part.crops[view] for part in parts], dim=1), crops)
        assert whole.masks is not None
        assert whole.masks.shape[-1] == (side(whole) // 7) ** 2
        assert whole.masks.any()
        assert torch.equal(torch.cat([part.masks for part in parts], dim=1), whole.masks)
    assert seen == set(SIDES)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 2])
def test_workers_and_start_do_not_change_the_sizes(workers: int, start: int) -> None:
    made = maker(ONE, workers)
    _, batches = loader(made, start, 5, workers=workers)
    found = list(batches)
    assert len(found) == 5 - start
    assert {side(batch) for batch in found} == set(SIDES)
    for step, batch in enumerate(found, start):
        assert_same(batch, made[step, 0])


class Noting(Numbers):
    """Remembers what it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def __getitem__(self, index: int) -> Sample:
        self.asked.append(index)
        return super().__getitem__(index)


def test_the_stream_of_images_is_that_of_one_resolution() -> None:
    """And its crops are the same wherever a step has the recipe's own sizes."""
    tables = "{ratio=0.5}, {ratio=0.5, global_size=42}"
    asked, made = [], []
    for overrides in ((), (f"augmentation.resolutions=[{tables}]",)):
        dataset, augmentation = Noting(), pretrain(*overrides).method.prepare().augmentation
        of_steps = CropBatches(dataset, augmentation, ONE, seed=0, workers=0)
        made.append([of_steps[step, 0] for step in range(6)])
        asked.append(dataset.asked)
    assert asked[0] == asked[1]
    assert len(asked[0]) == 6 * ONE.batch_size
    usual = [step for step, batch in enumerate(made[1]) if side(batch) == 28]
    assert 0 < len(usual) < 6
    for step in usual:
        assert_same(made[0][step], made[1][step])


# --------------------------------------------------------------------------- the check
def test_a_check_shows_the_resolutions() -> None:
    report = pretrain(RESOLUTIONS, *GRAM).check(1)
    batch, rows = (dict(report.sections[name]) for name in ("batch", "resolutions"))
    largest = "2 global of 42 px, 2 local of 21 px, 2 anchor of 63 px"
    assert batch["crops per image"] == f"{largest} in the largest of 2 resolutions"
    # 2 x 4 x 4 + 2 x 2 x 2 patches, then 2 x 6 x 6 + 2 x 3 x 3
    assert rows == {
        "1": "0.5 of steps: 2 global of 28 px, 2 local of 14 px, 2 anchor of 42 px; "
        "40 patches per image for the student",
        "2": f"0.5 of steps: {largest}; 90 patches per image for the student",
    }
    assert "resolutions" not in pretrain().check(1).sections


def test_a_check_refuses_what_the_augmentation_refuses() -> None:
    wrong = "augmentation.resolutions=[{ratio=0.5}, {ratio=0.4, global_size=30}]"
    with pytest.raises(RecipeError) as caught:
        pretrain(wrong).check(1)
    assert [problem.where for problem in caught.value.problems] == [
        "augmentation.resolutions",
        "augmentation.resolutions.2.global_size",
    ]


def made(**sizes: int) -> SimpleNamespace:
    """An augmentation that declares two crops of each view."""
    views = {name: View(2, size) for name, size in sizes.items()}
    return SimpleNamespace(views=views, makes_masks=True)


@pytest.mark.parametrize(
    ("second", "messages"),
    [
        ({"global": 42, "local": 21}, []),
        # The teacher's crops are cut into patches of the teacher's.
        ({"global": 42, "local": 21, "teacher": 30}, []),
        ({"global": 42, "local": 20}, ["local crops of 20 px are no multiple of the patch size 7"]),
        ({"global": 42}, ["needs 'student.local.class': the augmentation makes global crops only"]),
    ],
)
def test_a_check_looks_at_each_variant(second: dict[str, int], messages: list[str]) -> None:
    task = pretrain()
    parts = task.method.prepare()
    augmentation = made(**{"global": 28, "local": 14})
    augmentation.variants = lambda: (augmentation, made(**second), made(**second))
    problems = parts_problems(task.config, evolve(parts, augmentation=augmentation))
    assert [problem.message for problem in problems] == messages


def test_observers_see_crops_of_the_first_steps_size(tmp_path: Path) -> None:
    with trainer(tmp_path, RESOLUTIONS, "augmentation.teacher_scale=0.5") as ours:
        shown = ours.run.sample_batch(3)
        size = side(ours.maker[0, 0])
        assert {name: crops.shape[-1] for name, crops in shown.items() if name != "masks"} == {
            **dict(zip(("global", "local", "anchor"), SIDES[size], strict=True)),
            "teacher": size // 2,
        }
        assert shown["masks"].shape == (2, 3, (size // 7) ** 2)


# --------------------------------------------------------------------------- the networks
class Tables:
    """The rotary tables that a backbone makes from now on, with the grids they are for."""

    def __init__(self, backbone: Any) -> None:
        self.made: list[tuple[int, Tensor]] = []
        self.rope = backbone.rope_embed
        make = self.rope.forward

        def forward(height: int, width: int) -> Any:
            table = make(height, width)
            assert height == width
            self.made.append((height, torch.atan2(table.sin, table.cos)))
            return table

        self.rope.forward = forward

    def factors(self) -> list[tuple[int, float]]:
        """Each table's grid, and by how much its coordinates are those of the grid rescaled.

        Rows and columns are read off the slowest of the four periods, whose angle stays below a
        turn; everything else has to follow from them.
        """
        found = []
        for grid, angles in self.made:
            period, patches = float(self.rope.periods[-1]), angles[self.rope.n_unturned :]
            rows, columns = (patches[:, place] * period / (2 * math.pi) for place in (3, 7))
            centers = 2 * (torch.arange(grid) + 0.5) / grid - 1
            factor = float(rows[-1] / centers[-1])
            torch.testing.assert_close(rows, factor * centers.repeat_interleave(grid))
            torch.testing.assert_close(columns, factor * centers.repeat(grid))
            found.append((grid, round(factor, 5)))
        return found


def test_positions_are_right_for_each_size_and_drawn_for_each_pass(tmp_path: Path) -> None:
    overrides = (RESOLUTIONS, *GRAM, "accumulation_steps=2", "backbone.drop_path_rate=0.0")
    with trainer(tmp_path, *overrides) as ours:
        sizes = [ours.maker.augmentation.at(0, step).views["global"].size for step in range(4)]
        assert set(sizes) == set(SIDES)
        before = snapshot(ours, ["student.backbone"])
        student = Tables(ours.unit.placed.student["backbone"])
        teacher = Tables(ours.unit.placed.teacher["backbone"])
        anchor = Tables(ours.unit.placed.anchors["gram"])
        figures = steps(ours, 4)
        moved = changed(before, ours)
    passes = [size for size in sizes for _ in range(2)]
    grids = [[length // 7 for length in SIDES[size]] for size in passes]
    drawn = student.factors()
    assert [grid for grid, _ in drawn] == [grid for each in grids for grid in each[:2]]
    factors = [factor for _, factor in drawn]
    # One for each view of each pass, within the recipe's 1/2..2, and no two alike.
    assert len(set(factors)) == len(factors) == 16
    assert all(0.5 <= factor <= 2 for factor in factors)
    # Teacher and anchor see the grid as it is.
    assert teacher.factors() == [(grid, 1.0) for grid, _, _ in grids]
    assert anchor.factors() == [(grid, 1.0) for _, _, grid in grids]
    assert all(np.isfinite(line["loss"]) and line["gram"] > 0 for line in figures)
    assert len({line["loss"] for line in figures}) == 4
    assert moved >= {name for name in before if name.endswith(("qkv.weight", "mask_token"))}


# --------------------------------------------------------------------------- whole runs
@pytest.mark.slow
def test_two_processes_on_two_sizes_killed_and_resumed(tmp_path: Path) -> None:
    augmentation = pretrain(RESOLUTIONS).method.prepare().augmentation
    count = Counter(augmentation.at(0, step).views["global"].size for step in range(6))
    assert min(count[28], count[42]) >= 2, "both sizes come up in a run of six steps"
    overrides = (RESOLUTIONS, *GRAM)
    whole, output = tmp_path / "whole", tmp_path / "killed"
    done = two_processes(whole, *overrides)
    assert done.returncode == 0, done.stderr
    assert all(line["gram"] is not None for line in metrics(whole))
    kill = ("use=signal_at", "iteration=5", "rank=1")
    first = two_processes(output, *overrides, *(f"observers.kill.{part}" for part in kill))
    assert first.returncode == ExitCode.FAILED, first.stderr
    second = two_processes(output, *overrides, "loader.workers=2")
    assert second.returncode == 0, second.stderr
    assert losses(whole) == losses(output)
    assert export_bytes(whole) == export_bytes(output)
