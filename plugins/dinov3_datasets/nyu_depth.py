"""NYU Depth v2, from files or from the labeled set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from dinov3_datasets.dense_pairs import DensePairs, Pairs
from dinov3_datasets.depth_configs import NyuDepthConfig
from dinov3_datasets.depth_values import DepthReader
from dinov3_datasets.nyu_labeled import LABELED, NyuLabeled
from dinov3_datasets.pairing import absent
from dinov3_datasets.text_lines import numbered_lines
from dinov3_framework import DataError, Target
from dinov3_framework.errors import first_few, printable

_MILLIMETERS = 0.001


def open_nyu_depth(config: NyuDepthConfig, *, channels: int) -> NyuFiles | NyuLabeled:
    """The dataset of the source that is asked for, or there; raises ``DataError``."""
    root = Path(config.root).expanduser()
    listed = root / f"nyu_{config.split}.txt"
    labeled = root if root.suffix == ".mat" else root / LABELED
    if config.source == "files" or (config.source == "auto" and listed.is_file()):
        if config.split == "all":
            raise DataError('nyu_depth: split = "all" is of the labeled set; files have two splits')
        return NyuFiles(config, channels, root, listed)
    if config.source == "auto" and not labeled.is_file():
        what = "has neither" if root.is_dir() else "is no folder, and so has neither"
        raise DataError(
            f"nyu_depth: root = {config.root!r} {what} {listed.name} nor {LABELED}\n"
            "    root is the folder with the split files and the folders of scenes, or with the "
            "labeled set"
        )
    return NyuLabeled(config, channels, labeled)


class NyuFiles(DensePairs):
    """Images that a split file lists with their depth and focal length, a line each."""

    component = "nyu_depth"

    def __init__(self, config: NyuDepthConfig, channels: int, root: Path, listed: Path) -> None:
        names = list(_lines(listed))
        for what, wanted in (
            ("images", [a for a, _ in names]),
            ("depth maps", [b for _, b in names]),
        ):
            if missing := absent(root, wanted):
                raise DataError(
                    f"nyu_depth: {len(missing):,} of {len(names):,} {what} that {listed.name} "
                    f"lists are missing in {root}: {printable(first_few(missing), kept='')}"
                )
        pairs = Pairs.of(root, root, names)
        super().__init__(config, channels, pairs, {"depth": Target("map", unit="m")})
        self.reader = DepthReader(config.max_pixels, _MILLIMETERS)

    def read_truth(self, index: int) -> Tensor:
        return self.reader(self.truth_path(index))

    def truth_options(self) -> str:
        return "depth in millimeters"


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(image, depth) of each line, in the order of the sorted lines as in the reference."""
    for line, number in sorted((line, number) for number, line in numbered_lines(path)):
        parts = line.split()
        if len(parts) != 3 or not _is_number(parts[2]):
            raise DataError(
                f"{path}, line {number}: {printable(line)[:120]!r} is not the paths of an "
                "image and its depth and a focal length between spaces"
            )
        yield parts[0].strip("/"), parts[1].strip("/")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
