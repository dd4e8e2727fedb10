"""Compose a recipe: files one over the other, what they extend and drop, and overrides over all.

The result is one plain dict in which each value's origin is known; ``structure`` gives it types.
A table called ``recipe`` is a recipe inside a recipe and may say all that a file may.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import define, field, frozen

from dinov3_framework.errors import Problem, RecipeError, suggest
from dinov3_framework.recipes.files import Mistake, Source, find_base, find_recipe
from dinov3_framework.recipes.shorthand import KEY as SHORTHAND
from dinov3_framework.recipes.shorthand import Shorthand, read_shorthand
from dinov3_framework.recipes.toml_text import KeyPath, dotted, inline, parse_toml, split_key

COMMAND_LINE = Source(Path("command line"), "command line")
NESTED = "recipe"  # a table of this name holds a whole recipe
NO_TASK = "missing, so this is an overlay: name a recipe before it, or give it a task (--list task)"


@frozen
class Composed:
    """A recipe in one piece."""

    data: dict[str, Any]
    # Of each value and table: the file that set it, as messages name it.
    origins: dict[KeyPath, str]
    name: str  # of the first file, and so of the run
    source: str  # the first file, as messages name it
    paths: tuple[str, ...] = ()  # of the files on the command line, absolute

    def located(self, error: RecipeError) -> RecipeError:
        """The same mistakes, each with the file or override that set its key."""
        keys = {dotted(path): path for path in self.origins}

        def source(where: str) -> str:
            while where and where not in keys:
                where = where.rpartition(".")[0]
            return origin_of(keys[where], self.origins) if where else ""

        return RecipeError(
            [each._replace(source=each.source or source(each.where)) for each in error.problems]
        )


def origin_of(path: KeyPath, origins: Mapping[KeyPath, str]) -> str:
    """The file or override that set a key or, if there is none, the nearest table above it."""
    if path in origins:
        return origins[path]
    table = next((path[:n] for n in range(len(path) - 1, 0, -1) if path[:n] in origins), None)
    if table is None:
        return ""
    # A key that is missing was left out by whoever chose the component.
    chosen = (origins.get((*table, key)) for key in ("use", "task"))
    return next(filter(None, chosen), origins[table])


@frozen
class _Value:
    """Anything but a table."""

    content: Any
    origin: str

    def plain(self) -> Any:
        return self.content


@define
class _Table:
    """Values and tables by key and, of a recipe, what it is put over."""

    origin: str
    items: dict[str, _Table | _Value] = field(factory=dict)
    bases: list[_Table] = field(factory=list)
    drop: list[str] = field(factory=list)
    shorthand: dict[str, Shorthand] = field(factory=dict)

    @property
    def use(self) -> Any:
        use = self.items.get("use")
        return use.content if isinstance(use, _Value) else None

    def plain(self) -> dict[str, Any]:
        return {key: item.plain() for key, item in self.items.items()}

    def origins(self, path: KeyPath = ()) -> dict[KeyPath, str]:
        """Who set what, of every value and table."""
        found: dict[KeyPath, str] = {}
        for key, item in self.items.items():
            found[*path, key] = item.origin
            if isinstance(item, _Table):
                found |= item.origins((*path, key))
        return found


def is_override(word: str) -> bool:
    """Whether a word of a command line is an override rather than the name of a recipe.

    It is if it begins like ``key.path=``, unless there is a file of that name.
    """
    _, rest = split_key(word) or ((), "")
    return rest.startswith("=") and not os.path.isfile(word)


def compose(recipes: str | Path | Sequence[str | Path], overrides: Sequence[str] = ()) -> Composed:
    """Read one recipe or several, and all that they extend; apply ``key.path=value`` overrides.

    Each recipe is put over those before it, as if it extended them; the overrides over all. Tables
    merge; numbers, strings and arrays replace; a table whose ``use`` differs from that of the table
    below replaces it whole. Raises ``RecipeError`` with every mistake found.
    """
    names = [recipes] if isinstance(recipes, str | Path) else recipes
    sources: list[Source] = []
    problems: list[Problem] = []
    for name in names:
        try:
            sources.append(find_recipe(name))
        except Mistake as error:
            problems.append(error.problem(""))
    files = [_read(source, (), problems) for source in sources]
    last = _command_line(overrides, problems)
    if problems:  # what is found from here on might only be a consequence
        raise RecipeError(list(dict.fromkeys(problems)))  # a file may be extended twice
    whole = _Table("")
    has_task = []  # after each file
    for table in files:
        _put(whole, table, (), problems)
        has_task.append("task" in whole.items)
    if not has_task[0] and (has_task[-1] or problems):
        problems = [Problem("task", NO_TASK, "", files[0].origin)]
    _expand(whole, last, problems)
    _put(whole, last, (), problems)
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))
    paths = tuple(os.path.abspath(source.path) for source in sources)
    return Composed(whole.plain(), whole.origins(), sources[0].path.stem, sources[0].label, paths)


# --------------------------------------------------------------------------- reading
def _read(source: Source, chain: tuple[Source, ...], problems: list[Problem]) -> _Table:
    """A file and all that it extends; ``chain`` is what leads to it."""
    try:
        data = source.load()
    except Mistake as error:
        problems.append(error.problem(source.label))
        return _Table(source.label)
    return _table(data, (), source, (*chain, source), problems)


def _table(
    data: Mapping[str, Any],
    path: KeyPath,
    source: Source,
    chain: tuple[Source, ...],
    problems: list[Problem],
) -> _Table:
    """A table of a file, with what it extends if it is a recipe."""
    table, data = _Table(source.label), dict(data)

    def entries(key: str) -> list[str]:
        """``extends`` or ``drop``: a string or an array of strings."""
        value = data.pop(key, [])
        found = [value] if isinstance(value, str) else value
        if isinstance(found, list) and all(isinstance(entry, str) for entry in found):
            return found
        message = f"expected a string or an array of strings, found {inline(value)}"
        problems.append(Problem(dotted((*path, key)), message, "", source.label))
        return []

    if not path or path[-1] == NESTED:
        for name in entries("extends"):
            try:
                base = find_base(name, source)
                if any(base.path.resolve() == link.path.resolve() for link in chain):
                    links = " -> ".join(link.label for link in (*chain, base))
                    raise Mistake(f"goes round in a circle: {links}")
            except Mistake as error:
                problems.append(error.problem(source.label, dotted((*path, "extends"))))
            else:
                table.bases.append(_read(base, chain, problems))
        table.drop = entries("drop")
        try:
            table.shorthand = read_shorthand(data.pop(SHORTHAND, {}), source.label)
        except Mistake as error:
            problems.append(error.problem(source.label, dotted((*path, SHORTHAND))))
    for key, value in data.items():
        if isinstance(value, Mapping):
            table.items[key] = _table(value, (*path, key), source, chain, problems)
        else:
            table.items[key] = _Value(value, source.label)
    return table


# --------------------------------------------------------------------------- merging
def _put(below: _Table, above: _Table, path: KeyPath, problems: list[Problem]) -> None:
    """Put a table over another, in place: what it extends, then its drops, then its own keys."""
    for base in above.bases:
        _put(below, base, path, problems)
    below.shorthand |= above.shorthand
    for text in above.drop:
        _drop(below, text, above.origin, path, problems)
    for key, item in above.items.items():
        here, old = (*path, key), below.items.get(key)
        if isinstance(item, _Value):
            below.items[key] = item
            continue
        if isinstance(old, _Value) and item.use is None:
            inner = next(iter(item.origins(here)), here)
            problems.append(_no_keys(inner, here, old.content, old.origin).problem(item.origin))
            continue
        if not isinstance(old, _Table) or (None not in (item.use, old.use) and item.use != old.use):
            old = below.items[key] = _Table(item.origin)
        _put(old, item, here, problems)


def _expand(whole: _Table, last: _Table, problems: list[Problem]) -> None:
    """Put what short keys stand for, which recipes or the command line gave, over the recipes."""
    for name, short in whole.shorthand.items():
        here, above = whole.items.pop(name, None), last.items.pop(name, None)
        given = here if above is None else above
        if given is None:
            continue
        source = Source(Path(given.origin), given.origin)
        _put(whole, _table(short.expanded(given.plain()), (), source, (), problems), (), problems)


def _no_keys(path: KeyPath, known: KeyPath, value: Any, origin: str) -> Mistake:
    """What to say of a ``path`` that leads into a value."""
    array = isinstance(value, list)
    return Mistake(
        f"{dotted(known)} is {inline(value)} (set by {origin}), which has no keys",
        f"replace it by a whole {'array' if array else 'table'}: {dotted(known)} = "
        + ("[..., ...]" if array else "{ use = ..., ... }"),
        dotted(path),
    )


def _drop(table: _Table, text: str, origin: str, path: KeyPath, problems: list[Problem]) -> None:
    """Remove the key that ``drop`` names by its path from the recipe's table on, in place."""
    keys, rest = split_key(text) or ((), text)
    known = table.origins()
    if rest or keys not in known:
        names = list(map(dotted, known))
        hint = suggest(text, names, "inherited keys") if names else "nothing is inherited"
        message = f"no inherited key is {text!r}"
        problems.append(Problem(dotted((*path, "drop")), message, hint, origin))
        return
    for key in keys[:-1]:
        table = table.items[key]  # type: ignore[assignment]
    del table.items[keys[-1]]


# --------------------------------------------------------------------------- command line
def _command_line(overrides: Iterable[str], problems: list[Problem]) -> _Table:
    """All overrides as one table, so that their order does not matter (but the last of a key)."""
    data: dict[str, Any] = {}
    for text in overrides:
        try:
            _insert(data, *_override(text))
        except Mistake as mistake:
            problems.append(mistake.problem(COMMAND_LINE.label))
    return _table(data, (), COMMAND_LINE, (), problems)


def _insert(data: dict[str, Any], path: KeyPath, value: Any) -> None:
    """Merge one override into those before it."""
    for depth, key in enumerate(path[:-1], 1):
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            raise _no_keys(path, path[:depth], data, COMMAND_LINE.label)
    old = data.get(path[-1])
    if isinstance(old, dict) and isinstance(value, dict):
        for key, inner in value.items():
            _insert(old, (key,), inner)
    else:
        data[path[-1]] = value


def _override(text: str) -> tuple[KeyPath, Any]:
    """``losses.gram.weight=1.5`` taken apart: a value in TOML syntax, or a bare word or path."""
    path, rest = split_key(text) or ((), "")
    if not rest.startswith("="):
        raise Mistake(f"{text!r} is not an override", "write key.path=value")
    value, where = rest[1:].strip(), dotted(path)
    if not value:
        raise Mistake("no value after the equals sign", f"an empty string is {where}='\"\"'", where)
    try:
        parsed = parse_toml(f"value = {value}")
    except ValueError as error:
        if value[0] not in "[{\"'" and "\n" not in value:
            return path, value
        reason = str(error).partition(" (at ")[0]  # places would count our own "value = "
        hint = "strings inside arrays and tables need quotes, and the shell wants quotes around all"
        raise Mistake(f"{value} is not a TOML value: {reason}", hint, where) from error
    if len(parsed) > 1:
        raise Mistake(f"{value!r} is more than one value", "", where)
    return path, parsed["value"]
