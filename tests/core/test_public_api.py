"""The top level of the package is the public API: lazy, complete, and known to type checkers."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import dinov3_framework

PACKAGE = Path(dinov3_framework.__file__).parent
STUB = PACKAGE / "__init__.pyi"


def homes() -> dict[str, str]:
    """name -> module, of everything that the stub exports."""
    exported = {}
    for node in ast.parse(STUB.read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                assert alias.asname == alias.name, f"{alias.name} is not exported without 'as'"
                assert alias.name not in exported, f"{alias.name} is exported twice"
                exported[alias.name] = str(node.module)
    return exported


def test_all_lists_every_name() -> None:
    assert sorted(dinov3_framework.__all__) == sorted({*homes(), "__version__"})
    assert dir(dinov3_framework) == sorted(dinov3_framework.__all__)


@pytest.mark.parametrize(("name", "home"), homes().items())
def test_every_name_comes_from_its_home(name: str, home: str) -> None:
    value = getattr(dinov3_framework, name)
    if isinstance(value, ModuleType):
        assert value.__name__ == f"{home}.{name}"
        return
    assert value is getattr(importlib.import_module(home), name)
    # A name that lives elsewhere would be listed under two homes one day.
    assert value.__module__ == home or not isinstance(value, type)


def test_every_public_class_and_function_is_documented() -> None:
    unsaid = [
        name
        for name in homes()
        if callable(value := getattr(dinov3_framework, name))
        and isinstance(value, type)
        and not (value.__doc__ or "").strip()
    ]
    assert unsaid == []


def test_unknown_names_are_errors() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Backbones'"):
        _ = dinov3_framework.Backbones  # type: ignore[attr-defined]


CONFIG_ONLY = """
import sys
from dinov3_framework import Component, LossConfig, UserError, config, hookimpl, option, positive

@config
class SpreadConfig(LossConfig):
    target: float = option("a target", default=1.0, check=positive)

Component("spread", SpreadConfig, "somewhere:Spread")
heavy = {"torch", "numpy", "PIL", "torchvision", "matplotlib"} & sys.modules.keys()
sys.exit(f"imported {heavy}" if heavy else 0)
"""


def test_configs_are_written_without_heavy_imports() -> None:
    done = subprocess.run([sys.executable, "-c", CONFIG_ONLY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_type_checkers_see_an_editable_install(tmp_path: Path) -> None:
    script = tmp_path / "features.py"
    script.write_text(
        "from dinov3_framework import load_backbone\n"
        'reveal_type(load_backbone("x"))\n'
        "load_backbone(width=3)\n"
    )
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert 'type is "dinov3_framework.weights.loaded.LoadedBackbone"' in found.stdout
    assert 'Unexpected keyword argument "width"' in found.stdout
