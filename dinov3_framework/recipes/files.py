"""Find recipes: files, recipes inside packages, and the installed ones by name."""

from __future__ import annotations

import difflib
import importlib.util
import itertools
import json
import os
import re
from importlib.metadata import entry_points
from pathlib import Path

from attrs import frozen

from dinov3_framework.blame import PROJECT
from dinov3_framework.errors import Problem, first_few, suggest
from dinov3_framework.recipes.toml_text import parse_toml

RECIPES_PACKAGE = "dinov3_recipes"
_CHECKOUT = Path(__file__).parents[2] / "recipes"  # of which an editable install has copies
FORMERLY = "formerly.json"  # in a package: {name of a recipe that went: what to write instead}

_HEADER_LINE = re.compile(r"([A-Z][a-z]+): +(.*)")
_IN_PACKAGE = re.compile(r"([A-Za-z_][\w.]*):([\w./-]+)")


class Mistake(Exception):
    """Why a recipe or an override is of no use, and what to do about it."""

    def __init__(self, message: str, hint: str = "", where: str = "") -> None:
        self.message, self.hint, self.where = message, hint, where
        super().__init__(message)

    def problem(self, source: str, where: str = "") -> Problem:
        return Problem(self.where or where, self.message, self.hint, source)


@frozen
class Source:
    """A recipe's file, and how messages name it."""

    path: Path
    label: str
    package: str = ""  # the package it lies in, if it was asked for by one

    def load(self) -> dict[str, object]:
        try:
            return parse_toml(self.path.read_text("utf-8"))
        except UnicodeDecodeError as error:
            raise Mistake(f"is not UTF-8: {error}") from error
        except ValueError as error:
            raise Mistake(f"is not TOML: {error}") from error
        except OSError as error:
            raise Mistake(f"cannot be read: {error.strerror}") from error


def find_recipe(recipe: str | Path) -> Source:
    """The file meant by a path, an installed recipe's name or ``package:recipe``."""
    text = os.fspath(recipe)
    if os.path.isfile(text):  # Path.is_file refuses what is too long for a name
        return Source(Path(text), text)
    if match := _IN_PACKAGE.fullmatch(text):
        return _in_package(match[1], match[2])
    if text in recipes_of(RECIPES_PACKAGE):
        return _in_package(RECIPES_PACKAGE, text)
    hints = []
    if "=" in text:
        hints.append("to replace a value, write key.path=value")
    if now := _formerly(RECIPES_PACKAGE, Path(text).stem):
        hints.append(f"it is composed now: {now}")
    raise _not_found(text, Path(text), hints)


def find_base(base: str, extending: Source) -> Source:
    """The file that ``extending`` means by an entry of its ``extends``."""
    path = extending.path.parent / base
    if os.path.isfile(path):
        if not extending.package:
            label = os.path.normpath(os.path.join(os.path.dirname(extending.label), base))
            return Source(path, label)
        if os.path.basename(base) != base:
            return Source(path, os.path.normpath(path))
        label = f"{extending.package}:{base.removesuffix('.toml')}"
        return Source(path, label, extending.package)
    if match := _IN_PACKAGE.fullmatch(base):
        return _in_package(match[1], match[2])
    raise _not_found(base, path, [], f" (as {RECIPES_PACKAGE}:name)")


def recipes_of(package: str) -> list[str]:
    """Names of the recipes that lie in a package, sorted."""
    return sorted({file.stem for folder in _folders(package) for file in folder.glob("*.toml")})


def header_of(recipe: str) -> tuple[str, dict[str, str]]:
    """What the comment on top of an installed recipe says: its first line, then texts by keys.

    A key is a word with a colon, such as ``Cost:``.
    """
    path = find_recipe(f"{RECIPES_PACKAGE}:{recipe}").path
    lines = itertools.takewhile(lambda line: line[:1] == "#", path.read_text("utf-8").splitlines())
    summary, *more = [line.removeprefix("#").strip() for line in lines] or [""]
    header: dict[str, str] = {}
    key = ""
    for line in more:
        found = _HEADER_LINE.fullmatch(line)
        key, text = found.groups() if found else (key, line)
        header[key] = f"{header.get(key, '')} {text}".strip()
    return summary, header


def _declared() -> set[str]:
    """Top-level packages with recipes: those of plugins, and what distributions declare besides."""
    offered = [*entry_points(group=PROJECT), *entry_points(group=f"{PROJECT}.recipes")]
    return {entry.module.partition(".")[0] for entry in offered}


def _folders(package: str) -> list[Path]:
    """The folders of a package that declares recipes, found without importing anything.

    To look for a top-level package imports nothing; to look for one inside would import the outer
    one. ``importlib.resources`` cannot look into a package without ``__init__`` that is installed
    in editable mode, which is what the shipped recipes are to a developer.
    """
    if package == RECIPES_PACKAGE and (_CHECKOUT / FORMERLY).is_file():
        return [_CHECKOUT]
    top, *inner = package.split(".")
    try:
        spec = importlib.util.find_spec(top) if top in _declared() else None
    except (ImportError, ValueError):
        return []
    places = spec.submodule_search_locations if spec is not None else None
    folders = [Path(place, *inner) for place in places or ()]
    return [folder for folder in folders if folder.is_dir()]


def _in_package(package: str, name: str) -> Source:
    name = name.removesuffix(".toml")
    folders = _folders(package)
    for folder in folders:
        path = folder / f"{name}.toml"
        if path.is_file() and ".." not in path.parts:
            return Source(path, f"{package}:{name}", package)
    if not folders:
        message = f"no package {package!r} with recipes is installed"
        raise Mistake(message, f"those that declare recipes: {', '.join(sorted(_declared()))}")
    now = _formerly(package, name)
    known = recipes_of(package)
    hint = f"it is composed now: {now}" if now else suggest(name, known, "its recipes")
    raise Mistake(f"package {package!r} has no recipe {name!r}", hint)


def _formerly(package: str, name: str) -> str | None:
    """What to write instead of a recipe that a package used to have; None if it had none."""
    tables = [folder / FORMERLY for folder in _folders(package)]
    known = [json.loads(table.read_text("utf-8")) for table in tables if table.is_file()]
    return next((str(table[name]) for table in known if name in table), None)


def _not_found(text: str, path: Path, hints: list[str], how: str = "") -> Mistake:
    """What to say of a file that is not there: near files first, then installed recipes."""
    if os.path.isdir(path):
        hints.append("that is a folder; name a file in it")
    shown = os.path.dirname(text) or "."
    if not os.path.isdir(path.parent):
        hints.append(f"there is no folder {shown}")
    elif neighbors := [file.name for file in path.parent.glob("*.toml")]:
        hints.append(f"recipes in {shown}: {_nearest_first(path.name, neighbors)}")
    if installed := recipes_of(RECIPES_PACKAGE):
        hints.append(f"installed recipes: {_nearest_first(path.stem, installed)}{how}")
    return Mistake(f"no such recipe: {text}", "\n    ".join(hints))


def _nearest_first(name: str, known: list[str]) -> str:
    """At most ten names."""
    ratio = {other: difflib.SequenceMatcher(None, name, other).ratio() for other in known}
    ordered = sorted(sorted(known), key=lambda other: -ratio[other])
    return first_few(ordered, 10)
