"""Shards of WebDataset, with an index or as a stream; and their index files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dinov3_datasets.files import find_files
from dinov3_datasets.index_arrays import Progress
from dinov3_datasets.shard_index import index_path, index_shards, is_indexed
from dinov3_datasets.tar_dataset import TarDataset
from dinov3_datasets.tar_stream import TarStream
from dinov3_datasets.webdataset_config import WebDatasetConfig
from dinov3_framework import Dataset, StreamDataset


class WebDataset:
    """Makes the dataset that ``mode`` asks for, and is an ``Indexable`` of the task ``index``."""

    def __call__(self, config: WebDatasetConfig, *, channels: int) -> Dataset | StreamDataset:
        build = TarStream if config.mode == "stream" else TarDataset
        return build(config, channels=channels)

    @staticmethod
    def index_files(config: WebDatasetConfig) -> Sequence[Path]:
        """The index files that are missing, or of another state of their shards."""
        shards = find_files("shards", config.shards, ".tar")
        return [index_path(shard) for shard in shards if not is_indexed(shard)]

    @staticmethod
    def write_index(config: WebDatasetConfig, progress: Progress | None = None) -> list[Path]:
        """Write these; ``progress`` counts shards. Returns the paths of the files written."""
        return index_shards(find_files("shards", config.shards, ".tar"), progress)


open_webdataset = WebDataset()
