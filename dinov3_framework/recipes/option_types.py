"""Name the types that a config's field may have, and the values that stand where they should."""

from __future__ import annotations

import functools
import operator
import typing
from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Any, Literal

import attrs

from dinov3_framework.errors import PluginError
from dinov3_framework.kinds import KINDS
from dinov3_framework.recipes.toml_text import inline
from dinov3_framework.schedules import Schedule, Span

NONE = "none"  # how a recipe says None; TOML has no null

_WORDS: dict[Any, str] = {int: "integer", float: "number", bool: "boolean", str: "string"}


def kind_of(declared: Any) -> str | None:
    """The kind whose base class this is: its tables choose a component by its selector."""
    return next((kind.name for kind in KINDS.values() if kind.config is declared), None)


def without_none(declared: Any) -> Any:
    """X, of ``X | None``; other types as they are."""
    if typing.get_origin(declared) in (typing.Union, UnionType):
        members = [member for member in typing.get_args(declared) if member is not NoneType]
        if len(members) < len(typing.get_args(declared)):
            return functools.reduce(operator.or_, members)
    return declared


def type_name(declared: Any) -> str:
    """A type for people; ``TypeError`` if a recipe cannot spell it."""
    inner = without_none(declared)
    if inner is not declared:
        return f'{type_name(inner)} or "{NONE}"'
    if declared in _WORDS:
        return _WORDS[declared]
    if declared is Schedule:
        return "number or schedule"
    if declared == Span:
        return 'integer or share of the run (such as "10%")'
    if kind := kind_of(declared):
        return f"{'recipe' if kind == 'task' else kind} ({KINDS[kind].selector} = ...)"
    if attrs.has(declared):
        return "table"
    origin, parts = typing.get_origin(declared), typing.get_args(declared)
    if origin is Literal and all(isinstance(part, str) for part in parts):
        return " or ".join(map(inline, parts))
    if origin is tuple and parts:
        return _array_name(parts)
    if origin in (dict, Mapping) and parts[0] is str:
        return f"table of name = {type_name(parts[1])}"
    raise TypeError(f"{declared} cannot be spelled in a recipe")


def _array_name(parts: tuple[Any, ...]) -> str:
    if len(parts) == 2 and parts[1] is Ellipsis:
        return f"array of {_plural(parts[0])}"
    if len(set(parts)) == 1:
        return f"array of {len(parts)} {_plural(parts[0])}"
    return f"array of {', '.join(map(type_name, parts))}"


def _plural(declared: Any) -> str:
    name = type_name(declared)
    return f"{name}s" if declared in _WORDS or name == "table" else f"({name})"


def describe_value(value: Any) -> str:
    """What stands where something else was expected."""
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list | tuple):
        return "an array"
    word = next((word for cls, word in _WORDS.items() if type(value) is cls), type(value).__name__)
    try:
        text = inline(value)
    except TypeError:  # a Python object, given to Registry.build
        text = repr(value)
    return f"{word} {text if len(text) <= 60 else text[:57] + '...'}"


def resolved_fields(cls: type) -> list[attrs.Attribute[Any]]:
    """A config's fields with their types; ``PluginError`` if one has a type no recipe can spell."""
    try:
        attrs.resolve_types(cls)
    except NameError as error:
        raise PluginError(
            f"{cls.__module__}.{cls.__name__}: the type of a field cannot be resolved ({error}); "
            "import what configs mention at the top of the module"
        ) from error
    fields = [attribute for attribute in attrs.fields(cls) if attribute.init]
    for attribute in fields:
        try:
            type_name(attribute.type)
        except TypeError as error:
            where = f"{cls.__module__}.{cls.__name__}.{attribute.name}"
            raise PluginError(f"{where}: the type {error}") from error
    return fields


def nested_config(declared: Any) -> type | None:
    """The config class whose fields a recipe spells out below a field of this type, if any."""
    declared = without_none(declared)
    if typing.get_origin(declared) in (dict, Mapping):
        declared = without_none(typing.get_args(declared)[1])
    elif typing.get_origin(declared) is tuple and typing.get_args(declared)[1:] == (Ellipsis,):
        declared = typing.get_args(declared)[0]
    if declared is Schedule or kind_of(declared) or not attrs.has(declared):
        return None
    return typing.cast(type, declared)


def element_types(declared: Any, length: int) -> Iterator[Any] | None:
    """The type of each element of an array of ``length``; None if a tuple has another length."""
    parts = typing.get_args(declared)
    if len(parts) == 2 and parts[1] is Ellipsis:
        return iter([parts[0]] * length)
    return iter(parts) if len(parts) == length else None
