"""Masks and maps come as they are stored, whatever decoders of pictures make of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import torchvision.transforms.v2.functional as transforms
from mask_trees import ids, write_image, write_mask, write_packed_gray
from PIL import Image

from dinov3_framework import CorruptSampleError
from dinov3_framework.data.masks import read_map, read_mask
from dinov3_framework.data.palettes import palette


def read_both(path: Path, **options: bool) -> np.ndarray:
    """From the file, and from its bytes, which must be the same."""
    found = read_mask(path, **options)
    again = read_mask(path, **options, data=path.read_bytes())
    assert np.array_equal(found, again)
    assert found.dtype == again.dtype
    return found


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_gray_png_of_few_bits(tmp_path: Path, bits: int) -> None:
    values = np.arange(48).reshape(6, 8) % 2**bits
    assert read_both(write_packed_gray(tmp_path / "a.png", values, bits)).tolist() == (
        values.tolist()
    )


def test_palette_png_of_few_colors_holds_indices(tmp_path: Path) -> None:
    values = ids(0, 3, 2, 15)
    path = write_mask(tmp_path / "a.png", values, with_palette=True)
    assert read_both(path).tolist() == values.tolist()
    assert read_both(path, colors=True)[0, :3].tolist() == [[0, 0, 0], [128, 128, 0], [0, 128, 0]]


def test_sixteen_bits(tmp_path: Path) -> None:
    values = np.array([[0, 300], [65535, 7]], dtype=np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        assert read_both(tmp_path / name).tolist() == values.tolist()


@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "int64"]
)
def test_integers_of_tiff_and_numpy(tmp_path: Path, dtype: str) -> None:
    """A bool TIFF is white-is-zero, which Pillow inverts; its 32 bits have a sign."""
    values = np.array([[0, 1, 0], [1, 1, 0]]).astype(dtype)
    if dtype != "bool":
        values[0, 0], values[0, 1] = np.iinfo(dtype).min, np.iinfo(dtype).max
    tifffile.imwrite(tmp_path / "a.tif", values)
    np.save(tmp_path / "a.npy", values)
    for name in ("a.tif", "a.npy"):
        assert read_both(tmp_path / name).tolist() == values.astype(int).tolist()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_floats_are_maps(tmp_path: Path, dtype: str) -> None:
    values = np.array([[0.5, np.nan], [np.inf, -3]]).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", values)
    np.save(tmp_path / "a.npy", values)
    for name in ("a.tif", "a.npy"):
        assert np.array_equal(read_map(tmp_path / name), values, equal_nan=True)
        with pytest.raises(CorruptSampleError, match="ids are whole numbers"):
            read_mask(tmp_path / name)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_as_to_images(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    values = np.arange(6, dtype=np.uint16).reshape(2, 3) * 100
    Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
    turned = {
        1: values, 2: values[:, ::-1], 3: values[::-1, ::-1], 4: values[::-1], 5: values.T,
        6: values[::-1].T, 7: values[::-1, ::-1].T, 8: values[:, ::-1].T,
    }[orientation]  # fmt: skip
    assert read_both(tmp_path / "a.png").tolist() == turned.tolist()


def test_what_is_no_mask_and_no_map(tmp_path: Path) -> None:
    write_image(tmp_path / "a.jpg")
    with pytest.raises(CorruptSampleError, match="JPEG, which changes ids"):
        read_mask(tmp_path / "a.jpg")
    with pytest.raises(CorruptSampleError, match="is a JPEG; a map is one channel of numbers"):
        read_map(tmp_path / "a.jpg")
    write_image(tmp_path / "a.png")
    with pytest.raises(CorruptSampleError, match=r"is a picture \(RGB\)"):
        read_map(tmp_path / "a.png")
    assert read_mask(tmp_path / "a.png").shape == (6, 8, 3)
    np.save(tmp_path / "a.npy", np.zeros((4, 5, 2)))
    with pytest.raises(CorruptSampleError, match=r"shape \[4, 5, 2\]"):
        read_map(tmp_path / "a.npy")
    whole = write_mask(tmp_path / "b.png", ids(1, 2)).read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    for read in (read_mask, read_map):
        with pytest.raises(CorruptSampleError, match=r"b\.png"):
            read(tmp_path / "b.png")
    with pytest.raises(CorruptSampleError, match="48 pixels"):
        read_mask(write_mask(tmp_path / "c.png", ids(1)), 10)


def test_colors_of_classes_differ_and_are_those_of_pascal_voc() -> None:
    """The first 21, as in the palettes of its masks."""
    assert palette(4) == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    assert palette(21)[20] == (0, 64, 128)
    assert len(set(palette(256))) == 256
    assert palette(300)[256] == palette(1)[0]


def test_ids_survive_the_package_s_own_resizing(tmp_path: Path) -> None:
    """What a mask becomes in a transform: still its ids alone."""
    found = torch.from_numpy(read_mask(write_mask(tmp_path / "a.png", ids(3, 255, 7))))[None]
    resized = transforms.resize(found, [3, 4], transforms.InterpolationMode.NEAREST_EXACT)
    assert set(resized.unique().tolist()) <= {3, 7, 255}
