"""Discovery, with real distributions: good, broken, blocked, misspelt and doubled plugins."""

from __future__ import annotations

import multiprocessing
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from run_support import run

from dinov3_framework import ExitCode, PluginError, Registry
from dinov3_framework.cli import main
from dinov3_framework.plugins import BLOCK_VARIABLE, find_plugins

Install = Callable[[str, dict[str, str], dict[str, str]], Path]

GOOD = """
    from dinov3_framework import BackboneConfig, Component, config, hookimpl, option

    @config
    class ThirdConfig(BackboneConfig):
        '''A third party's backbone.'''
        depth: int = option("blocks", default=1)

    @hookimpl
    def dinov3_backbones():
        return [Component("third", ThirdConfig, "{module}:ThirdConfig")]
"""


def good(module: str) -> str:
    return GOOD.replace("{module}", module)


def test_a_third_party_plugin_is_found(distribution: Install) -> None:
    distribution("good-dist", {"third": "good_plugin"}, {"good_plugin": good("good_plugin")})
    registry = Registry.load()
    found = registry.get("backbone", "third")
    assert (found.plugin, found.distribution) == ("third", "good-dist")
    assert registry.distributions["third"] == "good-dist"
    assert "pretrain" in registry.names("task"), "our own plugins come the same way"


def test_a_plugin_that_fails_to_import_takes_nothing_down(distribution: Install) -> None:
    distribution(
        "bad-dist",
        {"bad": "bad_plugin", "gone": "no_such_module_here", "quits": "quitting_plugin"},
        {
            "bad_plugin": "import a_library_that_is_missing",
            "quitting_plugin": "raise SystemExit(3)",
        },
    )
    distribution("good-dist", {"third": "good_plugin"}, {"good_plugin": good("good_plugin")})
    registry = Registry.load()
    assert "third" in registry.names("backbone")
    broken = {plugin.name: str(plugin) for plugin in registry.broken}
    assert "plugin 'bad' of distribution 'bad-dist' cannot be loaded" in broken["bad"]
    assert "No module named 'a_library_that_is_missing'" in broken["bad"]
    assert "--block-plugin bad" in broken["bad"]
    assert "no_such_module_here" in broken["gone"]
    assert "SystemExit: 3" in broken["quits"]
    assert "third" not in broken


def test_a_hook_that_raises_takes_nothing_down(distribution: Install) -> None:
    source = """
        from dinov3_framework import hookimpl

        @hookimpl
        def dinov3_losses():
            raise RuntimeError("no luck")
    """
    distribution("raising-dist", {"raising": "raising_plugin"}, {"raising_plugin": source})
    registry = Registry.load()
    assert "pretrain" in registry.names("task")
    (broken,) = [plugin for plugin in registry.broken if plugin.name == "raising"]
    assert broken.distribution == "raising-dist"
    assert broken.error == "dinov3_losses: RuntimeError: no luck"


def test_what_plugins_print_and_their_exits_spoil_nothing(
    distribution: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    source = """
        import sys
        from dinov3_framework import hookimpl
        print("welcome")

        @hookimpl
        def dinov3_losses():
            print("all aboard")
            sys.exit(0)
    """
    distribution("loud-dist", {"loud": "loud_plugin"}, {"loud_plugin": source})
    assert main(["--list", "task"]) == ExitCode.OK
    out, err = capsys.readouterr()
    assert out.startswith("task\n")
    assert "welcome" not in out
    assert "aboard" not in out
    for words in ("printed: welcome", "printed: all aboard", "cannot be loaded: dinov3_losses"):
        (line,) = [line for line in err.splitlines() if words in line]
        assert "plugin 'loud' of distribution 'loud-dist'" in line
    assert "SystemExit: 0" in err


def test_a_plugin_without_hooks_is_reported(distribution: Install) -> None:
    distribution("empty-dist", {"empty": "empty_plugin"}, {"empty_plugin": "x = 1"})
    (broken,) = [plugin for plugin in Registry.load().broken if plugin.name == "empty"]
    assert broken.error == "empty_plugin implements no hook"


def test_a_distribution_seen_twice_is_loaded_once(
    distribution: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = distribution(
        "twice-dist",
        {"third": "good_plugin", "bad": "bad_plugin"},
        {"good_plugin": good("good_plugin"), "bad_plugin": "1 / 0"},
    )
    monkeypatch.syspath_prepend(str(folder.parent / "." / folder.name / ".." / folder.name))
    registry = Registry.load()
    assert "third" in registry.names("backbone")
    assert [plugin.name for plugin in registry.broken].count("bad") == 1


# --------------------------------------------------------------------------- mistakes of authors
def test_a_misspelt_hook_is_an_error(distribution: Install) -> None:
    source = good("typo_plugin").replace("dinov3_backbones", "dinov3_backbons")
    distribution("typo-dist", {"typo": "typo_plugin"}, {"typo_plugin": source})
    with pytest.raises(PluginError) as caught:
        Registry.load()
    text = str(caught.value)
    assert "plugin 'typo' of distribution 'typo-dist': " in text
    assert "dinov3_backbons" in text
    assert "the hooks are: dinov3_augmentations, dinov3_backbones, " in text


def test_a_hook_without_its_decorator_is_an_error(distribution: Install) -> None:
    source = good("bare_plugin").replace("@hookimpl", "")
    distribution("bare-dist", {"bare": "bare_plugin"}, {"bare_plugin": source})
    with pytest.raises(PluginError, match="dinov3_backbones lacks the @hookimpl decorator"):
        Registry.load()


def test_a_hook_with_arguments_is_an_error(distribution: Install) -> None:
    source = good("args_plugin").replace("dinov3_backbones()", "dinov3_backbones(registry)")
    distribution("args-dist", {"args": "args_plugin"}, {"args_plugin": source})
    with pytest.raises(PluginError, match="'args' of distribution 'args-dist'"):
        Registry.load()


def test_two_plugins_of_one_name_are_an_error(distribution: Install) -> None:
    distribution("one-dist", {"same": "one_plugin"}, {"one_plugin": good("one_plugin")})
    distribution("two-dist", {"same": "two_plugin"}, {"two_plugin": good("two_plugin")})
    with pytest.raises(PluginError, match="two plugins are named 'same'") as caught:
        Registry.load()
    assert "'one-dist'" in str(caught.value)
    assert "'two-dist'" in str(caught.value)


def test_one_module_under_two_names_is_an_error(distribution: Install) -> None:
    entries = {"first": "good_plugin", "second": "good_plugin"}
    distribution("alias-dist", entries, {"good_plugin": good("good_plugin")})
    with pytest.raises(PluginError, match="good_plugin is already loaded under another name"):
        Registry.load()


def test_two_components_of_one_name_are_an_error(distribution: Install) -> None:
    distribution("one-dist", {"one": "one_plugin"}, {"one_plugin": good("one_plugin")})
    distribution("two-dist", {"two": "two_plugin"}, {"two_plugin": good("two_plugin")})
    with pytest.raises(PluginError, match="backbone 'third' is registered twice") as caught:
        Registry.load()
    text = str(caught.value)
    assert "plugin 'one' of distribution 'one-dist'" in text
    assert "plugin 'two' of distribution 'two-dist'" in text
    assert Registry.load(block=["two"]).get("backbone", "third").plugin == "one"


def test_a_hook_that_returns_no_list_is_an_error(distribution: Install) -> None:
    source = good("shape_plugin").replace("return [", "return {").replace('Config")]', 'Config")}')
    distribution("shape-dist", {"shape": "shape_plugin"}, {"shape_plugin": source})
    with pytest.raises(PluginError, match="dinov3_backbones returned set, not a list"):
        Registry.load()


# --------------------------------------------------------------------------- blocking
def test_blocked_plugins_are_not_even_imported(
    distribution: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution("bomb-dist", {"bomb": "bomb_plugin"}, {"bomb_plugin": "raise SystemExit('boom')"})
    assert "bomb" not in [plugin.name for plugin in Registry.load(block=["bomb"]).broken]
    monkeypatch.setenv(BLOCK_VARIABLE, "bomb, losses ,")
    registry = Registry.load()
    assert registry.blocked == ["bomb", "losses"]
    assert not {"dino", "ibot", "koleo", "gram"} & set(registry.names("loss"))
    assert "bomb" not in [plugin.name for plugin in registry.broken]


def test_blocking_what_is_not_there() -> None:
    with pytest.raises(PluginError, match=r"no plugin is named 'pipelin'.*did you mean 'pipeline'"):
        find_plugins(name for name in ["pipelin"])


def test_the_environment_may_block_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BLOCK_VARIABLE, "not_installed_here")
    assert Registry.load().blocked == ["not_installed_here"]


# --------------------------------------------------------------------------- not installed
def test_a_file_is_a_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = tmp_path / "try_me.py"
    file.write_text(textwrap.dedent(good("try_me")) + "\nimport beside_it\n")
    (tmp_path / "beside_it.py").write_text("")
    for _ in range(2):
        found = Registry.load(files=[str(file)])
        assert found.get("backbone", "third").distribution == str(file)
        config = found.config_of("backbone", "third", {"depth": 3})
        assert found.get("backbone", "third").component.resolve() is type(config)
    # A process that was not forked and unpickles it finds it, too.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(getattr, (config, "depth")) == 3
    assert "third" not in Registry.load().names("backbone")


TRIAL = """
    import torch
    from dinov3_framework import Component, DatasetConfig, Loss, LossConfig, LossResult
    from dinov3_framework import config, hookimpl
    from dinov3_framework.contracts.data import Dataset, Sample

    @config
    class NoiseConfig(DatasetConfig):
        '''Flat images.'''

    class Noise(Dataset):
        def __init__(self, config, channels):
            self.channels = channels

        def __len__(self):
            return 24

        def __getitem__(self, index):
            return Sample(torch.full((self.channels, 28, 28), index, dtype=torch.uint8))

        def describe(self):
            return "noise"

    @config
    class FussyConfig(LossConfig):
        '''A loss that has enough of it.'''

    class Fussy(Loss):
        needs = frozenset({"student.global.class"})

        def __init__(self, config):
            super().__init__()

        def forward(self, step):
            if step.iteration == 1:
                raise RuntimeError("enough")  # here
            return LossResult(step.student["global"].cls.square().mean())

    @hookimpl
    def dinov3_datasets():
        return [Component("noise", NoiseConfig, "trial:Noise")]

    @hookimpl
    def dinov3_losses():
        return [Component("fussy", FussyConfig, "trial:Fussy")]
"""


@pytest.mark.slow
def test_a_file_serves_launched_processes_and_their_workers(tmp_path: Path) -> None:
    file, source = tmp_path / "trial.py", textwrap.dedent(TRIAL)
    file.write_text(source)
    words = ("--plugin", str(file), "dataset={use='noise'}", "losses.fussy.use=fussy")
    two = ("launcher.use=local", "launcher.processes=2", "loader.workers=1", "observers={}")
    done = run(tmp_path / "run", *words, *two)
    assert done.returncode == 1, done.stderr
    (line,) = [n for n, text in enumerate(source.splitlines(), 1) if text.endswith("# here")]
    assert f"a plugin of {file}, at {file}:{line}, not of your recipe" in done.stderr


@pytest.mark.parametrize(
    ("name", "source", "words"),
    [
        ("not_there.py", None, "no such Python file"),
        ("no_plugin.txt", "", "no such Python file"),
        ("no_hooks.py", "", "no hook"),
        ("no_import.py", "x = 1\nimport a_library_that_is_missing", "no_import.py:2: ModuleNotF"),
        ("no_code.py", "def", "line 1"),
        ("quits.py", "raise SystemExit(3)", "SystemExit: 3"),
        ("json.py", "", "rename the file"),
        ("a-b.py", "", "rename the file"),
        ("typo.py", good("typo").replace("_backbones", "_bones"), "unknown hook"),
    ],
)
def test_a_file_that_is_no_plugin_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str | None, words: str
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = tmp_path / name
    if source is not None:
        file.write_text(textwrap.dedent(source))
    with pytest.raises(PluginError, match=name.removesuffix(".py")) as caught:
        Registry.load(files=[str(file)])
    assert words in str(caught.value)
