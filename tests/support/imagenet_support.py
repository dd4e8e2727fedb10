"""Small trees in the layouts of ImageNet, and their index as a few lines of NumPy write it."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import ImageFolder

IDS = ("n01440764", "n01443537", "n01484850")
NAMES = ("tench", "goldfish", "great white shark, white shark")
# Sorted by name, as strings, 10 comes before 2, and 100 after 10.
TRAIN = {"n01440764": (2, 10, 100, 9), "n01443537": (7,), "n01484850": (5, 44)}
VAL = {"n01440764": (3, 12), "n01443537": (1,), "n01484850": (2,)}


def jpeg(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (value, 255 - value, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_labels(root: Path) -> None:
    rows = [f'{each},"{name}"' for each, name in zip(IDS, NAMES, strict=True)]
    (root / "labels.txt").write_text("\n".join(rows) + "\n")


def write_tree(root: Path) -> Path:
    """ImageNet-1k in little; the number in each file's name is also its red value."""
    root.mkdir(parents=True, exist_ok=True)
    write_labels(root)
    for class_id, numbers in TRAIN.items():
        for number in numbers:
            _put(root / "train" / class_id / f"{class_id}_{number}.JPEG", number)
    for class_id, numbers in VAL.items():
        for number in numbers:
            _put(root / "val" / class_id / f"ILSVRC2012_val_{number:08}.JPEG", number)
    for number in (1, 2):
        _put(root / "test" / f"ILSVRC2012_test_{number:08}.JPEG", number)
    return root


def _put(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(value))


def published_index(root: Path, extra: Path, split: str) -> dict[str, bytes]:
    """Write the index of a split of ImageNet-1k by its published layout; the files' bytes."""
    rows = []
    if split == "test":
        count = len(list((root / "test").iterdir()))
        rows = [(number, 2**32 - 1, "", "") for number in range(1, count + 1)]
    else:
        named = dict(zip(IDS, NAMES, strict=True))
        for path, label in ImageFolder(str(root / split)).samples:
            class_id = os.path.basename(os.path.dirname(path))
            number = int(re.findall(r"_([0-9]+)\.JPEG$", path)[0])
            rows.append((number, label, class_id, named[class_id]))
    widths = [max(len(row[column]) for row in rows) for column in (2, 3)]
    entries = np.array(
        rows,
        [
            ("actual_index", "<u4"),
            ("class_index", "<u4"),
            ("class_id", f"U{widths[0]}"),
            ("class_name", f"U{widths[1]}"),
        ],
    )
    arrays = {"entries": entries}
    if split != "test":
        for column, name in ((2, "class-ids"), (3, "class-names")):
            values = [next(row[column] for row in rows if row[1] == label) for label in range(3)]
            arrays[name] = np.array(values)
    extra.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(extra / f"{name}-{split.upper()}.npy", array)
    return {path.name: path.read_bytes() for path in sorted(extra.glob(f"*-{split.upper()}.npy"))}


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path
