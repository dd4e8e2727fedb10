"""Published components by name, as ``torch.hub`` asks for them; without a registry.

Needs torch, numpy and attrs alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from attrs import frozen

from dinov3_framework.configs import replace
from dinov3_framework.contracts.layouts import Layout, Published
from dinov3_framework.errors import CheckpointError, UnknownNameError
from dinov3_framework.kinds import KINDS, Component
from dinov3_framework.weights._files import open_weights
from dinov3_framework.weights.locations import local_file
from dinov3_framework.weights.source import WeightSource


@frozen
class PlainCatalog:
    """What some packages offer; a ``Catalog`` as a registry is one."""

    components: Sequence[Component]
    layouts: Sequence[Layout]
    published: Mapping[str, Published]

    @classmethod
    def of(cls, *packages: str) -> PlainCatalog:
        """What packages have under ``components.COMPONENTS`` and ``.PUBLISHED``, and
        ``layouts.LAYOUTS``."""

        def all_of(module: str, name: str) -> list[Any]:
            modules = [importlib.import_module(f"{package}.{module}") for package in packages]
            return [each for found in modules for each in getattr(found, name)]

        published = {each.name: each for each in all_of("components", "PUBLISHED")}
        return cls(all_of("components", "COMPONENTS"), all_of("layouts", "LAYOUTS"), published)

    def build(self, config: Any, /, **runtime: Any) -> Any:
        for component in self.components:
            if component.config is type(config):
                return component.resolve()(config, **runtime)
        raise UnknownNameError(f"no component has the config class {type(config).__name__}")

    def config_of(self, kind: str, name: str, values: Mapping[str, Any], /) -> Any:
        known = {c.name: c for c in self.components if issubclass(c.config, KINDS[kind].config)}
        if name not in known:
            raise UnknownNameError(f"no {kind} is named {name!r} here; known: {', '.join(known)}")
        # JSON and TOML have lists where configs have tuples.
        plain = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return known[name].config(**plain)


def load_published(
    catalog: PlainCatalog,
    name: str,
    *,
    pretrained: bool = True,
    weights: str | Path | None = None,
    check_hash: bool = False,
    unused: Sequence[str] = (),
    runtime: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Any:
    """A published backbone, in eval mode, on the CPU.

    ``weights`` is the name of a training set (``LVD1689M``, the default, or ``SAT493M``), a path,
    or a URL; ``pretrained=False`` gives random weights and reads nothing. ``check_hash`` compares
    the file's SHA-256 with the digits in its name. ``unused`` are names, or patterns with ``*``, of
    tensors that may be left over. ``fields`` change the backbone's config, such as
    ``drop_path_rate=0.1``. Components of other kinds are built with ``runtime``. Raises
    ``CheckpointError`` where the file cannot be had, is damaged, or is not of this backbone.
    """
    published = catalog.published[name]
    if not pretrained:
        expected = published.file(None if weights is None else str(weights)) or published.default
        config, images = replace(expected.config, **fields), expected.images
        module = catalog.build(config, **(runtime or {}))
    else:
        with open_weights(local_file(published, weights, check_hash=check_hash)) as opened:
            found = WeightSource.recognize(opened, catalog, kind=published.kind, unused=unused)
            wanted = published.default.config
            if type(found.config) is not type(wanted):
                raise CheckpointError(
                    f"{found.path} holds another {published.kind} than {name}: "
                    f"{_described(found.config)}, not {_described(wanted)}"
                )
            found = attrs.evolve(found, config=replace(found.config, **fields))
            module, images = found.load_state(found.build(**(runtime or {}))), found.images
    module.images = images
    return module.eval()


def _described(config: Any) -> str:
    """The first line of a config's docstring: ``DINOv3's ViT-S/16, 21.6M parameters``."""
    text = (type(config).__doc__ or type(config).__name__).strip().splitlines()[0].rstrip(".")
    width, depth = getattr(config, "embed_dim", None), getattr(config, "depth", None)
    return f"{text} ({width} wide, {depth} deep)" if width and depth else text
