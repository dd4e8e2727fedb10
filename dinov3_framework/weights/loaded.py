"""A backbone ready for use: images in any form in, features out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.data.images import SQUARE, EvaluationTransform, ImageFit
from dinov3_framework.data.inference import evaluating, group_by_shape
from dinov3_framework.data.tokens import TokenReader
from dinov3_framework.errors import DataError
from dinov3_framework.kinds import BackboneConfig

if TYPE_CHECKING:
    from dinov3_framework.data.pictures import Picture


@frozen
class LoadedBackbone:
    """A backbone with what it was trained on.

    >>> loaded = load_backbone("teacher_backbone.safetensors")
    >>> loaded.features(["a.jpg", "b.png"]).shape  # [2, D]
    >>> loaded.extract("a.jpg", ["class", "patches"])["patches"].shape  # [1, h, w, D]
    """

    backbone: Backbone
    images: ImagesConfig
    size: int | None  # pixels, of the images it was trained on, where that is known
    provenance: Mapping[str, str]
    component: str | None = None  # what built it, and with which options, where that is known
    config: BackboneConfig | None = None
    name: str = ""  # what it was loaded from

    def __repr__(self) -> str:
        parameters = list(self.backbone.parameters())
        first = parameters[0]
        return (
            f"LoadedBackbone({self.component or type(self.backbone).__name__} from {self.name!r}: "
            f"{sum(p.numel() for p in parameters):,} parameters, {first.dtype} on {first.device},\n"
            f"  {self.backbone.embed_dim} wide, {self.backbone.n_layers} layers, a patch every "
            f"{self.backbone.patch_size} px, {self.images.channels} channels, {self.size} px)"
        )

    @property
    def origin(self) -> list[tuple[str, str]]:
        """Rows for a report: where it comes from."""
        rows = sorted(self.provenance.items())
        return rows if "weights" in self.provenance else [("weights", self.name), *rows]

    def features(
        self,
        images: Picture | Sequence[Picture],
        size: int | None = None,
        batch_size: int = 64,
    ) -> Tensor:
        """Class tokens [n, D], float32 on the CPU, without gradient.

        ``images`` is one image or a list: a path, a PIL image, a uint8 tensor [C, H, W] or a uint8
        array [H, W, C] or [H, W]; or several in one, [n, C, H, W] or [n, H, W, C]. Gray becomes
        RGB and RGB gray as the backbone wants. Each is resized and cropped to ``size`` pixels, by
        default those of the training; a multiple of the patch size. ``batch_size`` images pass the
        backbone at a time. Raises ``DataError`` for what is no such image or size.
        """
        cls: Tensor = self.extract(images, size=size, batch_size=batch_size)["class"]
        return cls

    def extract(
        self,
        images: Picture | Sequence[Picture],
        outputs: Sequence[str] = ("class",),
        *,
        layers: Sequence[int] = (-1,),
        norm: bool = True,
        fit: str = "crop",
        size: int | None = None,
        batch_size: int = 64,
    ) -> dict[str, Any]:
        """Any outputs of any layers by name, float32 on the CPU, without gradient.

        ``outputs`` are some of ``class`` [n, D], ``mean_patch`` [n, D] (of the patch tokens),
        ``patches`` [n, h, w, D] and ``storage`` [n, R, D]; ``layers`` indices from 0, or from -1
        for the last backwards; ``norm`` says whether the final norm is applied. With one layer
        the names are those, with several ``layer11.class`` and so on.

        ``fit`` is how an image becomes what the backbone sees: ``crop`` (the evaluation's: resized
        and cropped to ``size``), ``squash`` (resized to ``size`` x ``size`` whatever its shape),
        ``pad`` (in its own shape, the longer side resized to ``size`` if one is given, padded
        with the mean color to whole patches) or ``native`` (as it is; its sides must be multiples
        of the patch size). ``size`` left out is that of the training for the first two. With
        ``pad`` and ``native`` grids differ, and ``patches`` is a list of n tensors [h, w, D].

        ``images`` and errors as of :meth:`features`; also ``UserError`` for what the backbone does
        not give.
        """
        if batch_size < 1:
            raise DataError(f"batch_size must be at least 1, is {batch_size}")
        fitted = self._fit(size, fit)
        transform = EvaluationTransform(fitted)
        reader = TokenReader(self.backbone, outputs, layers, norm)
        found: list[dict[str, Tensor]] = []
        with evaluating(self.backbone), torch.no_grad():
            for batch in _batches(images, batch_size):
                found += self._read(reader, [transform(picture) for picture in batch])
        if not found:
            return self._nothing(reader, fitted)
        return {
            name: [each[name] for each in found]
            if fitted.ragged and name.endswith("patches")
            else torch.stack([each[name] for each in found])
            for name in found[0]
        }

    def transform(self, size: int | None = None, fit: str = "crop") -> EvaluationTransform:
        """From a picture of any form to what the backbone takes: float32 [C, H, W] on the CPU.

        Fitted as :meth:`extract` does it, with the mean and deviation of the training. Raises
        ``DataError`` for a size that does not fit; the transform does for what is no image.
        """
        return EvaluationTransform(self._fit(size, fit))

    def _fit(self, size: int | None, fit: str) -> ImageFit:
        side = self.size if size is None and fit in SQUARE else size
        fitted = ImageFit(self.images, self.backbone.patch_size, fit, side)
        if complaint := fitted.complaint():
            option, message, hint = complaint
            raise DataError(f"{option}: {message}; {hint}")
        return fitted

    def _read(self, reader: TokenReader, pixels: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Outputs of each image; those of one shape pass the backbone together."""
        first = next(self.backbone.parameters())
        found: list[dict[str, Tensor]] = [{} for _ in pixels]
        for places, batch in group_by_shape(pixels):
            for name, values in reader(batch.to(first.device, first.dtype)).items():
                for place, value in zip(places, values.float().cpu(), strict=True):
                    found[place][name] = value
        return found

    def _nothing(self, reader: TokenReader, fit: ImageFit) -> dict[str, Any]:
        """What no images give: tensors without rows, their shapes taken from a blank image."""
        side = fit.patch_size if fit.size is None or fit.ragged else fit.size
        blank = torch.zeros(self.images.channels, side, side)
        with evaluating(self.backbone), torch.no_grad():
            (shapes,) = self._read(reader, [blank])
        return {
            name: [] if fit.ragged and name.endswith("patches") else value[None][:0]
            for name, value in shapes.items()
        }


def _batches(images: Any, batch_size: int) -> Iterator[list[Any]]:
    several = isinstance(images, list | tuple) or (
        isinstance(images, Tensor | np.ndarray) and images.ndim == 4
    )
    items: Sequence[Any] = images if several else [images]
    for start in range(0, len(items), batch_size):
        yield list(items[start : start + batch_size])
