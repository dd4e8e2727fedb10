"""Finds which mask or map belongs to which image."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from attrs import frozen

from dinov3_datasets.dense_pairs import Pairs
from dinov3_datasets.listing import image_files
from dinov3_framework import DataError
from dinov3_framework.errors import first_few, printable


@frozen
class Pairing:
    """How images and truths are paired: by equal paths without suffixes and endings."""

    component: str
    truth: str  # the option with the folder of truths: masks, depth
    image_extensions: Collection[str]
    truth_extensions: Collection[str]
    image_suffix: str = ""
    truth_suffix: str = ""
    skip_unpaired: bool = False

    def pairs(self, images: str, truths: str) -> Pairs:
        """All pairs of two folders, or of one; raises ``DataError``."""
        image_root, truth_root = self._folder("images", images), self._folder(self.truth, truths)
        same = image_root.resolve() == truth_root.resolve()
        if same and self.image_suffix == self.truth_suffix:
            raise DataError(
                f"{self.component}: images and {self.truth} are one folder, {image_root}; state "
                f"what the stems of {self.truth} end with ({self._suffix_option})"
            )
        truth_of = self._truths(truth_root)
        found, missing, owners = [], [], dict[str, str]()
        for name in image_files(image_root, self.image_extensions):
            stem, _ = os.path.splitext(name)
            # In one folder the truths are no images.
            if not stem.endswith(self.image_suffix) or (
                same
                and len(self.truth_suffix) > len(self.image_suffix)
                and stem.endswith(self.truth_suffix)
            ):
                continue
            key = stem.removesuffix(self.image_suffix)
            if key not in truth_of:
                missing.append(name)
                continue
            if key in owners:
                raise DataError(
                    f"{self.component}: {printable(owners[key])} and {printable(name)} in "
                    f"{image_root} belong to one file of {self.truth}, {printable(truth_of[key])}"
                )
            owners[key] = name
            found.append((name, truth_of[key]))
        notes = self._complain(image_root, truth_root, len(found), missing, truth_of, owners)
        return Pairs.of(image_root, truth_root, found, notes)

    @property
    def _suffix_option(self) -> str:
        return f"{self.truth.removesuffix('s')}_suffix"

    def _folder(self, option: str, value: str) -> Path:
        root = Path(value).expanduser()
        if not root.is_dir():
            what = "is not a folder" if root.exists() else "does not exist"
            raise DataError(f"{self.component}: {option} = {value!r} {what}")
        return root

    def _truths(self, root: Path) -> dict[str, str]:
        """Files of truths by their paths without suffix and ending."""
        found: dict[str, str] = {}
        others: Counter[str] = Counter()
        for name in image_files(root, self.truth_extensions, None, others):
            stem, _ = os.path.splitext(name)
            if not stem.endswith(self.truth_suffix):
                continue
            key = stem.removesuffix(self.truth_suffix)
            if key in found:
                raise DataError(
                    f"{self.component}: {printable(found[key])} and {printable(name)} in {root} "
                    "are of one image; keep one of them"
                )
            found[key] = name
        if not found:
            ends = f"{self.truth_suffix} and then " if self.truth_suffix else ""
            held = f"; there are {first_few(_counts(others))}" if others else ""
            jpeg = ""
            if {".jpg", ".jpeg"} & set(others):
                jpeg = f"\n    JPEG changes numbers: {self.truth} are to be kept as PNG"
            raise DataError(
                f"{self.component}: no {self.truth} in {root} or below (looked for names that end "
                f"in {ends}{' '.join(self.truth_extensions)}){printable(held)}{jpeg}"
            )
        return found

    def _complain(
        self,
        image_root: Path,
        truth_root: Path,
        found: int,
        missing: Sequence[str],
        truth_of: dict[str, str],
        used: Collection[str],
    ) -> Iterator[str]:
        """Notes on what has no partner; raises ``DataError`` where it may not be so."""
        spare = [name for key, name in truth_of.items() if key not in used]
        alone = f"{len(missing):,} images have no file of {self.truth}: {_named(missing)}"
        if not found and not missing:
            endings = " ".join(self.image_extensions)
            raise DataError(
                f"{self.component}: no images in {image_root} or below (looked for {endings})"
            )
        if missing and (not found or not self.skip_unpaired):
            remedy = f"names must be equal up to the ending and {self._suffix_option}"
            if found:
                remedy = f"add them, or set skip_unpaired = true; {remedy}"
            shown = f"; {truth_root} has {_named(spare)}" if spare else ""
            raise DataError(f"{self.component}: {alone}{shown}\n    {remedy}")
        return iter(
            [
                *([f"{alone} (left out)"] if missing else []),
                *(
                    [f"{len(spare):,} files of {self.truth} are of no image: {_named(spare)}"]
                    if spare
                    else []
                ),
            ]
        )


def absent(root: Path, names: Iterable[str]) -> list[str]:
    """Which of some files below a folder are not there; each folder is listed once."""
    listed: dict[str, set[str]] = {}
    missing = []
    for name in names:
        folder, _, last = name.rpartition("/")
        if folder not in listed:
            try:
                listed[folder] = set(os.listdir(root / folder))
            except OSError:
                listed[folder] = set()
        if last not in listed[folder]:
            missing.append(name)
    return missing


def _named(names: Sequence[str]) -> str:
    return printable(first_few(names), kept="")


def _counts(others: Counter[str]) -> list[str]:
    return [f"{count:,} {ending or 'without an ending'}" for ending, count in others.most_common()]
