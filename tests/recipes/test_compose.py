"""Composition: extends, merging, drop, overrides, origins, and every mistake."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli

from dinov3_framework.errors import ExitCode, RecipeError
from dinov3_framework.recipes.compose import Composed, compose, is_override
from dinov3_framework.recipes.toml_text import annotated_toml, dotted, inline, split_key, to_toml

Write = Callable[[str, str], Path]

BASE = """
    task = "pretrain"
    iterations = 100

    [backbone]
    use = "vit_small"
    drop_path_rate = 0.3

    [losses.koleo]
    use = "koleo"
    weight = 0.1

    [optimizer]
    betas = [0.9, 0.999]
    lr = { use = "cosine", start = 0.0, peak = 1.0, end = 0.0 }
"""


def mistakes(*arguments: object) -> str:
    with pytest.raises(RecipeError) as caught:
        compose(*arguments)  # type: ignore[arg-type]
    assert caught.value.exit_code == ExitCode.WRONG_INPUT
    return str(caught.value)


# --------------------------------------------------------------------------- files
def test_the_file_wins_over_its_bases_and_a_later_base_over_an_earlier(write: Write) -> None:
    write("a.toml", "x = 1\ny = 1\nz = 1\n[t]\na = 1\nboth = 1")
    write("b.toml", "y = 2\nz = 2\n[t]\nb = 2\nboth = 2")
    write("top.toml", 'extends = ["a.toml", "b.toml"]\nz = 3\n[t]\nc = 3')
    composed = compose("top.toml")
    assert composed.data == {"x": 1, "y": 2, "z": 3, "t": {"a": 1, "both": 2, "b": 2, "c": 3}}
    assert composed.origins[("x",)] == "a.toml"
    assert composed.origins[("y",)] == "b.toml"
    assert composed.origins[("z",)] == "top.toml"
    assert composed.origins["t", "a"] == "a.toml"
    assert composed.origins["t", "both"] == "b.toml"
    assert composed.origins["t", "c"] == "top.toml"
    assert composed.origins[("t",)] == "a.toml"
    assert (composed.name, composed.source) == ("top", "top.toml")


# --------------------------------------------------------------------------- several recipes
def test_recipes_go_over_one_another_from_left_to_right(write: Write) -> None:
    write("base.toml", BASE)
    write("big.toml", '[backbone]\nuse = "vit_base"\n[optimizer]\nlr = { peak = 2 }')
    write("tall/8.toml", 'drop = "losses.koleo"\niterations = 8\n[backbone]\ndepth = 3')
    composed = compose(["base.toml", Path("big.toml"), "tall/8.toml"], ["iterations=9"])
    assert composed.data["backbone"] == {"use": "vit_base", "depth": 3}
    assert composed.data["losses"] == {}
    assert composed.data["optimizer"]["lr"]["peak"] == 2
    assert composed.origins["backbone", "use"] == "big.toml"
    assert composed.origins["backbone", "depth"] == "tall/8.toml"
    assert composed.origins["optimizer", "lr", "start"] == "base.toml"
    assert composed.origins[("iterations",)] == "command line"
    assert (composed.name, composed.source) == ("base", "base.toml"), "overlays are no other run"
    swapped = compose(["base.toml", "tall/8.toml", "big.toml"])
    assert swapped.data["backbone"] == {"use": "vit_base"}


def test_several_recipes_are_what_a_file_that_extends_them_is(write: Write) -> None:
    write("base.toml", BASE)
    write("gpus.toml", "batch_size = 8\niterations = 8")
    write("high.toml", 'extends = "gpus.toml"\ndrop = ["backbone"]\nbatch_size = 4')
    write("top.toml", 'extends = ["base.toml", "high.toml"]')
    composed = compose("top.toml")
    assert composed.data == compose(["base.toml", "high.toml"]).data
    assert "backbone" not in composed.data
    assert (composed.data["iterations"], composed.data["batch_size"]) == (8, 4)
    assert composed.origins[("iterations",)] == "gpus.toml"


def test_an_overlay_goes_after_a_recipe(write: Write) -> None:
    write("base.toml", BASE)
    write("gpus.toml", "iterations = 8")
    write("drops.toml", "drop = 'losses.koleo'")
    for names in (["gpus.toml", "base.toml"], ["drops.toml", "base.toml"], "drops.toml"):
        text = mistakes(names)
        assert "task: missing, so this is an overlay" in text
        assert "\n" not in text
    assert compose(["gpus.toml", "gpus.toml"], ["task=x"]).data["task"] == "x"


def test_mistakes_of_all_recipes_come_at_once(write: Write) -> None:
    write("base.toml", BASE)
    write("bad.toml", "x =")
    text = mistakes(["base.toml", "bad.toml", "nowhere.toml"], ["x="])
    assert text.startswith("3 mistakes")
    write("over.toml", 'drop = ["losses.koloe"]\n[optimizer.lr.peak]\nx = 1')
    text = mistakes(["base.toml", "over.toml"])
    assert "over.toml: drop: no inherited key is 'losses.koloe'" in text
    assert "optimizer.lr.peak is 1.0 (set by base.toml)" in text


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("seed=3", True),
        ("a.b = [1]", True),
        ('losses."my.loss".weight=1', True),
        ("output_dir=/data/x=1", True),
        ("my.toml", False),
        ("runs/lr=1/recipe.toml", False),
        ("./lr=1.toml", False),
        ("lr=1.toml", False),  # a file, below
        ("lr=2.toml", True),
        (f"x=[{', '.join(['1'] * 9999)}]", True),  # too long for the name of a file
        ("package:lr=1", False),
        ("=3", False),
    ],
)
def test_overrides_and_recipes_are_told_apart(write: Write, word: str, expected: bool) -> None:
    write("lr=1.toml", "x = 1")
    assert is_override(word) == expected


# --------------------------------------------------------------------------- extends


def test_arrays_and_scalars_replace(write: Write) -> None:
    write("base.toml", BASE)
    write("top.toml", 'extends = "base.toml"\n[optimizer]\nbetas = [0.8]\nlr = 0.5')
    optimizer = compose("top.toml").data["optimizer"]
    assert optimizer == {"betas": [0.8], "lr": 0.5}
    assert ("optimizer", "lr", "peak") not in compose("top.toml").origins


def test_a_table_with_another_use_replaces_the_inherited_one_whole(write: Write) -> None:
    write("base.toml", BASE)
    write("top.toml", 'extends = "base.toml"\n[backbone]\nuse = "vit_base"')
    composed = compose("top.toml")
    assert composed.data["backbone"] == {"use": "vit_base"}
    assert ("backbone", "drop_path_rate") not in composed.origins
    assert composed.origins[("backbone",)] == "top.toml"


def test_a_table_with_the_same_use_or_none_merges(write: Write) -> None:
    write("base.toml", BASE)
    write("same.toml", 'extends = "base.toml"\n[backbone]\nuse = "vit_small"\ndepth = 3')
    write("none.toml", 'extends = "base.toml"\n[backbone]\ndepth = 3')
    expected = {"use": "vit_small", "drop_path_rate": 0.3, "depth": 3}
    assert compose("same.toml").data["backbone"] == expected
    assert compose("none.toml").data["backbone"] == expected


def test_a_schedule_replaces_an_inherited_number(write: Write) -> None:
    write("base.toml", BASE)
    write("top.toml", 'extends = "base.toml"\n[losses.koleo]\nweight = { use = "x", peak = 2 }')
    assert compose("top.toml").data["losses"]["koleo"]["weight"] == {"use": "x", "peak": 2}


def test_a_table_without_use_does_not_replace_a_number(write: Write) -> None:
    write("base.toml", BASE)
    write("top.toml", 'extends = "base.toml"\n[losses.koleo.weight]\npeak = 2')
    text = mistakes("top.toml")
    assert "top.toml: losses.koleo.weight.peak: losses.koleo.weight is 0.1" in text
    assert "set by base.toml" in text


def test_drop_removes_inherited_keys_before_the_file_adds_its_own(write: Write) -> None:
    write("base.toml", BASE)
    write(
        "top.toml",
        """
        extends = "base.toml"
        drop = ["losses.koleo", "backbone.drop_path_rate", "optimizer"]
        [optimizer]
        lr = 1.0
        """,
    )
    composed = compose("top.toml")
    assert composed.data["losses"] == {}
    assert composed.data["backbone"] == {"use": "vit_small"}
    assert composed.data["optimizer"] == {"lr": 1.0}
    assert ("losses", "koleo", "weight") not in composed.origins
    assert "drop" not in composed.data
    assert "extends" not in composed.data


def test_dropping_what_is_not_inherited_names_near_keys(write: Write) -> None:
    write("base.toml", BASE)
    write("top.toml", 'extends = "base.toml"\ndrop = ["losses.koloe", "iterations.x"]')
    text = mistakes("top.toml")
    assert "top.toml: drop: no inherited key is 'losses.koloe'" in text
    assert "did you mean 'losses.koleo'" in text
    assert "'iterations.x'" in text
    write("alone.toml", 'drop = "x"\ntask = "x"')
    assert "nothing is inherited" in mistakes("alone.toml")


def test_relative_bases_are_relative_to_the_extending_file(write: Write) -> None:
    write("shared/base.toml", "x = 1")
    write("mine/middle.toml", 'extends = "../shared/base.toml"\ny = 2')
    write("top.toml", 'extends = "mine/middle.toml"')
    composed = compose("top.toml")
    assert composed.data == {"x": 1, "y": 2}
    assert composed.origins[("x",)] == "shared/base.toml"


def test_one_base_may_be_reached_twice(write: Write) -> None:
    write("root.toml", "x = 1")
    write("a.toml", 'extends = "root.toml"\na = 1')
    write("b.toml", 'extends = "root.toml"\nb = 1')
    write("top.toml", 'extends = ["a.toml", "b.toml"]')
    assert compose("top.toml").data == {"x": 1, "a": 1, "b": 1}


def test_a_circle_is_shown(write: Write) -> None:
    write("a.toml", 'extends = "b.toml"')
    write("b.toml", 'extends = "c.toml"')
    write("c.toml", 'extends = "./a.toml"')
    text = mistakes("a.toml")
    assert "goes round in a circle: a.toml -> b.toml -> c.toml -> a.toml" in text
    assert text.startswith("c.toml: extends:")


def test_a_missing_base_names_its_neighbors(write: Write) -> None:
    write("base.toml", "x = 1")
    write("top.toml", 'extends = ["bas.toml", "nowhere/base.toml"]')
    text = mistakes("top.toml")
    assert "top.toml: extends: no such recipe: bas.toml" in text
    assert "recipes in .: base.toml, top.toml" in text
    assert "there is no folder nowhere" in text


def test_every_unreadable_file_is_told_at_once(write: Write) -> None:
    write("bad.toml", "x = 1\ny =\n")
    write("latin.toml", "x = 1").write_bytes(b"x = '\xe9'")
    write("odd.toml", "extends = 3\ndrop = [1]")
    write("top.toml", 'extends = ["bad.toml", "latin.toml", "odd.toml"]')
    text = mistakes("top.toml")
    assert text.startswith("4 mistakes")
    assert "bad.toml: is not TOML: Invalid value (at line 2, column 4)" in text
    assert "latin.toml: is not UTF-8" in text
    assert "odd.toml: extends: expected a string or an array of strings, found 3" in text
    assert "odd.toml: drop: expected a string or an array of strings, found [1]" in text


# --------------------------------------------------------------------------- recipes inside
CHAIN = """
    task = "pipeline"

    [stages.first.recipe]
    extends = "base.toml"

    [stages.plain.recipe]
    iterations = 1

    [stages.second.recipe]
    extends = ["base.toml", "more.toml"]
    drop = ["losses.koleo"]
    iterations = 7
    [stages.second.recipe.backbone]
    depth = 3
"""


@pytest.fixture
def chain(write: Write) -> None:
    write("base.toml", BASE)
    write("more.toml", "seed = 2\n[optimizer]\nbetas = [0.5]")
    write("chain.toml", CHAIN)


def test_a_recipe_inside_a_recipe_builds_on_others(chain: None) -> None:
    composed = compose("chain.toml")
    stages = composed.data["stages"]
    assert list(stages) == ["first", "plain", "second"], "in the order of the file"
    assert stages["first"]["recipe"] == compose("base.toml").data
    second = stages["second"]["recipe"]
    assert second["losses"] == {}
    assert second["iterations"] == 7
    assert second["backbone"] == {"use": "vit_small", "drop_path_rate": 0.3, "depth": 3}
    assert second["optimizer"]["betas"] == [0.5]
    where = ("stages", "second", "recipe")
    assert composed.origins[*where, "iterations"] == "chain.toml"
    assert composed.origins[*where, "seed"] == "more.toml"
    assert composed.origins[*where, "task"] == "base.toml"
    assert composed.origins[*where, "backbone", "use"] == "base.toml"
    assert composed.origins[*where, "backbone", "depth"] == "chain.toml"
    assert (*where, "losses", "koleo") not in composed.origins
    assert all(path[-1] not in ("extends", "drop") for path in composed.origins)


def test_what_extends_a_chain_changes_its_stages(chain: None, write: Write) -> None:
    write(
        "top.toml",
        """
        extends = "chain.toml"
        drop = ["stages.plain"]
        [stages.last.recipe]
        extends = "more.toml"
        [stages.second.recipe]
        extends = "other.toml"
        drop = ["optimizer"]
        seed = 9
        """,
    )
    write("other.toml", "iterations = 8\nseed = 8")
    stages = compose("top.toml").data["stages"]
    assert list(stages) == ["first", "second", "last"]
    second = stages["second"]["recipe"]
    # Over what the chain says comes what the table extends, then what it says itself.
    assert (second["iterations"], second["seed"]) == (8, 9)
    assert "optimizer" not in second
    assert second["backbone"]["depth"] == 3
    write(
        "anew.toml",
        """
        extends = "chain.toml"
        drop = ["stages.second.recipe"]
        [stages.second.recipe]
        extends = "more.toml"
        """,
    )
    second = compose("anew.toml").data["stages"]["second"]["recipe"]
    assert second == {"seed": 2, "optimizer": {"betas": [0.5]}}


def test_recipes_inside_a_recipe_lie_beside_the_file_that_names_them(write: Write) -> None:
    write("shared/base.toml", "x = 1")
    write("shared/chain.toml", '[stages.a.recipe]\nextends = "base.toml"')
    write("top.toml", '[stages.b.recipe]\nextends = "shared/chain.toml"')
    composed = compose("top.toml")
    path = ("stages", "b", "recipe", "stages", "a", "recipe")
    assert composed.origins[*path, "x"] == "shared/base.toml"


def test_overrides_reach_into_a_recipe_inside(chain: None) -> None:
    second = "stages.second.recipe"
    overrides = [f"{second}.iterations=9", f"{second}.drop=seed", f"{second}.backbone.use=x"]
    composed = compose("chain.toml", overrides)
    recipe = composed.data["stages"]["second"]["recipe"]
    assert recipe["iterations"] == 9
    assert "seed" not in recipe
    assert recipe["backbone"] == {"use": "x"}
    assert composed.origins["stages", "second", "recipe", "iterations"] == "command line"
    text = mistakes("chain.toml", [f"{second}.extends=bas.toml", f"{second}.drop=[1]"])
    assert f"command line: {second}.extends: no such recipe: bas.toml" in text
    assert f"command line: {second}.drop: expected a string or an array" in text


def test_an_overlay_for_a_recipe_inside(chain: None, write: Write) -> None:
    write("small.toml", "iterations = 2\nbatch_size = 1")
    override = ["stages.second.recipe.extends=small.toml", "stages.second.recipe.batch_size=3"]
    composed = compose("chain.toml", override)
    recipe = composed.data["stages"]["second"]["recipe"]
    assert (recipe["iterations"], recipe["batch_size"], recipe["seed"]) == (2, 3, 2)
    assert composed.origins["stages", "second", "recipe", "iterations"] == "small.toml"


def test_only_a_table_of_that_name_is_a_recipe(write: Write) -> None:
    write("top.toml", '[backbone]\nuse = "tiny"\ndrop = 0.1\nextends = "x"')
    assert compose("top.toml").data["backbone"] == {"use": "tiny", "drop": 0.1, "extends": "x"}


def test_mistakes_in_a_recipe_inside_name_their_keys(chain: None, write: Write) -> None:
    write(
        "top.toml",
        """
        extends = "chain.toml"
        [stages.first.recipe]
        extends = "bas.toml"
        [stages.second.recipe]
        drop = [3]
        """,
    )
    text = mistakes("top.toml")
    assert "top.toml: stages.first.recipe.extends: no such recipe: bas.toml" in text
    assert "top.toml: stages.second.recipe.drop: expected a string or an array" in text
    write("late.toml", 'extends = "chain.toml"\n[stages.second.recipe]\ndrop = "losses.koleo"')
    text = mistakes("late.toml")
    assert "late.toml: stages.second.recipe.drop: no inherited key is 'losses.koleo'" in text
    write("into.toml", 'extends = "chain.toml"\n[stages.second.recipe.iterations]\nx = 1')
    text = mistakes("into.toml")
    assert "stages.second.recipe.iterations.x: stages.second.recipe.iterations is 7" in text


def test_a_circle_through_a_recipe_inside_is_shown(write: Write) -> None:
    write("chain.toml", '[stages.a.recipe]\nextends = "part.toml"')
    write("part.toml", 'extends = "chain.toml"')
    assert mistakes("chain.toml") == (
        "part.toml: extends: goes round in a circle: chain.toml -> part.toml -> chain.toml"
    )
    write("own.toml", '[stages.a.recipe]\nextends = "own.toml"')
    text = mistakes("own.toml")
    assert text == "own.toml: stages.a.recipe.extends: goes round in a circle: own.toml -> own.toml"


def test_a_file_that_two_stages_extend_is_complained_of_once(write: Write) -> None:
    write("bad.toml", "drop = 3")
    write("top.toml", '[a.recipe]\nextends = "bad.toml"\n[b.recipe]\nextends = "bad.toml"')
    assert mistakes("top.toml").count("bad.toml: drop: expected") == 1


# --------------------------------------------------------------------------- finding recipes
def test_packages_hold_recipes(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("lib/studio/__init__.py", "raise SystemExit('recipes are found without importing')")
    write("lib/studio/base.toml", "x = 1")
    write("lib/studio/first.toml", 'extends = "base.toml"\ny = 2')
    write("top.toml", 'extends = ["studio:first", "studio:base.toml"]\nz = 3')
    write("lib/studio/inner/deep.toml", "w = 4")
    write("lib/studio/inner/__init__.py", "raise SystemExit('nor is what is inside')")
    write("lib/base.toml", "x = 5")
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    assert "no package 'studio' with recipes" in mistakes("studio:first"), "it declares none"
    write("lib/studio-1.0.dist-info/METADATA", "Name: studio\nVersion: 1.0\n")
    write(
        "lib/studio-1.0.dist-info/entry_points.txt", "[dinov3_framework.recipes]\nours = studio\n"
    )
    composed = compose("top.toml")
    assert composed.data == {"x": 1, "y": 2, "z": 3}
    assert compose("studio.inner:deep").data == {"w": 4}
    assert "has no recipe" in mistakes("studio:../base")
    assert composed.origins[("y",)] == "studio:first"
    assert composed.origins[("x",)] == "studio:base"
    assert compose("studio:first").source == "studio:first"
    assert compose("studio:first").name == "first"
    text = mistakes("studio:frist")
    assert "package 'studio' has no recipe 'frist'" in text
    assert "did you mean 'first'?" in text
    assert "no package 'no_such' with recipes is installed" in mistakes("no_such:base")
    assert not {"studio", "studio.inner"} & set(sys.modules)


def test_installed_recipes_are_known_by_name(write: Write) -> None:
    composed = compose("vitl_im1k")
    assert composed.source == "dinov3_recipes:vitl_im1k"
    assert composed.data["task"] == "pretrain"
    text = mistakes("vitl_im1k.toml")
    assert "no such recipe: vitl_im1k.toml" in text, "with a suffix it is a file"
    assert "installed recipes: vitl_im1k, " in text
    write("vitl_im1k.toml", "x = 1")
    assert compose("vitl_im1k.toml").data == {"x": 1}, "a file comes before an installed recipe"


def test_an_unknown_recipe_lists_files_and_installed_recipes(write: Write) -> None:
    write("first.toml", "x = 1")
    text = mistakes("vitl_im1")
    assert text.startswith("no such recipe: vitl_im1\n    recipes in .: first.toml\n")
    assert "installed recipes: vitl_im1k, " in text
    write("folder/x.toml", "x = 1")
    assert "that is a folder" in mistakes("folder")
    assert mistakes("x" * 999).startswith("no such recipe: xxx")
    assert "write key.path=value" in mistakes("a..b=1")


def test_recipes_that_went_say_what_to_write(write: Write, tmp_path: Path) -> None:
    for name in ("vitb_pretrain_8gpu", "recipes/vitb_pretrain_8gpu.toml"):
        assert f"no such recipe: {name}\n    it is composed now: vitb_pretrain 8gpu" in mistakes(
            name
        )
    write("top.toml", 'extends = "dinov3_recipes:vits_high_res_adapt_1gpu"')
    assert "composed now: vits_high_res_adapt 1gpu_high_res" in mistakes("top.toml")


# --------------------------------------------------------------------------- overrides
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("iterations=5", 5),
        ("iterations = 5", 5),
        ("x=1_000", 1000),
        ("x=1e-4", 1e-4),
        ("x=true", True),
        ("x=vit_small", "vit_small"),
        ("x=/data/my images", "/data/my images"),
        ("x=~/data", "~/data"),
        ("x=True", "True"),
        ("x='7'", "7"),
        ('x="a=b"', "a=b"),
        ("x=a=b", "a=b"),
        ("x=[1, 2.5]", [1, 2.5]),
        ('x={use = "cosine", peak = 1}', {"use": "cosine", "peak": 1}),
        ('x=""', ""),
    ],
)
def test_override_values(write: Write, text: str, value: object) -> None:
    write("r.toml", "iterations = 1")
    data = compose("r.toml", [text]).data
    assert data[text.partition("=")[0].strip()] == value
    assert type(data[text.partition("=")[0].strip()]) is type(value)


def test_overrides_are_one_layer_whose_order_does_not_matter(write: Write) -> None:
    write("base.toml", BASE)
    for overrides in (
        ["backbone.use=vit_base", "backbone.depth=3"],
        ["backbone.depth=3", "backbone.use=vit_base"],
    ):
        composed = compose("base.toml", overrides)
        assert composed.data["backbone"] == {"use": "vit_base", "depth": 3}
        assert composed.origins["backbone", "depth"] == "command line"
    assert compose("base.toml", ["iterations=1", "iterations=2"]).data["iterations"] == 2
    assert compose("base.toml", ["a.b=1", "a=2"]).data["a"] == 2


def test_overrides_merge_into_tables_and_may_drop(write: Write) -> None:
    write("base.toml", BASE)
    data = compose("base.toml", ["losses.koleo.weight=0.5", "drop=backbone"]).data
    assert data["losses"]["koleo"] == {"use": "koleo", "weight": 0.5}
    assert "backbone" not in data


def test_override_keys_may_be_quoted(write: Write) -> None:
    write("r.toml", '[tags]\n"a.b" = 1')
    composed = compose("r.toml", ['tags."a.b"=2', "tags.'c = d'=3"])
    assert composed.data["tags"] == {"a.b": 2, "c = d": 3}


def test_an_override_into_a_number_shows_it_and_its_origin(write: Write) -> None:
    write("base.toml", BASE)
    text = mistakes("base.toml", ["losses.koleo.weight.peak=2"])
    assert "losses.koleo.weight is 0.1 (set by base.toml), which has no keys" in text
    text = mistakes("base.toml", ["x=1", "x.y=2"])
    assert "x is 1 (set by command line), which has no keys" in text
    assert "replace it by a whole table: x = { use = ..., ... }" in text
    text = mistakes("base.toml", ["x=[1, 2]", "x.1=3"])
    assert "x is [1, 2] (set by command line), which has no keys" in text
    assert "replace it by a whole array: x = [..., ...]" in text


def test_all_bad_overrides_are_told_at_once(write: Write) -> None:
    write("base.toml", BASE)
    overrides = ["nothing", "=3", "a..b=1", "x=", "y=[1,", 'z="open', "w=1\nv=2"]
    text = mistakes("base.toml", [*overrides, "x=1", "x.y=2"])
    assert text.startswith("8 mistakes")
    for wrong in ("'nothing'", "'=3'", "'a..b=1'"):
        assert f"command line: {wrong} is not an override" in text
    assert "command line: x: no value after the equals sign" in text
    assert "command line: y: [1, is not a TOML value: " in text
    assert 'command line: z: "open is not a TOML value' in text
    assert "command line: w: '1\\nv=2' is more than one value" in text
    assert "no inherited key is 'nobody'" in mistakes("base.toml", ["drop=nobody"])


# --------------------------------------------------------------------------- text
def test_annotated_toml_is_the_same_recipe(write: Write) -> None:
    write("base.toml", BASE)
    composed = compose("base.toml", ['tags."odd key"="line\\nbreak # no comment"', "empty={}"])
    text = annotated_toml(composed.data, composed.origins)
    assert tomli.loads(text) == composed.data
    assert "drop_path_rate = 0.3  # base.toml" in text
    assert '"odd key" = "line\\nbreak # no comment"  # command line' in text
    assert "[empty]  # command line" in text
    again = compose(write("again.toml", text))
    assert again.data == composed.data


def test_annotated_toml_survives_strange_file_names() -> None:
    text = annotated_toml({"x": 1, "y": 2}, {("x",): "a\nb\x00.toml"})
    assert tomli.loads(text) == {"x": 1, "y": 2}
    assert text == "x = 1  # a?b?.toml\ny = 2  # default\n"


def test_to_toml_round_trip(write: Write) -> None:
    data = compose(write("base.toml", BASE)).data
    assert tomli.loads(to_toml(data)) == data


@pytest.mark.parametrize("value", [1, 1e-5, True, 'a "b"', [1, [2.5]], {"a b": {"c": []}}, {}])
def test_inline_round_trip(value: object) -> None:
    assert tomli.loads(f"x = {inline(value)}") == {"x": value}
    assert "\n" not in inline(value)


def test_key_paths() -> None:
    assert split_key('a."b.c".d = 1') == (("a", "b.c", "d"), "= 1")
    assert dotted(("a", "b.c", "d")) == 'a."b.c".d'
    assert split_key("a.") is None
    assert split_key("") is None


def test_composition_leaves_its_inputs_alone(write: Write) -> None:
    path = write("base.toml", BASE)
    first, second = compose(path), compose(path)
    first.data["backbone"]["use"] = "changed"
    assert second.data["backbone"]["use"] == "vit_small"
    assert isinstance(first, Composed)


@pytest.mark.parametrize(
    "content",
    [f"x = {'[' * 5000}{']' * 5000}", f"{'a.' * 5000}a = 1", f"x = {'9' * 5000}"],
    ids=["arrays", "keys", "digits"],
)
def test_what_is_too_much_to_be_read_is_a_mistake(write: Write, content: str) -> None:
    write("top.toml", content)
    assert "top.toml: is not TOML" in mistakes("top.toml")
    write("small.toml", "y = 1")
    with pytest.raises(RecipeError, match="is not a TOML value"):
        compose("small.toml", [f"x={{ {content} }}"])


# --------------------------------------------------------------------------- short keys
SHORT = """
    task = "evaluate"
    weights = "some"

    [shorthand.data]
    doc = "a folder"
    sets.near.train = { use = "folder", root = "{data}", names = ["{data}", "x-{data}"] }
    sets.near.test = { use = "folder", root = "{data}/val" }

    [near]
    k = 3
    train = { use = "clothes", split = "train" }
    test = { use = "folder", classes = "all" }
"""


def test_a_short_key_goes_to_all_the_places_that_the_recipe_says(write: Write) -> None:
    write("a.toml", SHORT)
    assert "shorthand" not in compose("a.toml").data
    assert compose("a.toml").data["near"]["train"] == {"use": "clothes", "split": "train"}
    composed = compose("a.toml", ["data=my/pictures", "near.test.root=other"])
    assert "data" not in composed.data
    assert composed.data["near"] == {
        "k": 3,
        "train": {
            "use": "folder",
            "root": "my/pictures",
            "names": ["my/pictures", "x-my/pictures"],
        },
        "test": {"use": "folder", "classes": "all", "root": "other"},
    }
    assert composed.origins["near", "train", "root"] == "command line"


def test_a_recipe_over_it_may_use_a_short_key_or_change_it(write: Write) -> None:
    write("a.toml", SHORT)
    write("b.toml", 'extends = "a.toml"\ndata = "mine"')
    composed = compose("b.toml")
    assert composed.data["near"]["test"]["root"] == "mine/val"
    assert composed.origins["near", "test", "root"] == "b.toml"
    assert compose("b.toml", ["data=other"]).data["near"]["test"]["root"] == "other/val"
    write("c.toml", 'extends = "a.toml"\n[shorthand.data]\nsets.weights = "{data}"')
    assert compose("c.toml", ["data=other"]).data["weights"] == "other"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shorthand = 1", "shorthand: expected a table, found 1"),
        ("[shorthand]\ndata = 1", "shorthand.data: expected a table with a table sets"),
        ("[shorthand.data]\ndoc = 'x'", "shorthand.data: expected a table with a table sets"),
        ("[shorthand.data]\nsets = {}\ndocs = 'x'", "knows sets and doc, not docs"),
    ],
)
def test_short_keys_that_are_no_such_thing(write: Write, text: str, message: str) -> None:
    write("a.toml", f'task = "x"\n{text}')
    assert message in mistakes("a.toml")
