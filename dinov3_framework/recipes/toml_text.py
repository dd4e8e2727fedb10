"""Write recipes as text: keys, values and whole files in TOML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tomli
import tomli_w

KeyPath = tuple[str, ...]

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_KEY = re.compile(r"""\s*(?:([A-Za-z0-9_-]+)|"([^"\\]*)"|'([^']*)')\s*""")


def key_text(key: str) -> str:
    """One key, quoted if TOML wants it so."""
    return key if _BARE.fullmatch(key) else tomli_w.dumps({key: 0}).removesuffix(" = 0\n")


def dotted(path: Iterable[str]) -> str:
    """A key path as a recipe spells it: ``losses.gram.weight``."""
    return ".".join(key_text(key) for key in path)


def split_key(text: str) -> tuple[KeyPath, str] | None:
    """The dotted key that ``text`` starts with, and what follows it; None if it has none."""
    path: list[str] = []
    position = 0
    while match := _KEY.match(text, position):
        path.append(next(part for part in match.groups() if part is not None))
        position = match.end()
        if text[position : position + 1] != ".":
            return tuple(path), text[position:]
        position += 1
    return None


def parse_toml(text: str) -> dict[str, Any]:
    """TOML as a dict; ``ValueError`` for what is not, or is nested too deep to be read."""
    try:
        return tomli.loads(text)
    except RecursionError as error:
        raise ValueError(f"nested too deep ({error})") from error


def inline(value: Any) -> str:
    """A value on one line: ``0.5``, ``"cosine"``, ``[1, 2]``, ``{ use = "cosine" }``."""
    if isinstance(value, Mapping):
        items = [f"{key_text(key)} = {inline(item)}" for key, item in value.items()]
        return f"{{ {', '.join(items)} }}" if items else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(inline, value))}]"
    return tomli_w.dumps({"k": value}).removeprefix("k = ").removesuffix("\n")


def to_toml(data: Mapping[str, Any]) -> str:
    """A whole recipe."""
    return tomli_w.dumps(data)


def annotated_toml(
    data: Mapping[str, Any], origins: Mapping[KeyPath, str], otherwise: str = "default"
) -> str:
    """A whole recipe in which a comment after each value says who set it.

    The text is itself a recipe. A value without an origin comes from ``otherwise``.
    """
    lines = _annotated_table(data, (), origins, otherwise)
    return "\n".join(lines).strip("\n") + "\n"


def _annotated_table(
    table: Mapping[str, Any], path: KeyPath, origins: Mapping[KeyPath, str], otherwise: str
) -> Iterator[str]:
    leaves = {key: item for key, item in table.items() if not isinstance(item, Mapping)}
    if path and (leaves or not table):
        yield ""
        yield f"[{dotted(path)}]" + ("" if table else f"  # {origins.get(path, otherwise)}")
    texts = {key: f"{key_text(key)} = {inline(item)}" for key, item in leaves.items()}
    width = min(max(map(len, texts.values()), default=0), 60)
    for key, text in texts.items():
        origin = origins.get((*path, key), otherwise)
        comment = "".join(letter if letter.isprintable() else "?" for letter in origin)
        yield f"{text:{width}}  # {comment}"
    for key, item in table.items():
        if isinstance(item, Mapping):
            yield from _annotated_table(item, (*path, key), origins, otherwise)
