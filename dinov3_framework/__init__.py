"""A plugin-based framework for DINOv3: the names that most code needs, from all its packages.

Names are imported when first used: a plugin that registers configs does not import torch. Where
each one lives is written once, in ``__init__.pyi``, which type checkers read too.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def _homes() -> dict[str, str]:
    """The module that each name of the stub is imported from."""
    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text("utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


_HOME_OF = _homes()

__all__ = ["__version__", *sorted(_HOME_OF)]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(_HOME_OF[name])
    is_module = not hasattr(home, name)  # such as collectives
    value = importlib.import_module(f"{home.__name__}.{name}") if is_module else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
