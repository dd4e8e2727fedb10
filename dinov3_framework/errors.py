"""Errors meant for a person, and the exit codes they end with.

Whoever raises a :class:`UserError` has said everything there is to say: what is wrong, where, and
what to do. The command line prints it without a traceback (``--traceback`` shows one).
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from enum import IntEnum
from io import TextIOWrapper
from typing import NamedTuple


class ExitCode(IntEnum):
    """What ``dinov3-run`` ends with."""

    OK = 0
    FAILED = 1  # a fault of ours: comes with a traceback
    WRONG_INPUT = 2  # the recipe, the data or the output folder has to change first
    DIVERGED = 3  # training produced non-finite values and stopped
    REQUEUE = 75  # asked to stop; the state is saved, running the same command goes on
    INTERRUPTED = 130  # Ctrl-C


class UserError(Exception):
    """A mistake that the person at the keyboard can mend."""

    exit_code = ExitCode.WRONG_INPUT
    # Whether every process of a run raises it alike, so that the main one alone need say it.
    shared = False


class Problem(NamedTuple):
    """One mistake in a recipe.

    ``where`` is the dotted key path (empty for the recipe as a whole), ``source`` the file or
    override that set it, ``message`` what is wrong, ``hint`` what to do about it.
    """

    where: str
    message: str
    hint: str = ""
    source: str = ""

    def __str__(self) -> str:
        place = ": ".join(part for part in (self.source, self.where) if part)
        text = f"{place}: {self.message}" if place else self.message
        return f"{text}\n    {self.hint}" if self.hint else text


class RecipeError(UserError):
    """Everything that is wrong with a recipe, at once."""

    def __init__(self, problems: Sequence[Problem] | str) -> None:
        if isinstance(problems, str):
            problems = [Problem("", problems)]
        self.problems = list(problems)
        lines = [str(problem) for problem in self.problems]
        if len(lines) > 1:
            lines.insert(0, f"{len(lines)} mistakes in this recipe:")
            lines[1:] = [f"  - {line}" for line in lines[1:]]
        super().__init__("\n".join(lines))


def problems_at(where: str, error: UserError) -> list[Problem]:
    """The mistakes of a part of a recipe, with their key paths in the whole one."""
    if isinstance(error, RecipeError):
        return [each._replace(where=f"{where}.{each.where}".rstrip(".")) for each in error.problems]
    return [Problem(where, str(error))]


class PluginError(UserError):
    """A plugin that cannot be loaded, or two that claim the same name."""


class UnknownNameError(UserError):
    """A kind or component that no plugin registered."""


class DataError(UserError):
    """A dataset that is missing, empty or mostly unreadable."""


class CorruptSampleError(Exception):
    """One sample cannot be decoded.

    Datasets raise it from ``__getitem__``; the loader answers with a substitute, so that one bad
    file does not end a run of a week.
    """

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        super().__init__(printable(f"{name}: {reason}", kept=""))

    def __reduce__(self) -> tuple[type[CorruptSampleError], tuple[str, str]]:
        return type(self), (self.name, self.reason)


class WrongTargetError(CorruptSampleError):
    """What is known of a sample can be read and is not what its dataset says.

    Such as an id above the classes, or a mask of another size than its image. Unlike a broken file
    this is seldom alone, so that a check complains of the first one.
    """


class CheckpointError(UserError):
    """A checkpoint that is incomplete, damaged, or does not fit the model."""


class OutputError(UserError):
    """An output folder that is in use, holds another run, or cannot be written."""


class DivergenceError(UserError):
    """Training went non-finite and did not recover."""

    exit_code = ExitCode.DIVERGED
    shared = True


class StopRequested(UserError):
    """A signal asked the run to stop; its state is on disk."""

    exit_code = ExitCode.REQUEUE
    shared = True


class PeerError(UserError):
    """Another process of the run failed; it says itself what went wrong."""

    exit_code = ExitCode.FAILED
    shared = True


# --------------------------------------------------------------------------- parts of messages
_SHOWN = 12  # names in a list
# Control characters, which a terminal obeys, and bytes of file names that are no UTF-8.
_ODD = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def printable(text: str, kept: str = "\n\t") -> str:
    r"""``text`` for a log, a terminal or a table: \x1b, say, in place of what does not print."""
    return _ODD.sub(lambda found: found[0] if found[0] in kept else _escaped(found[0]), text)


def _escaped(character: str) -> str:
    byte = ord(character) - 0xDC00  # of a name that is no UTF-8
    if 0x80 <= byte < 0x100:
        return f"\\x{byte:02x}"
    return character.encode("unicode_escape").decode("ascii")


def escape_unencodable() -> None:
    """Have standard output escape what its encoding lacks, as standard error does."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def suggest(name: str, known: Sequence[str], introduction: str = "known") -> str:
    """What somebody who wrote ``name`` may have meant."""
    likeness = {each: _likeness(name.casefold(), each.casefold()) for each in known}
    close = sorted((each for each in known if likeness[each]), key=lambda each: -likeness[each])
    if close:
        return f"did you mean {' or '.join(map(repr, close[:3]))}?"
    return f"{introduction}: {', '.join(known) or 'none'}"


def _likeness(name: str, other: str) -> float:
    """How much of two names is the same; 0 where one is hardly the other misspelt.

    A slip of the pen seldom hits the first letter: without it, gpu would be cpu.
    """
    ratio = difflib.SequenceMatcher(None, name, other).ratio()
    least = 0.65 if name[:1] == other[:1] else 0.75
    return ratio if ratio >= (0.5 if name in other or other in name else least) else 0


def first_few(names: Iterable[object], shown: int = 4, separator: str = ", ") -> str:
    """The first of some names in one line, and how many there are besides."""
    texts = [str(name) for name in names]
    more = f" and {len(texts) - shown:,} more" if len(texts) > shown else ""
    return separator.join(texts[:shown]) + more


def summarize_names(title: str, lines: Iterable[str]) -> str:
    """``lines`` sorted under their number and a title, cut where it gets long; "" for none."""
    lines = sorted(lines)
    if not lines:
        return ""
    more = [f"... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return f"\n  {len(lines)} {title}:" + "".join(f"\n    {x}" for x in lines[:_SHOWN] + more)
