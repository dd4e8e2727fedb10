"""Folders that ``save_to_disk`` of Hugging Face datasets wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dinov3_datasets.files import Files
from dinov3_datasets.tables import Table, missing_library
from dinov3_framework import CorruptSampleError, DataError
from dinov3_framework.errors import first_few, printable, suggest


def is_arrow_folder(place: Path) -> bool:
    """Whether a folder is one of ``save_to_disk``, of a dataset or of several splits."""
    return any((place / name).is_file() for name in ("state.json", "dataset_dict.json"))


def split_folder(place: Path, split: str | None) -> Path:
    """The folder of one split; ``DataError`` if it is not there, or has to be stated."""
    if (place / "dataset_dict.json").is_file():
        try:
            splits = json.loads((place / "dataset_dict.json").read_text("utf-8"))["splits"]
            known = [each for each in splits if isinstance(each, str)]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{place / 'dataset_dict.json'} cannot be read: {error}") from error
        if split is None and len(known) == 1:
            split = known[0]
        if split is None:
            raise DataError(f"{place} holds several splits, state split: {first_few(known)}")
        if split not in known:
            raise DataError(f"split = {split!r}: no such split in {place}; {suggest(split, known)}")
        return place / split
    if split is not None:
        raise DataError(f"split = {split!r}: {place} is one dataset without splits; leave it out")
    return place


class ArrowFolder(Table):
    """Rows of such a folder, which is mapped and not loaded."""

    def __init__(self, folder: Path) -> None:
        try:
            import datasets
        except ImportError as error:
            raise missing_library("datasets") from error
        try:
            loaded = datasets.load_from_disk(str(folder))
        except Exception as error:  # whatever its files hold
            raise DataError(f"{folder} cannot be read: {printable(str(error))}") from error
        if not isinstance(loaded, datasets.Dataset):
            raise DataError(f"{folder} is no dataset of save_to_disk")
        if not len(loaded):
            raise DataError(f"{folder}: no rows")
        self.folder = folder
        # As Arrow: images stay the bytes that they are, and are decoded by us.
        self._rows = loaded.with_format("arrow")
        self._views: dict[tuple[str, ...], Any] = {}
        self.schema = loaded.features.arrow_schema
        files = Files.of([Path(each["filename"]) for each in loaded.cache_files])
        self.contents, self.state = files.contents, files.state

    def __len__(self) -> int:
        return len(self._rows)

    def check(self, columns: Sequence[str]) -> None:
        # Arrow reads what is mapped without looking: offsets that lead elsewhere end the process.
        # Of images, the offsets alone are read here.
        import pyarrow as pa

        try:
            self._rows.select_columns(list(columns))[:].validate(full=True)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DataError(f"{self.folder} is damaged: {printable(str(error))}") from error

    def column(self, name: str) -> list[Any]:
        values: list[Any] = self._rows.select_columns([name])[:].column(name).to_pylist()
        return values

    def row(self, index: int, columns: Sequence[str]) -> Mapping[str, Any]:
        import pyarrow as pa

        key = tuple(columns)
        if key not in self._views:
            self._views[key] = self._rows.select_columns(list(columns))
        try:
            found: Mapping[str, Any] = self._views[key][index].to_pylist()[0]
        except (OSError, ValueError, pa.ArrowException) as error:
            raise CorruptSampleError(self.name(index), str(error)) from error
        return found

    def name(self, index: int) -> str:
        return f"{self.folder.name}:{index}"
