"""The multi-crop augmentation (SwAV, Caron et al. 2020, arXiv 2006.09882; DINO, arXiv 2104.14294).

An image passes through these stages, each for all crops of a view at once:

1. boxes are drawn; each is cut out, *then* resized, on uint8 pixels, and mirrored (``boxes``);
2. distortions are drawn, then applied in float and rounded back to uint8 (``distortions``);
3. where there are anchors, global crops and anchors are brought to their own sizes.

A global crop and its anchor are one crop, made at the larger of the two sizes. With undistorted
anchors it is brought to the global size before the distortions, otherwise after: distortions
measured in pixels, such as blur, then mean the same to both.

``local_from_global`` distorts the undistorted global crops anew, once for each local crop, and
cuts a window out of each at a random offset that is a multiple of the patch size.
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
from dinov3_framework import Augmentation, DataError, Problem, RecipeError, View

GLOBAL_CROPS = 2

Pixels = NDArray[np.uint8]  # an image [H, W, C] or crops [N, C, H, W]


class MultiCrop(Augmentation):
    """Crops and masks of one image; see :class:`~dinov3_crops.MultiCropConfig`.

    Raises RecipeError where sizes do not fit the patch size or each other.
    """

    def __init__(self, config: MultiCropConfig, *, channels: int, patch_size: int) -> None:
        problems = _problems(config, patch_size)
        if problems:
            raise RecipeError(problems)
        self.config, self.channels, self.patch_size = config, channels, patch_size
        self.views = {"global": View(GLOBAL_CROPS, config.global_size)}
        if config.local_crops:
            self.views["local"] = View(config.local_crops, config.local_size)
        if config.anchor_size is not None:
            self.views["anchor"] = View(GLOBAL_CROPS, config.anchor_size)
        self.makes_masks = config.masking is not None and config.masking.probability > 0

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Mapping[str, Tensor]:
        """Crops of a uint8 image [C, H, W], by view: uint8 [crops, C, size, size].

        Raises DataError where the image is not of that kind.
        """
        config = self.config
        pixels = self._pixels(image)
        if config.share_color_jitter:
            pixels = self._jittered(pixels, rng)
        largest = max(config.global_size, config.anchor_size or 0)
        bases = self._crop(pixels, rng, GLOBAL_CROPS, largest, config.global_scale)
        crops = self._global_and_anchor(bases, rng)
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

    def _global_and_anchor(self, bases: Pixels, rng: np.random.Generator) -> dict[str, Pixels]:
        config, distortions = self.config, self.config.distortions
        resize_first, anchor_size = config.anchor_without_distortions, config.anchor_size
        crops = resize(bases, config.global_size) if resize_first else bases.copy()
        self._distort(crops, rng, distortions.blur_probability, distortions.solarize_probability)
        views = {"global": crops if resize_first else resize(crops, config.global_size)}
        if anchor_size is not None:
            views["anchor"] = resize(bases if resize_first else crops, anchor_size)
        return views

    def _local(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        config = self.config
        crops = self._crop(pixels, rng, config.local_crops, config.local_size, config.local_scale)
        self._distort_local(crops, rng)
        return crops

    def _local_from_global(self, bases: Pixels, rng: np.random.Generator) -> Pixels:
        count, size = self.config.local_crops, self.config.local_size
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


def _problems(config: MultiCropConfig, patch_size: int) -> list[Problem]:
    """What keeps crops from being made, or from being cut into patches."""
    problems = []

    def add(key: str, message: str, hint: str) -> None:
        problems.append(Problem(f"augmentation.{key}", message, hint))

    sizes = {"global_size": config.global_size}
    if config.local_crops:
        sizes["local_size"] = config.local_size
    if config.anchor_size is not None:
        sizes["anchor_size"] = config.anchor_size
    for key, size in sizes.items():
        if size % patch_size:
            below = size - size % patch_size
            near = f"{below} or {below + patch_size}" if below else f"{patch_size}"
            add(key, f"{size} is no multiple of the patch size {patch_size}", f"try {near}")
    if config.local_crops and config.local_from_global:
        if config.local_crops % GLOBAL_CROPS:
            add(
                "local_crops",
                f"{config.local_crops} is odd, but local_from_global takes half of the local "
                "crops from each global crop",
                f"try {config.local_crops + 1}",
            )
        if config.local_size > config.global_size:
            add(
                "local_size",
                f"{config.local_size} is above global_size = {config.global_size}, out of which "
                "local_from_global cuts the local crops",
                f"try at most {config.global_size}, or local_from_global = false",
            )
    return problems
