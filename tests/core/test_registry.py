"""The registry: what it takes, what it refuses, what it tells, what it builds."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import attrs
import pytest
from PIL import Image
from toy_configs import HeadOptions, OtherConfig, PullConfig, TinyConfig

from dinov3_framework import (
    BackboneConfig,
    Component,
    DatasetConfig,
    LossConfig,
    PluginError,
    Registry,
    TaskConfig,
    config,
    option,
)
from dinov3_framework.blame import PROJECT
from dinov3_framework.errors import ExitCode, RecipeError, UnknownNameError, UserError
from dinov3_framework.kinds import KINDS
from dinov3_framework.plugins import HOOKS, OFFERS, BrokenPlugin
from dinov3_framework.recipes.describe import rounded


@config
class SpareConfig(BackboneConfig):
    """Spare."""


@config
class ReservedConfig(BackboneConfig):
    """Has a field of a reserved name."""

    use: str = option("taken", default="x")


@config
class ReservedTaskConfig(TaskConfig):
    """Has a field of a reserved name."""

    extends: str = option("taken", default="x")


class Bare(BackboneConfig):
    """Lacks the decorator."""


def refused(registry: Registry, kind: str, component: object) -> str:
    with pytest.raises(PluginError) as caught:
        registry.add(kind, component, "late", "late-dist")  # type: ignore[arg-type]
    assert "plugin 'late' of distribution 'late-dist'" in str(caught.value)
    return str(caught.value)


def test_names_and_get(registry: Registry) -> None:
    assert registry.names("backbone") == ["other", "tiny"]
    assert registry.names("backbones") == ["other", "tiny"]
    assert registry.names("losses") == ["pull"]
    assert registry.names("observer") == []
    assert registry.get("backbone", "tiny").component.config is TinyConfig
    assert registry.of_config(TinyConfig()).component.name == "tiny"


def test_unknown_names(registry: Registry) -> None:
    with pytest.raises(UnknownNameError, match=r"no backbone is named 'tini'; did you mean 'tiny'"):
        registry.get("backbone", "tini")
    with pytest.raises(UnknownNameError, match=r"no backbone is named 'zz'; known: other, tiny"):
        registry.get("backbone", "zz")
    with pytest.raises(UnknownNameError, match=r"no kind is named 'backbon'; did you mean 'backb"):
        registry.names("backbon")
    with pytest.raises(UnknownNameError, match=r"no kind is named 'xy'; kinds: backbone, augm"):
        registry.names("xy")
    assert UnknownNameError.exit_code == ExitCode.WRONG_INPUT


def test_an_unknown_name_mentions_plugins_that_are_not_there(registry: Registry) -> None:
    registry.broken.append(BrokenPlugin("bad", "bad-dist", "ImportError: x"))
    registry.blocked.append("shy")
    with pytest.raises(UnknownNameError) as caught:
        registry.get("backbone", "resnet")
    assert "plugin 'bad' of distribution 'bad-dist' cannot be loaded: ImportErr" in str(
        caught.value
    )
    assert "blocked plugins: shy" in str(caught.value)


def test_duplicates_name_both_plugins(registry: Registry) -> None:
    text = refused(registry, "backbone", Component("tiny", SpareConfig, SpareConfig))
    assert "backbone 'tiny' is registered twice" in text
    assert "plugin 'toys' of distribution 'toy-box'" in text
    text = refused(registry, "backbone", Component("new", TinyConfig, TinyConfig))
    assert "TinyConfig is the config of backbone 'tiny'" in text
    assert "plugin 'toys' of distribution 'toy-box'" in text


def test_components_that_cannot_be(registry: Registry) -> None:
    assert "is not a Component" in refused(registry, "backbone", ("x", TinyConfig))
    text = refused(registry, "loss", Component("x", SpareConfig, SpareConfig))
    assert "the config of loss 'x' must be a subclass of LossConfig" in text
    assert "lacks the @config decorator" in refused(
        registry, "backbone", Component("x", Bare, Bare)
    )
    text = refused(registry, "backbone", Component("x", ReservedConfig, ReservedConfig))
    assert "ReservedConfig has a field 'use'" in text
    text = refused(registry, "task", Component("x", ReservedTaskConfig, ReservedTaskConfig))
    assert "ReservedTaskConfig has a field 'extends'" in text
    with pytest.raises(UnknownNameError):
        registry.add("backbon", Component("x", SpareConfig, SpareConfig), "late", "late-dist")


# --------------------------------------------------------------------------- building
def test_build(registry: Registry) -> None:
    assert registry.build("backbone", "tiny", depth=5) == (TinyConfig(depth=5), {})
    assert registry.build(PullConfig(), channels=3) == (PullConfig(), {"channels": 3})
    assert registry.build("backbone", "tiny", depth=5) == (TinyConfig(depth=5), {})
    with pytest.raises(TypeError, match="build"):
        registry.build("backbone")
    with pytest.raises(UnknownNameError, match="no component has the config class SpareConfig"):
        registry.build(SpareConfig())


def test_build_by_name_with_what_the_factory_takes(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    registry = Registry.load()
    dataset = registry.build("dataset", "image_folder", root=str(tmp_path), channels=1)
    assert dataset[0].image.shape == (1, 8, 8)
    crops = registry.build("augmentations", "multi_crop", global_size=32, channels=3, patch_size=16)
    assert crops.views["global"].size == 32
    for typo, meant in (("chanels", "channels"), ("rot", "root")):
        with pytest.raises(RecipeError, match=f"{typo}: unknown key.*\\n.*{meant}"):
            registry.build("dataset", "image_folder", root="x", **{typo: 3})
    with pytest.raises(RecipeError, match="channels: unknown key"):
        registry.build("backbone", "vit", channels=3)


def test_factories_are_imported_when_built(registry: Registry) -> None:
    registry.add("backbone", Component("spare", SpareConfig, "attrs:asdict"), "p", "d")
    assert registry.build("backbone", "spare") == {"in_chans": None}


@pytest.mark.parametrize("factory", ["no_such_module:x", "attrs:no_such_name", "attrs"])
def test_a_factory_that_is_not_there(factory: str) -> None:
    registry = Registry()
    registry.add("backbone", Component("spare", SpareConfig, factory), "p", "d")
    with pytest.raises(PluginError, match=f"its factory '{factory}' cannot be imported"):
        registry.build("backbone", "spare")


# --------------------------------------------------------------------------- describing
def test_numbers_say_no_more_than_is_known() -> None:
    numbers = (260042.29, 4e6, 8.96, 15.24, 99.96, 0.00114, 0)
    assert [rounded(number) for number in numbers] == [
        *("260,000", "4,000,000", "8.96", "15.2", "100", "0.00114", "0")
    ]


def test_describe(registry: Registry) -> None:
    found = registry.describe("backbone", "tiny")
    assert (found.doc, found.plugin, found.distribution) == (
        "A backbone.\n\nSmall.",
        "toys",
        "toy-box",
    )
    rows = {field.name: (field.type, field.default, field.doc) for field in found.fields}
    assert rows["depth"] == ("integer", "2", "number of blocks")
    assert rows["norm"] == ('"layer" or "rms"', '"layer"', "normalization")
    assert rows["in_chans"][:2] == ('integer or "none"', "none")


def test_describe_shows_nested_tables_and_required_fields(registry: Registry) -> None:
    fields = {field.name: field for field in registry.describe("loss", "pull").fields}
    assert fields["head"].default == "as below"
    assert [inner.name for inner in fields["head"].fields] == ["width", "bias"]
    assert fields["weight"].default == "1.0"
    toy = {field.name: field for field in registry.describe("task", "toy").fields}
    assert toy["iterations"].default == "required"
    assert toy["backbone"].fields == [], "components are described under their own names"
    assert (toy["heads"].type, toy["heads"].default) == ("array of tables", "[]")
    assert [inner.name for inner in toy["heads"].fields] == ["width", "bias"]


@config
class CustomHeadConfig(LossConfig):
    """Its nested default is not the nested class's own."""

    head: HeadOptions = option("head", factory=lambda: HeadOptions(width=1))


def test_describe_spells_out_a_nested_default_that_differs(registry: Registry) -> None:
    registry.add("loss", Component("custom", CustomHeadConfig, CustomHeadConfig), "p", "d")
    fields = {field.name: field for field in registry.describe("loss", "custom").fields}
    assert fields["head"].default == "{ width = 1, bias = true }"


def test_every_kind_has_a_hook_and_a_documented_config() -> None:
    assert set(HOOKS) == {kind.hook for kind in KINDS.values()} | OFFERS.keys()
    assert PROJECT == "dinov3_framework"
    for kind in KINDS.values():
        assert kind.doc
        assert kind.config.__doc__
        assert attrs.has(kind.config)
        module, _, name = kind.contract.partition(":")
        assert isinstance(getattr(importlib.import_module(module), name), type)
    assert issubclass(PluginError, UserError)
    assert OtherConfig().heads == 4


def test_all_installed_components_are_documented_and_spellable() -> None:
    registry = Registry.load()
    seen = 0
    for kind in KINDS:
        for name in registry.names(kind):
            found = registry.describe(kind, name)
            assert found.doc, f"{kind} {name} has no docstring"
            for field in found.fields:
                assert field.doc, f"{kind} {name}: {field.name} has no doc"
                seen += 1
    assert seen > 20


@config
class PairConfig(DatasetConfig):
    """Two datasets one after the other."""

    first: DatasetConfig = option("the first")
    second: DatasetConfig = option("the second")


def test_a_component_that_composes_others_is_given_build(tmp_path: Path) -> None:
    def pair(config: PairConfig, *, channels: int, build: Any) -> tuple[Any, Any]:
        return build(config.first, channels=channels), build(config.second, channels=channels)

    registry = Registry.load()
    registry.add("dataset", Component("pair", PairConfig, pair, composes=True), "mine", "mine")
    clothes = {"use": "fashion_mnist"}
    values = {"first": clothes, "second": {**clothes, "split": "test"}}
    first, second = registry.build("dataset", "pair", **values, channels=1)
    assert (len(first), len(second)) == (5000, 1000)
