"""Structuring: strict types, all mistakes at once with their places, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import attrs
import pytest
import tomli
from toy_configs import HeadOptions, OtherConfig, PullConfig, TinyConfig, ToyConfig

from dinov3_framework import (
    BackboneConfig,
    Component,
    Constant,
    Cosine,
    InvalidOption,
    LauncherConfig,
    LossConfig,
    PluginError,
    RecipeError,
    Registry,
    Schedule,
    config,
    option,
)
from dinov3_framework.errors import UnknownNameError, suggest
from dinov3_framework.plugins import BrokenPlugin
from dinov3_framework.recipes.compose import Composed, compose
from dinov3_framework.recipes.option_types import type_name
from dinov3_framework.recipes.plain import to_toml_value, unstructure
from dinov3_framework.recipes.structure import structure_component, structure_recipe
from dinov3_framework.recipes.toml_text import annotated_toml, to_toml

MINIMAL = 'task = "toy"\niterations = 5\nlr = 0.1\nbackbone = { use = "tiny" }\n'


def composed(text: str, source: str = "r.toml") -> Composed:
    data = tomli.loads(text)
    origins: dict[tuple[str, ...], str] = {}

    def mark(table: Mapping[str, Any], path: tuple[str, ...]) -> None:
        for key, value in table.items():
            origins[*path, key] = source
            if isinstance(value, dict):
                mark(value, (*path, key))

    mark(data, ())
    return Composed(data, origins, "r", source)


def structure(registry: Registry, text: str) -> ToyConfig:
    result = structure_recipe(registry, composed(text))
    assert isinstance(result, ToyConfig)
    return result


def mistakes(registry: Registry, text: str) -> dict[str, str]:
    """Message and hint of each mistake, by its place."""
    with pytest.raises(RecipeError) as caught:
        structure_recipe(registry, composed(text))
    problems = caught.value.problems
    assert all(problem.source == "r.toml" for problem in problems)
    return {problem.where: f"{problem.message} | {problem.hint}" for problem in problems}


# --------------------------------------------------------------------------- what is right
def test_a_whole_recipe(registry: Registry) -> None:
    result = structure(
        registry,
        """
        task = "toy"
        iterations = 5
        mean = [1, 2.5]
        clip = 3
        resume = false
        lr = { use = "cosine", start = 0, peak = 1.5, end = 0.0, warmup = 10 }
        tags = { a = "b" }
        [backbone]
        use = "tiny"
        drop = 1
        norm = "rms"
        in_chans = 1
        [losses.first]
        use = "pull"
        weight = 2
        scale = [0, 0.5]
        head.width = 7
        [launcher]
        use = "here"
        processes = 2
        """,
    )
    assert result.lr == Cosine(start=0.0, peak=1.5, end=0.0, warmup=10)
    assert result.mean == (1.0, 2.5)
    assert type(result.mean[0]) is float
    assert (result.clip, result.resume, result.tags) == (3.0, False, {"a": "b"})
    assert result.backbone == TinyConfig(drop=1.0, norm="rms", in_chans=1)
    assert result.losses == {
        "first": PullConfig(weight=Constant(value=2.0), scale=(0.0, 0.5), head=HeadOptions(width=7))
    }
    assert result.launcher is not None
    assert result.seed == 0


def test_defaults_fill_the_rest(registry: Registry) -> None:
    result = structure(registry, MINIMAL)
    assert result == ToyConfig(iterations=5, lr=Constant(value=0.1), backbone=TinyConfig())


def test_arrays_of_tables_there_and_back(registry: Registry) -> None:
    text = MINIMAL + "heads = [{ width = 3 }, {}]"
    result = structure(registry, text)
    assert result.heads == (HeadOptions(width=3), HeadOptions())
    plain = unstructure(registry, result)
    assert plain["heads"] == [{"width": 3, "bias": True}, {"width": 256, "bias": True}]
    for written in (to_toml(plain), annotated_toml(plain, {})):
        assert structure(registry, written) == result
    appended = MINIMAL + "[[heads]]\nwidth = 3\n[[heads]]\n"
    assert structure(registry, appended) == result


def test_mistakes_in_an_array_of_tables_come_together_with_their_places(
    registry: Registry,
) -> None:
    found = mistakes(registry, MINIMAL + 'heads = [{ width = 0 }, {}, { widht = 3, bias = "no" }]')
    assert found == {
        "heads.1.width": "must be above 0, is 0 | ",
        "heads.3.widht": "unknown key | did you mean 'width'?",
        "heads.3.bias": 'expected boolean, found string "no" | '
        "booleans are true and false, without quotes",
    }
    assert mistakes(registry, MINIMAL + "heads = [{}, 7]") == {
        "heads.2": "expected table, found integer 7 | "
    }


def test_integers_stand_for_numbers(registry: Registry) -> None:
    result = structure(registry, MINIMAL + "clip = 3")
    assert type(result.clip) is float


# --------------------------------------------------------------------------- strictness
@pytest.mark.parametrize(
    ("line", "where", "message"),
    [
        ("seed = 3.7", "seed", "expected integer, found number 3.7"),
        ("seed = 3.0", "seed", "expected integer, found number 3.0"),
        ('seed = "7"', "seed", 'expected integer, found string "7"'),
        ("seed = true", "seed", "expected integer, found boolean true"),
        ("seed = []", "seed", "expected integer, found an array"),
        ("clip = true", "clip", "expected number, found boolean true"),
        ('clip = "1"', "clip", 'expected number, found string "1"'),
        ("clip = nan", "clip", "must not be nan"),
        ('resume = "false"', "resume", 'expected boolean, found string "false"'),
        ("resume = 1", "resume", "expected boolean, found integer 1"),
        ("output_dir = 7", "output_dir", "expected string, found integer 7"),
        ("output_dir = 2024-01-02", "output_dir", "expected string, found date 2024-01-02"),
        ("mean = 0.5", "mean", "expected array of numbers, found number 0.5"),
        ("mean = [1, 'a']", "mean.2", 'expected number, found string "a"'),
        ("mean = {}", "mean", "expected array of numbers, found a table"),
        ("tags = 'a'", "tags", 'expected table of name = string, found string "a"'),
        ("tags = { a = 1 }", "tags.a", "expected string, found integer 1"),
        ("launcher = 'here'", "launcher", 'expected table, found string "here"'),
        ("losses = { a = 1 }", "losses.a", "expected table, found integer 1"),
        ("losses = []", "losses", "expected table of name = loss (use = ...), found an array"),
        (
            "losses.a = { use = 'pull', scale = [0.5] }",
            "losses.a.scale",
            "expected array of 2 numbers, found an array of 1",
        ),
        (
            "losses.a = { use = 'pull', head = 3 }",
            "losses.a.head",
            "expected table, found integer 3",
        ),
        (
            "losses.a = { use = 'pull', weight = 'big' }",
            "losses.a.weight",
            'expected number or schedule, found string "big"',
        ),
        (
            "losses.a = { use = 'pull', weight = true }",
            "losses.a.weight",
            "expected number or schedule, found boolean true",
        ),
    ],
)
def test_nothing_is_coerced(registry: Registry, line: str, where: str, message: str) -> None:
    found = mistakes(registry, MINIMAL + line)
    assert list(found) == [where]
    assert found[where].startswith(f"{message} | ")


def test_choices(registry: Registry) -> None:
    text = MINIMAL.replace('"tiny"', '"tiny", norm = "leyer"')
    expected = 'expected "layer" or "rms", found string "leyer" | did you mean \'layer\'?'
    assert mistakes(registry, text) == {"backbone.norm": expected}


def test_checks_name_the_field_and_come_all_at_once(registry: Registry) -> None:
    text = """
        task = "toy"
        iterations = 0
        seed = -1
        lr = 1
        [backbone]
        use = "tiny"
        depth = 0
        drop = 1.5
        [losses.gram]
        use = "pull"
        scale = [1.0, 0.5]
        head = { width = 0 }
    """
    found = mistakes(registry, text)
    assert found == {
        "iterations": "must be above 0, is 0 | ",
        "seed": "must not be negative, is -1 | ",
        "backbone.depth": "must be above 0, is 0 | ",
        "backbone.drop": "must lie in 0..1, is 1.5 | ",
        "losses.gram.scale": "must be two increasing numbers in 0..1, is [1.0, 0.5] | ",
        "losses.gram.head.width": "must be above 0, is 0 | ",
    }


def test_a_complaint_of_a_whole_config_names_the_field(registry: Registry) -> None:
    text = MINIMAL.replace("= 5", "= 13")
    assert mistakes(registry, text) == {"iterations": "13 brings bad luck | "}


# --------------------------------------------------------------------------- keys
def test_unknown_keys_have_their_full_path_and_a_suggestion(registry: Registry) -> None:
    text = (
        MINIMAL
        + """
        itarations = 3
        zzz = 1
        [losses.gram]
        use = "pull"
        wieght = 1.0
        head.witdh = 3
    """
    )
    found = mistakes(registry, text)
    assert found["itarations"] == "unknown key | did you mean 'iterations'?"
    assert found["losses.gram.wieght"].startswith("unknown key | did you mean 'weight'")
    assert found["losses.gram.head.witdh"] == "unknown key | did you mean 'width'?"
    assert found["zzz"].startswith("unknown key | keys here: output_dir, seed, launcher,")
    assert len(found) == 4


@config
class RenamedConfig(BackboneConfig):
    """Its keys had other names."""

    width: int = option("the width", default=8, formerly=("dim", "channels"))
    head: HeadOptions = option("the head", factory=HeadOptions, formerly=("bias", "head_options"))


def test_names_that_went_say_what_they_are_called_now(registry: Registry) -> None:
    new = Component("renamed", RenamedConfig, RenamedConfig, formerly=("old", "older"))
    registry.add("backbone", new, "p", "d")
    keys = "dim = 3, channels = 3, bias = true, head_options = {}"
    assert mistakes(registry, MINIMAL.replace('"tiny"', f'"renamed", {keys}')) == {
        "backbone.dim": "unknown key | it is called 'width' now",
        "backbone.channels": "unknown key | it is called 'width' now",
        "backbone.bias": "unknown key | it is called 'head.bias' now",
        "backbone.head_options": "unknown key | it is called 'head' now",
    }
    assert mistakes(registry, MINIMAL.replace("tiny", "older")) == {
        "backbone.use": "no backbone is named 'older' | it is called 'renamed' now"
    }
    with pytest.raises(UnknownNameError, match="'old'; it is called 'renamed' now"):
        registry.build("backbone", "old")


def test_missing_keys_say_what_belongs_there(registry: Registry) -> None:
    found = mistakes(registry, 'task = "toy"\nlr = { use = "cosine", start = 1.0, end = 0.0 }')
    assert found == {
        "iterations": "missing: integer | steps",
        "backbone": "missing: backbone (use = ...) | the network",
        "lr.peak": "missing: number | value after the warm-up",
    }


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("gpu", ["auto", "cpu", "cuda"], None),
        ("CPU", ["auto", "cpu", "cuda"], "'cpu'"),
        ("ibto", ["dino", "gram", "ibot"], "'ibot'"),
        ("batch", ["batch_size", "seed"], "'batch_size'"),
        ("cosin", ["constant", "cosine"], "'cosine'"),
    ],
)
def test_only_what_was_probably_meant_is_suggested(
    name: str, known: list[str], meant: str | None
) -> None:
    expected = f"known: {', '.join(known)}" if meant is None else f"did you mean {meant}?"
    assert suggest(name, known) == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("losses.dino.weight", "-1"),
        ("losses.dino.weight", "{ use = 'cosine', start = 0, peak = 1, end = -0.1 }"),
        ("losses.dino.local_weight", "-0.5"),
        ("optimizer.lr", "-0.001"),
        ("teacher.momentum", "1.01"),
    ],
)
def test_schedules_have_bounds(key: str, value: str) -> None:
    with pytest.raises(RecipeError, match=f"{key}: must") as caught:
        structure_recipe(Registry.load(), compose("quickstart", [f"{key}={value}"]))
    assert len(caught.value.problems) == 1


def test_use_is_needed_and_must_name_something(registry: Registry) -> None:
    text = """
        task = "toy"
        iterations = 5
        lr = { use = "cosin", peak = 1 }
        backbone = { depth = 3 }
        [losses.a]
        use = "pul"
        [losses.b]
        use = 3
        [launcher]
        use = "slurm"
    """
    assert mistakes(registry, text) == {
        "lr.use": "no schedule is named 'cosin' | did you mean 'cosine' or 'warmup_cosine'?",
        "backbone.use": "missing | it picks the backbone; known: other, tiny",
        "losses.a.use": "no loss is named 'pul' | did you mean 'pull'?",
        "losses.b.use": "expected string, found integer 3 | ",
        "launcher.use": "no launcher is named 'slurm' | known: here",
    }


def test_a_component_of_another_kind_does_not_fit(registry: Registry) -> None:
    text = MINIMAL.replace('"tiny"', '"pull"')
    assert mistakes(registry, text)["backbone.use"].startswith("no backbone is named 'pull'")


def test_the_task_picks_the_config(registry: Registry) -> None:
    assert mistakes(registry, "x = 1")["task"].startswith("missing, so this is an overlay")
    assert mistakes(registry, "task = 'toi'") == {
        "task": "no task is named 'toi' | did you mean 'toy'?"
    }
    assert mistakes(registry, "task = 1")["task"].startswith("expected string, found integer 1")


def test_plugins_that_are_not_there_are_mentioned(registry: Registry) -> None:
    registry.broken.append(BrokenPlugin("bad", "bad-dist", "ImportError: x"))
    registry.blocked.append("shy")
    for text in ("task = 'other_task'", MINIMAL.replace('"tiny"', '"resnet"')):
        (message,) = mistakes(registry, text).values()
        assert "'bad' of distribution 'bad-dist' cannot be loaded" in message
        assert "blocked plugins: shy" in message


def test_sources_are_told(registry: Registry) -> None:
    recipe = composed(MINIMAL + "[losses.a]\nuse = 'pull'\nscale = [1]\nhead = { nope = 1 }")
    recipe.origins["losses", "a", "scale"] = "command line"
    recipe.origins["losses", "a", "head", "nope"] = "base.toml"
    del recipe.data["iterations"]
    del recipe.data["backbone"]["use"]
    recipe.origins[("backbone",)] = "other.toml"
    del recipe.origins["backbone", "use"]
    with pytest.raises(RecipeError) as caught:
        structure_recipe(registry, recipe)
    assert {problem.where: problem.source for problem in caught.value.problems} == {
        "losses.a.scale": "command line",
        "losses.a.head.nope": "base.toml",
        "iterations": "r.toml",
        "backbone.use": "other.toml",
    }
    assert str(caught.value).startswith("4 mistakes in this recipe:\n  - r.toml: iterations: miss")


# --------------------------------------------------------------------------- from Python
def test_build_by_name_is_as_strict(registry: Registry) -> None:
    built, runtime = registry.build("backbone", "tiny", depth=3)
    assert (built, runtime) == (TinyConfig(depth=3), {})
    with pytest.raises(RecipeError, match=r"depth: expected integer, found number 3\.5"):
        registry.build("backbone", "tiny", depth=3.5)
    with pytest.raises(RecipeError, match=r"(?s)dept: unknown key.*did you mean 'depth'"):
        registry.build("backbone", "tiny", dept=3)


def test_values_from_python_may_be_built_already(registry: Registry) -> None:
    values = {
        "iterations": 5,
        "lr": Constant(value=0.1),
        "backbone": OtherConfig(heads=2),
        "losses": {"a": PullConfig(), "b": {"use": "pull", "head": HeadOptions(width=2)}},
        "mean": (0.1, 0.2),
        "clip": None,
    }
    result = structure_component(registry, "task", "toy", values)
    assert result.backbone == OtherConfig(heads=2)
    assert result.losses["b"].head.width == 2
    assert result.mean == (0.1, 0.2)


# --------------------------------------------------------------------------- the way back
def test_unstructure_is_complete_and_inverse(registry: Registry) -> None:
    first = structure(registry, MINIMAL + "losses.a = { use = 'pull', weight = 3, period = 4 }")
    plain = unstructure(registry, first)
    assert plain == {
        "task": "toy",
        "seed": 0,
        "iterations": 5,
        "lr": 0.1,
        "backbone": {"use": "tiny", "depth": 2, "drop": 0.0, "norm": "layer"},
        "losses": {
            "a": {
                "use": "pull",
                "weight": 3.0,
                "head": {"width": 256, "bias": True},
                "scale": [0.5, 1.0],
                "period": 4,
            }
        },
        "mean": [0.5],
        "tags": {},
        "heads": [],
        "resume": True,
    }
    assert structure(registry, to_toml(plain)) == first
    assert structure(registry, annotated_toml(plain, {})) == first


def test_round_trip_of_every_kind_of_value(registry: Registry) -> None:
    first = ToyConfig(
        iterations=7,
        output_dir='runs/a "b"',
        lr=Cosine(start=0.1, peak=1e-300, end=float("inf"), warmup=3),
        backbone=OtherConfig(in_chans=1),
        losses={"odd name.x": PullConfig(weight=Cosine(start=0.0, peak=1.0, end=0.5, cosine=9))},
        mean=(0.1, 1 / 3, 1.0),
        tags={"ä ": "\n\t\\"},
        clip=1e6,
        resume=False,
    )
    assert structure(registry, to_toml(unstructure(registry, first))) == first
    component = unstructure(registry, first.backbone)
    assert component == {"use": "other", "in_chans": 1, "heads": 4}


@config
class StubbornConfig(BackboneConfig):
    """Its default cannot be undone in a recipe."""

    scale: float | None = option("a scale", default=1.0)


def test_none_turns_off_what_a_default_turns_on(registry: Registry) -> None:
    registry.add("backbone", Component("stubborn", StubbornConfig, StubbornConfig), "p", "d")
    assert unstructure(registry, StubbornConfig()) == {"use": "stubborn", "scale": 1.0}
    off = StubbornConfig(scale=None)
    assert unstructure(registry, off) == {"use": "stubborn", "scale": "none"}
    assert structure_component(registry, "backbone", "stubborn", {"scale": "none"}) == off


TOY = {"iterations": 1, "lr": 0.1, "backbone": {"use": "tiny"}}


def test_strings_too_are_turned_off(registry: Registry) -> None:
    config = structure_component(registry, "task", "toy", {"output_dir": "none", **TOY})
    assert config.output_dir is None


def test_a_path_below_home_is_expanded_once(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = structure_component(registry, "task", "toy", {"output_dir": "~/runs/a", **TOY})
    assert config.output_dir == "/home/me/runs/a"
    config = structure_component(registry, "task", "toy", {"output_dir": "a~/b", **TOY})
    assert config.output_dir == "a~/b"


def test_no_string_holds_a_nul(registry: Registry) -> None:
    with pytest.raises(RecipeError, match=r"output_dir: .*holds bytes that are no UTF-8"):
        structure_component(registry, "task", "toy", {"output_dir": "caf\udce9", **TOY})
    with pytest.raises(RecipeError, match="output_dir: holds a NUL"):
        structure_component(registry, "task", "toy", {"output_dir": "a\0b", **TOY})


# --------------------------------------------------------------------------- words
@pytest.mark.parametrize(
    ("declared", "name"),
    [
        (int, "integer"),
        (float, "number"),
        (bool, "boolean"),
        (str, "string"),
        (int | None, 'integer or "none"'),
        (Schedule, "number or schedule"),
        (BackboneConfig, "backbone (use = ...)"),
        (LauncherConfig | None, 'launcher (use = ...) or "none"'),
        (HeadOptions, "table"),
        (tuple[float, ...], "array of numbers"),
        (tuple[float, float], "array of 2 numbers"),
        (tuple[int, str], "array of integer, string"),
        (tuple[HeadOptions, ...], "array of tables"),
        (tuple[tuple[int, int], ...], "array of (array of 2 integers)"),
        (dict[str, LossConfig], "table of name = loss (use = ...)"),
        (Literal["a", "b"], '"a" or "b"'),
    ],
)
def test_type_names(declared: Any, name: str) -> None:
    assert type_name(declared) == name


def test_values_as_a_recipe_spells_them() -> None:
    assert to_toml_value(Constant(value=1.5)) == "1.5"
    assert to_toml_value((1, 2)) == "[1, 2]"
    assert to_toml_value("a") == '"a"'
    assert to_toml_value(HeadOptions()) == "{ width = 256, bias = true }"
    schedule = Cosine(start=0.0, peak=1.0, end=0.5)
    text = '{ use = "cosine", start = 0.0, peak = 1.0, end = 0.5, warmup = 0 }'
    assert to_toml_value(schedule) == text


# --------------------------------------------------------------------------- faults of plugins
@config
class ListConfig(BackboneConfig):
    """A type that no recipe can spell."""

    sizes: list[int] = option("sizes", factory=list)


@config
class RaisingConfig(BackboneConfig):
    """Its check is broken."""

    size: int = option("a size", default=1, check=lambda value: 1 // 0 and None)


@config
class ValueErrorConfig(BackboneConfig):
    """Complains in words of its own."""

    size: int = option("a size", default=1)

    def __attrs_post_init__(self) -> None:
        if self.size == 2:
            raise InvalidOption("inner.size", "not two")


@attrs.frozen
class Untyped(BackboneConfig):
    """A field without a type."""

    size = attrs.field(default=1)


def test_types_that_no_recipe_can_spell_are_the_plugins_fault(registry: Registry) -> None:
    registry.add("backbone", Component("list", ListConfig, ListConfig), "p", "d")
    registry.add("backbone", Component("untyped", Untyped, Untyped), "p", "d")
    with pytest.raises(PluginError, match=r"ListConfig\.sizes: the type list\[int\] cannot be sp"):
        structure_component(registry, "backbone", "list", {})
    with pytest.raises(PluginError, match=r"Untyped\.size: the type None cannot be spelled"):
        structure_recipe(registry, composed(MINIMAL.replace('"tiny"', '"untyped"')))


def test_a_broken_check_is_not_put_down_to_the_recipe(registry: Registry) -> None:
    registry.add("backbone", Component("raising", RaisingConfig, RaisingConfig), "p", "d")
    with pytest.raises(ZeroDivisionError):
        structure_recipe(registry, composed(MINIMAL.replace('"tiny"', '"raising", size = 3')))


def test_a_complaint_may_point_further_in(registry: Registry) -> None:
    registry.add("backbone", Component("words", ValueErrorConfig, ValueErrorConfig), "p", "d")
    text = MINIMAL.replace('"tiny"', '"words", size = 2')
    assert mistakes(registry, text) == {"backbone.inner.size": "not two | "}


def test_integers_have_bounds(registry: Registry) -> None:
    found = mistakes(registry, MINIMAL.replace("= 5", f"= {2**64}"))
    assert "64 bits" in found["iterations"]
