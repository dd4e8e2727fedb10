"""Published backbones by name, as ``torch.hub`` asks for them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import attrs

from dinov3_framework.configs import replace
from dinov3_framework.contracts.layouts import Published, PublishedFile
from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.errors import CheckpointError
from dinov3_framework.kinds import BackboneConfig
from dinov3_framework.weights.downloads import (
    check_digest,
    digest_in,
    fetch_weights,
    is_url,
    published_url,
)
from dinov3_framework.weights.filling import fill
from dinov3_framework.weights.recognition import Catalog, Recognised, built, recognise
from dinov3_framework.weights.sources import open_source

log = logging.getLogger(__name__)


def load_published(
    catalog: Catalog,
    name: str,
    *,
    pretrained: bool = True,
    weights: str | Path | None = None,
    check_hash: bool = False,
    **fields: Any,
) -> Backbone:
    """A published backbone, in eval mode, on the CPU.

    ``weights`` is the name of a training set (``LVD1689M``, the default, or ``SAT493M``), a path,
    or a URL; ``pretrained=False`` gives random weights and reads nothing. ``check_hash`` compares
    the file's SHA-256 with the digits in its name. ``fields`` change the backbone's config, such
    as ``drop_path_rate=0.1``. Raises ``CheckpointError`` where the file is not to be had, damaged,
    or not of this backbone.
    """
    published = catalog.published[name]
    if not pretrained:
        expected = _of_training_set(published, weights) or _default(published)
        backbone: Backbone = catalog.build(replace(expected.config, **fields))
        backbone.images = expected.images
        return backbone.eval()
    path = local_file(published, weights, check_hash=check_hash)
    with open_source(path) as source:
        found = recognise(source, catalog)
        _require(published, found)
        found = attrs.evolve(found, config=replace(found.config, **fields))
        for note in found.notes:
            log.warning("%s: %s", path, note)
        backbone = fill(built(found, catalog), found)
    backbone.images = found.images
    return backbone.eval()


def published_file(catalog: Catalog, source: str) -> PublishedFile | None:
    """The published file that a name, or a path or URL that ends in the file's name, stands for."""
    name, _, training_set = source.partition("@")
    if name in catalog.published:
        return _of_training_set(catalog.published[name], training_set or None)
    last = source.partition("?")[0].rpartition("/")[2]
    files = (file for each in catalog.published.values() for file in each.files.values())
    return next((file for file in files if file.file == last), None)


def local_file(
    published: Published, weights: str | Path | None = None, *, check_hash: bool = False
) -> Path:
    """The file of published weights on this machine, downloaded if need be."""
    file = _of_training_set(published, weights)
    if file is not None:
        url = published_url(published.name, file.file)
        return fetch_weights(url, check_hash=file.digest if check_hash else None)
    text = str(weights)
    if is_url(text):
        return fetch_weights(text, check_hash=_digest(text.partition("?")[0], check_hash))
    path = Path(text).expanduser()
    if not path.exists():
        sets = ", ".join(published.files)
        raise CheckpointError(
            f"{published.name}: there is no file {text}; weights is a path, a URL or the name of a "
            f"training set ({sets})"
        )
    if digest := _digest(path.name, check_hash):
        check_digest(path, digest)
    return path


def _digest(name: str, wanted: bool) -> str | None:
    """The digits in a file's name, where they are to be compared."""
    if not wanted:
        return None
    digits = digest_in(name)
    if digits is None:
        raise CheckpointError(
            f"{name} has no hash in its name to compare with, as in -08c60483.pth; leave "
            "check_hash out"
        )
    return digits


def _of_training_set(published: Published, weights: str | Path | None) -> PublishedFile | None:
    """The file that the name of a training set stands for; none for a path or a URL."""
    if weights is None:
        return _default(published)
    return published.files.get(str(weights).upper())


def _default(published: Published) -> PublishedFile:
    return next(iter(published.files.values()))


def _require(published: Published, found: Recognised) -> None:
    """Raise unless the file holds this backbone and no other."""
    wanted = _default(published).config
    if type(found.config) is not type(wanted):
        raise CheckpointError(
            f"{found.path} holds another backbone than {published.name}: "
            f"{_called(found.config)}, not {_called(wanted)}"
        )


def _called(config: BackboneConfig) -> str:
    """What a config's docstring calls it: ``DINOv3's ViT-S/16, 21.6M parameters``."""
    said = (type(config).__doc__ or type(config).__name__).strip().splitlines()[0].rstrip(".")
    width = getattr(config, "embed_dim", None)
    depth = getattr(config, "depth", None)
    return f"{said} ({width} wide, {depth} deep)" if width and depth else said
