"""The ``figures`` observer: when each plot is drawn, and what happens if that fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dinov3_figures.configs import FiguresConfig
from dinov3_figures.crops import crops_figure
from dinov3_figures.curves import curves_figure, read_series
from dinov3_figures.images import choose, patch_grid, readable
from dinov3_figures.maps import principal_components, to_colors
from dinov3_figures.sheet import Tile, draw_sheet, fit, pixels_of, save_png, to_rgb
from dinov3_framework import (
    Backbone,
    DataError,
    Dataset,
    ImagesConfig,
    Observer,
    Run,
    StepRecord,
    evaluation_image,
    normalize,
)
from dinov3_framework.runtime import collectives
from dinov3_framework.runtime.agreement import RankFailure, run_on_all_ranks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Below the framework's logger, whose handlers write run.log.
log = logging.getLogger("dinov3_framework.plots")

_SIDE = 200  # pixels that an image of patch_pca.png is shown with, about
_TALLEST = 1700  # pixels of all its rows


class Plots(Observer):
    """Draws crops.png at the start, curves.png as training goes on, patch_pca.png at the end.

    What cannot be drawn is logged and left out: a plot is never worth a training run.
    """

    def __init__(self, config: FiguresConfig) -> None:
        self.config = config
        self._dataset: Dataset | None = None

    def check(self, build: Callable[..., Any], images: ImagesConfig) -> None:
        if self.config.dataset is not None:
            build(self.config.dataset, channels=images.channels)

    def on_start(self, run: Run, iteration: int) -> Mapping[str, float] | None:
        # Not caught: a dataset that is not there should be known now, not after the last step.
        if self.config.dataset is not None:
            self._dataset = run.build(self.config.dataset, channels=run.images.channels)
        path = run.output_dir / "figures/crops.png"
        if run.is_main and (iteration == 0 or not path.exists()):
            _draw(path, lambda: crops_figure(run.sample_batch(self.config.images), run.images))
        return None

    def on_step(self, run: Run, step: StepRecord) -> Mapping[str, float] | None:
        # The last step's metrics are not in the file yet; on_end draws them.
        if run.is_main and step.iteration < run.total_iterations:
            _draw_curves(run)
        return None

    def on_end(self, run: Run) -> None:
        if run.is_main:
            _draw_curves(run)
        path = run.output_dir / "figures/patch_pca.png"
        try:
            # A model may be sharded: either all processes go on to call it, or none does.
            images = run_on_all_ranks(self._images, run)
        except RankFailure as failure:
            _warn(path, str(failure))
            return
        features = _features(run, images, self.config.upscale, path)
        if run.is_main and features:
            _draw(path, lambda: pca_figure(images, features, run.images))

    def _images(self, run: Run) -> Tensor:
        """The images of patch_pca.png, [n, C, s, s]."""
        crops = run.sample_batch(self.config.images)["global"][0]
        if self._dataset is None:
            return crops
        return spread_images(self._dataset, self.config.images, crops.shape[-1])


# ---------------------------------------------------------------------- patch features
def spread_images(dataset: Dataset, count: int, size: int) -> Tensor:
    """``count`` evaluation images spread evenly over a dataset, uint8 [count, C, size, size].

    Fewer where it is smaller or some cannot be decoded; raises ``DataError`` where none can be.
    """
    found = [readable(dataset, candidates) for candidates in choose(dataset, None, count)]
    images = [evaluation_image(each[1].image, size) for each in found if each]
    if not images:
        raise DataError(f"{dataset.describe()}: no image to show")
    return torch.stack(images)


def _features(run: Run, images: Tensor, upscale: int, path: Path) -> dict[int, Tensor]:
    """Patch features by the size of the images: their own, and enlarged if the model allows that.

    Called on every process; the colors are left to the one that draws.
    """
    backbone, seen = run.model().backbone, normalize(images.to(run.device), run.images)
    features: dict[int, Tensor] = {}
    for scale in sorted({1, upscale}):
        size = scale * images.shape[-1]
        try:
            features[size] = patch_features(backbone, seen, scale)
        except Exception as error:
            _warn(path, f"patch features of {size} px images: {type(error).__name__}: {error}")
            break
    return features


def patch_features(backbone: Backbone, images: Tensor, scale: int) -> Tensor:
    """Patch features [n, h, w, D] of normalized images [n, C, H, W], enlarged ``scale``x."""
    if scale > 1:
        images = F.interpolate(
            images, scale_factor=scale, mode="bicubic", antialias=False, align_corners=False
        )
    # One by one: enlarged images may be far larger than those of training.
    return torch.stack([patch_grid(backbone, image) for image in images])


def pca_figure(images: Tensor, features: Mapping[int, Tensor], spec: ImagesConfig) -> Figure:
    """Images [n, C, s, s] (uint8 or normalized), and a map of each for features [n, h, w, D].

    Features are by the size of the images that they are of, in pixels. Colors are computed over
    the patches of all images together, so that a color means the same in each.
    """
    size = images.shape[-1]
    side = size * max(round(_SIDE / size), 1)
    side = min(side if side <= 2 * _SIDE else _SIDE, _TALLEST // len(images))
    heads = [f"image\n{size} px"]
    columns = [[Tile(pixels_of(image)) for image in fit(to_rgb(images, spec), side)]]
    for seen, tokens in features.items():
        scores, shares = principal_components(tokens.flatten(0, 2))
        colors = to_colors(scores).unflatten(0, tokens.shape[:3])
        height, width = tokens.shape[1:3]
        heads.append(f"at {seen} px: {height} x {width} patches\n{sum(shares):.0%}")
        columns.append([Tile(each.numpy(), (side, side), crisp=True) for each in colors])
    note = (
        "Red, green and blue are the first three principal components of all patches in a column;\n"
        "percent: their share of the variance."
    )
    rows = list(zip(*columns, strict=True))
    return draw_sheet("The model's patch features", note, rows, heads=heads, narrowest=180)


# ---------------------------------------------------------------------- drawing without risk
def _draw_curves(run: Run) -> None:
    series = read_series(run.output_dir / "metrics.jsonl")
    if not series:
        return  # nothing was logged yet
    done = max(int(each.iterations[-1]) for each in series.values())
    title = f"{run.output_dir.name}: {done:,} of {run.total_iterations:,} iterations"
    _draw(run.output_dir / "figures/curves.png", lambda: curves_figure(series, title))


def _draw(path: Path, figure: Callable[[], Figure]) -> None:
    try:
        save_png(figure(), path)
    except Exception as error:
        _warn(path, f"{type(error).__name__}: {error}")


def _warn(path: Path, reason: str) -> None:
    if collectives.is_main():
        log.warning("%s: not drawn, or not in full; training goes on: %s", path, reason)
