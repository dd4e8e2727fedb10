"""A run that goes on sees the data that it began with, wherever they lie by then."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from run_support import losses, run_here

from dinov3_framework import ExitCode

RECIPE = ("dataset.use=image_folder", "iterations=6", "checkpoint.every=2")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(20):
        pixels = rng.integers(0, 256, (30, 30), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02}.png")
    return folder


def train(
    output: Path, images: Path, *overrides: str, recipe: tuple[str, ...] = RECIPE
) -> tuple[int, str]:
    key = "dataset.root" if recipe is RECIPE else "dataset.parts.all.of.root"
    done = run_here(output, *recipe, f"{key}={images}", *overrides)
    return done.returncode, done.stderr


def interrupted(output: Path, images: Path) -> None:
    stopped = ("observers.stop.use=raise_at", "observers.stop.iteration=4")
    code, _ = train(output, images, *stopped)
    assert code == ExitCode.WRONG_INPUT


def test_data_that_changed_are_refused(tmp_path: Path, images: Path) -> None:
    output = tmp_path / "run"
    interrupted(output, images)
    for index in range(11):
        (images / f"{index:02}.png").unlink()
    for check in ((), ("--check",)):
        code, complaint = train(output, images, *check)
        assert code == ExitCode.WRONG_INPUT
        assert "dataset: is not the data that this run began with: 20 images" in complaint
        assert "9 images" in complaint
        assert f"or choose another --output-dir; there, continue_from.run={output}" in complaint
    for index in range(11):  # as many, under other names
        Image.new("L", (30, 30)).save(images / f"other{index:02}.png")
    code, complaint = train(output, images)
    assert "20 images" in complaint
    assert code == ExitCode.WRONG_INPUT


def test_the_same_data_may_lie_elsewhere(tmp_path: Path, images: Path) -> None:
    whole, output = tmp_path / "whole", tmp_path / "run"
    assert train(whole, images)[0] == 0
    interrupted(output, images)
    moved = images.rename(tmp_path / "moved")
    code, complaint = train(output, moved)
    assert code == 0, complaint
    assert losses(output) == losses(whole)
    code, complaint = train(output, moved.rename(images))
    assert code == ExitCode.WRONG_INPUT, "a complete run is that of its own recipe"
    assert "holds a run of another recipe" in complaint


@pytest.mark.slow
def test_the_same_data_of_a_mixture_may_lie_elsewhere(tmp_path: Path, images: Path) -> None:
    recipe = (
        "dataset.use=mixture",
        "dataset.parts.all.use=subset",
        "dataset.parts.all.of.use=image_folder",
        "dataset.parts.all.percent=90",
        "dataset.parts.clothes.use=fashion_mnist",
        "iterations=4",
        "checkpoint.every=2",
    )
    whole, output = tmp_path / "whole", tmp_path / "run"
    assert train(whole, images, recipe=recipe)[0] == 0
    stopped = ("observers.stop.use=raise_at", "observers.stop.iteration=3")
    assert train(output, images, *stopped, recipe=recipe)[0] == ExitCode.WRONG_INPUT
    code, complaint = train(output, images.rename(tmp_path / "moved"), recipe=recipe)
    assert code == 0, complaint
    assert losses(output) == losses(whole)
