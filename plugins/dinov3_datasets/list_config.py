"""Options of lists of images."""

from __future__ import annotations

from dinov3_datasets.labeled_config import LabeledConfig
from dinov3_framework import config, option


@config
class ImageListConfig(LabeledConfig):
    """Images that a file lists: CSV or TSV with a header, or JSON Lines (.jsonl).

    Columns are the image's path and, where they are there, a label, several labels and a text.
    Several labels are separated by semicolons, or a JSON list.
    """

    path: str = option("the list: a file .csv, .tsv or .jsonl, in UTF-8", is_place=True)
    root: str | None = option(
        "the folder that the paths start from; left out, that of the list",
        default=None,
        is_place=True,
    )
    image: str = option("the column with the paths of images", default="path")
    label: str | None = option(
        'the column with the labels, whole numbers or names; auto: label if it is there; "none": '
        "no labels",
        default="auto",
    )
    labels: str | None = option(
        "the column with several labels of an image, the target labels; auto: labels if it is "
        'there; "none": none',
        default="auto",
    )
    text: str | None = option(
        'the column with a text, the target text; auto: text if it is there; "none": none',
        default="auto",
    )
