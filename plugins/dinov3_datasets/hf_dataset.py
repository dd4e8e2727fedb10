"""Tables with images as a dataset: Hugging Face datasets on disk, and Parquet files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dinov3_datasets.arrow_folder import ArrowFolder, is_arrow_folder, split_folder
from dinov3_datasets.decoding import decode, pixel_options
from dinov3_datasets.hf_config import HfDatasetConfig
from dinov3_datasets.labels import NONE, Classes, number_labels
from dinov3_datasets.parquet import ParquetTable, parquet_files
from dinov3_datasets.tables import Table, image_column, label_column, text_column
from dinov3_framework import CorruptSampleError, Dataset, Sample, Target
from dinov3_framework.errors import printable


class HfDataset(Dataset):
    """Rows of a table as samples, images uint8 [channels, H, W] decoded from encoded bytes.

    Raises ``DataError`` for tables that are missing, empty or damaged, columns that are not there
    or of another type, and labels that are no class. A row without an image is a corrupt sample.
    """

    def __init__(self, config: HfDatasetConfig, *, channels: int) -> None:
        self.config, self.channels = config, channels
        self.table = _open_table(config)
        self.image = image_column(self.table, config.image)
        self.label_column = label_column(self.table, config.label)
        self.text = text_column(self.table, config.text)
        self.table.check(
            [name for name in (self.image, self.label_column, self.text) if name is not None]
        )
        stated = None if self.label_column is None else self.table.class_names(self.label_column)
        values = [] if self.label_column is None else self.table.column(self.label_column)
        what = f"hf_dataset {config.path}, column {self.label_column}"
        self.labels = number_labels(values, Classes.of(config, stated), what, self.table.name)
        self.targets = {} if self.label_column is None else {"label": self.labels.target}
        if self.text is not None:
            self.targets["text"] = Target("text")

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        name, targets = self.name(index), dict[str, Any]()
        if self.label_column is not None:
            targets["label"] = int(self.labels.values[index])
            if targets["label"] == NONE:
                raise CorruptSampleError(name, f"has no label in the column {self.label_column}")
        wanted = [self.image] if self.text is None else [self.image, self.text]
        row = self.table.row(index, wanted)
        if self.text is not None:
            if row[self.text] is None:
                raise CorruptSampleError(name, f"has no text in the column {self.text}")
            targets["text"] = row[self.text]
        data = _bytes(row[self.image], name, self.image)
        return Sample(decode(self.config, data, name, self.channels), targets)

    def label(self, index: int) -> int | None:
        return None if self.label_column is None else self.labels.label(index)

    def name(self, index: int) -> str:
        return self.table.name(range(len(self))[index])

    def describe(self) -> str:
        kind = "no labels" if self.n_classes is None else f"{self.n_classes:,} classes"
        split = "" if self.config.split is None else f", {self.config.split} split"
        return f"hf_dataset {self.config.path}{split}: {len(self):,} images, {kind}"

    def digest(self) -> str:
        files, labels = self.table.contents, self.labels.digest
        return f"{len(self):,} images, files {files}, column {self.image}, labels {labels}"

    def version(self) -> str:
        options = pixel_options(self.config, self.channels)
        return f"{self.digest()}, state {self.table.state}, text {self.text}, {options}"

    def notes(self) -> list[str]:
        return self.table.notes()


def _open_table(config: HfDatasetConfig) -> Table:
    place = Path(config.path).expanduser()
    if is_arrow_folder(place):
        return ArrowFolder(split_folder(place, config.split))
    return ParquetTable(parquet_files(config.path, config.split), config.cache_bytes)


def _bytes(value: Any, name: str, column: str) -> bytes:
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path") is not None:
            path = printable(str(value["path"]))
            raise CorruptSampleError(
                name, f"holds only the path {path!r}; write the table with its images embedded"
            )
        value = value.get("bytes")
    if not value:
        raise CorruptSampleError(name, f"has no image in the column {column}")
    return bytes(value)
