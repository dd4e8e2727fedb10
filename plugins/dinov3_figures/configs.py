"""The options of the plots of a training, and of the pictures of one backbone."""

from __future__ import annotations

from typing import ClassVar, Literal

from dinov3_framework import (
    BackboneTaskConfig,
    DatasetConfig,
    ObserverConfig,
    Span,
    config,
    option,
    positive,
)


@config
class FiguresConfig(ObserverConfig):
    """Draws crops.png, curves.png and patch_pca.png into the run's folder ``figures``."""

    every: Span = option(
        "iterations between two drawings of the curves", default=1000, check=positive
    )
    images: int = option(
        "images shown in crops.png and in patch_pca.png", default=6, check=positive
    )
    dataset: DatasetConfig | None = option(
        "where the images of patch_pca.png come from; left out, global crops of the stream",
        default=None,
    )
    upscale: int = option(
        "patch_pca.png also shows images enlarged this many times, which gives small ones a finer "
        "grid of patches; 1 leaves that out",
        default=4,
        check=positive,
    )


def _distinct(value: tuple[object, ...]) -> str | None:
    if value and all(value) and len(set(value)) == len(value):
        return None
    return f"must hold one or more, none empty and each once, is {list(value)}"


def _points(value: tuple[tuple[float, float], ...]) -> str | None:
    wrong = [list(point) for point in value if not all(0 <= place <= 1 for place in point)]
    if wrong:
        return f"must be [x, y] with both in 0..1, not {wrong[0]}"
    return None if len(set(value)) == len(value) else "names a place more than once"


def _typical(value: int) -> str | None:
    return None if 0 <= value <= 2 else f"must be 0, 1 or 2, is {value}"


@config
class VisualizeConfig(BackboneTaskConfig):
    """Pictures of what a backbone's patch features see, and a page to explore them.

    Writes figures/<name>.png for each image, figures/overview.png and index.html. Either
    ``weights`` or ``backbone`` is given.
    """

    dataset: DatasetConfig = option("where the images come from")
    names: tuple[str, ...] | None = option(
        "names of samples to show, such as their paths below the dataset's folder; * and ? stand "
        "for any letters; left out, any sample",
        default=None,
        check=_distinct,
    )
    count: int | None = option(
        "images to show, spread evenly over the samples; left out, 8, or with names all of them",
        default=None,
        check=positive,
    )
    size: int | None = option(
        "pixels that an image is resized to along its shorter side; left out, the size of the "
        "weights' training, and with backbone the image's own. Images keep their aspect, but for "
        "rounding each side to whole patches",
        default=None,
        check=positive,
    )
    side: Literal["shorter", "longer"] = option("the side that size is about", default="shorter")
    layer: int = option(
        "the layer whose patch features are shown, from 0, or from the last one (-1) back",
        default=-1,
    )
    maps: tuple[Literal["pca", "foreground", "similarity"], ...] = option(
        "what to draw beside an image: principal components of all patches (pca) or of those in "
        "the foreground (foreground) as colors, cosine similarity to marked patches (similarity)",
        default=("pca", "foreground", "similarity"),
        check=_distinct,
    )
    pca: Literal["joint", "image"] = option(
        "principal components, and with them foreground and colors, of all images together "
        "(joint), so that a color means the same in each, or of each by itself (image)",
        default="joint",
    )
    points: tuple[tuple[float, float], ...] = option(
        "marked places [x, y] in every image, from [0, 0] at the top left to [1, 1]",
        default=((0.5, 0.5),),
        check=_points,
    )
    typical: int = option(
        "patches marked in each image by themselves: the one most typical of the foreground (1), "
        "and that of the background (2)",
        default=1,
        check=_typical,
    )
    overwritten: ClassVar = ("index.html", "figures/overview.png")
