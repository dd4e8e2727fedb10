"""Text for people: what the command line lists, describes and reports."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import attrs
from attrs import field, frozen

from dinov3_framework.kinds import KINDS, Registered
from dinov3_framework.recipes.option_types import nested_config, resolved_fields, type_name
from dinov3_framework.recipes.plain import to_toml_value
from dinov3_framework.recipes.protocol import Components

if TYPE_CHECKING:  # contracts import torch, and listing shall not wait for it
    from dinov3_framework.contracts.running import Plan

_WIDTH = 100


@frozen
class FieldInfo:
    """One field of a config, for people to read."""

    name: str
    type: str
    default: str
    doc: str
    fields: list[FieldInfo] = field(factory=list)  # of the table that this field holds, if any


@frozen
class Description:
    """All that is known of a component without building it."""

    kind: str
    name: str
    doc: str
    plugin: str
    distribution: str
    fields: list[FieldInfo]


def describe(registered: Registered) -> Description:
    """A component as registered."""
    component = registered.component
    return Description(
        registered.kind,
        component.name,
        inspect.cleandoc(component.config.__doc__ or ""),
        registered.plugin,
        registered.distribution,
        _describe_fields(component.config),
    )


def _describe_fields(config: type) -> list[FieldInfo]:
    fields = []
    for attribute in resolved_fields(config):
        default: Any = attribute.default
        if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
            default = default.factory()
        nested = nested_config(attribute.type)
        if default is attrs.NOTHING:
            shown = "required"
        elif nested is not None and default == nested_default(nested):
            shown = "as below"
        else:
            shown = show_default(default)
        inner = _describe_fields(nested) if nested is not None else []
        doc = attribute.metadata.get("doc", "")
        fields.append(FieldInfo(attribute.name, type_name(attribute.type), shown, doc, inner))
    return fields


def nested_default(config: type) -> Any:
    """A config with nothing set; None if it has required fields."""
    required = [a for a in attrs.fields(config) if a.init and a.default is attrs.NOTHING]
    return None if required else config()


def show_default(value: Any) -> str:
    """A default as a recipe would spell it."""
    if value is None:
        return "none"
    return to_toml_value(value)


def columns(rows: Iterable[Sequence[str]], indent: int = 2) -> str:
    """Rows of cells, aligned; nothing is cut off, so that output can be searched."""
    rows = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(" " * indent + line.rstrip() for line in lines)


def listing(registry: Components, kind: str | None) -> str:
    """All components, or those of one kind: name, plugin, first line of the doc."""
    blocks = []
    for shown in [kind] if kind else list(KINDS):
        rows = []
        for name in registry.names(shown):
            component = describe(registry.get(shown, name))
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
    for each in fields:
        default = each.default if each.default == "required" else f"default {each.default}"
        yield f"{' ' * indent + each.name:{width}}{each.type}; {default}"
        yield from textwrap.wrap(each.doc, _WIDTH, initial_indent=margin, subsequent_indent=margin)
        yield from _fields(each.fields, indent + 2, width)


def report_text(report: Plan) -> str:
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
