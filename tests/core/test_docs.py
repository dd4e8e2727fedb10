"""The documentation of recipes and plugins does what it says."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli
from attrs import frozen

from dinov3_framework import Registry
from dinov3_framework.cli import main
from dinov3_framework.errors import ExitCode
from dinov3_framework.kinds import KINDS
from dinov3_framework.plugins import OFFERS
from dinov3_framework.schedules import SCHEDULES

DOCS = Path(__file__).parents[2] / "docs"


@frozen
class Block:
    """A fenced block: ``` language file."""

    language: str
    file: str
    text: str


def blocks(name: str) -> list[Block]:
    text = (DOCS / name).read_text("utf-8")
    found = re.findall(r"^```(\w+)[ ]?(\S*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(*groups) for groups in found]


COMMANDS = [
    block.text
    for block in blocks("recipes.md")
    if block.language == "console" and block.text.startswith("$ ")
]


@pytest.fixture
def documented(write: Callable[[str, str], Path]) -> None:
    """The recipes of the page, in the working directory."""
    for block in blocks("recipes.md"):
        if block.file:
            write(block.file, block.text)


@pytest.mark.parametrize("text", COMMANDS, ids=lambda text: text.partition("\n")[0])
def test_commands_print_what_the_page_shows(
    text: str, documented: None, capsys: pytest.CaptureFixture[str]
) -> None:
    command, _, expected = text.partition("\n")
    program, *arguments = shlex.split(command.removeprefix("$ "))
    assert program == "dinov3-run"
    code = main(arguments)
    out, err = capsys.readouterr()
    assert code == (ExitCode.OK if "--print-recipe" in arguments else ExitCode.WRONG_INPUT)
    assert expected.rstrip("\n") in out + err
    assert not Path("runs").exists()


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("recipe", ["small.toml", "large.toml"])
def test_the_recipes_of_the_page_are_right(
    recipe: str, documented: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([recipe, "--print-recipe"]) == ExitCode.OK
    data = tomli.loads(capsys.readouterr().out)
    assert ("koleo" in data["losses"]) == (recipe == "small.toml")
    assert data["augmentation"]["local_crops"] == (6 if recipe == "small.toml" else 8)


def test_schedules_and_exit_codes_are_documented() -> None:
    page = (DOCS / "recipes.md").read_text("utf-8")
    for name, schedule in SCHEDULES.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        for field in schedule.__attrs_attrs__:  # type: ignore[attr-defined]
            assert f"`{field.name}`" in row
    for code in ExitCode:
        assert f"\n| {int(code)} | " in page


# --------------------------------------------------------------------------- plugins
def test_every_hook_is_documented() -> None:
    page = (DOCS / "plugins.md").read_text("utf-8")
    for hook in OFFERS:
        assert f"`{hook}`" in page
    for kind in KINDS.values():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{kind.hook}` |")]
        call = f"factory(config, {kind.arguments})" if kind.arguments else "factory(config)"
        assert f"`{call}`" in row
        assert f"`{kind.config.__name__}`" in row


def test_the_example_plugin_works(
    distribution: Callable[[str, dict[str, str], dict[str, str]], Path],
) -> None:
    files = {block.file: block.text for block in blocks("plugins.md") if block.file}
    project = tomli.loads(files.pop("pyproject.toml"))["project"]
    entries = project["entry-points"]["dinov3_framework"]
    folder = distribution(project["name"], entries, {})
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    try:
        registry = Registry.load()
        assert registry.get("loss", "spread").distribution == "my-losses"
        assert "my_losses.spread" not in sys.modules
        sys.path.insert(0, str(folder / "tests"))
        importlib.import_module("test_spread").test_spread()
        suite = importlib.import_module("test_contract").TestSpread
        suite.check(suite.config)
    finally:
        sys.path.remove(str(folder / "tests"))
        for module in ("my_losses", "my_losses.spread", "test_spread", "test_contract"):
            sys.modules.pop(module, None)
