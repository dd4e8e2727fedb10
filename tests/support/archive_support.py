"""Pictures, tar files and shards that tests write."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from pathlib import Path
from typing import Any

from dinov3_datasets.tar_dataset import TarDataset
from dinov3_datasets.tar_stream import TarStream
from dinov3_datasets.webdataset import open_webdataset
from dinov3_datasets.webdataset_config import WebDatasetConfig
from PIL import Image

from dinov3_framework import Sample


def picture(value: int, ending: str = "jpg", size: tuple[int, int] = (12, 9)) -> bytes:
    """An image file of one gray value, width and height given; JPEG is off by at most one."""
    stream = io.BytesIO()
    format_of = {"jpg": "JPEG", "jpeg": "JPEG"}
    Image.new("RGB", size, (value, value, value)).save(
        stream, format_of.get(ending, ending.upper())
    )
    return stream.getvalue()


def write_tar(path: Path, members: list[tuple[str | tarfile.TarInfo, bytes]]) -> Path:
    """A tar file of members given by name, or by a header of which the size is not touched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for given, data in members:
            info = given if isinstance(given, tarfile.TarInfo) else tarfile.TarInfo(given)
            if not isinstance(given, tarfile.TarInfo):
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, sizes: list[int], classes: int = 3) -> list[int]:
    """Shards of PNGs with labels and captions; returns the gray value of each sample."""
    values: list[int] = []
    for number, size in enumerate(sizes):
        members: list[tuple[str | tarfile.TarInfo, bytes]] = []
        for place in range(size):
            value, key = len(values), f"./part/{number:02}_{place:04}"
            described = {"label": value % classes, "name": f"class {value % classes}"}
            members += [
                (f"{key}.png", picture(value, "png", (8, 8))),
                (f"{key}.cls", str(value % classes).encode()),
                (f"{key}.json", json.dumps(described).encode()),
                (f"{key}.txt", f"a picture of {value}".encode()),
            ]
            values.append(value)
        write_tar(folder / f"train-{number:03}.tar", members)
    return values


def indexed(place: Path | str, **options: Any) -> TarDataset:
    return TarDataset(WebDatasetConfig(shards=str(place), **options), channels=3)


def stream(place: Path | str, **options: Any) -> TarStream:
    return TarStream(WebDatasetConfig(shards=str(place), mode="stream", **options), channels=3)


def write_index(place: Path, progress: Any = None) -> list[Path]:
    return open_webdataset.write_index(WebDatasetConfig(shards=str(place)), progress)


def gray(sample: Any) -> int:
    assert isinstance(sample, Sample), sample
    return int(sample.image[0, 0, 0])


def first(dataset: TarStream, count: int, part: int = 0, parts: int = 1, **how: Any) -> list[Any]:
    return list(itertools.islice(dataset.open(part=part, parts=parts, seed=3, **how), count))
