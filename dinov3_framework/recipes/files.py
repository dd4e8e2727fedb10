"""Where recipes are: files, recipes inside packages, and the installed ones by name."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from pathlib import Path

import tomli
from attrs import frozen

from dinov3_framework.errors import Problem, suggest

RECIPES_PACKAGE = "dinov3_recipes"

_IN_PACKAGE = re.compile(r"([A-Za-z_][\w.]*):([\w./-]+)")


class RecipeProblem(Exception):
    """One reason why a recipe cannot be had."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        super().__init__(str(problem))


@frozen
class Source:
    """A recipe's file, and how messages name it."""

    path: Path
    label: str
    package: str = ""  # the package it lies in, if it was asked for by one

    def load(self) -> dict[str, object]:
        try:
            return tomli.loads(self.path.read_text("utf-8"))
        except tomli.TOMLDecodeError as error:
            raise RecipeProblem(Problem("", f"is not TOML: {error}", source=self.label)) from error
        except UnicodeDecodeError as error:
            raise RecipeProblem(Problem("", f"is not UTF-8: {error}", source=self.label)) from error
        except OSError as error:
            message = f"cannot be read: {error.strerror}"
            raise RecipeProblem(Problem("", message, source=self.label)) from error


def package_folders(package: str) -> list[Path]:
    """The folders of a package, found without importing it.

    ``importlib.resources`` cannot look into a package without ``__init__`` that is installed in
    editable mode, which is what the shipped recipes are to a developer.
    """
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return []
    locations = spec.submodule_search_locations if spec is not None else None
    return [Path(place) for place in locations or () if os.path.isdir(place)]


def recipes_of(package: str) -> list[str]:
    """Names of the recipes that lie in a package, sorted."""
    folders = package_folders(package)
    return sorted({file.stem for folder in folders for file in folder.glob("*.toml")})


def find_recipe(recipe: str | Path) -> Source:
    """The file that somebody means by a path, an installed recipe's name or package:recipe."""
    text = os.fspath(recipe)
    if Path(text).is_file():
        return Source(Path(text), text)
    if match := _IN_PACKAGE.fullmatch(text):
        return _in_package(match[1], match[2], asked_by="")
    if text.removesuffix(".toml") in recipes_of(RECIPES_PACKAGE):
        return _in_package(RECIPES_PACKAGE, text, asked_by="")
    raise _not_found(text, Path(text), asked_by="")


def find_base(base: str, extending: Source) -> Source:
    """The file that ``extending`` means by an entry of its ``extends``."""
    path = extending.path.parent / base
    if path.is_file():
        return Source(path, *_label(base, extending))
    if match := _IN_PACKAGE.fullmatch(base):
        return _in_package(match[1], match[2], asked_by=extending.label)
    raise _not_found(base, path, asked_by=extending.label)


def _label(base: str, extending: Source) -> tuple[str, str]:
    if extending.package and os.path.basename(base) == base:
        return f"{extending.package}:{base.removesuffix('.toml')}", extending.package
    if extending.package:
        return os.path.normpath(extending.path.parent / base), ""
    return os.path.normpath(os.path.join(os.path.dirname(extending.label), base)), ""


def _in_package(package: str, name: str, asked_by: str) -> Source:
    name = name.removesuffix(".toml")
    folders = package_folders(package)
    for folder in folders:
        path = folder / f"{name}.toml"
        if path.is_file():
            return Source(path, f"{package}:{name}", package)
    where = "extends" if asked_by else ""
    if not folders:
        message, hint = f"no package is named {package!r}", "is it installed in this environment?"
    else:
        message = f"package {package!r} has no recipe {name!r}"
        hint = suggest(name, recipes_of(package), "its recipes")
    raise RecipeProblem(Problem(where, message, hint, asked_by))


def _not_found(text: str, path: Path, asked_by: str) -> RecipeProblem:
    """The message for a file that is not there: near files first, then installed recipes."""
    if not asked_by and "=" in text:
        hint = "the recipe comes first, overrides (key=value) after it"
        return RecipeProblem(Problem("", f"no recipe is named {text!r}", hint))
    hints = []
    if path.is_dir():
        hints.append("that is a folder; name a file in it")
    folder = path.parent
    shown = os.path.dirname(text) or "."
    neighbours = [file.name for file in folder.glob("*.toml")] if folder.is_dir() else []
    if not folder.is_dir():
        hints.append(f"there is no folder {shown}")
    elif neighbours:
        hints.append(f"recipes in {shown}: {_nearest_first(path.name, neighbours)}")
    installed = recipes_of(RECIPES_PACKAGE)
    if installed:
        hints.append(f"installed recipes: {_nearest_first(path.stem, installed)}")
        if asked_by:
            hints[-1] += f" (as {RECIPES_PACKAGE}:name)"
    where = "extends" if asked_by else ""
    message = f"no such recipe: {text}"
    return RecipeProblem(Problem(where, message, "\n    ".join(hints), asked_by))


def _nearest_first(name: str, known: list[str]) -> str:
    """At most ten names."""
    known = sorted(
        sorted(known), key=lambda other: -difflib.SequenceMatcher(None, name, other).ratio()
    )
    return ", ".join(known[:10]) + (f" and {len(known) - 10} more" if len(known) > 10 else "")
