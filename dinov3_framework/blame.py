"""Whose fault an error is: the plugin that raised it, and where it came up."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection
from importlib import metadata
from typing import cast

from dinov3_framework.errors import CorruptSampleError, UserError

PROJECT = "dinov3_framework"  # also the entry-point group of plugins
DISTRIBUTION = "dinov3-framework"
FILES: dict[str, str] = {}  # module -> path, of plugins that were loaded from a file

_BLAME = "_dinov3_blame"  # attribute of an error: (the plugin's distribution, where it came up)


def author_of(error: BaseException) -> str | None:
    """The distribution whose plugin raised ``error``; None where that was the framework's own."""
    known = vars(error).get(_BLAME)
    if known is not None:
        return cast("str | None", known[0])
    owners = {PROJECT: DISTRIBUTION}
    for distribution in metadata.distributions():
        entries = distribution.entry_points.select(group=PROJECT)
        others = (distribution.read_text("top_level.txt") or "").split() if entries else []
        for module in (*(entry.module for entry in entries), *others):
            owners[module.partition(".")[0]] = distribution.metadata["Name"]
    owners |= FILES
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [str(frame.f_globals.get("__name__")) for frame in reversed(frames)]
    packages = [module.partition(".")[0] for module in modules]
    author = next((owners[package] for package in packages if package in owners), DISTRIBUTION)
    return None if author == DISTRIBUTION else author


def blame(error: BaseException, where: str = "") -> None:
    """Note at an error, which may travel to another process, whose it is and where it came up."""
    inner = vars(error).get(_BLAME, (None, ""))[1]
    vars(error)[_BLAME] = (author_of(error), ": ".join(filter(None, (where, inner))))


def take_blame(error: Exception, other: Exception) -> Exception:
    """``error`` with what is noted at ``other``."""
    vars(error)[_BLAME] = vars(other)[_BLAME]
    return error


def describe_error(error: BaseException) -> str:
    """An error in words; those of a plugin begin with its distribution and where it came up."""
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    author = author_of(error)
    if author is None and isinstance(error, UserError):
        return text  # says it itself
    where = vars(error).get(_BLAME, (None, ""))[1]
    return ": ".join(filter(None, (author, where, text)))


class blaming:
    """A context that notes where an error came up; ``sys.exit()`` in it is one, too."""

    def __init__(self, where: Callable[[], str]) -> None:
        self.where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, SystemExit | StopIteration):  # the latter would end a loop in silence
            ended = as_error(error)
            blame(ended, self.where())
            raise ended
        if isinstance(error, Exception) and not isinstance(error, CorruptSampleError):
            blame(error, self.where())


def as_error(error: SystemExit | StopIteration) -> RuntimeError:
    """What to raise in place of what would end the program, or a loop, and say nothing."""
    text = "StopIteration was raised"
    if isinstance(error, SystemExit):
        text = f"sys.exit({error.code!r}) was called"
    return RuntimeError(text).with_traceback(error.__traceback__)


def line_of(error: BaseException, author: str) -> str:
    """``file:line`` where a plugin of ``author``, as :func:`author_of` names it, raised ``error``.

    Empty where no frame of it is left, such as after an error in another process.
    """
    packages = {name for name, path in FILES.items() if path == author}
    for entry in metadata.entry_points(group=PROJECT):
        if entry.dist is not None and entry.dist.name == author:
            packages.add(entry.module.partition(".")[0])
    return line_in(packages, error)


def line_in(packages: Collection[str], error: BaseException) -> str:
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if str(frame.f_globals.get("__name__")).partition(".")[0] in packages:
            return f"{frame.f_code.co_filename}:{line}"
    return ""
