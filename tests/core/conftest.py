"""A registry of small components, and real distributions to throw away."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from toy_configs import HereConfig, OtherConfig, PullConfig, TinyConfig, ToyConfig

from dinov3_framework import Component, Registry


@pytest.fixture
def registry() -> Registry:
    """Components that need no torch; their factories give back what they were called with."""
    registry = Registry()
    for kind, name, cls in (
        ("backbone", "tiny", TinyConfig),
        ("backbone", "other", OtherConfig),
        ("loss", "pull", PullConfig),
        ("launcher", "here", HereConfig),
        ("task", "toy", ToyConfig),
    ):
        component = Component(name, cls, lambda config, **runtime: (config, runtime))
        registry.add(kind, component, "toys", "toy-box")
    return registry


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """``write("base.toml", text)`` in a fresh working directory."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), "utf-8")
        return path

    return write


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
