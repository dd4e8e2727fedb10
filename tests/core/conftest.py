"""Real distributions to throw away."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str, dict[str, str], dict[str, str]], Path]]:
    """Install a distribution: ``distribution("my-dist", {entry: module}, {module: source})``."""
    installed: list[str] = []

    def install(name: str, entries: dict[str, str], modules: dict[str, str]) -> Path:
        folder = tmp_path / f"site-{name}"
        info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [f"{entry} = {module}" for entry, module in entries.items()]
        (info / "entry_points.txt").write_text("\n".join(["[dinov3_framework]", *lines]) + "\n")
        for module, source in modules.items():
            (folder / f"{module}.py").write_text(textwrap.dedent(source))
            installed.append(module)
        monkeypatch.syspath_prepend(str(folder))
        return folder

    yield install
    for module in installed:
        sys.modules.pop(module, None)
