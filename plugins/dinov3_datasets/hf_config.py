"""Options of tables with images: datasets of Hugging Face on disk, and Parquet files."""

from __future__ import annotations

from dinov3_datasets.files import place_complaint
from dinov3_datasets.labeled_config import LabeledConfig
from dinov3_framework import config, option, positive


@config
class HfDatasetConfig(LabeledConfig):
    """A folder that ``save_to_disk`` of Hugging Face datasets wrote, or Parquet files.

    Images are columns of encoded bytes, alone or with a path beside them; this is how datasets and
    the Hugging Face hub store them.
    """

    path: str = option(
        "a folder of save_to_disk; or a Parquet file, a folder of them, or a pattern such as "
        "data/train-*.parquet",
        check=place_complaint,
        is_place=True,
    )
    split: str | None = option(
        "which split, where there are several: a folder's, or the beginning of names such as "
        "train-00000-of-00004.parquet",
        default=None,
    )
    image: str | None = option(
        "the column with the images; left out, the only one that can be it, or that called image",
        default=None,
    )
    label: str | None = option(
        "the column with the labels: whole numbers, classes of Hugging Face, or names; auto: "
        'label, or the only column of classes; "none": no labels',
        default="auto",
    )
    text: str | None = option(
        "the column with a text, the target text; left out, none", default=None
    )
    cache_bytes: int = option(
        "Parquet alone: bytes of decoded row groups that each process keeps; a sample whose row "
        "group is not kept costs the reading of all of it",
        default=2**28,
        check=positive,
    )
