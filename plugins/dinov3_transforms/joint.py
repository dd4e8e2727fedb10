"""One transform of image and targets, made of torchvision's functions.

What the values are is the schema's knowledge: a mask is resized by its nearest values and padded
with what counts for nothing, boxes stay float32, and what is cut away is taken out of every target
per object.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tv

from dinov3_framework import (
    DataError,
    ImagesConfig,
    Problem,
    RecipeError,
    Sample,
    Target,
    Transform,
    normalize,
)
from dinov3_transforms import JointConfig
from dinov3_transforms.changes import drawn, happens, mean_color, shaded, turned
from dinov3_transforms.published import distorted, is_varied

_IMAGE = "\0image"  # beside the targets' names
_MAX = {torch.uint16: 2**16 - 1, torch.int16: 2**15 - 1}
_PLACES = 10  # tried for a crop that shows more than one class
_MIN_SIDE = 1.0  # pixels of a box that is kept


class Joint(Transform):
    """What ``JointConfig`` says; all randomness comes from torch's global generator."""

    def __init__(
        self, config: JointConfig, *, images: ImagesConfig, targets: Mapping[str, Target]
    ) -> None:
        self.config, self.images, self.targets = config, images, dict(targets)
        if problems := self._problems():
            raise RecipeError(problems)
        self.random = bool(self.random_options())
        self.interpolation = InterpolationMode(config.interpolation)
        self.flip = v2.RandomHorizontalFlip(config.flip)
        self.distort = v2.RandomPhotometricDistort(p=config.distort)
        self.crop = None
        if config.crop is not None:
            self.crop = (config.crop, config.crop_width or config.crop)
        self.size = self._size()
        self.part = None
        if config.area is not None:
            self.part = _RandomPart(
                self.crop, config.area, config.aspect, self.interpolation, antialias=True
            )

    def random_options(self) -> list[str]:
        config = self.config
        drawn = {
            "scale": config.scale[0] != config.scale[1],
            "area": config.area is not None,
            "turn": config.turn > 0,
            "crop_at": config.crop is not None and config.crop_at == "random",
            "flip": config.flip > 0,
            "distort": config.distort > 0,
            "shade": config.shade > 0,
        }
        return [name for name, is_drawn in drawn.items() if is_drawn]

    def _problems(self) -> list[Problem]:
        problems, config = [], self.config
        if config.distort and self.images.channels not in (1, 3):
            message = f"is for images of 1 or 3 channels, these have {self.images.channels}"
            problems.append(Problem("distort", message, "leave it out"))
        for name, target in self.targets.items():
            if target.kind != "mask" or target.ignore_index is not None:
                continue
            if config.turn:
                message = f"leaves corners without truth, and the mask {name!r} has no ignore_index"
                problems.append(Problem("turn", message, "leave it out"))
            if self._may_pad():
                problems.append(
                    Problem(
                        "crop" if config.crop is not None else "multiple_of",
                        f"smaller images are padded, and the mask {name!r} has no ignore_index to "
                        "pad with",
                        "resize images to at least the crop's size",
                    )
                )
        return problems

    def _may_pad(self) -> bool:
        config = self.config
        if config.crop is None or config.area is not None:
            return config.multiple_of > 1
        resized = 0.0 if config.resize is None or config.side == "longer" else config.resize
        longest = max(config.crop, config.crop_width or 0)
        return round(resized * config.scale[0]) < longest or config.multiple_of > 1

    def _size(self) -> tuple[int, int] | None:
        config, size = self.config, self.crop
        if size is None and config.side == "both" and config.scale == (1.0, 1.0):
            size = None if config.resize is None else (config.resize, config.resize)
        return None if size is None else (self._whole(size[0]), self._whole(size[1]))

    def _whole(self, side: int) -> int:
        return math.ceil(side / self.config.multiple_of) * self.config.multiple_of

    # ------------------------------------------------------------------ one sample
    def __call__(self, sample: Sample) -> Sample:
        image = self._image(sample.image)
        size = tuple(image.shape[-2:])
        typed = {name: self._typed(name, value, size) for name, value in sample.targets.items()}
        parts = self._resized(self._in_region({_IMAGE: image, **typed}))
        parts = self.flip(self._cropped(self._turned(parts)))
        parts[_IMAGE] = self._normalized(self._shaded(self._distorted(parts[_IMAGE])))
        parts = self._padded(parts)
        image = parts.pop(_IMAGE).as_subclass(Tensor)
        return Sample(image, parts)

    def _image(self, image: Tensor) -> Any:
        if image.ndim != 3 or image.shape[0] != self.images.channels:
            raise DataError(
                f"an image of shape {list(image.shape)} where images.channels = "
                f"{self.images.channels} asks for [{self.images.channels}, H, W]"
            )
        if image.dtype in _MAX:
            # Resized as they are, integers of 16 bits would wrap around at the ends of their range.
            image = image.float() / _MAX[image.dtype]
        return tv_tensors.Image(image if image.dtype == torch.uint8 else image.float())

    def _typed(self, name: str, value: Any, size: tuple[int, ...]) -> Any:
        """A target as what torchvision goes by."""
        kind = self.targets[name].kind if name in self.targets else ""
        if kind in ("mask", "map", "instances") and not isinstance(value, tv_tensors.Mask):
            return tv_tensors.Mask(value)
        if kind == "boxes":
            if not isinstance(value, tv_tensors.BoundingBoxes):
                value = tv_tensors.BoundingBoxes(value, format="XYXY", canvas_size=size)
            value = tv.convert_bounding_box_format(
                tv_tensors.wrap(value.float(), like=value), new_format="XYXY"
            )
        return value

    def _in_region(self, parts: dict[str, Any]) -> dict[str, Any]:
        if self.config.region is None:
            return parts
        top, left, bottom, right = self.config.region
        height, width = parts[_IMAGE].shape[-2:]
        if bottom > height or right > width:
            raise DataError(
                f"an image of {height} x {width} pixels has no region {list(self.config.region)}"
            )
        parts = self._each(parts, tv.crop, top, left, bottom - top, right - left)
        return self._without_objects_outside(parts)

    def _resized(self, parts: dict[str, Any]) -> dict[str, Any]:
        config, low, high = self.config, *self.config.scale
        if self.part is not None:
            return self.part(parts)  # type: ignore[no-any-return]
        factor = low if low == high else low + (high - low) * float(torch.rand(()))
        height, width = parts[_IMAGE].shape[-2:]
        if config.resize is not None:
            sides = {"shorter": min(height, width), "longer": max(height, width)}
            if config.side == "both":
                height = width = config.resize
            else:
                factor *= config.resize / sides[config.side]
        size = [max(round(side * factor), 1) for side in (height, width)]
        if tuple(size) == tuple(parts[_IMAGE].shape[-2:]):
            return parts
        return self._each(parts, self._resize, size)

    def _resize(self, part: Any, size: list[int]) -> Any:
        if isinstance(part, tv_tensors.Mask):
            return _nearest(part, size)
        return tv.resize(part, size, interpolation=self.interpolation, antialias=True)

    def _turned(self, parts: dict[str, Any]) -> dict[str, Any]:
        if not happens(self.config.turn):
            return parts
        angle = drawn(-self.config.turn_by, self.config.turn_by)
        fills = self._fills() | {_IMAGE: mean_color(parts[_IMAGE], self.images)}
        parts = {
            name: turned(part, angle, fills[name])
            if isinstance(part, tv_tensors.TVTensor)
            else part
            for name, part in parts.items()
        }
        return self._without_objects_outside(parts)

    def _distorted(self, image: Tensor) -> Tensor:
        if self.config.distort_as == "torchvision":
            return self.distort(image)  # type: ignore[no-any-return]
        return distorted(image, self.config.distort)

    def _shaded(self, image: Tensor) -> Tensor:
        config = self.config
        if not happens(config.shade):
            return image
        return shaded(image, config.gamma, config.brightness, config.color)

    def _cropped(self, parts: dict[str, Any]) -> dict[str, Any]:
        if self.crop is None:
            return parts
        sides = list(zip(parts[_IMAGE].shape[-2:], self.crop, strict=True))
        space = [max(length - side, 0) for length, side in sides]
        if any(space):
            size = [min(length, side) for length, side in sides]
            parts = self._each(parts, tv.crop, *self._place(parts, space, size), *size)
        return self._without_objects_outside(parts)

    def _place(self, parts: dict[str, Any], space: list[int], size: list[int]) -> list[int]:
        """Top and left of a crop of ``size``, which may lie anywhere in ``space``."""
        if self.config.crop_at == "center":
            return [round(each / 2) for each in space]
        share = self.config.crop_max_share
        names = [name for name, target in self.targets.items() if target.kind == "mask"]
        ignored = [self.targets[name].ignore_index for name in names]
        for tried in range(_PLACES + 1):
            top, left = place = [int(torch.randint(each + 1, ())) for each in space]
            if share is None or tried == _PLACES:
                break
            there = (slice(top, top + size[0]), slice(left, left + size[1]))
            masks = [parts[name].as_subclass(Tensor)[there] for name in names]
            if is_varied(masks, ignored, share):
                break
        return place

    @staticmethod
    def _each(parts: dict[str, Any], change: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """Change the image and the targets that lie on it."""
        return {
            name: change(part, *args, **options) if isinstance(part, tv_tensors.TVTensor) else part
            for name, part in parts.items()
        }

    def _without_objects_outside(self, parts: dict[str, Any]) -> dict[str, Any]:
        """Take what a crop has cut away out of every target per object."""
        keep: Tensor | None = None
        for name, target in self.targets.items():
            if target.kind == "boxes":
                parts[name] = boxes = tv.clamp_bounding_boxes(parts[name])
                keep = ((boxes[:, 2:] - boxes[:, :2]) >= _MIN_SIDE).all(1).as_subclass(Tensor)
            elif target.kind == "instances" and keep is None:
                keep = parts[name].flatten(1).any(1).as_subclass(Tensor)
        if keep is None or bool(keep.all()):
            return parts
        for name, target in self.targets.items():
            if target.per_object:
                parts[name] = _chosen(parts[name], keep)
        return parts

    def _normalized(self, image: Tensor) -> tv_tensors.Image:
        pixels = image.as_subclass(Tensor)
        if pixels.is_floating_point():
            # Bicubic interpolation leaves the range of the values.
            mean, std = list(self.images.mean), list(self.images.std)
            pixels = tv.normalize(pixels.clamp(0, 1), mean, std)
        return tv_tensors.Image(normalize(pixels, self.images))

    def _padded(self, parts: dict[str, Any]) -> dict[str, Any]:
        """Pad at the right and at the bottom, the image with its mean: 0, once normalized."""
        sides = zip(parts[_IMAGE].shape[-2:], self.crop or (0, 0), strict=True)
        bottom, right = (self._whole(max(side, least)) - side for side, least in sides)
        if not (bottom or right):
            return parts
        fills = self._fills() | {_IMAGE: 0.0}
        return {
            name: tv.pad(part, [0, 0, right, bottom], fill=fills[name])
            if isinstance(part, tv_tensors.TVTensor)
            else part
            for name, part in parts.items()
        }

    def _fills(self) -> dict[str, Any]:
        """What a target has where nothing is known."""
        fills: dict[str, Any] = {}
        for name, target in self.targets.items():
            unknown = {"map": math.nan, "mask": target.ignore_index}.get(target.kind, 0)
            fills[name] = 0 if unknown is None else unknown
        return fills


class _RandomPart(v2.RandomResizedCrop):
    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            return _nearest(tv.crop(inpt, **params), list(self.size))
        return super().transform(inpt, params)


def _nearest(mask: tv_tensors.Mask, size: list[int]) -> tv_tensors.Mask:
    """A mask or map with the value nearest to the center of each pixel.

    What torchvision 0.29 does by itself, its older ``NEAREST``, is half a pixel of the result away
    from there, and from the image; ``resized_crop`` does so whatever it is told.
    """
    plain = mask.as_subclass(Tensor)
    exact = InterpolationMode.NEAREST_EXACT
    resized = tv.resize(plain.reshape(-1, *plain.shape[-2:]), size, interpolation=exact)
    return tv_tensors.wrap(resized.reshape(*plain.shape[:-2], *size), like=mask)


def _chosen(values: Any, keep: Tensor) -> Any:
    if isinstance(values, tv_tensors.TVTensor):
        return tv_tensors.wrap(values[keep], like=values)
    if isinstance(values, Tensor):
        return values[keep]
    return [value for value, kept in zip(values, keep.tolist(), strict=True) if kept]
