"""Predictions for anybody's images: files, pictures and one report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dinov3_framework import (
    Component,
    DatasetConfig,
    InvalidOption,
    config,
    fraction,
    hookimpl,
    not_negative,
    option,
    positive,
)
from dinov3_framework.data.dense_config import DenseInferenceConfig
from dinov3_framework.kinds import TaskConfig, name_of_source

if TYPE_CHECKING:
    from torch import Tensor


def _forms(value: tuple[str, ...]) -> str | None:
    if value and len(set(value)) == len(value):
        return None
    return f"must name at least one, and each once, is {list(value)}"


@config
class PredictConfig(TaskConfig):
    """What a head says of images: a mask or depth of each, or its class.

    Leaves ``predictions.csv`` and ``report.html``, of masks and maps ``predictions`` and
    ``overlays``, too. A run that was stopped goes on when it is started again.
    """

    weights: str = option(
        "a head: the folder of the run that trained it, its file, or a published name"
    )
    backbone: str | None = option(
        "weights of the backbone under it; left out, those that the head says it was trained on",
        default=None,
    )
    images: str | None = option(
        "a folder of images and those below it, one image, a pattern such as photos/*.jpg, or a "
        ".txt file with a path a line",
        default=None,
    )
    dataset: DatasetConfig | None = option("a dataset, in place of images", default=None)
    target: str | None = option(
        "which of the head's targets is predicted, where it has several", default=None
    )
    inference: DenseInferenceConfig | None = option(
        "how pixels are predicted; left out, the shorter side is resized to the size of the head's "
        "training, and the image looked at in windows of that size",
        default=None,
    )
    formats: tuple[Literal["png", "npy"], ...] = option(
        "files of each mask or map: PNG of ids or of 16 bits, NumPy's of ids or float32",
        default=("png",),
        check=_forms,
    )
    png_scale: float = option(
        "what one step of a map's 16-bit PNG stands for, in its unit", default=1e-3, check=positive
    )
    overlays: bool = option("draw each prediction over its image", default=True)
    alpha: float = option(
        "how much of a mask's colors covers the image", default=0.5, check=fraction
    )
    colormap: str = option("matplotlib's name of a map's colors", default="turbo")
    report_images: int = option(
        "images that the report shows, from the first", default=100, check=not_negative
    )
    batch_size: int = option("images at a time, of classes", default=32, check=positive)
    workers: int = option("loader processes of each process", default=2, check=not_negative)
    overwritten: ClassVar = (
        "predictions/**/*.png",
        "predictions/**/*.npy",
        "predictions/predictions.json",
        "overlays/**/*.jpg",
        "predictions.csv",
        "skipped.csv",
        "report.html",
    )

    def __attrs_post_init__(self) -> None:
        if self.images is not None and self.dataset is not None:
            raise InvalidOption("dataset", "has no effect where images are given")

    def run_name(self, recipe: str) -> str:
        return "-".join([recipe, *name_of_source(self.weights)])


def predict(weights: str, images: str, **options: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, prediction) of each image, and no file of it.

    Class ids int64 [H, W] of a mask, float32 [H, W] of a map, both at the size of the image; of
    classes probabilities [classes]. ``options`` are those of the task: ``backbone``, ``target``,
    ``inference``, ``batch_size``, ``workers``. Images that cannot be read are left out.
    """
    from dinov3_predict.task import predicted_images

    return predicted_images(PredictConfig(weights=weights, images=images, **options))


@hookimpl
def dinov3_tasks() -> list[Component]:
    return [Component("predict", PredictConfig, "dinov3_predict.task:Predict")]
