"""Features of a frozen backbone that are extracted once: the same training, and its promises."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from dinov3_heads.feature_chunks import Chunk
from dinov3_vit.transformer import VisionTransformer
from heads_support import RECIPE, SEGMENTATION, TUNED, task
from run_support import losses, metrics, run, run_here

from dinov3_framework import CorruptSampleError, HeadFeatures, RecipeError, Sample
from dinov3_framework.testing.transforms import SCHEMA
from dinov3_framework.training.simulation import made_up_sample

STILL = ("transform.flip=0.0", "dataset.count=20", "iterations=10")  # 4 passes over 20 squares
NEVER = ("reuse_features=never",)
ALWAYS = ("reuse_features=always",)
QUIET = ('drop=["observers.score"]',)
KILL = (
    *("observers.kill.use=signal_at", "observers.kill.signal=SIGKILL"),
    "observers.kill.iteration=5",
)
TWO = ("launcher.use=local", "launcher.processes=2")


def trained(output: Path, *options: str) -> list[tuple[int, str]]:
    """The learnt figures of a run, in hex."""
    found = run_here(output, *STILL, *options, recipe=RECIPE)
    assert found.returncode == 0, found.stderr
    return losses(output)


def figures(output: Path) -> list[float]:
    return [line["loss"] for line in metrics(output) if "loss" in line]


def rows(*overrides: str, world_size: int = 1) -> dict[str, str]:
    return dict(task(*STILL, *overrides).check(world_size).sections["batch"])


# ---------------------------------------------------------------------------- the same training
@pytest.mark.parametrize(
    "head", [(), SEGMENTATION, ("head.use=attentive_probe",)], ids=["classes", "masks", "queries"]
)
def test_losses_are_those_of_features_anew_in_each_step(
    tmp_path: Path, head: tuple[str, ...]
) -> None:
    """To rounding: the backbone's products are of another number of images at a time."""
    corrupt = ("dataset.corrupt=[3, 17]",)
    trained(tmp_path / "anew", *head, *NEVER, *corrupt)
    trained(tmp_path / "once", *head, *ALWAYS, *corrupt)
    assert figures(tmp_path / "once") == pytest.approx(figures(tmp_path / "anew"), rel=1e-5)
    logs = [(tmp_path / name / "run.log").read_text() for name in ("anew", "once")]
    assert ["undecodable sample 2, substituted: square" in log for log in logs] == [True, True]
    before, after = (
        json.loads((tmp_path / name / "results.json").read_text())["val"][1]["accuracy"]
        for name in ("anew", "once")
    )
    assert before == after


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images go through the backbone, a number for each call."""
    counts: list[int] = []
    inner = VisionTransformer.get_intermediate_layers

    def counting(self: Any, images: torch.Tensor, **options: Any) -> Any:
        if not images.is_meta:
            counts.append(len(images))
        return inner(self, images, **options)

    monkeypatch.setattr(VisionTransformer, "get_intermediate_layers", counting)
    return counts


def test_the_backbone_is_called_once_for_each_image(tmp_path: Path, seen: list[int]) -> None:
    trained(tmp_path / "once", *QUIET)
    assert sum(seen) == 20
    seen.clear()
    trained(tmp_path / "anew", *QUIET, *NEVER)
    assert sum(seen) == 80


def test_workers_memory_and_files_give_the_same_bits(tmp_path: Path, seen: list[int]) -> None:
    first = trained(tmp_path / "memory", *QUIET)
    cache, versioned = tmp_path / "cache", "dataset.versioned=true"
    kept = (*QUIET, f"feature_cache={cache}")
    assert first == trained(tmp_path / "workers", *QUIET, "loader.workers=2")
    assert first == trained(tmp_path / "unknown", *kept)
    assert not cache.exists()  # nothing would tell these data from others
    assert first == trained(tmp_path / "files", *kept, versioned)
    seen.clear()
    assert first == trained(tmp_path / "again", *kept, versioned, "loader.workers=2")
    assert seen == []
    # Another head on the same features finds them, one of other layers does not.
    trained(tmp_path / "other", *kept, versioned, "optimizer.lr=0.05", "iterations=7")
    assert seen == []
    trained(tmp_path / "layers", *kept, versioned, "head.layers=[0, 1]")
    assert sum(seen) == 20


def test_files_that_are_missing_or_cut_are_made_again(tmp_path: Path) -> None:
    kept = (*QUIET, f"feature_cache={tmp_path / 'cache'}", "dataset.versioned=true")
    many = ("dataset.count=150", "iterations=40")
    first = trained(tmp_path / "first", *kept, *many)
    files = sorted((tmp_path / "cache").glob("*/*.safetensors"))
    contents = [file.read_bytes() for file in files]
    assert len(files) == 3
    files[0].unlink()
    files[1].write_bytes(contents[1][:-9])
    assert first == trained(tmp_path / "again", *kept, *many)
    assert [file.read_bytes() for file in files] == contents


@pytest.mark.slow
def test_two_processes_make_the_same_files_and_share_memory(tmp_path: Path) -> None:
    many = (*QUIET, "dataset.count=150", "iterations=40", "dataset.corrupt=[3]")
    kept = ("dataset.versioned=true", *many)
    trained(tmp_path / "alone", *kept, f"feature_cache={tmp_path / 'one'}")
    found = [
        run(tmp_path / name, *STILL, *options, *TWO, recipe=RECIPE)
        for name, options in (
            ("files", (*kept, f"feature_cache={tmp_path / 'two'}")),
            ("memory", many),
            ("half", (*many, "parallel.param_dtype=bf16")),
        )
    ]
    assert [each.returncode for each in found] == [0, 0, 0], found[0].stderr
    one, two = (
        {file.name: file.read_bytes() for file in (tmp_path / name).glob("*/*.safetensors")}
        for name in ("one", "two")
    )
    assert one == two
    assert losses(tmp_path / "memory") == losses(tmp_path / "files")
    assert figures(tmp_path / "half") == pytest.approx(figures(tmp_path / "memory"), rel=0.05)


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_bits(tmp_path: Path) -> None:
    first = trained(tmp_path / "whole", *QUIET)
    killed = run(tmp_path / "cut", *STILL, *QUIET, *KILL, recipe=RECIPE)
    assert killed.returncode != 0
    again = run(tmp_path / "cut", *STILL, *QUIET, recipe=RECIPE)
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "cut") == first


def test_half_precision_takes_half_the_room(tmp_path: Path) -> None:
    exact = trained(tmp_path / "exact", *QUIET)
    half = trained(tmp_path / "half", *QUIET, "feature_dtype=bf16")
    assert half != exact
    assert figures(tmp_path / "half") == pytest.approx(figures(tmp_path / "exact"), rel=0.02)
    big = ("dataset.count=2000000", "iterations=1000000", "feature_memory=1000")
    sizes = [
        float(rows(*big, f"feature_dtype={dtype}")["features' size"].split()[0])
        for dtype in ("exact", "bf16")
    ]
    # Maps of 32 x 4 x 4 and two class tokens of 32 numbers; a byte a pixel of masks stays.
    assert sizes[0] - sizes[1] == pytest.approx(2e6 * 2 * (32 * 16 + 32) / 2**30, rel=0.01)


def test_targets_of_all_kinds_come_back(tmp_path: Path) -> None:
    sample = made_up_sample(SCHEMA, (12, 9))
    nested = {"a": [1, 2.5, None, (True, "x")], "b": torch.tensor([-1, 70000])}
    targets = {**sample.targets, "nested": nested}
    grid, tokens = torch.randn(2, 3, 4, 5), torch.randn(2, 2, 3)
    features = HeadFeatures([grid], [torch.randn(2, 3)], (12, 9), storage=[tokens])
    samples = {7: Sample(sample.image, targets), 9: Sample(sample.image, sample.targets)}
    corrupt = {8: CorruptSampleError("b.png", "cut")}
    written = Chunk.of(features, samples, corrupt, None)
    (tmp_path / "chunk").write_bytes(written.to_bytes())
    chunks = [written, Chunk.from_bytes(written.to_bytes()), Chunk.from_file(tmp_path / "chunk")]
    for chunk in chunks:
        found = chunk[7]
        assert torch.equal(found.maps[0], features.maps[0][0])
        assert torch.equal(found.cls[0], features.cls[0][0])
        assert torch.equal(found.storage[0], tokens[0])
        assert found.targets.keys() == targets.keys()
        for name, value in sample.targets.items():
            assert type(found.targets[name]) is type(value)
            assert str(found.targets[name]) == str(value)
        assert str(found.targets["nested"]) == str(nested)
        assert torch.equal(chunk[9].maps[0], features.maps[0][1])
        with pytest.raises(CorruptSampleError, match=r"b\.png: cut"):
            chunk[8]


# ---------------------------------------------------------------------------- what is decided
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("transform.flip=0.5", "transform.scale=[0.9, 1.1]"),
         "transform.scale, transform.flip draw at random"),
        (TUNED, "the backbone is trained"),
        (("dataset.stream=true",), "the data are a stream"),
        (("transform.crop=none", "transform.resize=28"), "images are of several sizes"),
        (("feature_memory=1e-6",), r"they take .* GiB, and feature_memory is 1e-06 GiB"),
    ],
)  # fmt: skip
def test_where_features_differ_from_step_to_step(overrides: tuple[str, ...], message: str) -> None:
    """It is said, and who insists is refused."""
    shown = rows(*overrides)["features"]
    assert shown.startswith("extracted in each step")
    assert re.search(message, shown)
    with pytest.raises(RecipeError, match=rf"reuse_features: \"always\", but {message}"):
        task(*STILL, *overrides, *ALWAYS).check(1)


def test_a_check_says_what_is_reused_and_where() -> None:
    shown = rows("dataset.count=40")
    assert shown["features"] == "extracted once, of 40 images; used in 2 passes"
    assert shown["features' size"].endswith("GiB, in memory")
    assert "of each of 2 processes" in rows(world_size=2)["features' size"]
    kept = rows("feature_cache=some/folder", "dataset.versioned=true")["features' size"]
    assert kept.endswith("in files in some/folder")
    assert rows("dataset.count=41")["features"].endswith("the run makes 1.95 passes over the data")
    assert rows(*NEVER)["features"] == 'extracted in each step: reuse_features = "never"'


def test_an_estimate_is_of_a_step_without_the_backbone(tmp_path: Path) -> None:
    texts = []
    for options in ((), NEVER):
        found = run_here(tmp_path / "out", "--rehearse", *STILL, *options, recipe=RECIPE)
        assert found.returncode == 0, found.stderr
        texts.append(found.stdout)
    once, anew = texts
    work = r"([0-9.]+) M FLOPs, .* peak ([0-9.]+) MiB"
    step = re.search(rf"steps +100.0% of steps: {work}", once)
    extraction = re.search(rf"extraction, once +10.0% of steps: {work}", once)
    usual = re.search(r"FLOPs of a process +([0-9.]+) M", anew)
    assert step is not None
    assert extraction is not None
    assert usual is not None
    assert float(step[1]) < 0.1 * float(usual[1])
    # Twenty images at once, and not eight.
    assert float(extraction[1]) == pytest.approx(2.5 * float(usual[1]), rel=0.02)
    assert float(step[2]) < float(extraction[2])
