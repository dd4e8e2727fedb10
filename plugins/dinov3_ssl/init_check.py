"""Whether weights mean in a run what they meant in their own: settings of the backbone, images.

Names and shapes do not show everything: twelve heads of 64 and six of 128 look alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.errors import Problem, suggest
from dinov3_framework.kinds import BackboneConfig
from dinov3_framework.recipes.toml_text import inline
from dinov3_framework.weights.source import WeightSource
from dinov3_ssl.configs import InitFromConfig

_IMAGES = "images"
_TOLERANCE = 1e-4  # of means and deviations of values in 0..1


def setting_problems(
    init: InitFromConfig, backbone: BackboneConfig, source: WeightSource
) -> Iterator[Problem]:
    """Settings in which the run's backbone differs from the weights' and may not.

    Backbones of different families share no settings: of them names and shapes say all.
    """
    ours, theirs = backbone.evaluation_settings(), source.config.evaluation_settings()
    for name in init.differing:
        if name != _IMAGES and name not in ours:
            hint = suggest(name, [_IMAGES, *ours])
            yield Problem("init_from.differing", f"there is no setting {name!r} to compare", hint)
    # A file of somebody else's format may not tell all of it.
    theirs_is = "that of the weights is" + ("" if source.layout is None else ", or is taken to be,")
    for name in differing_settings(backbone, source.config):
        if name not in init.differing:
            value = _shown(theirs[name])
            yield Problem(
                f"backbone.{name}",
                f"is {_shown(ours[name])}, and {theirs_is} {value}",
                f"take {value}, or if this is meant: {_allow(init, name)}",
            )


def differing_settings(one: BackboneConfig, other: BackboneConfig) -> list[str]:
    """Settings that both configs have, if they are of one family, and in which they differ."""
    ours, theirs = one.evaluation_settings(), other.evaluation_settings()
    return [n for n in ours if n in theirs and ours[n] != theirs[n]] if _related(one, other) else []


def _related(one: BackboneConfig, other: BackboneConfig) -> bool:
    """Whether both configs are of one family: sizes of it, or the family's own."""
    families = [c for c in type(one).__mro__ if issubclass(c, BackboneConfig)]
    families.remove(BackboneConfig)
    return any(isinstance(other, family) for family in families)


def image_problems(
    init: InitFromConfig, images: ImagesConfig, source: WeightSource
) -> Iterator[Problem]:
    """Images unlike those that the weights were trained on: a loss of quality that nobody sees."""
    theirs = source.images
    if _IMAGES in init.differing or _alike(images, theirs):
        return
    values = {"channels": theirs.channels, "mean": theirs.mean, "std": theirs.std}
    yield Problem(
        _IMAGES,
        f"channels = {images.channels}, mean = {inline(images.mean)} and std = "
        f"{inline(images.std)} are not what the weights were trained with",
        f"take {_IMAGES} = {inline(values)}, or if this is meant: {_allow(init, _IMAGES)}",
    )


def _alike(ours: ImagesConfig, theirs: ImagesConfig) -> bool:
    def close(some: Sequence[float], others: Sequence[float]) -> bool:
        return all(
            math.isclose(a, b, abs_tol=_TOLERANCE) for a, b in zip(some, others, strict=True)
        )

    same = ours.channels == theirs.channels
    return same and close(ours.mean, theirs.mean) and close(ours.std, theirs.std)


def _allow(init: InitFromConfig, name: str) -> str:
    return f"init_from.differing = {inline([*init.differing, name])}"


def _shown(value: object) -> str:
    return "left out" if value is None else inline(value)
