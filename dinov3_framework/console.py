"""Text for people: what the command line lists, describes and reports."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from dinov3_framework.registry import KINDS, Description, FieldInfo, Registry

if TYPE_CHECKING:  # contracts import torch, and listing shall not wait for it
    from dinov3_framework.contracts import Report

_WIDTH = 100


def columns(rows: Iterable[Sequence[str]], indent: int = 2) -> str:
    """Rows of cells, aligned; nothing is cut off, so that output can be searched."""
    rows = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(" " * indent + line.rstrip() for line in lines)


def listing(registry: Registry, kind: str | None) -> str:
    """All components, or those of one kind: name, plugin, first line of the doc."""
    blocks = []
    for shown in [kind] if kind else KINDS:
        rows = []
        for name in registry.names(shown):
            component = registry.describe(shown, name)
            summary = component.doc.partition("\n")[0]
            rows.append((name, f"{component.plugin} ({component.distribution})", summary))
        blocks.append(f"{shown}\n{columns(rows) if rows else '  none'}")
    return "\n\n".join(blocks)


def description(found: Description) -> str:
    """One component: its doc, and every field with type, default and doc."""
    title = f"{found.kind} {found.name}, of plugin {found.plugin!r} ({found.distribution})"
    parts = [title]
    if found.doc:
        parts.append(textwrap.indent(found.doc, "  "))
    width = _name_width(found.fields, 2) + 2
    parts.append("\n".join(_fields(found.fields, 2, width)) or "  It has no options.")
    return "\n\n".join(parts)


def _name_width(fields: Iterable[FieldInfo], indent: int) -> int:
    """How far names reach; those of a nested table stand further in."""
    reach = [
        max(indent + len(field.name), _name_width(field.fields, indent + 2)) for field in fields
    ]
    return max(reach, default=0)


def _fields(fields: Iterable[FieldInfo], indent: int, width: int) -> Iterator[str]:
    margin = " " * width
    for field in fields:
        default = field.default if field.default == "required" else f"default {field.default}"
        yield f"{' ' * indent + field.name:{width}}{field.type}; {default}"
        yield from textwrap.wrap(field.doc, _WIDTH, initial_indent=margin, subsequent_indent=margin)
        yield from _fields(field.fields, indent + 2, width)


def report_text(report: Report) -> str:
    """What a task says of itself before it runs."""
    width = max((len(label) for rows in report.sections.values() for label, _ in rows), default=0)
    blocks = [
        "\n".join([title, columns((label.ljust(width), value) for label, value in rows)])
        for title, rows in report.sections.items()
        if rows
    ]
    if report.missing:
        title = "warning: the recipe is sound, but could not run here as it stands"
        lacks = "\n".join(f"- {lack}" for lack in report.missing)
        blocks.append(f"{title}\n{textwrap.indent(lacks, '  ')}")
    return "\n\n".join(blocks)
