"""Backbones without a registry: for those who have torch, numpy and attrs and nothing more."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import frozen

from dinov3_framework.contracts.layouts import Layout, Published
from dinov3_framework.errors import UnknownNameError
from dinov3_framework.kinds import Component


@frozen
class PlainCatalog:
    """Some families of backbones, given by hand; a ``recognition.Catalog``."""

    components: Sequence[Component]
    layouts: Sequence[Layout]
    published: Mapping[str, Published]

    @classmethod
    def of(cls, *packages: str) -> PlainCatalog:
        """What packages have under ``components.COMPONENTS``, ``layouts.LAYOUTS`` and
        ``published.PUBLISHED``."""

        def all_of(module: str, name: str) -> list[Any]:
            modules = [importlib.import_module(f"{package}.{module}") for package in packages]
            return [each for found in modules for each in getattr(found, name)]

        return cls(
            components=all_of("components", "COMPONENTS"),
            layouts=all_of("layouts", "LAYOUTS"),
            published={each.name: each for each in all_of("published", "PUBLISHED")},
        )

    def build(self, config: Any, /) -> Any:
        for component in self.components:
            if component.config is type(config):
                return component.resolve()(config)
        raise UnknownNameError(f"no backbone has the config class {type(config).__name__}")

    def config_of(self, kind: str, name: str, values: Mapping[str, Any], /) -> Any:
        for component in self.components:
            if component.name == name:
                # JSON and TOML have lists where configs have tuples.
                plain = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
                return component.config(**plain)
        known = ", ".join(component.name for component in self.components)
        raise UnknownNameError(f"no {kind} is named {name!r} here; known: {known}")
