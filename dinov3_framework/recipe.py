"""Composes a recipe: a file, what it extends, what it drops, and the command line's overrides.

The result is one plain dict in which each value's origin is known; ``structure`` gives it types.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli
from attrs import field, frozen

from dinov3_framework.errors import Problem, RecipeError
from dinov3_framework.recipe_files import RecipeProblem, Source, find_base, find_recipe
from dinov3_framework.toml_text import KeyPath, dotted, inline, near, split_key
from dinov3_framework.toml_text import annotated_toml as annotated_toml
from dinov3_framework.toml_text import to_toml as to_toml

COMMAND_LINE = "command line"


@frozen
class Composed:
    """A recipe in one piece."""

    data: dict[str, Any]
    origins: dict[
        KeyPath, str
    ]  # of each value and table: the file that set it, as messages name it
    name: str
    path: Path
    source: str  # the recipe's own file, as messages name it


@frozen
class _Layer:
    """A table and the origin of everything in it."""

    data: dict[str, Any] = field(factory=dict)
    origins: dict[KeyPath, str] = field(factory=dict)

    @classmethod
    def of(cls, data: Mapping[str, Any], origin: str) -> _Layer:
        return cls(dict(data), dict.fromkeys(_paths(data), origin))


@frozen
class _File:
    """A recipe's file, read, with the files it extends."""

    source: Source
    layer: _Layer
    drop: list[str]
    bases: list[_File]


def compose(recipe: str | Path, overrides: Sequence[str] = ()) -> Composed:
    """Read a recipe and everything it extends, and apply ``key.path=value`` overrides.

    Tables merge; numbers, strings and arrays replace; a table whose ``use`` differs from the
    inherited one replaces it whole. Later bases win over earlier ones, the file over its bases, the
    overrides over all. Raises ``RecipeError`` with every mistake found.
    """
    problems: list[Problem] = []
    try:
        source = find_recipe(recipe)
    except RecipeProblem as error:
        raise RecipeError([error.problem]) from error
    file = _read(source, (), problems)
    incomplete = file is None or bool(problems)
    last = _command_line(overrides, problems)
    if file is None or incomplete:  # what is found from here on might only be a consequence
        raise RecipeError(problems)
    layer = _flatten(file, problems)
    _drop(
        layer,
        _entries(last.data.pop("drop", []), "drop", COMMAND_LINE, problems),
        COMMAND_LINE,
        problems,
    )
    _merge(layer, last, problems)
    if problems:
        raise RecipeError(problems)
    return Composed(layer.data, layer.origins, source.path.stem, source.path, source.label)


# --------------------------------------------------------------------------- files
def _read(source: Source, chain: tuple[Source, ...], problems: list[Problem]) -> _File | None:
    """A file and its bases; ``chain`` is what leads to it."""
    chain = (*chain, source)
    if any(earlier.path.resolve() == source.path.resolve() for earlier in chain[:-1]):
        path = " -> ".join(link.label for link in chain)
        problems.append(Problem("extends", f"goes round in a circle: {path}", "", chain[-2].label))
        return None
    try:
        data = source.load()
    except RecipeProblem as error:
        problems.append(error.problem)
        return None
    bases = []
    for name in _entries(data.pop("extends", []), "extends", source.label, problems):
        try:
            base = _read(find_base(name, source), chain, problems)
        except RecipeProblem as error:
            problems.append(error.problem)
            continue
        bases += [base] if base is not None else []
    drop = _entries(data.pop("drop", []), "drop", source.label, problems)
    return _File(source, _Layer.of(data, source.label), drop, bases)


def _entries(value: object, key: str, origin: str, problems: list[Problem]) -> list[str]:
    """``extends`` or ``drop``: a string or an array of strings."""
    entries = [value] if isinstance(value, str) else value
    if isinstance(entries, list) and all(isinstance(entry, str) for entry in entries):
        return entries
    message = f"expected a string or an array of strings, found {inline(value)}"
    problems.append(Problem(key, message, "", origin))
    return []


def _flatten(file: _File, problems: list[Problem]) -> _Layer:
    layer = _Layer()
    for base in file.bases:
        _merge(layer, _flatten(base, problems), problems)
    _drop(layer, file.drop, file.source.label, problems)
    _merge(layer, file.layer, problems)
    return layer


# --------------------------------------------------------------------------- layers
def _paths(table: Mapping[str, Any], path: KeyPath = ()) -> Iterator[KeyPath]:
    """The path of every value and table."""
    for key, value in table.items():
        yield (*path, key)
        if isinstance(value, Mapping):
            yield from _paths(value, (*path, key))


def _merge(
    layer: _Layer, top: _Layer, problems: list[Problem], *, use_replaces: bool = True
) -> None:
    """Put ``top`` over ``layer``, in place."""

    def go(below: dict[str, Any], above: Mapping[str, Any], path: KeyPath) -> None:
        for key, value in above.items():
            here, old = (*path, key), below.get(key)
            if isinstance(value, Mapping) and isinstance(old, dict):
                both = "use" in value and "use" in old
                if not (use_replaces and both and value["use"] != old["use"]):
                    go(old, value, here)
                    continue
            elif isinstance(value, Mapping) and key in below and "use" not in value:
                problems.append(_into_scalar(here, old, layer.origins[here], value, top))
                continue
            _forget(layer.origins, here)
            below[key] = copy.deepcopy(value)
            for inner in (here, *(_paths(value, here) if isinstance(value, Mapping) else ())):
                layer.origins[inner] = top.origins[inner]

    go(layer.data, top.data, ())


def _into_scalar(
    path: KeyPath, old: Any, origin: str, value: Mapping[str, Any], top: _Layer
) -> Problem:
    inner = next(_paths(value, path), path)
    array = isinstance(old, list)
    whole = "array" if array else "table"
    text = "[..., ...]" if array else "{ use = ..., ... }"
    return Problem(
        dotted(inner),
        f"{dotted(path)} is {inline(old)} (set by {origin}), which has no keys",
        f"replace it by a whole {whole}: {dotted(path)} = {text}",
        top.origins[path],
    )


def _forget(origins: dict[KeyPath, str], path: KeyPath) -> None:
    for known in [known for known in origins if known[: len(path)] == path]:
        del origins[known]


def _drop(layer: _Layer, keys: Sequence[str], origin: str, problems: list[Problem]) -> None:
    """Remove inherited keys, in place."""
    inherited = [dotted(path) for path in layer.origins]
    for text in keys:
        path, rest = split_key(text) or ((), text)
        if rest or path not in layer.origins:
            hint = near(text, inherited, "inherited keys") if inherited else "nothing is inherited"
            problems.append(Problem("drop", f"no inherited key is {text!r}", hint, origin))
            continue
        table = layer.data
        for key in path[:-1]:
            table = table[key]
        del table[path[-1]]
        _forget(layer.origins, path)


# --------------------------------------------------------------------------- command line
def _command_line(overrides: Sequence[str], problems: list[Problem]) -> _Layer:
    """All overrides as one layer, so that their order does not matter (but the last of a key)."""
    layer = _Layer()
    for text in overrides:
        try:
            path, value = _override(text)
        except RecipeProblem as error:
            problems.append(error.problem)
            continue
        for key in reversed(path):
            value = {key: value}
        _merge(layer, _Layer.of(value, COMMAND_LINE), problems, use_replaces=False)
    return layer


def _override(text: str) -> tuple[KeyPath, Any]:
    """``losses.gram.weight=1.5`` taken apart."""
    key, equals, _ = text.partition("=")
    split = split_key(text)
    if not equals or split is None or not split[1].startswith("="):
        message = f"{text!r} is not an override"
        raise RecipeProblem(Problem("", message, "write key.path=value", COMMAND_LINE))
    path, value = split[0], split[1][1:].strip()
    if path == ("extends",):
        message, hint = "cannot be overridden", "write a recipe file that extends both"
        raise RecipeProblem(Problem("extends", message, hint, COMMAND_LINE))
    if not value:
        message, hint = "no value after the equals sign", f"an empty string is {key}='\"\"'"
        raise RecipeProblem(Problem(dotted(path), message, hint, COMMAND_LINE))
    return path, _value(value, dotted(path))


def _value(text: str, where: str) -> Any:
    """A value in TOML syntax; a bare word or path is a string."""
    try:
        parsed = tomli.loads(f"value = {text}")
    except tomli.TOMLDecodeError as error:
        if text[0] not in "[{\"'" and "\n" not in text:
            return text
        reason = str(error).partition(" (at ")[0]  # places would count our own "value = "
        message = f"{text} is not a TOML value: {reason}"
        hint = "strings inside arrays and tables need quotes, and the shell wants quotes around all"
        raise RecipeProblem(Problem(where, message, hint, COMMAND_LINE)) from error
    if len(parsed) > 1:
        message = f"{text!r} is more than one value"
        raise RecipeProblem(Problem(where, message, "", COMMAND_LINE))
    return parsed["value"]
