"""The multi-crop augmentation (SwAV, Caron et al. 2020, arXiv 2006.09882; DINO, arXiv 2104.14294).

An image passes through these stages, each for all crops of a view at once:

1. boxes are drawn; each is cut out, *then* resized, on uint8 pixels, and mirrored (``boxes``);
2. distortions are drawn, then applied in float and rounded back to uint8 (``distortions``);
3. global crops, anchors and the teacher's crops are brought to their own sizes.

A global crop, its anchor and the teacher's version of it are one crop, made at the largest of
their sizes. It is distorted at the largest size of those that show the distortions, which
undistorted anchors do not, and brought to each size after: distortions measured in pixels, such
as blur, then mean the same to all.

``local_from_global`` distorts the undistorted global crops anew, once for each local crop, and
cuts a window out of each at a random offset that is a multiple of the patch size.

With several resolutions each step has one of them, drawn by their ratios and keyed by the step. A
resolution is a ``MultiCrop`` of its own, at the cost of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinov3_crops.boxes import crop, random_boxes, resize
from dinov3_crops.configs import MultiCropConfig
from dinov3_crops.distortions import apply_jitter, distort, draw_blur, draw_jitter
from dinov3_crops.masking import batch_masks
from dinov3_crops.sizes import GLOBAL_CROPS, by_resolution, size_problems, total_pixels, views_of
from dinov3_framework import Augmentation, DataError, RecipeError, keyed_rng

Pixels = NDArray[np.uint8]  # an image [H, W, C] or crops [N, C, H, W]


class MultiCrop(Augmentation):
    """Crops and masks of one image; see :class:`~dinov3_crops.MultiCropConfig`.

    Raises RecipeError where sizes do not fit the patch size or each other.
    """

    def __init__(self, config: MultiCropConfig, *, channels: int, patch_size: int) -> None:
        problems = size_problems(config, patch_size)
        if problems:
            raise RecipeError(problems)
        self.channels, self.patch_size = channels, patch_size
        self._resolutions: list[MultiCrop] = []
        if config.resolutions:
            for ratio, one in by_resolution(config):
                variant = MultiCrop(one, channels=channels, patch_size=patch_size)
                variant.share = ratio
                self._resolutions.append(variant)
            config = max(self._resolutions, key=lambda variant: total_pixels(variant.views)).config
        self.config, self.views = config, views_of(config, patch_size)
        self.makes_masks = config.masking is not None and config.masking.probability > 0

    def variants(self) -> Sequence[MultiCrop]:
        """One for each resolution."""
        return self._resolutions or [self]

    def at(self, seed: int, step: int) -> MultiCrop:
        """The resolution of a step, keyed by (seed, step)."""
        variants = self.variants()
        if len(variants) == 1:
            return variants[0]
        place = keyed_rng(seed, "resolution", step).random()
        # The last ends at 1, up to rounding.
        ends = np.cumsum([variant.share for variant in variants])[:-1]
        return variants[int(np.searchsorted(ends, place, side="right"))]

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Mapping[str, Tensor]:
        """Crops of a uint8 image [C, H, W], by view: uint8 [crops, C, size, size].

        Raises DataError where the image is not of that kind.
        """
        config = self.config
        pixels = self._pixels(image)
        if config.share_color_jitter:
            pixels = self._jittered(pixels, rng)
        largest = max(self._whole_sizes().values())
        bases = self._crop(pixels, rng, GLOBAL_CROPS, largest, config.global_scale)
        crops = self._whole(bases, rng)
        if config.local_crops and config.local_from_global:
            crops["local"] = self._local_from_global(bases, rng)
        elif config.local_crops:
            crops["local"] = self._local(pixels, rng)
        return {view: torch.from_numpy(of_view) for view, of_view in crops.items()}

    def masks(self, *, rows: Sequence[int], total: int, seed: int, step: int) -> Tensor:
        """Hidden patches of the batch's rows, bool [len(rows), P]; see ``masking``."""
        if self.config.masking is None:
            return super().masks(rows=rows, total=total, seed=seed, step=step)
        grid = self.config.global_size // self.patch_size
        return batch_masks(self.config.masking, grid, rows, total, seed, step)

    def _pixels(self, image: Tensor) -> Pixels:
        """The image as [H, W, C], compact, without touching the caller's."""
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != self.channels:
            raise DataError(
                f"multi_crop takes uint8 images [{self.channels}, H, W], got {image.dtype} "
                f"{list(image.shape)}; the dataset must decode to images.channels = "
                f"{self.channels}, or images.channels must change"
            )
        return np.ascontiguousarray(image.numpy().transpose(1, 2, 0))

    def _jittered(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        jitter = draw_jitter(rng, 1, self.channels, self.config.distortions)
        image = np.array(pixels.transpose(2, 0, 1), order="C")
        apply_jitter(image[None], jitter)
        return np.ascontiguousarray(image.transpose(1, 2, 0))

    def _crop(
        self,
        pixels: Pixels,
        rng: np.random.Generator,
        count: int,
        size: int,
        scale: tuple[float, float],
    ) -> Pixels:
        height, width, _ = pixels.shape
        boxes = random_boxes(rng, count, height, width, scale, self.config.aspect_ratio)
        flips = rng.random(count) < (0.5 if self.config.horizontal_flips else 0.0)
        return crop(pixels, boxes, flips, size)

    def _distort(
        self,
        crops: Pixels,
        rng: np.random.Generator,
        blur_probability: Sequence[float],
        solarize_probability: Sequence[float],
    ) -> None:
        config = self.config.distortions
        jitter = None
        if not self.config.share_color_jitter:
            jitter = draw_jitter(rng, len(crops), self.channels, config)
        blur = draw_blur(rng, config, np.array(blur_probability), np.array(solarize_probability))
        distort(crops, jitter, blur, config)

    def _whole_sizes(self) -> dict[str, int]:
        """Pixels of the views that show whole global crops."""
        return {name: view.size for name, view in self.views.items() if name != "local"}

    def _whole(self, bases: Pixels, rng: np.random.Generator) -> dict[str, Pixels]:
        config, distortions, sizes = self.config, self.config.distortions, self._whole_sizes()
        clean = {"anchor"} if config.anchor_without_distortions else set()
        crops = resize(bases, max(size for name, size in sizes.items() if name not in clean))
        self._distort(crops, rng, distortions.blur_probability, distortions.solarize_probability)
        return {
            name: resize(bases if name in clean else crops, size) for name, size in sizes.items()
        }

    def _local(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        config = self.config
        crops = self._crop(pixels, rng, config.local_crops, config.local_size, config.local_scale)
        self._distort_local(crops, rng)
        size = self.views["local"].size
        return np.ascontiguousarray(crops[:, :, :size, :size])

    def _local_from_global(self, bases: Pixels, rng: np.random.Generator) -> Pixels:
        count, size = self.config.local_crops, self.views["local"].size
        whole = np.repeat(resize(bases, self.config.global_size), count // GLOBAL_CROPS, axis=0)
        self._distort_local(whole, rng)
        places = (self.config.global_size - size) // self.patch_size + 1
        offsets = rng.integers(places, size=(count, 2)) * self.patch_size
        return np.stack(
            [
                one[:, top : top + size, left : left + size]
                for one, (top, left) in zip(whole, offsets, strict=True)
            ]
        )

    def _distort_local(self, crops: Pixels, rng: np.random.Generator) -> None:
        blur = self.config.distortions.local_blur_probability
        self._distort(crops, rng, [blur] * len(crops), [0.0] * len(crops))
