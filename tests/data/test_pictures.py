"""What becomes of image files, sound and broken."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3_framework.data.pictures import as_tensor, read_image
from dinov3_framework.errors import CorruptSampleError, DataError

LIMIT = 1_000_000


def colors(height: int = 5, width: int = 7) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_channels_choose_the_conversion(tmp_path: Path) -> None:
    pixels = colors()
    path = tmp_path / "a.png"
    image = Image.fromarray(pixels)
    image.save(path)
    rgb = read_image(path, 3, LIMIT)
    assert rgb.dtype == torch.uint8
    assert rgb.is_contiguous()
    assert torch.equal(rgb, torch.from_numpy(pixels).permute(2, 0, 1))
    gray = read_image(path, 1, LIMIT)
    assert torch.equal(gray, torch.from_numpy(np.array(image.convert("L")))[None])
    rgba = read_image(path, 4, LIMIT)
    assert torch.equal(rgba[:3], rgb)
    assert (rgba[3] == 255).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_gives_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.tif" if mode == "CMYK" else tmp_path / "a.png"
    Image.fromarray(colors()).convert(mode).save(path)
    assert read_image(path, 3, LIMIT).shape == (3, 5, 7)


def test_sixteen_bits_are_scaled_and_not_cut(tmp_path: Path) -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        assert read_image(tmp_path / name, 1, LIMIT).flatten().tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones((3, 3), np.float32), "floating-point"),
        (np.full((3, 3), 70_000, np.int32), "32-bit"),
    ],
)
def test_values_that_have_no_place_in_8_bits(
    tmp_path: Path, values: np.ndarray, message: str
) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(CorruptSampleError, match=message):
        read_image(tmp_path / "a.tif", 1, LIMIT)


def test_half_of_any_file_is_corrupt(tmp_path: Path) -> None:
    image = Image.fromarray(colors(64, 64))
    for name in ("a.jpg", "a.png", "a.webp", "a.bmp", "a.gif", "a.tif", "a.ppm"):
        path = tmp_path / name
        image.save(path)
        assert read_image(path, 3, LIMIT).shape == (3, 64, 64)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(CorruptSampleError) as caught:
            read_image(path, 3, LIMIT)
        assert caught.value.name == str(path)
        assert caught.value.reason


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".npy"])
@pytest.mark.parametrize("content", [b"", b"\0" * 500, b"<html>404</html>", bytes(range(256)) * 9])
def test_nothing_and_garbage_are_corrupt(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(CorruptSampleError, match=f"a{suffix}: ."):
        read_image(path, 3, LIMIT)


def test_flipped_bytes_give_an_image_or_a_corrupt_sample(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    path = tmp_path / "a.png"
    Image.fromarray(colors(32, 32)).save(path)
    sound = bytearray(path.read_bytes())
    refused = 0
    for _ in range(200):
        broken = bytearray(sound)
        for place in rng.integers(0, len(broken), 4):
            broken[place] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(broken)
        try:
            read_image(path, 3, LIMIT)
        except CorruptSampleError:
            refused += 1
    assert refused > 150  # PNG has checksums


def test_only_raster_formats_are_opened(tmp_path: Path) -> None:
    """PostScript would be run by Ghostscript."""
    image = Image.fromarray(colors())
    for name in ("a.eps", "a.pdf"):
        image.save(tmp_path / name)
        with pytest.raises(CorruptSampleError, match="cannot identify"):
            read_image(tmp_path / name, 3, LIMIT)
    for name in ("a.tga", "a.ico", "a.sgi", "a.jp2", "a.mpo"):
        image.save(tmp_path / name)
        assert read_image(tmp_path / name, 3, LIMIT).shape[0] == 3


def test_palettes_are_colors_and_orientation_is_left_alone(tmp_path: Path) -> None:
    """Where other decoders differ: packed palettes of few colors, EXIF."""
    few = Image.fromarray(colors()).quantize(4)
    few.save(tmp_path / "a.png", bits=2)
    expected = torch.from_numpy(np.array(few.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(read_image(tmp_path / "a.png", 3), expected)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(colors()).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg", 3).shape == (3, 5, 7)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CorruptSampleError, match="No such file"):
        read_image(tmp_path / "gone.png", 3, LIMIT)


def bomb(path: Path, width: int, height: int) -> None:
    """A PNG whose header promises far more than the file holds."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b""))


@pytest.mark.parametrize("side", [1001, 1500, 60_000])
def test_the_pixel_limit_is_checked_before_decoding(
    tmp_path: Path, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb.png"
    bomb(path, side, side)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(CorruptSampleError, match="pixels"):
        read_image(path, 3, LIMIT)


def test_the_pixel_limit_may_lie_above_pillows_own_and_leaves_it_alone(tmp_path: Path) -> None:
    Image.new("L", (40, 40)).save(tmp_path / "a.png")
    before = Image.MAX_IMAGE_PIXELS
    try:
        Image.MAX_IMAGE_PIXELS = 500  # Pillow would refuse 1,600 pixels outright
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read_image(tmp_path / "a.png", 1, 1600).shape == (1, 40, 40)
        with pytest.raises(CorruptSampleError):
            read_image(tmp_path / "a.png", 1, 1599)
        assert Image.MAX_IMAGE_PIXELS == 500
    finally:
        Image.MAX_IMAGE_PIXELS = before


@pytest.mark.parametrize(
    ("shape", "channels"),
    [((6, 7, 5), 5), ((5, 6, 7), 5), ((6, 7), 1), ((6, 7, 1), 1), ((1, 6, 7), 1), ((6, 7, 3), 3)],
)
def test_arrays_of_either_layout(tmp_path: Path, shape: tuple[int, ...], channels: int) -> None:
    array = np.random.default_rng(2).integers(0, 256, shape).astype(np.uint8)
    np.save(tmp_path / "a.npy", array)
    image = read_image(tmp_path / "a.npy", channels, LIMIT)
    assert image.shape == (channels, 6, 7)
    if array.ndim == 2:
        array = array[None]
    expected = array if array.shape == tuple(image.shape) else array.transpose(2, 0, 1)
    assert np.array_equal(image.numpy(), expected)
    image.zero_()  # the file is not written through
    assert np.load(tmp_path / "a.npy").any()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((6, 7, 4), np.uint8), r"shape \[6, 7, 4\], images.channels is 3"),
        (np.zeros((6, 7), np.uint8), r"shape \[6, 7\]"),
        (np.zeros((6, 7, 3), np.float32), "float32, uint8 is read"),
        (np.zeros((1001, 1001, 3), np.uint8), "max_pixels"),
        (np.zeros((0, 7, 3), np.uint8), "7 x 0 pixels|empty"),
        (np.array([{"a": 1}]), "."),
    ],
)
def test_arrays_that_are_refused(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(CorruptSampleError, match=message):
        read_image(tmp_path / "a.npy", 3, LIMIT)


def test_a_truncated_array(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((6, 7, 3), np.uint8))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CorruptSampleError):
        read_image(path, 3, LIMIT)


# --------------------------------------------------------------------------- any form
@pytest.mark.parametrize("channels", [1, 3])
def test_every_form_of_a_picture_gives_the_same(tmp_path: Path, channels: int) -> None:
    image = Image.fromarray(colors())
    image.save(tmp_path / "a.png")
    expected = read_image(tmp_path / "a.png", channels)
    array = np.array(image)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    for form in (image, array, tensor, tmp_path / "a.png", str(tmp_path / "a.png")):
        assert torch.equal(as_tensor(form, channels), expected)


def test_arrays_in_files_may_have_any_channels_and_pictures_may_not(tmp_path: Path) -> None:
    array = np.random.default_rng(2).integers(0, 256, (6, 7, 4)).astype(np.uint8)
    np.save(tmp_path / "a.npy", array)
    assert np.array_equal(as_tensor(tmp_path / "a.npy", 4).permute(1, 2, 0), array)
    Image.fromarray(colors()).save(tmp_path / "a.png")
    for form in (tmp_path / "a.png", Image.fromarray(colors()), array[..., :3]):
        with pytest.raises(DataError, match="the backbone takes 4"):
            as_tensor(form, 4)
    with pytest.raises(DataError, match="there is no image"):
        as_tensor(tmp_path / "gone.png", 3)
