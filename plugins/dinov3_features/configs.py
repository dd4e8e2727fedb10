"""What the task ``features`` can be told; light to import."""

from __future__ import annotations

from typing import ClassVar, Literal

from dinov3_framework.configs import config, not_negative, option, positive
from dinov3_framework.kinds import BackboneTaskConfig, DatasetConfig
from dinov3_framework.parallel import ParallelConfig


def _named_once(value: tuple[str | int, ...]) -> str | None:
    if value and len(set(value)) == len(value):
        return None
    return f"must name at least one, and each once, is {list(value)}"


@config
class FeaturesTaskConfig(BackboneTaskConfig):
    """Features of a dataset's images, in files: class tokens, patch tokens, any layers.

    Either ``weights`` or ``backbone`` is given. Leaves ``features.safetensors`` and ``index.csv``.
    """

    dataset: DatasetConfig = option("where the images come from")
    outputs: tuple[Literal["class", "mean_patch", "patches", "storage"], ...] = option(
        "what is written of each image: its class token, the mean of its patch tokens, their "
        "grid, its storage tokens",
        default=("class",),
        check=_named_once,
    )
    layers: tuple[int, ...] = option(
        "layers that give them, from 0, or from -1 for the last backwards",
        default=(-1,),
        check=_named_once,
    )
    norm: bool = option("whether the backbone's final norm is applied", default=True)
    fit: Literal["crop", "squash", "pad", "native"] = option(
        "how an image becomes what the backbone sees: resized and cropped to a square, squashed "
        "into one, kept in its shape and padded to whole patches, or taken as it is",
        default="crop",
    )
    size: int | None = option(
        "pixels of the square's side, or of the longer side with pad; left out, those of the "
        "weights' training, and with pad or native every image's own",
        default=None,
        check=positive,
    )
    format: Literal["safetensors", "npy"] = option(
        "one safetensors file, or a NumPy file for each tensor", default="safetensors"
    )
    dtype: Literal["fp32", "fp16", "bf16"] = option("type of the features", default="fp32")
    batch_size: int = option("images at a time in each process", default=64, check=positive)
    workers: int = option("loader processes of each process", default=4, check=not_negative)
    rows_per_part: int = option(
        "images of a part: what a process holds in memory, and what is lost when it is killed",
        default=512,
        check=positive,
    )
    merge: bool = option(
        "whether parts become one file at the end, for which they need their room twice",
        default=True,
    )
    sharded: bool = option(
        "split the weights over the processes, for a backbone that does not fit one device",
        default=False,
    )
    parallel: ParallelConfig = option("device and precision", factory=ParallelConfig)
    overwritten: ClassVar = (
        "features/part-*.safetensors",
        "features/plan.json",
        "features.safetensors",
        "index.csv",
        "skipped.csv",
    )
