"""Which images are shown, at what size a backbone sees them, and its features of their patches."""

from __future__ import annotations

import fnmatch
import itertools
import logging
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from dinov3_figures.configs import VisualizeConfig
from dinov3_framework import (
    Backbone,
    CorruptSampleError,
    DataError,
    Dataset,
    LoadedBackbone,
    Problem,
    RecipeError,
    Sample,
    normalize,
)
from dinov3_framework.data.images import resize
from dinov3_framework.errors import printable, suggest
from dinov3_framework.runtime import collectives
from dinov3_framework.runtime.agreement import OwnErrors, gather_from_all_ranks

# Below the framework's logger, whose handlers write run.log.
log = logging.getLogger("dinov3_framework.plots")

_COUNT = 8  # images, unless the recipe says which or how many
_MOST = 200  # images that names may match before a count has to be given
_TRIES = 50  # samples tried for one picture before it is left out
_SEARCHED = 10_000  # names among which one that was meant is looked for
_MOST_PATCHES = 2**16  # of one image: attention takes memory or time with their square


@attrs.frozen(eq=False)
class Seen:
    """One image as the backbone saw it, and the features of its patches."""

    name: str
    label: str  # its class, or empty
    original: tuple[int, int]  # height and width of the sample, in pixels
    image: Tensor  # uint8 [C, H, W]
    features: Tensor  # float32 [h, w, D], on the CPU


# --------------------------------------------------------------------------- which
def choose(dataset: Dataset, names: Sequence[str] | None, count: int | None) -> list[Sequence[int]]:
    """For each picture the samples that it may show; the first that can be decoded is taken.

    Pictures are spread evenly over the samples that ``names`` pick (in the order of the names, then
    the dataset's), or over all. Raises ``DataError`` for an empty dataset and ``RecipeError`` for a
    name that picks nothing.
    """
    if len(dataset) == 0:
        raise DataError(f"{dataset.describe()}: holds no images to show")
    pool: Sequence[int] = range(len(dataset))
    if names is not None:
        pool = _named(dataset, names)
        if count is None and len(pool) > _MOST:
            message = f"pick {len(pool):,} images, more than {_MOST}"
            raise RecipeError([Problem("names", message, "say by count how many of them to show")])
    shown = min(count or (_COUNT if names is None else len(pool)), len(pool))
    edges = [place * len(pool) // shown for place in range(shown + 1)]
    return [pool[start:stop] for start, stop in itertools.pairwise(edges)]


def _named(dataset: Dataset, patterns: Sequence[str]) -> list[int]:
    known = [dataset.name(index) for index in range(len(dataset))]
    found: dict[int, None] = {}
    problems = []
    for place, pattern in enumerate(patterns):
        # By equality too: a name may hold what a pattern takes for a wildcard.
        hits = [i for i, n in enumerate(known) if n == pattern or fnmatch.fnmatchcase(n, pattern)]
        if not hits:
            hint = suggest(pattern, known[:_SEARCHED])
            if not hint.startswith("did you mean"):
                shown = ", ".join(map(repr, known[:3]))
                hint = f"names are like {shown}; * stands for any letters"
            message = f"no sample is named {pattern!r}; {dataset.describe()}"
            problems.append(Problem(f"names[{place}]", message, hint))
        found |= dict.fromkeys(hits)
    if problems:
        raise RecipeError(problems)
    return list(found)


# --------------------------------------------------------------------------- how large
def seen_shape(height: int, width: int, size: int | None, side: str, patch: int) -> tuple[int, int]:
    """(height, width) in pixels that an image is resized to: whole patches, at least one."""
    reference = min(height, width) if side == "shorter" else max(height, width)
    scale = 1.0 if size is None else size / reference
    rows, columns = (max(round(length * scale / patch), 1) for length in (height, width))
    return rows * patch, columns * patch


# --------------------------------------------------------------------------- looking
def look(
    subject: LoadedBackbone,
    dataset: Dataset,
    choice: Sequence[Sequence[int]],
    config: VisualizeConfig,
) -> list[Seen]:
    """Show every chosen image to the backbone, on its own device; processes share the work.

    Call it on every process; all get everything, in the order of ``choice``. Pictures of which no
    sample can be decoded are left out with a warning. Raises ``DataError`` on every process where
    none is left; an error of one process ends all.
    """
    rank, world = collectives.rank(), collectives.world_size()

    def own_share() -> list[Seen | None]:
        return [_look_at(subject, dataset, each, config) for each in choice[rank::world]]

    with OwnErrors():
        shares = gather_from_all_ranks(own_share)
    # Picture p is the (p // world)-th of process p % world.
    every = [shares[place % world][place // world] for place in range(len(choice))]
    seen = [each for each in every if each is not None]
    if not seen:
        raise DataError(f"{dataset.describe()}: none of the chosen images can be decoded")
    return seen


def _look_at(
    subject: LoadedBackbone, dataset: Dataset, candidates: Sequence[int], config: VisualizeConfig
) -> Seen | None:
    found = readable(dataset, candidates)
    if found is None:
        return None
    (name, sample), spec, patch = found, subject.images, subject.backbone.patch_size
    image = sample.image
    if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != spec.channels:
        given = f"{str(image.dtype).removeprefix('torch.')} {list(image.shape)}"
        raise DataError(f"{name} is {given} where uint8 [{spec.channels}, H, W] is expected")
    original = image.shape[1], image.shape[2]
    shape = seen_shape(*original, config.size or subject.size, config.side, patch)
    patches = shape[0] * shape[1] // patch**2
    if patches > _MOST_PATCHES:
        raise DataError(
            f"{name} ({original[0]} x {original[1]} px) would be seen at {shape[0]} x {shape[1]} "
            f"px, {patches:,} patches, of which {_MOST_PATCHES:,} at most are taken; lower size, "
            'or set side = "longer"'
        )
    image = resize(image, *shape)
    features = patch_grid(subject.backbone, normalize(image, spec), config.layer)
    return Seen(name, _class_name(dataset, sample.label), original, image, features)


def readable(dataset: Dataset, candidates: Sequence[int]) -> tuple[str, Sample] | None:
    """Name and sample of the first candidate that can be decoded, of not too many."""
    for index in candidates[:_TRIES]:
        try:
            sample = dataset[index]
        except CorruptSampleError as error:
            log.warning("left out, since it cannot be decoded: %s", error)
            continue
        # Names of files may hold bytes that are no text.
        return printable(dataset.name(index), kept=""), sample
    return None


def _class_name(dataset: Dataset, label: int | None) -> str:
    if label is None:
        return ""
    return dataset.classes[label] if dataset.classes else f"class {label}"


@torch.no_grad()
def patch_grid(backbone: Backbone, image: Tensor, layer: int = -1) -> Tensor:
    """Patch features [h, w, D] of a layer, after the norm, of one normalized image [C, H, W].

    They are float32 and on the CPU. Where the backbone is sharded, call it on every process with
    the same image. Raises ``DataError`` where they are not finite.
    """
    parameter = next(backbone.parameters(), None)
    if parameter is not None:
        image = image.to(parameter.device, parameter.dtype)
    index = layer % backbone.n_layers
    (grid,) = backbone.get_intermediate_layers(image[None], n=[index], reshape=True)
    features: Tensor = grid[0].float().cpu().permute(1, 2, 0).contiguous()
    if not features.isfinite().all():
        raise DataError(
            f"layer {index} gives patch features that are not finite; are the weights sound?"
        )
    return features
