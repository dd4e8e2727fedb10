"""Gives a recipe its types: a plain dict in, one frozen config out, or every mistake at once.

Nothing is coerced: ``"7"`` is no integer, ``3.7`` is none either, ``"false"`` and ``1`` are no
booleans. The one exception is an integer where a number is wanted.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

import attrs
from cattrs import BaseValidationError, Converter, IterableValidationError, IterableValidationNote
from cattrs.gen import make_dict_structure_fn, mapping_structure_factory, override

from dinov3_framework.errors import Problem, RecipeError, suggest
from dinov3_framework.kinds import KINDS, TaskConfig
from dinov3_framework.recipes.compose import Composed
from dinov3_framework.recipes.faults import Fault, problems_of
from dinov3_framework.recipes.option_types import (
    element_types,
    found,
    kind_of,
    resolved_fields,
    says_none,
)
from dinov3_framework.recipes.option_types import type_name as type_name
from dinov3_framework.recipes.plain import to_toml_value as to_toml_value
from dinov3_framework.recipes.plain import unstructure as unstructure
from dinov3_framework.recipes.protocol import Components
from dinov3_framework.schedules import SCHEDULES, Constant, Schedule

Hook = Callable[[Any, Any], Any]


def structure_recipe(registry: Components, composed: Composed) -> TaskConfig:
    """The typed config of a whole recipe; its key ``task`` says of which class."""
    values = dict(composed.data)
    name = values.pop("task", None)
    if not isinstance(name, str) or name not in registry.names("task"):
        source = composed.origins.get(("task",), composed.source)
        raise RecipeError([_unknown_task(registry, name, source)])
    cls = registry.get("task", name).component.config
    config: TaskConfig = _structure(registry, values, cls, composed.origins, composed.source)
    return config


def structure_component(
    registry: Components, kind: str, name: str, values: Mapping[str, Any]
) -> Any:
    """The config of one component, checked as strictly as a recipe's.

    ``values`` may also hold configs and schedules that are already built.
    """
    return _structure(registry, dict(values), registry.get(kind, name).component.config, {}, "")


def _structure(
    registry: Components,
    values: Mapping[str, Any],
    cls: type,
    origins: Mapping[tuple[str, ...], str],
    source: str,
) -> Any:
    try:
        return _converter(registry).structure(values, cls)
    except Exception as error:
        problems = list(problems_of(error, cls, origins, source))
        raise RecipeError(problems) from error


def _converter(registry: Components) -> Converter:
    """A converter whose hooks are all ours. cattrs asks the last one registered first."""
    converter = Converter(detailed_validation=True, forbid_extra_keys=True)
    for primitive, hook in ((int, _integer), (float, _number), (bool, _boolean), (str, _string)):
        converter.register_structure_hook(primitive, hook)
    converter.register_structure_hook_func(lambda declared: _origin(declared) is Literal, _literal)
    converter.register_structure_hook_func(
        lambda declared: _origin(declared) is tuple,
        lambda value, declared: _array(value, declared, converter),
    )
    converter.register_structure_hook_factory(
        lambda declared: _origin(declared) in (dict, Mapping),
        lambda declared: _mapping_hook(declared, converter),
    )
    converter.register_structure_hook_factory(attrs.has, lambda cls: _class_hook(cls, converter))
    # Predicates by identity: a hook registered for a base class would capture its subclasses.
    converter.register_structure_hook_func(
        lambda declared: declared is Schedule, lambda value, _: _schedule(value, converter)
    )
    converter.register_structure_hook_func(
        lambda declared: kind_of(declared) is not None,
        lambda value, base: _component(value, base, registry, converter),
    )
    return converter


def _origin(declared: Any) -> Any:
    return typing.get_origin(declared)


def _integer(value: Any, _: Any) -> int:
    if type(value) is int:
        return value
    raise Fault.mismatch("integer", value)


def _number(value: Any, _: Any) -> float:
    if type(value) not in (int, float):
        raise Fault.mismatch("number", value)
    if math.isnan(value):
        raise Fault("must not be nan")
    return float(value)


def _boolean(value: Any, _: Any) -> bool:
    if type(value) is bool:
        return value
    hint = "booleans are true and false, without quotes" if isinstance(value, str) else ""
    raise Fault.mismatch("boolean", value, hint)


def _string(value: Any, _: Any) -> str:
    if type(value) is str:
        return value
    hint = "" if isinstance(value, Mapping | list) else "strings need quotes"
    raise Fault.mismatch("string", value, hint)


def _literal(value: Any, declared: Any) -> str:
    choices = typing.get_args(declared)
    if type(value) is str and value in choices:
        return value
    hint = suggest(value, choices) if isinstance(value, str) else ""
    raise Fault.mismatch(type_name(declared), value, hint)


def _array(value: Any, declared: Any, converter: Converter) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise Fault.mismatch(type_name(declared), value)
    types = element_types(declared, len(value))
    if types is None:
        raise Fault(f"expected {type_name(declared)}, found an array of {len(value)}")
    elements = []
    tables: list[Exception] = []
    for index, (item, inner) in enumerate(zip(value, types, strict=True), 1):
        try:
            elements.append(converter.structure(item, inner))
        except Fault as fault:
            raise Fault(f"element {index}: {fault.message}", fault.hint) from fault
        except BaseValidationError as error:
            error.add_note(IterableValidationNote(f"element {index}", index, inner))
            tables.append(error)
    if tables:
        raise IterableValidationError("in an array of tables", tables, type(value))
    return tuple(elements)


def _mapping_hook(declared: Any, converter: Converter) -> Hook:
    structure = mapping_structure_factory(declared, converter, detailed_validation=True)

    def hook(value: Any, _: Any) -> Any:
        if not isinstance(value, Mapping):
            raise Fault.mismatch(type_name(declared), value)
        return structure(value, declared)

    return hook


def _class_hook(cls: type, converter: Converter) -> Hook:
    """A config's fields, each with its own check, so that all complaints come at once."""
    overrides: dict[str, Any] = {
        attribute.name: override(struct_hook=_checked(attribute, converter))
        for attribute in resolved_fields(cls)
    }
    # The converter says that extra keys are forbidden and that every mistake is collected.
    structure: Hook = make_dict_structure_fn(cls, converter, **overrides)

    def hook(value: Any, _: Any) -> Any:
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise Fault.mismatch("table", value)
        return structure(value, cls)

    return hook


def _checked(attribute: attrs.Attribute[Any], converter: Converter) -> Hook:
    def hook(value: Any, declared: Any) -> Any:
        if says_none(value, declared):
            return None
        structured = converter.structure(value, declared)
        if attribute.validator is not None:
            attribute.validator(None, attribute, structured)
        return structured

    return hook


def _schedule(value: Any, converter: Converter) -> Schedule:
    if isinstance(value, Schedule):
        return value
    if not isinstance(value, Mapping):
        if type(value) not in (int, float):
            raise Fault.mismatch("number or schedule", value)
        return Constant(value=_number(value, float))
    name, rest = _chosen(value, "use", "a schedule", list(SCHEDULES))
    if name not in SCHEDULES:
        raise Fault(f"no schedule is named {name!r}", suggest(name, list(SCHEDULES)), at="use")
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
        raise Fault.mismatch("table", value, hint)
    name, rest = _chosen(value, key, f"the {kind}", registry.names(kind))
    if name not in registry.names(kind):
        hint = registry.suggest(kind, name) + _absent_plugins(registry)
        raise Fault(f"no {kind} is named {name!r}", hint, at=key)
    return converter.structure(rest, registry.get(kind, name).component.config)


def _chosen(
    value: Mapping[str, Any], key: str, what: str, known: list[str]
) -> tuple[str, dict[str, Any]]:
    """The name under ``key``, and the table without it."""
    rest = dict(value)
    if key not in rest:
        raise Fault("missing", f"it picks {what}; known: {', '.join(known) or 'none'}", at=key)
    name = rest.pop(key)
    if type(name) is not str:
        raise Fault(f"expected string, found {found(name)}", at=key)
    return name, rest


def _absent_plugins(registry: Components) -> str:
    """Plugins that might have offered what is missing; the reasons are printed once, elsewhere."""
    notes = [
        f"\n    {what}: {', '.join(names)}"
        for what, names in (
            ("plugins that could not be loaded", [broken.name for broken in registry.broken]),
            ("blocked plugins", registry.blocked),
        )
        if names
    ]
    return "".join(notes)


def _unknown_task(registry: Components, name: Any, source: str) -> Problem:
    known = f"known: {', '.join(registry.names('task')) or 'none'}" + _absent_plugins(registry)
    if name is None:
        return Problem("task", "missing", f"it says what the recipe runs; {known}", source)
    if not isinstance(name, str):
        return Problem("task", f"expected string, found {found(name)}", known, source)
    hint = registry.suggest("task", name) + _absent_plugins(registry)
    return Problem("task", f"no task is named {name!r}", hint, source)
