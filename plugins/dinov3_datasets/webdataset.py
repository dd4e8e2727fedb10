"""Shards of WebDataset, with an index or as a stream."""

from __future__ import annotations

from dinov3_datasets.tar_dataset import TarDataset
from dinov3_datasets.tar_stream import TarStream
from dinov3_datasets.webdataset_config import WebDatasetConfig
from dinov3_framework import Dataset, StreamDataset


def open_webdataset(config: WebDatasetConfig, *, channels: int) -> Dataset | StreamDataset:
    """The dataset that ``mode`` asks for."""
    build = TarStream if config.mode == "stream" else TarDataset
    return build(config, channels=channels)
