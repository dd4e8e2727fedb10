"""Turns what cattrs and the configs raise into mistakes with a place, a message and a hint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from attrs import fields_dict
from cattrs import (
    AttributeValidationNote,
    BaseValidationError,
    ClassValidationError,
    ForbiddenExtraKeysError,
    IterableValidationNote,
)

from dinov3_framework.configs import InvalidOption
from dinov3_framework.errors import Problem, RecipeError, suggest
from dinov3_framework.recipes.option_types import found, resolved_fields, type_name
from dinov3_framework.recipes.toml_text import KeyPath, dotted


class Fault(ValueError):
    """A value of a recipe that is not what it should be; ``at`` is a key inside it."""

    def __init__(self, message: str, hint: str = "", at: str = "") -> None:
        self.message, self.hint, self.at = message, hint, at
        super().__init__(message)

    @classmethod
    def mismatch(cls, expected: str, value: Any, hint: str = "") -> Fault:
        return cls(f"expected {expected}, found {found(value)}", hint)


def problems_of(
    error: Exception, cls: type, origins: Mapping[KeyPath, str], source: str
) -> Iterator[Problem]:
    """Every mistake in an exception raised while ``cls`` was structured.

    ``origins`` says which file or override set a key; what is set nowhere is put down to
    ``source``. Whatever is not a mistake of the recipe is raised again as it is.
    """
    for path, fault in _faults(error, (), cls):
        known = next((path[:n] for n in range(len(path), 0, -1) if path[:n] in origins), ())
        for problem in fault:
            place = origins.get(known, source)
            # A key that is missing was left out by whoever chose the component.
            if known and known != path:
                chosen = (origins.get((*known, key)) for key in ("use", "task"))
                place = next(filter(None, chosen), place)
            yield problem._replace(where=problem.where or dotted(path), source=place)


def _faults(
    error: BaseException, path: KeyPath, cls: type | None
) -> Iterator[tuple[KeyPath, list[Problem]]]:
    if isinstance(error, BaseValidationError):
        owner = error.cl if isinstance(error, ClassValidationError) else None
        for inner in error.exceptions:
            yield from _faults(inner, path + _step(inner), owner)
    elif isinstance(error, ForbiddenExtraKeysError):
        for key in sorted(error.extra_fields):
            known = [attribute.name for attribute in resolved_fields(error.cl)]
            yield (*path, key), [Problem("", "unknown key", suggest(key, known, "keys here"))]
    elif isinstance(error, KeyError) and path and error.args == (path[-1],) and cls is not None:
        attribute = fields_dict(cls)[path[-1]]
        expected = f"missing: {type_name(attribute.type)}"
        yield path, [Problem("", expected, attribute.metadata.get("doc", ""))]
    elif isinstance(error, Fault):
        place = (*path, error.at) if error.at else path
        yield place, [Problem("", error.message, error.hint)]
    elif isinstance(error, InvalidOption):
        yield _option_path(error, path), [Problem("", error.message)]
    elif isinstance(error, RecipeError):
        yield path, error.problems
    else:
        raise error


def _step(error: BaseException) -> KeyPath:
    """The key that cattrs noted on an exception, if it did."""
    for note in getattr(error, "__notes__", ()):
        if isinstance(note, AttributeValidationNote):
            return (note.name,)
        if isinstance(note, IterableValidationNote):
            return (str(note.index),)
    return ()


def _option_path(error: InvalidOption, path: KeyPath) -> KeyPath:
    """Where an ``InvalidOption`` belongs: a field's own check has already been noted by cattrs."""
    name = tuple(error.name.split("."))
    noted = bool(_step(error))
    return path if noted else path + name
