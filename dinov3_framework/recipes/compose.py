"""Composes a recipe: a file, what it extends, what it drops, and the command line's overrides.

The result is one plain dict in which each value's origin is known; ``structure`` gives it types.
A table called ``recipe`` is a recipe inside a recipe and may say all that a file may.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli
from attrs import evolve, field, frozen

from dinov3_framework.errors import Problem, RecipeError, suggest
from dinov3_framework.recipes.files import RecipeProblem, Source, find_base, find_recipe
from dinov3_framework.recipes.toml_text import KeyPath, dotted, inline, split_key
from dinov3_framework.recipes.toml_text import annotated_toml as annotated_toml
from dinov3_framework.recipes.toml_text import to_toml as to_toml

COMMAND_LINE = "command line"
NESTED = "recipe"  # a table of this name holds a whole recipe


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
    """A table, the origin of everything in it, and what it builds on, by the path of the recipe."""

    data: dict[str, Any] = field(factory=dict)
    origins: dict[KeyPath, str] = field(factory=dict)
    origin: str = ""  # of what has none of its own
    bases: dict[KeyPath, list[_Layer]] = field(factory=dict)
    drops: dict[KeyPath, list[str]] = field(factory=dict)

    @classmethod
    def of(cls, data: Mapping[str, Any], origin: str) -> _Layer:
        return cls(dict(data), dict.fromkeys(_paths(data), origin), origin)


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
        raise RecipeError(list(dict.fromkeys(problems)))
    layer = _Layer()
    for each in (file, last):
        _merge(layer, each, (), problems)
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))  # a file may be extended twice
    return Composed(layer.data, layer.origins, source.path.stem, source.path, source.label)


# --------------------------------------------------------------------------- files
def _read(source: Source, chain: tuple[Source, ...], problems: list[Problem]) -> _Layer | None:
    """A file and all that it builds on; ``chain`` is what leads to it."""
    chain = (*chain, source)
    if any(earlier.path.resolve() == source.path.resolve() for earlier in chain[:-1]):
        message = f"goes round in a circle: {' -> '.join(link.label for link in chain)}"
        raise RecipeProblem(Problem("extends", message, "", chain[-2].label))
    try:
        data = source.load()
    except RecipeProblem as error:
        problems.append(error.problem)
        return None
    extended: dict[KeyPath, list[str]] = {}
    drops: dict[KeyPath, list[str]] = {}
    for path, table in _recipes(data):
        for key, found in (("extends", extended), ("drop", drops)):
            where = dotted((*path, key))
            found[path] = _entries(table.pop(key, []), where, source.label, problems)
    bases: dict[KeyPath, list[_Layer]] = {}
    for path, names in extended.items():
        for name in names:
            try:
                base = _read(find_base(name, source), chain, problems)
            except RecipeProblem as error:
                problem = error.problem
                if problem.where == "extends" and problem.source == source.label:
                    problem = problem._replace(where=dotted((*path, "extends")))
                problems.append(problem)
                continue
            if base is not None:
                bases.setdefault(path, []).append(base)
    return evolve(_Layer.of(data, source.label), bases=bases, drops=drops)


def _recipes(table: dict[str, Any], path: KeyPath = ()) -> Iterator[tuple[KeyPath, dict[str, Any]]]:
    """The recipe itself and all tables in it that hold one."""
    if not path or path[-1] == NESTED:
        yield path, table
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _recipes(value, (*path, key))


def _entries(value: object, key: str, origin: str, problems: list[Problem]) -> list[str]:
    """``extends`` or ``drop``: a string or an array of strings."""
    entries = [value] if isinstance(value, str) else value
    if isinstance(entries, list) and all(isinstance(entry, str) for entry in entries):
        return entries
    message = f"expected a string or an array of strings, found {inline(value)}"
    problems.append(Problem(key, message, "", origin))
    return []


# --------------------------------------------------------------------------- layers
def _paths(table: Mapping[str, Any], path: KeyPath = ()) -> Iterator[KeyPath]:
    """The path of every value and table."""
    for key, value in table.items():
        yield (*path, key)
        if isinstance(value, Mapping):
            yield from _paths(value, (*path, key))


def _merge(
    layer: _Layer,
    top: _Layer,
    at: KeyPath,
    problems: list[Problem],
    *,
    use_replaces: bool = True,
) -> None:
    """Put ``top`` over the table ``at`` a path of ``layer``, in place.

    What a recipe in ``top`` builds on goes there first, then its drops are removed, then comes what
    it says itself.
    """

    def go(below: dict[str, Any], above: Mapping[str, Any], path: KeyPath) -> None:
        here = (*at, *path)
        for base in top.bases.get(path, ()):
            whole = _Layer()
            _merge(whole, base, (), problems)
            _merge(layer, whole, here, problems)
        if drop := top.drops.get(path):
            _drop(layer, here, drop, top.origin, problems)
        for key, value in above.items():
            put(below, key, value, (*path, key))

    def put(below: dict[str, Any], key: str, value: Any, path: KeyPath) -> None:
        here, old = (*at, *path), below.get(key)
        if isinstance(value, Mapping):
            both = isinstance(old, dict) and "use" in value and "use" in old
            if isinstance(old, dict) and not (use_replaces and both and value["use"] != old["use"]):
                go(old, value, path)
                return
            if key in below and not isinstance(old, dict) and "use" not in value:
                problems.append(_into_scalar(here, old, layer.origins[here], value, top))
                return
        _forget(layer.origins, here)
        layer.origins[here] = top.origins[path]
        if isinstance(value, Mapping):
            below[key] = {}
            go(below[key], value, path)
        else:
            below[key] = copy.deepcopy(value)

    table = layer.data
    for key in at:
        table = table[key]
    go(table, top.data, ())


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


def _drop(
    layer: _Layer, at: KeyPath, keys: Sequence[str], origin: str, problems: list[Problem]
) -> None:
    """Remove keys that the recipe ``at`` a path has inherited, in place."""
    inherited = [path[len(at) :] for path in layer.origins if path[: len(at)] == at and path != at]
    for text in keys:
        path, rest = split_key(text) or ((), text)
        if rest or path not in inherited or (*at, *path) not in layer.origins:
            names = [dotted(known) for known in inherited]
            hint = suggest(text, names, "inherited keys") if names else "nothing is inherited"
            message = f"no inherited key is {text!r}"
            problems.append(Problem(dotted((*at, "drop")), message, hint, origin))
            continue
        table = layer.data
        for key in (*at, *path[:-1]):
            table = table[key]
        del table[path[-1]]
        _forget(layer.origins, (*at, *path))


# --------------------------------------------------------------------------- command line
def _command_line(overrides: Sequence[str], problems: list[Problem]) -> _Layer:
    """All overrides as one layer, so that their order does not matter (but the last of a key)."""
    layer = _Layer(origin=COMMAND_LINE)
    for text in overrides:
        try:
            path, value = _override(text)
        except RecipeProblem as error:
            problems.append(error.problem)
            continue
        for key in reversed(path):
            value = {key: value}
        _merge(layer, _Layer.of(value, COMMAND_LINE), (), problems, use_replaces=False)
    for path, table in _recipes(layer.data):
        where = dotted((*path, "drop"))
        layer.drops[path] = _entries(table.pop("drop", []), where, COMMAND_LINE, problems)
        if table.pop("extends", None) is not None:
            message, hint = "cannot be overridden", "write a recipe file that extends both"
            where = dotted((*path, "extends"))
            problems.append(Problem(where, message, hint, COMMAND_LINE))
    return layer


def _override(text: str) -> tuple[KeyPath, Any]:
    """``losses.gram.weight=1.5`` taken apart."""
    key, equals, _ = text.partition("=")
    split = split_key(text)
    if not equals or split is None or not split[1].startswith("="):
        message = f"{text!r} is not an override"
        raise RecipeProblem(Problem("", message, "write key.path=value", COMMAND_LINE))
    path, value = split[0], split[1][1:].strip()
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
