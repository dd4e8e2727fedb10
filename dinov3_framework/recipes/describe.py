"""Format text for people: what the command line lists, describes and reports."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import attrs
from attrs import field, frozen

from dinov3_framework.kinds import KINDS, Registered
from dinov3_framework.recipes.files import RECIPES_PACKAGE, header_of, recipes_of
from dinov3_framework.recipes.option_types import nested_config, resolved_fields, type_name
from dinov3_framework.recipes.plain import Components, to_toml_value

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
        inner = _describe_fields(nested) if nested is not None else []
        if default is attrs.NOTHING:
            shown = "required"
        elif default is None:
            shown = "none"
        elif type(default) is nested and _is_as_described(default, inner):
            shown = "as below"
        else:
            shown = to_toml_value(default)
        doc = attribute.metadata.get("doc", "")
        fields.append(FieldInfo(attribute.name, type_name(attribute.type), shown, doc, inner))
    return fields


def _is_as_described(default: Any, fields: Sequence[FieldInfo]) -> bool:
    """Whether nothing is set in the default of a table that its own fields' defaults do not say."""
    return all(each.default != "required" for each in fields) and default == type(default)()


def rounded(number: float) -> str:
    """A number of which no more than three digits mean anything: 8.96, 15.2, 260,000."""
    return f"{float(f'{number:.3g}'):,.12g}"


def columns(rows: Iterable[Sequence[str]], indent: int = 2) -> str:
    """Rows of cells, aligned; nothing is cut off, so that output can be searched."""
    rows = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(" " * indent + line.rstrip() for line in lines)


def recipe_listing() -> str:
    """The installed recipes: what each is, what it costs and what to expect, by its header."""
    names, blocks = recipes_of(RECIPES_PACKAGE), []
    width = max(map(len, names), default=0)
    for name in names:
        summary, header = header_of(name)
        lines = [f"  {name:{width}}  {summary}"]
        for key in ("Cost", "Expected"):
            text = f"{key}: {header[key]}" if key in header else ""
            lines += textwrap.wrap(text, _WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 6)
        blocks.append("\n".join(lines))
    return "\n".join(["recipes", *(blocks or ["  none"])])


def listing(registry: Components, kind: str | None) -> str:
    """All components, or those of one kind: name, plugin, first line of the doc; or recipes."""
    if kind in ("recipe", "recipes"):
        return recipe_listing()
    blocks = []
    for shown in [kind] if kind else list(KINDS):
        rows = []
        for name in registry.names(shown):
            found = registry.get(shown, name)
            summary = (found.component.config.__doc__ or "").strip().partition("\n")[0]
            rows.append((name, f"{found.plugin} ({found.distribution})", summary))
        blocks.append(f"{shown}\n{columns(rows) if rows else '  none'}")
    return "\n\n".join(blocks)


def description(found: Description) -> str:
    """One component: its doc, and every field with type, default and doc."""
    title = f"{found.kind} {found.name}, of plugin {found.plugin!r} ({found.distribution})"
    doc = [textwrap.indent(found.doc, "  ")] if found.doc else []
    rows = list(_rows(found.fields, 2))
    width = max((len(indented) for indented, _ in rows), default=0) + 2
    margin, lines = " " * width, []
    for indented, each in rows:
        default = each.default if each.default == "required" else f"default {each.default}"
        lines.append(f"{indented:{width}}{each.type}; {default}")
        lines += textwrap.wrap(each.doc, _WIDTH, initial_indent=margin, subsequent_indent=margin)
    return "\n\n".join([title, *doc, "\n".join(lines) or "  It has no options."])


def _rows(fields: Iterable[FieldInfo], indent: int) -> Iterator[tuple[str, FieldInfo]]:
    """Each field with its name, those of a nested table further in."""
    for each in fields:
        yield " " * indent + each.name, each
        yield from _rows(each.fields, indent + 2)


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
