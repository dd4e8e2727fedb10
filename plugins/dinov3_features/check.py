"""What a check of a ``features`` recipe finds: mistakes, sizes, and whether the disk holds it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from dinov3_features.configs import FeaturesTaskConfig
from dinov3_features.extract import DTYPES
from dinov3_framework.contracts.data import Dataset
from dinov3_framework.data.images import ImageFit
from dinov3_framework.data.inference import (
    FitSamples,
    FittedImages,
    InferenceBatch,
    InferenceLoader,
)
from dinov3_framework.data.tokens import TokenReader, layers_complaint
from dinov3_framework.errors import DataError, OutputError, Problem, RecipeError, UserError
from dinov3_framework.parallel.check import parallel_problems
from dinov3_framework.weights.loaded import LoadedBackbone

_LOOKED_AT = 16  # images that a check reads


def problems(
    config: FeaturesTaskConfig, subject: LoadedBackbone, fit: ImageFit, processes: int
) -> Iterator[Problem]:
    """What is wrong whatever the images are."""
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
    if config.format == "npy" and config.dtype == "bf16":
        yield Problem("dtype", "NumPy files know no bf16", 'take "fp16" or format = "safetensors"')
    if config.format == "npy" and not config.merge:
        hint = 'leave merge out, or take format = "safetensors"'
        yield Problem("merge", "parts are safetensors files, only the merge makes npy", hint)
    if complaint := fit.complaint():
        yield Problem(*complaint)
    if complaint_of_layers := layers_complaint(config.layers, subject.backbone.n_layers):
        yield Problem("layers", complaint_of_layers)


def read_some(dataset: Dataset, fit: ImageFit) -> InferenceBatch[FittedImages]:
    """A few images spread over the dataset.

    Raises ``DataError`` for one that the backbone cannot take.
    """
    count = min(len(dataset), _LOOKED_AT)
    indices = [place * len(dataset) // count for place in range(count)]
    loader = InferenceLoader(dataset, FitSamples(fit), [indices], collate=FittedImages.collate)
    batch = loader.read(indices)
    for index, error in batch.refused.items():
        raise DataError(f"{dataset.name(index)}: {error}")
    return batch


def describe_sizes(batch: InferenceBatch[FittedImages]) -> str:
    """The sizes of some images as they were read."""
    if batch.data is None:
        return f"none of {len(batch.indices)} could be read"
    low, high = min(batch.data.sizes), max(batch.data.sizes)
    text = f"{low[0]} x {low[1]}" + ("" if low == high else f" to {high[0]} x {high[1]}")
    lost = f", {len(batch.corrupt)} unreadable" if batch.corrupt else ""
    return f"{text} px (of {len(batch.indices)} looked at{lost})"


def feature_rows(
    config: FeaturesTaskConfig,
    reader: TokenReader,
    fit: ImageFit,
    batch: InferenceBatch[FittedImages],
    images: int,
) -> list[tuple[str, str]]:
    """What the files will hold of all ``images``, and the room they take.

    Raises ``OutputError`` where they will not fit, ``RecipeError`` for what the backbone lacks.
    """
    seen = [] if batch.data is None else batch.data.shapes
    found = {shape: _output_shapes(reader, shape) for shape in sorted(set(seen))}
    shapes = {shape: outputs for shape, outputs in found.items() if outputs is not None}
    if not shapes or len(shapes) < len(found):
        return [("disk", "the shapes of the features are known when they are there")]
    rows = []
    for name in next(iter(shapes.values())):
        different = {each[name] for each in shapes.values()}
        low, high = min(different), max(different)
        text = str(list(low)) if low == high else f"{list(low)} to {list(high)}"
        rows.append((name, f"{text} {config.dtype}"))
    values = sum(torch.Size(each).numel() for shape in seen for each in shapes[shape].values())
    per_image = values / len(seen) * DTYPES[config.dtype].itemsize
    about = "about " if fit.ragged else ""
    more = ", twice that while parts are merged" if config.merge else ""
    output_dir = Path(config.output_dir or "runs")
    free = _require_room(output_dir, round(per_image * images), config.merge)
    part = round(per_image * min(config.rows_per_part, images))
    return [
        *rows,
        ("size", f"{about}{_mib(round(per_image * images))}{more}"),
        ("free", f"{_mib(free)} at {output_dir}"),
        ("part", f"{about}{_mib(part)} in each process's memory"),
    ]


def _output_shapes(
    reader: TokenReader, image: tuple[int, int, int]
) -> dict[str, tuple[int, ...]] | None:
    """Shape of each output of one image, found on the meta device.

    None if the backbone cannot be run there. Raises ``RecipeError`` for what it does not give.
    """
    state = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in (*reader.named_parameters(), *reader.named_buffers())
    }
    try:
        with torch.no_grad():
            pixels = torch.empty(1, *image, device="meta")
            named = torch.func.functional_call(reader, state, (pixels,))
    except UserError as error:
        where = "outputs" if "storage" in str(error) else "layers"
        raise RecipeError([Problem(where, str(error))]) from error
    except (RuntimeError, NotImplementedError):
        return None  # it looks at values, of which there are none
    return {name: tuple(tensor.shape[1:]) for name, tensor in named.items()}


def _require_room(output_dir: Path, features: int, merge: bool) -> int:
    """Bytes that are free; raises ``OutputError`` where ``features`` bytes will not fit."""
    written = sum(path.stat().st_size for path in output_dir.glob("features/part-*"))
    needed = max(features * (2 if merge else 1) - written, 0)
    folder = next(each for each in (output_dir, *output_dir.resolve().parents) if each.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(
            f"{output_dir}: the features need about {_mib(needed)} there, {_mib(free)} are free\n"
            "    make room, choose another --output-dir, fewer outputs or layers, or dtype = "
            '"fp16"; merge = false needs half of it'
        )
    return free


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
