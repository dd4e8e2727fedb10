"""For all tests: one thread each, a registry of small components, files in a fresh folder.

What tests import is in ``support``, which pyproject.toml puts on the path.
"""

from __future__ import annotations

import os
import signal
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Tests run side by side, one process per core: one thread each keeps them from waiting for
# each other, and makes sums in reduced precision the same however many cores there are. Set
# before torch is imported, and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from toy_configs import HereConfig, OtherConfig, PullConfig, TinyConfig, ToyConfig

from dinov3_framework import Component, Registry

# Under nohup the processes that tests start would ignore it, as they should.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The same for a torch that was imported with other settings."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
