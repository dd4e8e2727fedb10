"""A simulated step of students that a frozen teacher teaches: one, or several side by side."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from dinov3_estimate.command import estimate, fullest_rank
from dinov3_estimate.simulated import SimulatedRank
from dinov3_estimate.step import Estimate, simulate
from dinov3_ssl.configs import MultiDistillConfig
from distill_support import DISTILL, MULTI, distill
from trainer_support import pretrain, registry

from dinov3_framework import UserError, cli
from dinov3_framework.recipes.compose import compose
from dinov3_framework.recipes.structure import structure_recipe
from dinov3_framework.weights import downloads
from dinov3_framework.weights.locations import published_file

PUBLISHED = "dinov3_vits16_pretrain_lvd1689m-08c60483.pth"
RGB = "images={channels=3, mean=[0, 0, 0], std=[1, 1, 1]}"
SIZES = ("augmentation.global_size=64", "augmentation.local_size=32", "backbone.patch_size=16")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that a run leaves but values."""
    folder = tmp_path_factory.mktemp("teacher")
    wide = ("backbone.embed_dim=48", "backbone.num_heads=4", "backbone.patch_size=16")
    assert pretrain(*wide, *SIZES[:2]).write_expected_artifacts(folder)
    return folder


@pytest.fixture(scope="module")
def config(teacher: Path) -> MultiDistillConfig:
    words = [f"teacher.weights={teacher}", 'drop=["students.conv.losses.ibot"]']
    found = structure_recipe(registry(), compose(MULTI, words))
    assert isinstance(found, MultiDistillConfig)
    return found


@pytest.fixture(scope="module")
def found(config: MultiDistillConfig) -> Estimate:
    """Of the student that has two of four processes."""
    trainings = registry().build(config, registry=registry()).side_by_side(4)
    assert [each.name for each in trainings] == ["wide", "narrow", "conv"]
    rank = fullest_rank(trainings[0], trainings)
    # Of ten images the four show 2, 3, 2 and 3 to the teacher.
    assert rank == SimulatedRank(4, 1, [range(2), range(2, 3), range(3, 4)])
    return simulate(trainings[0].task, rank)


def batch_rows(found: Estimate) -> dict[str, str]:
    return dict(found.largest.batch.rows)


# --------------------------------------------------------------------------- several
def test_the_teacher_is_over_all_and_the_student_over_its_own(found: Estimate) -> None:
    assert (found.layout.world_size, found.layout.per_micro_batch) == (2, 5)
    assert batch_rows(found)["shown to the teacher"] == "4 x 1 micro-batches x 3 at most"
    whole, held = found.parameters["student"]
    assert held == pytest.approx(whole / 2, rel=0.05)
    sent = Counter(
        {(m.name, m.processes): n for m, n in found.tally.messages.items() if n and m.bytes}
    )
    assert {processes for name, processes in sent if name == "reduce_scatter"} == {2}
    assert {processes for name, processes in sent if name == "all_gather"} == {2, 4}
    gathered = sum(
        n for m, n in found.tally.messages.items() if (m.name, m.processes) == ("all_gather", 4)
    )
    assert gathered == 3  # the teacher's two blocks and the rest of its backbone


def test_crops_and_features_are_exchanged(found: Estimate) -> None:
    """The process gives its three images to one process of each student, and gets its five."""
    exchanged = Counter(
        {m.bytes: n for m, n in found.tally.messages.items() if m.name == "all_to_all"}
    )
    width, patches, fp32 = 48, 16, 4
    expected: Counter[int] = Counter()
    for size in (64, 32):
        expected[9 * 2 * size * size] += 1  # as bytes; nine are given away
    expected[9 * 2 * width * fp32] += 1  # class tokens
    # Two of the students alone look at patches.
    expected[6 * 2 * patches * width * fp32] += 1
    assert exchanged == expected


def test_masks_are_those_of_the_images_that_the_student_sees(
    found: Estimate, config: MultiDistillConfig
) -> None:
    alone = distill(Path(config.teacher.weights), *SIZES, "batch_size=10")
    assert alone.config.augmentation == config.augmentation
    of_two = simulate(alone, SimulatedRank(2))
    masked = batch_rows(found)["masked patches"]
    assert masked == batch_rows(of_two)["masked patches"]
    of_teacher = [batch_rows(each)["tokens of the teacher"] for each in (found, of_two)]
    assert of_teacher[0].partition(",")[0] == of_teacher[1].partition(",")[0]


def test_a_frozen_teacher_is_found_in_memory(found: Estimate) -> None:
    """Its backbone is a quarter's of all processes, its projectors are the student's."""
    whole, held = found.parameters["frozen teacher"]
    assert whole / 4 < held < whole / 3
    assert found.rest.bytes["frozen teacher"] >= 4 * held
    assert "other networks" not in found.parameters
    assert list(found.parameters) == ["student", "average", "frozen teacher"]


@pytest.mark.slow
def test_the_report_on_several(
    teacher: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [f"teacher.weights={teacher}", "--rehearse", "--world-size", "8", "batch_size=20"]
    assert cli.main([str(MULTI), *words]) == 0
    out = "\n".join(" ".join(line.split()) for line in capsys.readouterr().out.splitlines())
    for part in (
        "images per step 20, all of which each of them sees",
        "shown to the teacher 8 x 1 micro-batches x 3 at most",
        "of wide 4 x 1 micro-batches x 5",
        "of conv 2 x 1 micro-batches x 10",
        "narrow: memory of a process",
        "conv: estimated on H100 SXM 80 GB",
        ": all wait for it",
        "US dollars",
    ):
        assert part in out, part
    assert out.count("assumptions (estimates") == out.count("GPU hours") == 1
    assert list(tmp_path.iterdir()) == []
    assert cli.main([str(MULTI), *words[:2], "--world-size", "3"]) == 2
    assert "students: cannot share 3 processes" in capsys.readouterr().err


# --------------------------------------------------------------------------- what the teacher is
@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("an estimate fetches nothing")

    monkeypatch.setattr(downloads, "_download", refuse)
    monkeypatch.setattr(downloads, "_place", refuse)


@pytest.mark.usefixtures("offline")
def test_a_published_teacher_is_known_by_the_name_of_its_file() -> None:
    weights = f"nowhere/{PUBLISHED}"
    report = estimate(distill(Path("x"), RGB, *SIZES, f"teacher.weights={weights}"), 2)
    told = dict(report.sections["teacher"])
    assert told["backbone"] == "vit_small, 21,601,152 parameters"
    assert told["known as"] == f"the published {PUBLISHED}"
    assert any(f"there is no {weights}" in line for line in report.missing)


@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("dinov3_vits16", PUBLISHED),
        ("dinov3_vitl16@sat493m", "dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth"),
        (f"https://example.com/{PUBLISHED}?Policy=a/b", PUBLISHED),
        (PUBLISHED, PUBLISHED),
        ("dinov3_vits16@nothing", None),
        (f"{PUBLISHED}/else", None),
    ],
)
def test_what_a_source_stands_for(source: str, file: str | None) -> None:
    found = published_file(source, registry())
    assert (found and found.file) == file


@pytest.mark.usefixtures("offline")
def test_published_weights_of_anchors_and_beginnings_are_not_fetched() -> None:
    begin = "init_from={weights='dinov3_vits16', new=['*'], unused=['*']}"
    anchor = "losses.gram={use='gram', anchor={weights='dinov3_vits16'}}"
    task = pretrain(RGB, *SIZES, "augmentation.anchor_size=64", begin, anchor)
    anchors = dict(estimate(task, 1).sections["parameters"])["anchors"]
    assert anchors.startswith("21,601,152, ")


@pytest.mark.parametrize("recipe", [DISTILL, MULTI])
def test_an_unknown_teacher(recipe: Path) -> None:
    weights = "https://example.com/teacher.pth"
    config = structure_recipe(registry(), compose(recipe, [f"teacher.weights={weights}", RGB]))
    task = registry().build(config, registry=registry())
    with pytest.raises(UserError, match=r"there is no https.* here\n .*a published name"):
        estimate(task, 4)
