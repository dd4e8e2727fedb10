"""Turn configs into plain TOML values: the way back from a typed recipe to its text."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any, Protocol

import attrs

from dinov3_framework.kinds import KINDS, Registered
from dinov3_framework.recipes.option_types import (
    NONE,
    element_types,
    kind_of,
    resolved_fields,
    without_none,
)
from dinov3_framework.recipes.toml_text import inline
from dinov3_framework.schedules import Constant, Schedule, Share


class Components(Protocol):
    """What recipes need to know of components; the registry is one."""

    def names(self, kind: str, /) -> list[str]: ...
    def get(self, kind: str, name: str, /) -> Registered: ...
    def suggest(self, kind: str, name: str, /) -> str: ...
    def of_config(self, config: Any, /) -> Registered: ...


def unstructure(registry: Components, config: Any) -> dict[str, Any]:
    """The complete recipe of a config: every field that is not None by default, as TOML values.

    The inverse of structuring. A component is preceded by its ``use``, a whole recipe by its
    ``task``.
    """
    registered = registry.of_config(config)
    key = KINDS[registered.kind].selector
    return {key: registered.component.name, **_plain_fields(config, registry)}


def to_toml_value(value: Any) -> str:
    """A field's value as a recipe would spell it, on one line."""
    return inline(_plain(value, type(value), None))


def _plain_fields(config: Any, registry: Components | None) -> dict[str, Any]:
    plain = {}
    for attribute in resolved_fields(type(config)):
        value = getattr(config, attribute.name)
        if value is not None:
            plain[attribute.name] = _plain(value, attribute.type, registry)
        elif attribute.default is not None and registry is not None:
            plain[attribute.name] = NONE  # left out, the field would come back with its default
    return plain


def _plain(value: Any, declared: Any, registry: Components | None) -> Any:
    declared = without_none(declared)
    if isinstance(value, Share):
        return str(value)
    if isinstance(value, Constant):
        return value.value
    if isinstance(value, Schedule):
        return {"use": value.use, **_plain_fields(value, registry)}
    if attrs.has(type(value)):
        if registry is not None and kind_of(declared):
            return unstructure(registry, value)
        return _plain_fields(value, registry)
    if isinstance(value, Mapping):
        inner = typing.get_args(declared)[1:] or (Any,)
        return {key: _plain(item, inner[0], registry) for key, item in value.items()}
    if isinstance(value, list | tuple):
        types = element_types(declared, len(value)) or iter([Any] * len(value))
        return [_plain(item, inner, registry) for item, inner in zip(value, types, strict=True)]
    return value
