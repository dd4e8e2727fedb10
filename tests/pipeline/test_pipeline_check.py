"""A chain of stages before it runs: its recipe, and what the check of all stages finds."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from dinov3_pipeline.references import Reference, references, replaced
from dinov3_pipeline.task import Pipeline
from init_from_support import RGB, own_export, vit
from pipeline_support import CHAIN, KNN, chain_config, checked, write_chain
from run_support import TINY
from trainer_support import registry

from dinov3_framework import DatasetConfig, RecipeError, Registry
from dinov3_framework.checkpoints import CheckpointConfig
from dinov3_framework.checkpoints.expected import kept_steps
from dinov3_framework.cli import main
from dinov3_framework.recipes.compose import compose
from dinov3_framework.recipes.plain import unstructure
from dinov3_framework.recipes.structure import structure_recipe
from dinov3_framework.recipes.toml_text import to_toml
from dinov3_framework.runtime.processes import process_group


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    return write_chain(tmp_path)


def mistakes(recipe: Path, *overrides: str, world_size: int = 1) -> str:
    with pytest.raises(RecipeError) as caught:
        checked(recipe, *overrides, world_size=world_size)
    assert not (recipe.parent / "out").exists()
    return str(caught.value)


# --------------------------------------------------------------------------- the recipe
def test_stages_are_whole_recipes_in_their_order(chain: Path) -> None:
    config = chain_config(chain)
    assert list(config.stages) == ["pretrain", "adapt", "last"]
    adapt = config.stages["adapt"].recipe
    assert list(adapt.losses) == ["dino", "ibot"]  # type: ignore[attr-defined]
    assert references(adapt) == {("init_from", "weights"): Reference("pretrain", "")}


def test_the_written_recipe_is_complete(chain: Path, tmp_path: Path) -> None:
    config = chain_config(chain, "stages.last.recipe.iterations=7", "seed=5")
    written = tmp_path / "written.toml"
    written.write_text(to_toml(unstructure(registry(), config)), "utf-8")
    assert structure_recipe(registry(), compose(written)) == config


def test_the_printed_recipe_is_the_same_and_names_files(
    chain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(chain), "--print-recipe", "stages.adapt.recipe.batch_size=24"]) == 0
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("batch_size = 24")]
    assert line.endswith("# command line")
    assert f'weights = "stage:pretrain"  # {chain}' in printed
    assert f"# {TINY}" in printed
    again = chain.with_name("again.toml")
    again.write_text(printed, "utf-8")
    assert chain_config(again) == chain_config(chain, "stages.adapt.recipe.batch_size=24")


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (
            ["stages.adapt.recipe.losses.dino.wieght=2", "stages.last.recipe.task=pretrian"],
            [
                "command line: stages.adapt.recipe.losses.dino.wieght: unknown key",
                "command line: stages.last.recipe.task: no task is named 'pretrian'",
                "did you mean 'pretrain'?",
            ],
        ),
        (
            ["stages.adapt.recipe=tiny.toml"],
            [
                "stages.adapt.recipe: expected table",
                'a recipe in a file is a table that says extends = "..."',
            ],
        ),
        (["drop=stages.adapt.recipe.task"], ["chain.toml: stages.adapt.recipe.task: missing"]),
        (
            ["drop=stages.adapt.recipe.teacher"],
            [f"{TINY}: stages.adapt.recipe.teacher: missing: table"],
        ),
    ],
)
def test_mistakes_in_a_stage_name_file_and_key(
    chain: Path, overrides: list[str], lines: list[str]
) -> None:
    with pytest.raises(RecipeError) as caught:
        chain_config(chain, *overrides)
    for line in lines:
        assert line in str(caught.value)


# --------------------------------------------------------------------------- references
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("stage:a", Reference("a", "")),
        ("stage:a/b/c", Reference("a", "b/c")),
        ("stage:", Reference("", "")),
        ("runs/stage:a", None),
    ],
)
def test_what_is_a_reference(text: str, expected: Reference | None) -> None:
    assert Reference.of(text) == expected
    if expected is not None:
        assert str(expected) == text


def test_references_are_found_and_replaced_anywhere(chain: Path) -> None:
    recipe = chain_config(chain).stages["last"].recipe
    init = evolve(recipe.init_from, new=("x", "stage:a/y"))  # type: ignore[attr-defined]
    recipe = evolve(recipe, init_from=init)  # type: ignore[call-arg]
    assert set(references(recipe)) == {("init_from", "weights"), ("init_from", "new", "1")}
    filled = replaced(recipe, lambda _, each: f"{each.stage}!{each.inside}")
    assert filled.init_from.weights == "adapt!"  # type: ignore[attr-defined]
    assert filled.init_from.new == ("x", "a!y")  # type: ignore[attr-defined]
    assert references(filled) == {}
    assert replaced(filled, lambda *_: "never") is filled


# --------------------------------------------------------------------------- the chain as such
@pytest.mark.parametrize(
    ("overrides", "line", "hint"),
    [
        (
            ["stages.adapt.recipe.init_from.weights=stage:last"],
            "stages.adapt.recipe.init_from.weights: stage 'last' does not come before this one",
            "stages before this one: pretrain",
        ),
        (
            ["stages.adapt.recipe.init_from.weights=stage:adapt"],
            "stages.adapt.recipe.init_from.weights: stage 'adapt' does not come before this one",
            "",
        ),
        (
            ["stages.last.recipe.init_from.weights=stage:adpat"],
            "stages.last.recipe.init_from.weights: stage 'adpat' does not exist",
            "did you mean 'adapt'?",
        ),
        (
            ["stages.last.recipe.init_from.weights=stage:adapt/../x"],
            "stages.last.recipe.init_from.weights: stage:adapt/../x does not lie in the stage's",
            "",
        ),
        (
            ["stages.last.recipe.init_from.weights=stage:adapt/exports/x.pt"],
            "stages.last.recipe.init_from.weights: stage adapt will not leave exports/x.pt",
            "beside it: teacher_backbone.safetensors",
        ),
        (
            ["stages.adapt.recipe.launcher.use=local"],
            "stages.adapt.recipe.launcher: all stages run in the same processes",
            'drop = ["launcher"] in [stages.adapt.recipe]',
        ),
        (["stages.adapt.recipe.output_dir=x"], "stages.adapt.recipe.output_dir: a stage", ""),
        (
            ["seed=2", "stages.adapt.recipe.seed=3"],
            "stages.adapt.recipe.seed: is 3, and the seed of all stages is 2",
            "",
        ),
        (
            ['stages.inner.recipe={task="pipeline", stages={}}'],
            "stages.inner.recipe.task: a stage cannot be a pipeline",
            "",
        ),
        (['drop=["stages"]', "stages={}"], "stages: no stage: nothing would run", ""),
    ],
)
def test_what_is_wrong_with_a_chain(
    chain: Path, overrides: list[str], line: str, hint: str
) -> None:
    text = mistakes(chain, *overrides)
    assert line in text
    assert hint in text
    assert "mistakes" not in text, "and nothing else"


def test_a_name_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    chain = write_chain(tmp_path, CHAIN.replace("stages.last", 'stages."../last"'))
    assert 'stages."../last": a stage\'s name' in mistakes(chain)


def test_the_mistakes_of_all_stages_come_at_once(chain: Path) -> None:
    text = mistakes(
        chain,
        "stages.pretrain.recipe.optimizer.lr.warmup=300",
        "stages.adapt.recipe.batch_size=13",
        "stages.last.recipe.init_from.weights=stage:nobody",
        world_size=2,
    )
    assert text.startswith("3 mistakes in this recipe:")
    assert "stages.pretrain.recipe.optimizer.lr: warmup = 300 iterations" in text
    assert "stages.adapt.recipe.batch_size: 13 images cannot be split over 2 processes" in text
    assert "stages.last.recipe.init_from.weights: stage 'nobody' does not exist" in text


# --------------------------------------------------------------------------- what stages inherit
def test_a_sound_chain_is_described_stage_by_stage(chain: Path) -> None:
    before = set(os.listdir(tempfile.gettempdir()))
    report = checked(chain)
    assert report.sections["stages"] == [
        ("pretrain", "pretrain"),
        ("adapt", "pretrain, from stage:pretrain"),
        ("last", "pretrain, from stage:adapt"),
    ]
    assert ("iterations", "3") in report.sections["last: schedule"]
    rows = dict(report.sections["adapt: init_from"])
    assert rows["weights"] == f"{chain.parent}/out/pretrain"
    assert "backbone: 38 loaded, 0 new, 0 unused" in rows["teacher"]
    assert "ibot_head: 7 loaded" in dict(report.sections["last: init_from"])["student"]
    assert not (chain.parent / "out").exists()
    left = set(os.listdir(tempfile.gettempdir())) - before
    assert not [name for name in left if name.startswith("dinov3-check-")]
    assert report == checked(chain)


def test_another_width_is_refused(chain: Path) -> None:
    text = mistakes(chain, "stages.adapt.recipe.backbone.embed_dim=48")
    assert "stages.adapt.recipe.init_from: tensors differ" in text
    assert "38 of another shape" in text
    # The last stage starts from the second, and is narrower again.
    assert "stages.last.recipe.init_from: tensors differ" in text
    assert "dinov3-check-" not in text


def test_another_setting_and_other_images_are_refused(chain: Path) -> None:
    text = mistakes(
        chain, "stages.adapt.recipe.backbone.num_heads=4", "stages.adapt.recipe.images.mean=[0.5]"
    )
    assert "stages.adapt.recipe.backbone.num_heads: is 4, and that of the weights is 2" in text
    assert "stages.adapt.recipe.images: channels = 1, mean = [0.5]" in text


@pytest.mark.parametrize(
    ("step", "override", "there"),
    [
        (2, "checkpoint.keep=2", True),
        (2, "checkpoint.keep=1", False),
        (2, "checkpoint.keep_every=2", True),
        (3, "checkpoint.keep_every=3", False),
    ],
)
def test_a_checkpoint_that_will_not_be_there_is_refused(
    chain: Path, step: int, override: str, there: bool
) -> None:
    weights = f"stage:pretrain/checkpoints/step_{step:08}"
    given = [
        f"stages.pretrain.recipe.{override}",
        f"stages.adapt.recipe.init_from.weights={weights}",
    ]
    if there:
        checked(chain, *given)
        return
    text = mistakes(chain, *given)
    assert f"stage pretrain will not leave checkpoints/step_{step:08}" in text
    assert "stages.pretrain.recipe.checkpoint says by every, keep and keep_every" in text


@pytest.mark.parametrize(
    ("iterations", "options", "steps"),
    [
        (6, {"every": 2, "keep": 2}, [4, 6]),
        (7, {"every": 2, "keep": 2}, [6, 7]),
        (7, {"every": 2, "keep": 1, "keep_every": 4}, [4, 7]),
        (7, {"every": 2, "keep": 1, "keep_every": 3}, [6, 7]),
        (3, {"every": 9}, [3]),
    ],
)
def test_the_steps_that_are_kept(
    iterations: int, options: dict[str, int], steps: list[int]
) -> None:
    assert kept_steps(iterations, CheckpointConfig(**options)) == steps


def test_stages_of_other_tasks_are_checked_too(tmp_path: Path) -> None:
    chain = write_chain(tmp_path, CHAIN + KNN)
    report = checked(chain)
    assert ("weights", f"{tmp_path}/out/last") in report.sections["knn: backbone"]
    text = mistakes(chain, "stages.knn.recipe.evaluations.knn.size=30")
    assert "stages.knn.recipe.evaluations.knn.size: 30 px are no multiple of the backbone's" in text


def test_what_a_task_cannot_promise_is_checked_in_its_turn(tmp_path: Path) -> None:
    after = '[stages.after.recipe]\nextends = "dinov3_recipes:knn"\nweights = "stage:knn/x"\n'
    chain = write_chain(tmp_path, CHAIN + KNN + after)
    rows = dict(checked(chain).sections["stages"])
    assert rows["after"] == "evaluate, from stage:knn/x; to be checked when its turn has come"
    text = mistakes(chain, 'stages.after.recipe.backbone.use="vit_small"')
    assert "stages.after.recipe.backbone: weights bring their own backbone" in text
    assert "there is no file" not in text


def test_data_that_are_missing_are_said_with_their_stage(chain: Path) -> None:
    absent = ("dataset.use=image_folder", "dataset.root=/nowhere")
    report = checked(chain, *(f"stages.adapt.recipe.{override}" for override in absent))
    (line,) = report.missing
    assert line.startswith("stages.adapt: ")
    assert "/nowhere" in line


def test_a_complete_stage_is_what_the_others_are_checked_against(
    chain: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out" / "pretrain"
    (folder / "exports").mkdir(parents=True)
    images = [f"stages.{name}.recipe.{key}" for name in ("adapt", "last") for key in RGB]
    path = own_export(folder / "exports", vit(depth=1))
    path.rename(folder / "exports" / "teacher_backbone.safetensors")
    (folder / "results.json").write_text("{}")
    (folder / "recipe.toml").touch()
    with pytest.raises(RecipeError, match=r"stages\.adapt\.recipe\.init_from: tensors differ"):
        checked(chain, *images)
    report = checked(
        chain,
        *images,
        "stages.adapt.recipe.backbone.depth=1",
        "stages.last.recipe.backbone.depth=1",
    )
    assert report.sections["stages"][0] == ("pretrain", "pretrain: complete")
    assert "pretrain: schedule" not in report.sections


# --------------------------------------------------------------------------- its plan
def test_what_the_check_built_is_not_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages that inherit are built in their turn: what they start from is another by then."""
    chain = write_chain(tmp_path)
    output = tmp_path / "out"
    task = Pipeline(chain_config(chain, f"output_dir={output}"), registry=registry())
    plan, built, build = task.check(1), [], Registry.build
    assert list(plan.prepared) == ["pretrain"]

    def counting(self: Registry, config: Any, **runtime: Any) -> Any:
        if isinstance(config, DatasetConfig):
            built.append(config)
        return build(self, config, **runtime)

    monkeypatch.setattr(Registry, "build", counting)
    with process_group(torch.device("cpu"), timeout=60):
        output.mkdir()
        task.run(output, plan)
    assert (output / "last" / "results.json").exists()
    assert len(built) == 2  # of the second stage and the last


# --------------------------------------------------------------------------- the processes
def test_the_processes_suit_every_stage(chain: Path) -> None:
    def parallel(*overrides: str) -> tuple[str, float]:
        found = chain_config(chain, *(f"stages.{each}" for each in overrides)).parallel
        return found.device, found.timeout

    cpu = "recipe.parallel.device=cpu"
    assert parallel() == ("auto", 600)
    assert parallel(f"pretrain.{cpu}") == ("auto", 600)
    assert parallel(f"pretrain.{cpu}", f"adapt.{cpu}", f"last.{cpu}") == ("cpu", 600)
    assert parallel("adapt.recipe.parallel.device=cuda", f"last.{cpu}") == ("cuda", 600)
    assert parallel("adapt.recipe.parallel.timeout=900.0") == ("auto", 900)


def test_one_seed_for_all(chain: Path, tmp_path: Path) -> None:
    own = chain_config(chain, "stages.last.recipe.seed=7").inner_runs(tmp_path)
    assert [run.config.seed for run in own] == [0, 0, 7]
    same = chain_config(chain, "seed=5").inner_runs(tmp_path)
    assert [run.config.seed for run in same] == [5, 5, 5]
