"""Numbers for a person to read."""

from __future__ import annotations


def size(bytes_: float) -> str:
    unit, divisor = ("GiB", 2**30) if bytes_ >= 2**30 else ("MiB", 2**20)
    return f"{bytes_ / divisor:,.1f} {unit}"


def count(number: float) -> str:
    for unit, divisor in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if number >= divisor:
            return f"{number / divisor:,.1f} {unit}"
    return f"{number / 1e6:,.1f} M"


def duration(time: float) -> str:
    for unit, divisor in (("hours", 3600), ("minutes", 60)):
        if time >= divisor:
            return f"{time / divisor:,.1f} {unit}"
    return f"{time:.1f} seconds"


def seconds(time: float) -> str:
    return f"{time:.2f} s" if time >= 1 else f"{time * 1e3:.1f} ms"
