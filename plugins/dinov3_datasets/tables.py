"""What tables with images have in common: rows by number, columns with names and types."""

from __future__ import annotations

import abc
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dinov3_framework import DataError
from dinov3_framework.errors import first_few, printable

if TYPE_CHECKING:
    import pyarrow as pa


def missing_library(name: str) -> DataError:
    """What to say where an optional library is not there."""
    return DataError(
        f"hf_dataset needs {name}, which is not installed: pip install 'dinov3-framework[hf]'"
    )


class Table(abc.ABC):
    """Rows of a table; the schema is that of Arrow, whatever the files are."""

    schema: pa.Schema
    contents: str  # of its files: a hash of names and sizes, and one of times, too
    state: str

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def column(self, name: str) -> list[Any]:
        """All values of a small column."""

    @abc.abstractmethod
    def row(self, index: int, columns: Sequence[str]) -> Mapping[str, Any]:
        """Some values of a row; raises ``CorruptSampleError`` where the file is damaged."""

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """What a row is called."""

    def check(self, columns: Sequence[str]) -> None:
        """Raise ``DataError`` where reading damaged values could end the process."""

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """The classes of a column of Hugging Face's ``ClassLabel``."""
        feature = _features(self.schema).get(column)
        if not isinstance(feature, dict) or feature.get("_type") != "ClassLabel":
            return None
        names = feature.get("names")
        is_sound = isinstance(names, list) and all(isinstance(each, str) for each in names)
        return tuple(names) if is_sound and names else None  # type: ignore[arg-type]

    def notes(self) -> list[str]:
        """What a check should say of the files, a line each."""
        return []


def _features(schema: pa.Schema) -> Mapping[str, Any]:
    """What Hugging Face writes of the columns beside the schema."""
    try:
        known = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        found = known["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


# --------------------------------------------------------------------------- columns
def image_column(table: Table, given: str | None) -> str:
    """The column with the images; ``DataError`` if there is none, or one of another type."""
    import pyarrow as pa

    def fits(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            index = kind.get_field_index("bytes")
            return index >= 0 and fits(kind.field(index).type)
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    if given is not None:
        kind = column_type(table, "image", given)
        if not fits(kind):
            raise DataError(f"image = {given!r}: that column is {kind}, images are encoded bytes")
        return given
    found = [field.name for field in table.schema if fits(field.type)]
    if len(found) == 1 or "image" in found:
        return found[0] if len(found) == 1 else "image"
    what = f"several can be: {first_few(found)}" if found else "none can be"
    raise DataError(f"no column image, and {what}; state image. {_columns(table)}")


def label_column(table: Table, given: str | None) -> str | None:
    """The column with the labels; None if there is none."""
    import pyarrow as pa

    if given == "auto":
        if "label" in table.schema.names:
            given = "label"
        else:
            found = [name for name in table.schema.names if table.class_names(name)]
            given = found[0] if len(found) == 1 else None
    if given is None:
        return None
    kind = column_type(table, "label", given)
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_integer(values) or is_text(values)):
        raise DataError(
            f"label = {given!r}: that column is {kind}, labels are whole numbers or names "
            '(label = "none" leaves them out)'
        )
    return given


def text_column(table: Table, given: str | None) -> str | None:
    """The column with the texts; None if there is none."""
    if given is not None and not is_text(kind := column_type(table, "text", given)):
        raise DataError(f"text = {given!r}: that column is {kind}, no text")
    return given


def is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def column_type(table: Table, key: str, name: str) -> pa.DataType:
    """The type of a column; ``DataError`` names those that there are."""
    index = table.schema.get_field_index(name)
    if index < 0:
        raise DataError(f"{key} = {name!r}: there is no such column. {_columns(table)}")
    return table.schema.field(index).type


def _columns(table: Table) -> str:
    columns = (f"{printable(field.name)} ({field.type})" for field in table.schema)
    return f"The columns are {first_few(columns, 12)}"
