"""What becomes of image files, sound and broken."""

from __future__ import annotations

import os
import re
import struct
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageDraw, ImageOps

from dinov3_framework.data import pictures
from dinov3_framework.data.pictures import as_tensor, decode_image, lost
from dinov3_framework.errors import CorruptSampleError, DataError

LIMIT = 1_000_000


def read_image(path: str | Path, *args: Any, **options: Any) -> torch.Tensor:
    """From the file, and from its bytes in memory, which must give the same or fail alike."""
    try:
        found = pictures.read_image(path, *args, **options)
    except CorruptSampleError:
        if os.path.isfile(path):
            with pytest.raises(CorruptSampleError, match=re.escape(str(path))):
                decode_image(Path(path).read_bytes(), str(path), *args, **options)
        raise
    again = decode_image(Path(path).read_bytes(), str(path), *args, **options)
    assert torch.equal(again, found)
    return found


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


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_gives_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.tif" if mode == "CMYK" else tmp_path / "a.png"
    Image.fromarray(colors()).convert(mode).save(path)
    assert read_image(path, 3, LIMIT).shape == (3, 5, 7)


def test_sixteen_bits_are_scaled_and_not_cut(tmp_path: Path) -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        assert read_image(tmp_path / name, 1, LIMIT).flatten().tolist() == [0, 1, 1, 128, 255]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones((3, 3), np.float32), "float32: give the range"),
        (np.full((3, 3), 70_000, np.int32), "int32: give the range"),
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


def test_palettes_are_colors(tmp_path: Path) -> None:
    """Where other decoders differ: packed palettes of few colors."""
    few = Image.fromarray(colors()).quantize(4)
    few.save(tmp_path / "a.png", bits=2)
    expected = torch.from_numpy(np.array(few.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(read_image(tmp_path / "a.png", 3), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_what_a_camera_turned_is_upright(tmp_path: Path, orientation: int) -> None:
    """Images of Pillow, of torchvision and of tifffile, and pictures in memory."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(colors())
    expected = ImageOps.exif_transpose(Image.merge("RGB", image.split()))
    for name in ("a.png", "a.webp", "a.tif"):
        image.save(tmp_path / name, exif=exif, lossless=True)
        with Image.open(tmp_path / name) as opened:
            expected = torch.from_numpy(np.array(ImageOps.exif_transpose(opened)))
            assert torch.equal(as_tensor(opened, 3), expected.permute(2, 0, 1))
        assert torch.equal(read_image(tmp_path / name, 3), expected.permute(2, 0, 1))
    tags = [(274, "H", 1, orientation, True)]
    tifffile.imwrite(tmp_path / "b.tif", np.array(image), photometric="rgb", extratags=tags)
    by_pillow = read_image(tmp_path / "b.tif", 3)
    assert torch.equal(by_pillow, expected.permute(2, 0, 1))
    wide = np.concatenate([np.array(image), colors()], axis=2)
    bands = {"photometric": "minisblack", "planarconfig": "contig"}
    tifffile.imwrite(tmp_path / "c.tif", wide, extratags=tags, **bands)
    assert torch.equal(read_image(tmp_path / "c.tif", 6)[:3], by_pillow)


# --------------------------------------------------------------------------- bands and bits
def test_no_band_is_made_up(tmp_path: Path) -> None:
    Image.fromarray(colors()).save(tmp_path / "rgb.png")
    Image.fromarray(colors()[..., 0]).save(tmp_path / "gray.png")
    Image.fromarray(colors()).convert("CMYK").save(tmp_path / "print.tif")
    for name, channels in (("rgb.png", 4), ("rgb.png", 2), ("gray.png", 2), ("print.tif", 4)):
        with pytest.raises(CorruptSampleError, match=f"channels is {channels}|{channels} channels"):
            read_image(tmp_path / name, channels)


@pytest.mark.parametrize("extra", ["unspecified", "unassalpha"])
def test_a_fourth_band_is_read(tmp_path: Path, extra: str) -> None:
    """Red, green, blue and near infrared, which Pillow drops or takes for transparency."""
    tile = np.random.default_rng(0).integers(0, 256, (6, 8, 4)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", tile, photometric="rgb", extrasamples=[extra])
    image = read_image(tmp_path / "a.tif", 4)
    assert torch.equal(image, torch.from_numpy(tile).permute(2, 0, 1))
    if extra == "unspecified":
        assert torch.equal(read_image(tmp_path / "a.tif", 3), image[:3])
        (note,) = lost([str(tmp_path / "a.tif")], 3, LIMIT, None)
        assert "images.channels = 4 reads all" in note


@pytest.mark.parametrize("bands", [5, 13])
@pytest.mark.parametrize("layout", ["contig", "separate", "pages"])
def test_tiffs_of_many_bands(tmp_path: Path, bands: int, layout: str) -> None:
    tile = np.random.default_rng(0).integers(0, 10_000, (6, 8, bands)).astype(np.uint16)
    options = {} if layout == "pages" else {"planarconfig": layout, "photometric": "minisblack"}
    stored = tile if layout == "contig" else np.moveaxis(tile, 2, 0)
    tifffile.imwrite(tmp_path / "a.tif", stored, **options)
    image = read_image(tmp_path / "a.tif", bands, values=(0, 10_000))
    expected = np.rint(np.float32(tile) * np.float32(255 / 10_000)).astype(np.uint8)
    assert np.array_equal(image.permute(1, 2, 0), expected)
    if layout != "pages":  # of which the first is a gray image
        with pytest.raises(CorruptSampleError, match=r"images\.channels is 3"):
            read_image(tmp_path / "a.tif", 3)


def test_without_tifffile_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((6, 8, 5), np.uint8), photometric="minisblack")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(CorruptSampleError, match=r"dinov3-framework\[tiff\]"):
        read_image(tmp_path / "a.tif", 5)


@pytest.mark.parametrize("bits", [10, 12])
@pytest.mark.parametrize("name", ["gray.png", "gray.tif", "rgb.png", "rgb.tif", "rgb.npy"])
def test_ten_and_twelve_bits_keep_their_steps(tmp_path: Path, name: str, bits: int) -> None:
    top, channels = 2**bits - 1, 3 if name.startswith("rgb") else 1
    ramp = np.linspace(0, top, 256).round().astype(np.uint16).reshape(16, 16, 1)
    ramp = ramp.repeat(channels, axis=2)
    path = tmp_path / name
    if name.endswith(".npy"):
        np.save(path, ramp)
    elif name.endswith(".tif"):
        tifffile.imwrite(path, ramp.squeeze())
    else:
        path.write_bytes(encode_png(torch.from_numpy(ramp)))
    image = read_image(path, channels, values=(0, top))
    assert image[0].flatten().tolist() == list(range(256))
    (note,) = lost([str(path)], channels, LIMIT, None)
    assert f"state their range with bits = {bits}, or low and high" in note
    assert lost([str(path)], channels, LIMIT, (0, top)) == []


def encode_png(image: torch.Tensor) -> bytes:
    """A PNG of 16 bits, [H, W, C] of gray or RGB; no library here writes one of colors."""
    height, width, channels = image.shape
    rows = b"".join(b"\0" + row.numpy().astype(">u2").tobytes() for row in image)
    header = struct.pack(">IIBBBBB", width, height, 16, 2 if channels == 3 else 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    )


def test_reflectances_and_unknown_values(tmp_path: Path) -> None:
    tile = np.array([[-0.2, 0.0, 0.5, 1.0, 1.5, np.nan]], np.float32)
    tifffile.imwrite(tmp_path / "a.tif", tile)
    image = read_image(tmp_path / "a.tif", 1, values=(0.0, 1.0))
    assert image.flatten().tolist() == [0, 0, 128, 255, 255, 0]
    (note,) = lost([str(tmp_path / "a.tif")], 1, LIMIT, None)
    assert note.endswith("state their range with low and high"), "bits are of whole numbers"


# --------------------------------------------------------------------------- transparency
def circle(mode: str) -> Image.Image:
    """Black on transparent black: all that is seen of it is its transparency."""
    shape = Image.new("L", (16, 16))
    ImageDraw.Draw(shape).ellipse((3, 3, 12, 12), fill=255)
    image = Image.new("RGBA", (16, 16))
    image.putalpha(shape)
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_transparent_shows_the_background(tmp_path: Path, mode: str, channels: int) -> None:
    circle(mode).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", channels)
    assert image.shape == (channels, 16, 16)
    assert (image[:, 0, 0] == 255).all()
    assert (image[:, 8, 8] == 0).all()
    gray = read_image(tmp_path / "a.png", 3, background=(10, 20, 30))
    assert gray[:, 0, 0].tolist() == [10, 20, 30]
    assert torch.equal(as_tensor(circle(mode), channels), image)


def test_opaque_colors_stay_to_the_bit(tmp_path: Path) -> None:
    image = Image.fromarray(colors())
    image.putalpha(255)
    image.save(tmp_path / "a.png")
    assert torch.equal(read_image(tmp_path / "a.png", 3), as_tensor(colors(), 3))


# --------------------------------------------------------------------------- what is no image
def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    """A pipe would be waited for without end."""
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(CorruptSampleError, match="no regular file"):
        read_image(tmp_path / "a.png", 3)


def test_what_does_not_fit_into_memory_is_a_corrupt_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self: Image.Image) -> None:
        raise MemoryError

    Image.fromarray(colors()).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "load", load)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(CorruptSampleError, match="more memory"):
        read_image(tmp_path / "a.png", 3)


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
        (np.zeros((6, 7, 3), np.float32), "float32: give the range"),
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
        with pytest.raises(DataError, match=r"(is|takes) 4"):
            as_tensor(form, 4)
    with pytest.raises(DataError, match="there is no image"):
        as_tensor(tmp_path / "gone.png", 3)
