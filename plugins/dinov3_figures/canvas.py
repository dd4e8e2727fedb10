"""What all figures share: the look, and files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, FAINT = "#1f2328", "#656d76", "#d8dee4"
# Okabe and Ito's colours, which colour-blind readers can tell apart, without the yellow: too pale
# for a line on white.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
ALARM = "#d1242f"


def new_figure(width: float, height: float, dpi: int) -> Figure:
    """An empty white figure of ``width`` x ``height`` inches that belongs to no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write ``path`` with equal bytes for equal figures; see :func:`whole_file`."""
    with whole_file(path) as aside:
        figure.savefig(aside, format="png", dpi=figure.dpi, metadata={"Software": None})


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes ``path`` when all of it is there.

    Makes the folder. Raises ``OSError`` where it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
