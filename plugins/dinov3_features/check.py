"""What a check of a ``features`` recipe finds: mistakes, sizes, and whether the disk holds it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from attrs import frozen

from dinov3_features.configs import FeaturesTaskConfig
from dinov3_features.loop import DTYPES
from dinov3_features.parts import Row
from dinov3_features.reading import FittedImages, ReadImage
from dinov3_framework.contracts.data import Dataset
from dinov3_framework.data.fit import ImageFit
from dinov3_framework.data.tokens import TokenReader, layers_complaint
from dinov3_framework.errors import DataError, OutputError, Problem, RecipeError, UserError
from dinov3_framework.parallel.check import parallel_problems
from dinov3_framework.weights.loaded import LoadedBackbone

_LOOKED_AT = 16  # images that a check reads
_MIB = 2**20


def problems(
    config: FeaturesTaskConfig, subject: LoadedBackbone, fit: ImageFit, processes: int
) -> Iterator[Problem]:
    """What is wrong whatever the images are."""
    yield from _parallel_problems(config, processes)
    if config.format == "npy" and config.dtype == "bf16":
        yield Problem("dtype", "NumPy files know no bf16", 'take "fp16" or format = "safetensors"')
    if config.format == "npy" and not config.merge:
        hint = 'leave merge out, or take format = "safetensors"'
        yield Problem("merge", "parts are safetensors files, only the merge makes npy", hint)
    if complaint := fit.complaint():
        yield Problem(*complaint)
    if complaint_of_layers := layers_complaint(config.layers, subject.backbone.n_layers):
        yield Problem("layers", complaint_of_layers)


def _parallel_problems(config: FeaturesTaskConfig, processes: int) -> Iterator[Problem]:
    parallel = config.parallel
    for key, off in (("checkpointing", "none"), ("compile", False), ("fp8", "off")):
        if getattr(parallel, key) != off:
            yield Problem(f"parallel.{key}", "is for training runs", "leave it out")
    if config.sharded:
        yield from parallel_problems(parallel, processes)
    elif parallel.replicas > 1:
        yield Problem(
            "parallel.replicas", "every process holds all of the backbone", "set sharded = true"
        )


@frozen
class Look:
    """A few images spread over the dataset, and what became of them."""

    rows: Sequence[Row]
    shapes: Sequence[tuple[int, int]]  # pixels as the backbone sees them
    unreadable: int

    @classmethod
    def at(cls, dataset: Dataset, fit: ImageFit) -> Look:
        """Raises ``DataError`` for an image that the backbone cannot take."""
        total = len(dataset)
        if total == 0:
            raise DataError(f"{dataset.describe()}: holds no images")
        count = min(total, _LOOKED_AT)
        images = FittedImages(dataset, fit)
        items = [images[index * total // count] for index in range(count)]
        for item in items:
            if isinstance(item, str):
                raise DataError(item)
        read = [item for item in items if isinstance(item, ReadImage)]
        shapes = [(image.pixels.shape[1], image.pixels.shape[2]) for image in read]
        return cls([image.row for image in read], shapes, count - len(read))

    def describe(self) -> str:
        if not self.rows:
            return f"none of {self.unreadable} could be read"
        sides = [(row.height, row.width) for row in self.rows]
        low, high = min(sides), max(sides)
        text = f"{low[0]} x {low[1]}" + ("" if low == high else f" to {high[0]} x {high[1]}")
        lost = f", {self.unreadable} unreadable" if self.unreadable else ""
        return f"{text} px (of {len(self.rows) + self.unreadable} looked at{lost})"


def output_shapes(
    reader: TokenReader, channels: int, height: int, width: int
) -> Mapping[str, tuple[int, ...]] | None:
    """Shape of each output of one image, found on the meta device.

    None if the backbone cannot be run there. Raises ``RecipeError`` for what it does not give.
    """
    state = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in (*reader.named_parameters(), *reader.named_buffers())
    }
    try:
        with torch.no_grad():
            image = torch.empty(1, channels, height, width, device="meta")
            named = torch.func.functional_call(reader, state, (image,))
    except UserError as error:
        where = "outputs" if "storage" in str(error) else "layers"
        raise RecipeError([Problem(where, str(error))]) from error
    except (RuntimeError, NotImplementedError):
        return None  # it looks at values, of which there are none
    return {name: tuple(tensor.shape[1:]) for name, tensor in named.items()}


@frozen
class Estimate:
    """Bytes on the disk."""

    part: int
    features: int
    needed: int  # at the worst moment
    free: int

    @classmethod
    def of(
        cls,
        config: FeaturesTaskConfig,
        images: int,
        shapes: Sequence[Mapping[str, tuple[int, ...]]],
        output_dir: Path,
    ) -> Estimate:
        """``shapes`` are those of the images that were looked at."""
        width = DTYPES[config.dtype].itemsize
        per_image = sum(_values(each) for each in shapes) / len(shapes) * width
        features = round(per_image * images)
        written = sum(path.stat().st_size for path in output_dir.glob("features/part-*"))
        needed = max(features * (2 if config.merge else 1) - written, 0)
        folder = next(each for each in (output_dir, *output_dir.resolve().parents) if each.exists())
        part = round(per_image * min(config.rows_per_part, images))
        return cls(part, features, needed, shutil.disk_usage(folder).free)

    def require_room(self, output_dir: Path) -> None:
        """Raises ``OutputError`` where the features will not fit."""
        if self.needed > self.free:
            raise OutputError(
                f"{output_dir}: the features need about {mib(self.needed)} there, "
                f"{mib(self.free)} are free\n"
                "    make room, choose another --output-dir, fewer outputs or layers, or dtype = "
                '"fp16"; merge = false needs half of it'
            )


def _values(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def mib(count: int) -> str:
    return f"{count / _MIB:,.1f} MiB"
