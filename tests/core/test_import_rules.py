"""The core knows no plugin, plugins know public modules of the core, its layers point one way.

Imports are read from the source, those inside functions too, and factories given as strings.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli
from source_imports import CORE, Import, imports_of, imports_of_file, module_name

from dinov3_framework.plugins import HOOKS

ROOT = Path(__file__).parents[2]
PLUGINS = sorted(path.name for path in (ROOT / "plugins").iterdir() if path.is_dir())
EXAMPLES = sorted(path.parent for path in (ROOT / "examples").glob("*/src"))
HEAVY = {"torch", "torchvision", "numpy", "PIL", "matplotlib", "scipy", "sklearn"}


def is_part_of(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def ours(module: str) -> bool:
    """Whether a module is the core's or some plugin's (recipes are no code)."""
    top = module.partition(".")[0]
    return top.startswith("dinov3") and top != "dinov3_recipes"


# --------------------------------------------------------------------------- plugins
def is_private(found: Import) -> bool:
    """Whether a module or a name begins with an underscore, other than ``__version__``."""
    words = [*found.module.split("."), found.name]
    return any(word.startswith("_") and not word.startswith("__") for word in words)


def plugin_faults(package: str, imports: list[Import]) -> list[str]:
    """What a plugin imports of other plugins, or of the core's private parts."""
    return [
        f"line {found.line}: {found}"
        for found in imports
        if ours(found.module)
        and not is_part_of(found.module, package)
        and (not is_part_of(found.module, CORE) or is_private(found))
    ]


def source_roots() -> list[tuple[Path, str]]:
    """(folder, package) of every plugin: the first-party ones and the examples."""
    first = [(ROOT / "plugins", name) for name in PLUGINS]
    examples = [
        (folder / "src", package.name)
        for folder in EXAMPLES
        for package in (folder / "src").iterdir()
        if (package / "__init__.py").is_file()
    ]
    return first + examples


@pytest.mark.parametrize(
    ("root", "package"), [pytest.param(*found, id=found[1]) for found in source_roots()]
)
def test_plugins_import_public_modules_of_the_core_only(root: Path, package: str) -> None:
    files = sorted((root / package).rglob("*.py"))
    assert files
    faults = {
        str(file.relative_to(root)): found
        for file in files
        if (found := plugin_faults(package, imports_of_file(file, root)))
    }
    assert faults == {}


@pytest.mark.parametrize(
    "source",
    [
        "from dinov3_framework.plugins import _names",
        "import dinov3_framework._own.module",
        "from dinov3_framework import _load",
        "from dinov3_vit import VitConfig",
        "def f():\n    import dinov3_vit.block",
        "def f():\n    return importlib.import_module('dinov3_vit.block')",
        "Component('vit', Config, 'dinov3_vit.transformer:VisionTransformer')",
        "from ..dinov3_vit import block",
    ],
)
def test_what_plugins_may_not_import_is_noticed(source: str) -> None:
    assert len(plugin_faults("dinov3_own", imports_of(ast.parse(source), "dinov3_own"))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "from dinov3_framework import Component, collectives",
        "from dinov3_framework.testing import LossSuite",
        "from dinov3_own.configs import OwnConfig",
        "from .configs import OwnConfig",
        "import torch, numpy",
        "Component('own', Config, 'dinov3_own.loss:Own')",
        "import dinov3_framework",
        "from dinov3_framework import __version__",
        "from dinov3_framework.training.trainer import Trainer",
    ],
)
def test_what_plugins_may_import_is_let_through(source: str) -> None:
    assert plugin_faults("dinov3_own", imports_of(ast.parse(source), "dinov3_own")) == []


# --------------------------------------------------------------------------- the core
# From the bottom up: a package imports what stands on a line below its own, and nothing else.
LAYERS = (
    ("errors", "schedules", "randomness"),
    ("blame",),
    ("configs",),
    ("kinds",),
    ("contracts",),
    ("plugins",),
    ("recipes",),
    ("registry",),
    ("runtime",),
    ("parallel",),
    ("checkpoints",),
    ("data",),
    ("weights",),
    ("training",),
    ("testing", "cli"),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def core_files() -> Iterator[Path]:
    # The package's own __init__ is the face of all layers: it names their homes in a lazy table.
    for file in sorted((ROOT / CORE).rglob("*.py")):
        if file != ROOT / CORE / "__init__.py":
            yield file


def part_of(module: str, name: str = "") -> str:
    """The module or subpackage of the core: ``engine`` for ``dinov3_framework.data.loader``."""
    if module == CORE:
        return name
    return module.removeprefix(f"{CORE}.").partition(".")[0]


def core_edges(file: Path) -> Iterator[tuple[str, str, Import]]:
    """(part, imported part, import) for each import of the core by the core."""
    importer = part_of(module_name(file, ROOT))
    for found in imports_of_file(file, ROOT):
        imported = part_of(found.module, found.name)
        # A row of the table of kinds names a class by a string, and imports nothing.
        if file.name in ("kinds.py", "plugins.py") and found.lazy and found.name[:1].isupper():
            continue
        if is_part_of(found.module, CORE) and imported not in (importer, "__version__"):
            yield importer, imported, found


def test_the_core_imports_no_plugin() -> None:
    faults = [
        f"{file.name}, line {found.line}: {found}"
        for file in (ROOT / CORE).rglob("*.py*")
        if file.suffix in (".py", ".pyi")
        for found in imports_of_file(file, ROOT)
        if ours(found.module) and not is_part_of(found.module, CORE)
    ]
    assert faults == []


def test_the_core_names_no_plugin() -> None:
    """Nor does it look for one by a string."""
    packages = {package for _, package in source_roots()} - set(HOOKS)
    texts = {file: file.read_text("utf-8") for file in (ROOT / CORE).rglob("*.py")}
    named = [
        (file.name, name)
        for file, text in texts.items()
        for name in packages
        if re.search(rf"\b{name}\b", text)  # published names such as dinov3_vits16 may be quoted
    ]
    assert named == []


def test_every_part_of_the_core_has_a_layer() -> None:
    parts = {part_of(module_name(file, ROOT)) for file in core_files()}
    assert parts == LEVEL.keys()


def points_up(importer: str, imported: str) -> bool:
    return LEVEL[imported] >= LEVEL[importer]


def test_imports_inside_the_core_point_one_way() -> None:
    """Those inside functions too: a package can be understood before those that import it."""
    faults = [
        f"{file.relative_to(ROOT)}, line {found.line}: {importer} imports {imported}"
        for file in core_files()
        for importer, imported, found in core_edges(file)
        if points_up(importer, imported)
    ]
    assert faults == []


def test_imports_that_point_up_are_noticed() -> None:
    assert not points_up("registry", "configs")
    assert points_up("registry", "runtime")
    assert points_up("cli", "testing")


def test_modules_import_each_other_one_way() -> None:
    """No circle anywhere, inside a package either."""
    edges: dict[str, set[str]] = {}
    for file in core_files():
        name = module_name(file, ROOT)
        for found in imports_of_file(file, ROOT):
            if is_part_of(found.module, CORE):
                inner = f"{found.module}.{found.name}"
                imported = inner if _is_module(inner) else found.module
                if imported not in (name, CORE):
                    edges.setdefault(name, set()).add(imported)
    assert _circle(edges) == []
    assert _circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def _circle(edges: dict[str, set[str]]) -> list[str]:
    done: set[str] = set()

    def walk(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        for imported in sorted(edges.get(name, ())):
            if circle := walk(imported, [*trail, name]):
                return circle
        done.add(name)
        return []

    return next((circle for name in sorted(edges) if (circle := walk(name, []))), [])


# --------------------------------------------------------------------------- lightness, hooks
@pytest.mark.parametrize("package", PLUGINS)
def test_registering_a_plugin_imports_nothing_heavy(package: str) -> None:
    script = (
        f"import sys, {package} as plugin\n"
        "for name in dir(plugin):\n"
        "    if name.startswith('dinov3_') and callable(getattr(plugin, name)):\n"
        "        assert getattr(plugin, name)()\n"
        f"heavy = {HEAVY!r} & sys.modules.keys()\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_plugin_folder_is_installed() -> None:
    """A folder that the package's metadata forget works for nobody but its author."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        data = tomli.load(file)
    points = data["project"]["entry-points"]["dinov3_framework"]
    packages = data["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert CORE in packages
    for package in PLUGINS:
        # The hooks may stand apart, so that the rest of a package does without the framework's own
        # dependencies.
        assert {package, f"{package}.plugin"} & set(points.values())
        assert f"plugins/{package}" in packages


def test_every_hook_has_a_user() -> None:
    folders = [ROOT / CORE, ROOT / "plugins", *EXAMPLES]
    defined = {
        node.name
        for folder in folders
        for file in folder.rglob("*.py")
        for node in ast.parse(file.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef)
        and any("hookimpl" in ast.dump(decorator) for decorator in node.decorator_list)
    }
    page = (ROOT / "docs" / "plugins.md").read_text("utf-8")
    documented = {name for name in HOOKS if f"| `{name}` |" in page}
    assert set(HOOKS) <= defined | documented
    assert defined <= set(HOOKS)
    assert {"dinov3_backbones", "dinov3_losses", "dinov3_tasks"} <= defined
