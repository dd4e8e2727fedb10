"""Index files of datasets: NumPy arrays that are read by mapping them, and written whole."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from dinov3_framework import DataError
from dinov3_framework.errors import first_few, printable
from dinov3_framework.runtime.output import output_file

Progress = Callable[[int, int], None]  # (done, total), called now and then

_ROWS = 1 << 18  # of a mapped table at a time


def load_array(path: Path, fields: Mapping[str, str] | None, mend: str) -> np.ndarray:
    """A one-dimensional array, mapped into memory.

    ``fields`` are the names of a table's columns with the kinds of their dtypes ("u" or "U"); None
    means an array of strings. Raises ``DataError`` that ends with ``mend`` for a file that is
    missing or is something else. Pickled objects are never read.
    """
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path} is missing\n    {mend}") from None
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        reason = printable(str(error), kept="") or type(error).__name__
        raise DataError(f"{path} is no array of NumPy: {reason}\n    {mend}") from error
    if not isinstance(array, np.ndarray) or array.ndim != 1 or not _fits(array.dtype, fields):
        wanted = "strings" if fields is None else f"a table of {', '.join(fields)}"
        found = f"{array.dtype}" if isinstance(array, np.ndarray) else "an archive of arrays"
        raise DataError(f"{path} holds {found}, not {wanted}\n    {mend}")
    return array


def _fits(dtype: np.dtype, fields: Mapping[str, str] | None) -> bool:
    if fields is None:
        return dtype.kind == "U"
    found = {} if dtype.fields is None else {name: dtype[name].kind for name in dtype.names or ()}
    return all(found.get(name) == kind for name, kind in fields.items())


def save_array(path: Path, array: np.ndarray) -> Path:
    """Write a whole file or none; raises ``OutputError``."""
    with output_file(path) as aside, aside.open("xb") as stream:  # a path would get another ending
        np.save(stream, array, allow_pickle=False)
    return path


def in_chunks(array: np.ndarray) -> list[np.ndarray]:
    """The rows in parts, so that a mapped table of gigabytes never lies in memory whole."""
    return [array[start : start + _ROWS] for start in range(0, len(array), _ROWS)]


def check_class_ids(ids: tuple[str, ...], path: Path, mend: str) -> None:
    """Raise ``DataError`` unless each is the name of a folder or file, and no two are the same."""
    wrong = [each for each in ids if not re.fullmatch(r"(?!\.)[^/\\\0]+", each)]
    if wrong:
        raise DataError(
            f"{path}: {len(wrong):,} classes have no usable id ({first_few(map(repr, wrong))}); "
            f"classes without images have none\n    {mend}"
        )
    if len(set(ids)) < len(ids):
        twice = sorted({each for each in ids if ids.count(each) > 1})
        raise DataError(f"{path} names classes twice: {first_few(twice)}\n    {mend}")


def check_labels(labels: np.ndarray, classes: tuple[str, ...], path: Path, mend: str) -> None:
    """Raise ``DataError`` for labels that are no place in ``classes``, and classes without any."""
    if not len(labels):
        raise DataError(f"{path} names no image\n    {mend}")
    if (most := int(labels.max())) >= len(classes):
        raise DataError(
            f"{path}: labels out of range: {most} where there are {len(classes):,} classes, of 0 "
            f"to {len(classes) - 1:,}\n    {mend}"
        )
    counts = np.bincount(labels, minlength=len(classes))
    if empty := [classes[label] for label in np.flatnonzero(counts == 0)]:
        raise DataError(
            f"{path}: {len(empty):,} classes have no image: {first_few(empty)}\n    {mend}"
        )


def index_command(name: str, values: Mapping[str, str | None], replace: bool = False) -> str:
    """The command that writes the index of a dataset; its keys that are None are left out."""
    given = [f"dataset.{key}={value}" for key, value in values.items() if value is not None]
    words = ["index", f"dataset.use={name}", *given]
    more = ["replace=true", "--overwrite"] if replace else []
    return f"dinov3-run {shlex.join([*words, *more])}"


def data_folder(name: str, root: str, holds: str) -> Path:
    """The folder of a dataset; raises ``DataError`` where it is none."""
    path = Path(root).expanduser()
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise DataError(f"{name}: root = {root!r} {what}\n    root is the folder with {holds}")
    return path
