"""A head for segmentation on a folder of images and masks: checked, trained, refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from heads_support import RECIPE
from mask_trees import ids, write_image, write_mask
from run_support import metrics, run_here

from dinov3_framework.data.palettes import palette

SIZE = (40, 36)
HEAD = ("head.use=toy_segmentation", "head.layers=[0, 1]", 'drop=["observers"]')


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Eight images; where one is bright it is of class 1."""
    for number in range(8):
        write_image(tmp_path / f"images/{number}.png", 30 * number, size=SIZE)
        values = ids(number > 3, size=SIZE)
        values[:2] = 255
        write_mask(tmp_path / f"masks/{number}.png", values, with_palette=True)
    return tmp_path


def dataset(root: Path, more: str = "n_classes = 2") -> tuple[str, ...]:
    """A recipe's three lines, and more."""
    lines = f'use = "image_mask_folder", images = "{root}/images", masks = "{root}/masks"'
    return (f"dataset={{ {lines}, {more} }}", *HEAD)


def test_three_lines_train_a_head(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    checked = run_here(out, *dataset(data), "--check", recipe=RECIPE)
    assert checked.returncode == 0, checked.stderr
    assert re.search(
        r"first sample\n *sample +0.png\n *mask +0 of 2 classes; 6% ign", checked.stdout
    )
    assert not out.exists()
    done = run_here(out, *dataset(data), recipe=RECIPE)
    assert done.returncode == 0, done.stderr
    losses = [line["loss"] for line in metrics(out) if "loss" in line]
    assert len(losses) == 6
    assert np.isfinite(losses).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("n_classes = 1", r"masks/\d\.png: holds id 1 .*; ids are 0\.\.0 for 1 classes"),
        ("n_classes = 2, offset = -2", "none of 8 samples has any truth"),
        ("palette = [[0, 0, 0]], coding = 'colors'", r"palette lacks: \(128, 0, 0\)"),
    ],
)
def test_masks_that_do_not_fit_are_refused(
    data: Path, tmp_path: Path, options: str, message: str
) -> None:
    assert palette(2)[1] == (128, 0, 0)
    for number in range(4):  # so that the first sample shows it
        write_mask(data / f"masks/{number}.png", ids(1, size=SIZE), with_palette=True)
    out = tmp_path / "out"
    refused = run_here(out, *dataset(data, options), recipe=RECIPE)
    assert refused.returncode == 2
    assert re.search(message, refused.stderr), refused.stderr
    assert "Traceback" not in refused.stderr
    assert not out.exists()


def test_one_wrong_mask_is_replaced_and_told(data: Path, tmp_path: Path) -> None:
    write_mask(data / "masks/5.png", ids(7, size=SIZE))
    out = tmp_path / "out"
    done = run_here(out, *dataset(data), recipe=RECIPE)
    assert done.returncode == 0, done.stderr
    assert "masks/5.png: holds id 7" in (out / "run.log").read_text()
