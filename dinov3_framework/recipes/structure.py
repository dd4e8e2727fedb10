"""Give a recipe its types: a plain dict in, one frozen config out, or every mistake at once.

Nothing is coerced: ``"7"`` is no integer, ``3.7`` is none either, ``"false"`` and ``1`` are no
booleans. The one exception is an integer where a number is wanted.
"""

from __future__ import annotations

import math
import os
import sys
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import attrs
from attrs import define, field
from cattrs import Converter

from dinov3_framework.configs import InvalidOption
from dinov3_framework.errors import Problem, RecipeError, suggest
from dinov3_framework.kinds import KINDS, TaskConfig
from dinov3_framework.recipes.compose import NO_TASK, Composed, origin_of
from dinov3_framework.recipes.option_types import (
    NONE,
    describe_value,
    element_types,
    kind_of,
    nested_config,
    resolved_fields,
    type_name,
    without_none,
)
from dinov3_framework.recipes.plain import Components
from dinov3_framework.recipes.toml_text import KeyPath, dotted
from dinov3_framework.schedules import SCHEDULES, Constant, Schedule, Share, Span

Fault = tuple[KeyPath, str, str]  # keys that lead to a mistake, what is wrong there, a hint


def structure_recipe(registry: Components, composed: Composed) -> TaskConfig:
    """The typed config of a whole recipe; its key ``task`` says of which class."""
    if "task" not in composed.data:
        raise RecipeError([Problem("task", NO_TASK, "", composed.source)])
    config: TaskConfig = _structure(
        registry, composed.data, TaskConfig, composed.origins, composed.source
    )
    return config


def structure_component(
    registry: Components, kind: str, name: str, values: Mapping[str, Any]
) -> Any:
    """The config of one component, checked as strictly as a recipe's.

    ``values`` may also hold configs and schedules that are already built.
    """
    return _structure(registry, values, registry.get(kind, name).component.config, {}, "")


def _structure(
    registry: Components,
    values: Mapping[str, Any],
    cls: type,
    origins: Mapping[KeyPath, str],
    source: str,
) -> Any:
    try:
        return _converter(registry).structure(values, cls)
    except _Faults as error:
        problems = [
            Problem(dotted(path), message, hint, origin_of(path, origins) or source)
            for path, message, hint in error.faults
        ]
        raise RecipeError(problems) from error


# --------------------------------------------------------------------------- faults
class _Faults(Exception):
    """All that is wrong with a value."""

    def __init__(self, faults: list[Fault]) -> None:
        self.faults = faults
        super().__init__(faults)


def _fault(message: str, hint: str = "", *at: str) -> _Faults:
    return _Faults([(at, message, hint)])


def _mismatch(expected: str, value: Any, hint: str = "") -> _Faults:
    return _fault(f"expected {expected}, found {describe_value(value)}", hint)


@define
class _Collector:
    """Collects what is wrong in a table or an array, so that all of it comes at once."""

    faults: list[Fault] = field(factory=list)

    @contextmanager
    def below(self, *keys: str) -> Iterator[None]:
        """Take what is wrong with the value under ``keys``."""
        try:
            yield
        except _Faults as error:
            self.faults += [((*keys, *path), message, hint) for path, message, hint in error.faults]
        except InvalidOption as error:  # which names a key of the table
            self.faults.append((tuple(error.name.split(".")), error.message, ""))

    def each(self, rows: Iterable[tuple[str, Any, Any]], converter: Converter) -> dict[str, Any]:
        """The values of ``(key, value, type)``."""
        structured = {}
        for key, value, declared in rows:
            with self.below(key):
                structured[key] = converter.structure(value, declared)
        self.refuse()
        return structured

    def refuse(self) -> None:
        if self.faults:
            raise _Faults(self.faults)


# --------------------------------------------------------------------------- types
def _converter(registry: Components) -> Converter:
    """A converter whose hooks are all ours. cattrs asks the last one registered first."""
    converter = Converter()

    def hook(is_meant: Callable[[Any], bool], structure: Callable[..., Any], *more: Any) -> None:
        converter.register_structure_hook_func(
            is_meant, lambda value, declared: structure(value, declared, *more)
        )

    for scalar in (int, float, bool, str):
        converter.register_structure_hook(scalar, _scalar)
    hook(lambda declared: typing.get_origin(declared) is Literal, _literal)
    hook(lambda declared: typing.get_origin(declared) is tuple, _array, converter)
    hook(lambda declared: typing.get_origin(declared) in (dict, Mapping), _mapping, converter)
    hook(lambda declared: without_none(declared) is not declared, _optional, converter)
    hook(lambda declared: declared == Span, _span)
    hook(attrs.has, _table, converter)
    # Predicates by identity: a hook registered for a base class would capture its subclasses.
    hook(lambda declared: declared is Schedule, _schedule, converter)
    hook(lambda declared: kind_of(declared) is not None, _component, registry, converter)
    return converter


def _scalar(value: Any, declared: Any) -> Any:
    if declared is float and type(value) is int:
        return float(value)
    if type(value) is not declared:
        hint = ""
        if declared is bool and isinstance(value, str):
            hint = "booleans are true and false, without quotes"
        elif declared is str and not isinstance(value, Mapping | list):
            hint = "strings need quotes"
        raise _mismatch(type_name(declared), value, hint)
    if declared is int and abs(value) > sys.maxsize:
        raise _fault("is out of bounds: integers have 64 bits")
    if declared is float and math.isnan(value):
        raise _fault("must not be nan")
    if declared is str and "\0" in value:
        raise _fault("holds a NUL character, which no name or path may")
    # Once and for all: to everything else a path that begins so is a folder of that name.
    return os.path.expanduser(value) if declared is str and value.startswith("~/") else value


def _span(value: Any, declared: Any) -> Span:
    share = Share.parse(value) if isinstance(value, str) else value
    if type(share) not in (int, Share):
        raise _mismatch(type_name(declared), value)
    return typing.cast(Span, share)


def _literal(value: Any, declared: Any) -> str:
    choices = typing.get_args(declared)
    if type(value) is str and value in choices:
        return value
    hint = suggest(value, choices) if isinstance(value, str) else ""
    raise _mismatch(type_name(declared), value, hint)


def _optional(value: Any, declared: Any, converter: Converter) -> Any:
    inner = without_none(declared)
    # A recipe turns an optional field off whatever its default or inherited value is.
    if value is None or value == NONE:
        return None
    return converter.structure(value, inner)


def _array(value: Any, declared: Any, converter: Converter) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _mismatch(type_name(declared), value)
    types = element_types(declared, len(value))
    if types is None:
        raise _fault(f"expected {type_name(declared)}, found an array of {len(value)}")
    rows = ((str(n), *row) for n, row in enumerate(zip(value, types, strict=True), 1))
    return tuple(_Collector().each(rows, converter).values())


def _mapping(value: Any, declared: Any, converter: Converter) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _mismatch(type_name(declared), value)
    inner = typing.get_args(declared)[1]
    return _Collector().each(((key, item, inner) for key, item in value.items()), converter)


def _table(value: Any, cls: Any, converter: Converter) -> Any:
    """A config: each field has its own check, so that all complaints come at once."""
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise _mismatch("table", value)
    fields = {attribute.name: attribute for attribute in resolved_fields(cls)}
    collector = _Collector()
    values: dict[str, Any] = {}
    for name, attribute in fields.items():
        if name in value:
            with collector.below(name):
                values[name] = converter.structure(value[name], typing.cast(type, attribute.type))
                if attribute.validator is not None:
                    attribute.validator(None, attribute, values[name])
        elif attribute.default is attrs.NOTHING:
            doc = attribute.metadata.get("doc", "")
            collector.faults.append(((name,), f"missing: {type_name(attribute.type)}", doc))
    for key in sorted(value.keys() - fields.keys()):
        collector.faults.append(((key,), "unknown key", _meant(key, fields)))
    collector.refuse()
    with collector.below():
        return cls(**values)
    raise _Faults(collector.faults)


def _meant(key: str, fields: Mapping[str, attrs.Attribute[Any]]) -> str:
    """What somebody may have meant by a key that is not there."""
    for name, attribute in fields.items():
        if key in attribute.metadata.get("formerly", ()):
            table = nested_config(attribute.type)
            moved = table is not None and key in attrs.fields_dict(table)
            now = f"{name}.{key}" if moved else name
            return f"it is called {now!r} now"
    return suggest(key, list(fields), "keys here")


# --------------------------------------------------------------------------- choices
def _schedule(value: Any, _: Any, converter: Converter) -> Schedule:
    if isinstance(value, Schedule):
        return value
    if type(value) in (int, float):
        return Constant(value=_scalar(value, float))
    if not isinstance(value, Mapping):
        raise _mismatch("number or schedule", value)
    name, rest = _chosen(
        value, "use", "schedule", SCHEDULES, lambda name: suggest(name, [*SCHEDULES])
    )
    schedule: Schedule = converter.structure(rest, SCHEDULES[name])
    return schedule


def _component(value: Any, base: Any, registry: Components, converter: Converter) -> Any:
    if isinstance(value, base):
        return value
    kind = typing.cast(str, kind_of(base))
    key = KINDS[kind].selector
    if not isinstance(value, Mapping):
        hint = f'write {{ {key} = "..." }}: it picks the {kind}'
        if kind == "task":
            hint = 'a recipe in a file is a table that says extends = "..."'
        raise _mismatch("table", value, hint)
    known = registry.names(kind)
    name, rest = _chosen(value, key, kind, known, lambda name: registry.suggest(kind, name))
    return converter.structure(rest, registry.get(kind, name).component.config)


def _chosen(
    value: Mapping[str, Any],
    key: str,
    what: str,
    known: Collection[str],
    hint: Callable[[str], str],
) -> tuple[str, dict[str, Any]]:
    """The name under ``key``, one of the ``known``, and the table without it."""
    rest = dict(value)
    if key not in rest:
        raise _fault("missing", f"it picks the {what}; known: {', '.join(known) or 'none'}", key)
    name = rest.pop(key)
    if type(name) is not str:
        raise _fault(f"expected string, found {describe_value(name)}", "", key)
    if name not in known:
        raise _fault(f"no {what} is named {name!r}", hint(name), key)
    return name, rest
