"""Opens weights of any kind by path, URL or published name, and finds the backbone in them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tomli
import torch

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.errors import CheckpointError, UserError
from dinov3_framework.recipes.compose import compose
from dinov3_framework.recipes.structure import structure_recipe
from dinov3_framework.registry import Registry
from dinov3_framework.runtime import collectives
from dinov3_framework.weights import sharded as sharded_weights
from dinov3_framework.weights.downloads import fetch_weights, is_url
from dinov3_framework.weights.hub import local_file
from dinov3_framework.weights.info import BackboneInfo
from dinov3_framework.weights.recognition import Opened, Recognised, recognise
from dinov3_framework.weights.sources import open_source

log = logging.getLogger(__name__)

EXPORT = "exports/teacher_backbone.safetensors"  # below a run's folder
RECIPE = "recipe.toml"


def exists(source: str | Path, registry: Registry) -> bool:
    """Whether ``source`` is at least a path that is there, a URL, or a published name."""
    text = str(source)
    return Path(text).exists() or is_url(text) or text.partition("@")[0] in registry.published


@contextmanager
def open_backbone(
    source: str | Path,
    registry: Registry,
    *,
    network: str = "teacher",
    images: ImagesConfig | None = None,
    projectors: bool = False,
    thorough: bool = True,
) -> Iterator[Recognised]:
    """The backbone in ``source``, recognised and ready to be read; nothing is built or filled.

    ``source`` is a path to a file or folder of any known format, a run's output folder, a URL, or
    a published name such as ``dinov3_vits16`` or ``dinov3_vitl16@SAT493M``. Of training
    checkpoints ``network`` says which network is meant, ``teacher`` or ``student``. ``images``
    overrules what the weights say of their images. With ``projectors`` a run's folder means its
    checkpoints, which have them, rather than its export. Shards of checkpoints are compared with
    their hashes, which takes time, unless not ``thorough``: where no values are read.

    What a person should know is logged as a warning. Raises ``CheckpointError`` for what is not
    there or not usable.
    """
    path = _located(str(source), registry)
    with _opened(path, network, projectors, thorough) as opened:
        info = None
        if isinstance(opened, sharded_weights.ShardedSource):
            info = _of_recipe(opened.path, registry)
        found = recognise(opened, registry, network=network, images=images, info=info)
        for note in found.notes if collectives.is_main() else ():
            log.warning("%s: %s", path, note)
        yield found


def _located(text: str, registry: Registry) -> Path:
    """The file or folder that is meant, downloaded if need be."""
    path = Path(text).expanduser()
    if path.exists():
        return path
    if is_url(text):
        return fetch_weights(text)
    name, _, training_set = text.partition("@")
    if name in registry.published:
        published = registry.published[name]
        if training_set and training_set.upper() not in published.files:
            raise CheckpointError(
                f"{name} is not published with weights of {training_set!r}; known: "
                f"{', '.join(published.files)}"
            )
        return local_file(published, training_set or None)
    raise CheckpointError(
        f"there is no file {text}, nor are weights published under this name; "
        f"published: {', '.join(sorted(registry.published)) or 'none'}"
    )


@contextmanager
def _opened(path: Path, network: str, projectors: bool, thorough: bool) -> Iterator[Opened]:
    if path.is_dir():
        export = path / EXPORT
        kept = projectors and sharded_weights.checkpoint_in(path) is not None
        if network == "teacher" and export.is_file() and not kept:
            path = export
        elif sharded_weights.is_checkpoint(path):
            yield sharded_weights.one(path, thorough)
            return
        elif (folder := sharded_weights.checkpoint_in(path)) is not None:
            yield sharded_weights.newest(folder, thorough)
            return
    with open_source(path) as source:
        yield source


def _of_recipe(checkpoint: Path, registry: Registry) -> BackboneInfo | None:
    """What the recipe of a run says of the backbone in its checkpoints; None if there is none.

    The run's folder is the one above ``checkpoints/step_...``.
    """
    recipe = checkpoint.resolve().parent.parent / RECIPE
    if not recipe.is_file():
        return None
    try:
        config = structure_recipe(registry, compose(recipe))
    except (UserError, OSError, tomli.TOMLDecodeError) as error:
        raise CheckpointError(
            f"{checkpoint} belongs to a run whose recipe cannot be read any more: {error}"
        ) from error
    backbone, images = getattr(config, "backbone", None), getattr(config, "images", None)
    if backbone is None or not isinstance(images, ImagesConfig):
        return None
    component, values = registry.values_of(backbone)
    return BackboneInfo(
        component=component,
        config=values,
        images=images,
        size=_trained_size(registry, config),
        provenance={"checkpoint": checkpoint.name, "run": str(recipe.parent)},
    )


def _trained_size(registry: Registry, config: object) -> int:
    """Pixels of the global crops of a training recipe."""
    images, augmentation = config.images, config.augmentation  # type: ignore[attr-defined]
    with torch.device("meta"):
        backbone = registry.build(config.backbone)  # type: ignore[attr-defined]
    built = registry.build(augmentation, channels=images.channels, patch_size=backbone.patch_size)
    return int(built.views["global"].size)
