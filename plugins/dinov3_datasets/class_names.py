"""Names and colors of the classes of masks: tables of this package and files of people's own."""

from __future__ import annotations

import re
from pathlib import Path

from attrs import frozen

from dinov3_datasets.text_lines import numbered_lines
from dinov3_framework import DataError
from dinov3_framework.data.palettes import Palette
from dinov3_framework.errors import first_few, printable

_TABLES = Path(__file__).parent / "class_tables"
_HEADER = "name\tred\tgreen\tblue"
# A line of the labelmap.txt that CVAT writes: label:color_rgb:parts:actions.
_LABELMAP = re.compile(r"(?P<name>[^:]+):(?P<color>\d+,\d+,\d+)?:[^:]*:[^:]*")


@frozen
class ClassTable:
    """Classes by id: their names, and RGB colors where they are known."""

    names: tuple[str, ...]
    palette: Palette | None = None


def packaged_classes(name: str) -> ClassTable:
    """A table that comes with this package, such as ``ade20k``."""
    return read_classes(_TABLES / f"{name}.tsv")


def read_classes(path: Path) -> ClassTable:
    """Classes that a text file lists in the order of their ids, a line each.

    A line is a name; a name and red, green and blue between tabs; or CVAT's
    ``name:red,green,blue::``. Empty lines and those that begin with ``#`` count for nothing. Raises
    ``DataError``.
    """
    names, colors = [], []
    for number, line in numbered_lines(path):
        if line.startswith("#") or line == _HEADER:
            continue
        name, color = _parsed(line, f"{path}, line {number}")
        names.append(name)
        colors.append(color)
    if not names:
        raise DataError(f"{path} names no class; a line of it is a class, in the order of the ids")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path} names more than once: {printable(first_few(repeated), kept='')}")
    known = [color for color in colors if color is not None]
    return ClassTable(tuple(names), tuple(known) if len(known) == len(names) else None)


def _parsed(line: str, where: str) -> tuple[str, tuple[int, int, int] | None]:
    """The name and, if it has one, the color of a line."""
    name, *parts = (part.strip() for part in line.split("\t"))
    if found := _LABELMAP.fullmatch(line):
        name, parts = found["name"].strip(), (found["color"] or "").split(",")
    if parts in ([], [""]):
        return name, None
    try:
        red, green, blue = map(int, parts)
    except ValueError:
        red = -1
    if red < 0 or not all(0 <= part <= 255 for part in (red, green, blue)):
        raise DataError(
            f"{where}: {printable(line)!r} is neither a name nor a name with red, green "
            "and blue of 0 to 255 between tabs"
        )
    return name, (red, green, blue)
