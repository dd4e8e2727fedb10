"""Small trees of images with masks and depth, as the published data sets lay them out."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dinov3_framework.data.palettes import palette

SIZE = (8, 6)  # width and height


def ids(*values: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A mask whose pixels go round ``values``, uint8 [H, W]."""
    return np.resize(np.array(values, dtype=np.uint8), size[::-1])


def write_image(path: Path, value: int = 90, *, orientation: int = 1, size: Any = SIZE) -> Path:
    """A JPEG or PNG of one gray value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation != 1:
        exif[0x0112] = orientation
    Image.new("RGB", size, (value,) * 3).save(path, exif=exif)
    return path


def write_mask(path: Path, values: np.ndarray, *, with_palette: bool = False) -> Path:
    """A PNG (or TIFF) of ids, gray or as indices of a palette."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    if with_palette:
        image.putpalette([part for color in palette(256) for part in color])
    image.save(path)
    return path


def write_packed_gray(path: Path, values: np.ndarray, bits: int) -> Path:
    """A gray PNG of 1, 2 or 4 bits, which Pillow does not write."""
    height, width = values.shape
    unpacked = np.unpackbits(values.astype(np.uint8)[..., None], axis=2)[:, :, 8 - bits :]
    rows = np.packbits(unpacked.reshape(height, width * bits), axis=1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )
    return path


def write_mask_folder(root: Path, count: int = 3, **masks: np.ndarray) -> Path:
    """images/N.jpg and masks/N.png of 4 classes, besides those given by name."""
    for number in range(count):
        write_image(root / "images" / f"{number}.jpg", 10 * number)
        write_mask(root / "masks" / f"{number}.png", ids(0, 1, number, 255))
    for name, values in masks.items():
        write_image(root / "images" / f"{name}.jpg")
        write_mask(root / "masks" / f"{name}.png", values)
    return root


def write_ade20k(root: Path) -> Path:
    """Two images for training and one for validation, with ids 0 to 150."""
    for split, names in (("training", "12"), ("validation", "3")):
        for name in names:
            stem = f"{split}/ADE_{split[:5]}_{name}"
            write_image(root / "images" / f"{stem}.jpg", 50)
            write_mask(root / "annotations" / f"{stem}.png", ids(0, 1, 150, int(name)))
    return root


def write_nyu_files(root: Path, lines: int = 3) -> Path:
    """Scenes with depth in millimeters, and both split files in no order."""
    for split in ("train", "test"):
        listed = []
        for number in reversed(range(lines)):
            scene = f"{split}_room/"
            write_image(root / scene / f"rgb_{number}.jpg", 10 * number)
            depth = np.full(SIZE[::-1], 1000 * (number + 1), np.uint16)
            depth[0, 0], depth[0, 1] = 0, 1234
            Image.fromarray(depth).save(root / scene / f"sync_depth_{number}.png")
            listed.append(f"/{scene}rgb_{number}.jpg /{scene}sync_depth_{number}.png 518.8579\n")
        (root / f"nyu_{split}.txt").write_text("".join(listed))
    return root
