"""Options of WebDataset shards."""

from __future__ import annotations

import re
from typing import Literal

from dinov3_datasets.files import place_complaint
from dinov3_datasets.labeled_config import LabeledConfig
from dinov3_framework import config, not_negative, option, positive

_ENDINGS = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "gif", "ppm", "avif", "jp2", "npy")


def _endings(value: tuple[str, ...]) -> str | None:
    if not value:
        return "must name at least one ending"
    wrong = [name for name in value if not name or name.startswith(".") or name != name.lower()]
    return f"must be lower case and without the first dot, not {wrong}" if wrong else None


def _part(value: str) -> str | None:
    if re.fullmatch(r"[^:/]+|[^:/]*json:.+", value):
        return None
    return f"must be an ending such as cls or txt, or json:FIELD, is {value!r}"


@config
class WebDatasetConfig(LabeledConfig):
    """Shards of WebDataset: tar files with the members of a sample one after another.

    A sample is the consecutive members with one path up to the first dot of the file name, such as
    000017.jpg and 000017.cls. Shards are local files; nothing is unpacked.
    """

    shards: str = option(
        "a folder of *.tar files, or a pattern such as train-{000..127}.tar or train-*.tar",
        check=place_complaint,
        is_place=True,
    )
    mode: Literal["indexed", "stream"] = option(
        "indexed: any sample is read by its place, after one look through all headers or with the "
        "index files beside the shards; stream: shards are read from end to end",
        default="indexed",
    )
    images: tuple[str, ...] = option(
        "endings of images; of several in a sample, the one that comes first here",
        default=_ENDINGS,
        check=_endings,
    )
    label: str | None = option(
        "the member with the label: cls (a whole number), txt (a number or a name), or json:FIELD; "
        'auto: cls if the first sample has it; "none": no labels',
        default="auto",
        check=_part,
    )
    text: str | None = option(
        "the member with a text, such as txt or json:caption, the target text; left out, none",
        default=None,
        check=_part,
    )
    shuffle: int = option(
        "stream alone: samples that are read ahead and mixed, 0 for none; each loader worker holds "
        "so many encoded images",
        default=500,
        check=not_negative,
    )
    max_bytes: int = option(
        "bytes of a member above which its sample counts as corrupt, and is not read",
        default=2**28,
        check=positive,
    )
