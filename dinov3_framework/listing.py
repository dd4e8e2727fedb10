"""Lists of names in messages."""

from __future__ import annotations

from collections.abc import Iterable

_SHOWN = 12


def listing(title: str, lines: Iterable[str]) -> str:
    """``lines`` sorted under their number and a title, cut where it gets long; none for none."""
    lines = sorted(lines)
    if not lines:
        return ""
    more = [f"... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return f"\n  {len(lines)} {title}:" + "".join(f"\n    {x}" for x in lines[:_SHOWN] + more)
