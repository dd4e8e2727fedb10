"""Reads text files that list something, a line each."""

from __future__ import annotations

from pathlib import Path

from dinov3_framework import DataError


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a file that are not empty, stripped, with their numbers from 1.

    Raises ``DataError`` for a file that cannot be read or has no such line.
    """
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not in UTF-8: {error.reason} at byte {error.start}") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    found = [(number, line) for number, line in lines if line]
    if not found:
        raise DataError(f"{path} is empty")
    return found
