"""Predictions as files: what other programs read of them, and what is read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dinov3_framework import Target
from dinov3_framework.data.palettes import palette
from dinov3_framework.data.saved_predictions import SavedPredictions
from dinov3_framework.errors import DataError

KEY = {"weights": "1f2e", "window": 512, "scales": (1.0, 0.5)}
MASK = Target("mask", classes=("sky", "sea", "sand"), palette=((1, 2, 3), (4, 5, 6), (7, 8, 9)))
DEPTH = Target("map", unit="m")


def ids(count: int = 3) -> Tensor:
    return torch.arange(20 * 30).reshape(20, 30) % count


def depths(least: float = 0.5, most: float = 20.0) -> Tensor:
    values = torch.linspace(least, most, 600).reshape(20, 30)
    values[0, 0] = float("nan")
    return values


def test_a_mask_is_a_picture_of_class_ids_in_the_colors_of_its_classes(tmp_path: Path) -> None:
    saved = SavedPredictions(tmp_path, KEY, ["png"])
    saved.write("street.jpg", ids(), MASK)
    with Image.open(tmp_path / "street.jpg.png") as picture:
        assert picture.mode == "P"
        assert np.array_equal(np.array(picture), ids().numpy())
        assert picture.convert("RGB").getpixel((2, 0)) == (7, 8, 9)
    assert torch.equal(saved.read("street.jpg"), ids())


def test_without_a_palette_colors_are_those_of_voc(tmp_path: Path) -> None:
    SavedPredictions(tmp_path, KEY, ["png"]).write("a", ids(150), Target("mask", n_classes=150))
    with Image.open(tmp_path / "a.png") as picture:
        seen = np.array(picture.convert("RGB"))
    assert np.array_equal(seen, np.array(palette(150), dtype=np.uint8)[ids(150).numpy()])


@pytest.mark.parametrize(("count", "mode"), [(256, "P"), (257, "I;16")])
def test_more_classes_than_8_bits_hold_are_16_bits(count: int, mode: str, tmp_path: Path) -> None:
    saved = SavedPredictions(tmp_path, KEY, ["png"])
    saved.write("a", ids(count), Target("mask", n_classes=count))
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == mode
    assert torch.equal(saved.read("a"), ids(count))


def test_depth_is_millimeters_and_0_where_it_is_unknown(tmp_path: Path) -> None:
    saved = SavedPredictions(tmp_path, KEY, ["png"])
    saved.write("a", depths(), DEPTH)
    with Image.open(tmp_path / "a.png") as picture:
        stored = np.array(picture).astype(np.int64)
    assert stored[0, 0] == 0
    assert (stored[0, 1:3].tolist(), stored[-1, -1]) == ([533, 565], 20_000)
    found = saved.read("a")
    assert found.dtype == torch.float32
    assert torch.equal(found.isnan(), depths().isnan())
    assert (found - depths()).abs().nan_to_num().max() <= 0.5001e-3
    assert saved.clipped == 0


def test_a_stated_scale_reaches_further_and_is_found_in_the_folder(tmp_path: Path) -> None:
    saved = SavedPredictions(tmp_path, KEY, ["png"], scale=0.01)
    saved.write("far", depths(0.01, 600.0), DEPTH)
    assert saved.clipped == 0
    assert saved.read("far")[-1, -1] == pytest.approx(600.0)
    assert json.loads((tmp_path / "predictions.json").read_text())["map scale"] == 0.01


@pytest.mark.parametrize(("values", "stored"), [((1.0, 70.0), 65_535), ((-2.0, -1.0), 1)])
def test_values_that_16_bits_do_not_hold_are_counted(
    values: tuple[float, float], stored: int, tmp_path: Path
) -> None:
    saved = SavedPredictions(tmp_path, KEY, ["png"])
    saved.write("near", depths(), DEPTH)
    saved.write("far", depths(*values), DEPTH)
    assert saved.clipped == 1
    with Image.open(tmp_path / "far.png") as picture:
        assert np.array(picture)[-1, -1] == stored


@pytest.mark.parametrize(
    ("prediction", "target", "dtype"), [(ids(), MASK, np.uint8), (depths(-1), DEPTH, np.float32)]
)
def test_arrays_are_exact(
    prediction: Tensor, target: Target, dtype: type[np.generic], tmp_path: Path
) -> None:
    saved = SavedPredictions(tmp_path, KEY, ["png", "npy"])
    saved.write("a", prediction, target)
    assert np.load(tmp_path / "a.npy").dtype == dtype
    assert torch.equal(saved.read("a").nan_to_num(9), prediction.nan_to_num(9))


# --------------------------------------------------------------------------- going on
def test_what_is_there_in_every_format_need_not_be_predicted_again(tmp_path: Path) -> None:
    SavedPredictions(tmp_path, KEY, ["png"]).write("a", ids(), MASK)
    assert SavedPredictions(tmp_path, KEY, ["png"]).has("a")
    assert not SavedPredictions(tmp_path, KEY, ["png", "npy"]).has("a")
    assert not SavedPredictions(tmp_path, KEY, ["png"]).has("b")


@pytest.mark.parametrize(
    ("key", "scale", "complaint"),
    [
        ({**KEY, "weights": "aaaa"}, 1e-3, "weights: 1f2e there, aaaa now"),
        ({**KEY, "flip": True}, 1e-3, "flip: None there, True now"),
        (KEY, 1e-2, "map scale: 0.001 there, 0.01 now"),
    ],
)
def test_a_folder_of_other_predictions_is_refused_and_left(
    key: dict[str, Any], scale: float, complaint: str, tmp_path: Path
) -> None:
    SavedPredictions(tmp_path, KEY, ["png"]).write("a", ids(), MASK)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DataError, match=complaint):
        SavedPredictions(tmp_path, key, ["png"], scale=scale)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_a_killed_process_left_is_gone_and_no_prediction(tmp_path: Path) -> None:
    saved = SavedPredictions(tmp_path, KEY, ["npy"])
    saved.write("a/b/c", ids(), MASK)
    half = tmp_path / "a" / "b" / ".d.npy.0123abcd"
    half.write_bytes(b"\x93NUMPY")
    again = SavedPredictions(tmp_path, KEY, ["npy"])
    assert (half.exists(), again.has("a/b/c"), again.has("a/b/d")) == (False, True, False)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"no picture"])
def test_a_damaged_file_is_named(content: bytes, tmp_path: Path) -> None:
    saved = SavedPredictions(tmp_path, KEY, ["png"])
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.png cannot be read"):
        saved.read("a")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe"])
def test_a_damaged_description_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "predictions.json").write_bytes(content)
    with pytest.raises(DataError, match=r"predictions\.json .* delete the folder"):
        SavedPredictions(tmp_path, KEY, ["png"])


def test_formats_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="png, npy"):
        SavedPredictions(tmp_path, KEY, ["jpg"])


# --------------------------------------------------------------------------- names
NAMES = ("b.jpg", "b.png", "a/b.jpg", "ä ö/ß.tif", "tile 0.5", "tile 0.25", "../b.jpg", "/b.jpg",
         "__/x", "n" * 240 + ".jpg", "n" * 240 + ".png", "", ".hidden", "ä" * 120)  # fmt: skip


def test_no_two_names_share_a_file_and_none_leaves_the_folder(tmp_path: Path) -> None:
    for given in ((), NAMES, NAMES[2:4]):
        saved = SavedPredictions(tmp_path, KEY, ["npy"], names=given)
        paths = {saved.path(name, "npy") for name in NAMES}
        assert len(paths) == len(NAMES)
        assert all(path.resolve().is_relative_to(tmp_path) for path in paths)
    for place, name in enumerate(NAMES):
        saved.write(name, torch.full((2, 2), place), MASK)
    assert [int(saved.read(name)[0, 0]) for name in NAMES] == list(range(len(NAMES)))


def test_names_lose_their_suffixes_where_all_differ_without(tmp_path: Path) -> None:
    def called(*names: str) -> list[str]:
        saved = SavedPredictions(tmp_path, KEY, ["png"], names=names)
        return [str(saved.path(name, "png").relative_to(tmp_path)) for name in names]

    assert called("a/x.jpg", "b/x.png", "tile 0.5") == ["a/x.png", "b/x.png", "tile 0.5.png"]
    assert called("x.jpg", "x.png", "y.jpg") == ["x.jpg.png", "x.png.png", "y.jpg.png"]
