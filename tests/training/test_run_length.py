"""How long a run and the parts of its schedules are: iterations, epochs, shares of the run."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_support import TINY, losses, run_here

from dinov3_framework import ExitCode, RecipeError, Registry
from dinov3_framework.cli import main
from dinov3_framework.recipes.compose import compose
from dinov3_framework.recipes.plain import unstructure
from dinov3_framework.recipes.structure import structure_recipe

EPOCHS = ("iterations=0", "epochs=0.0144")  # of 5,000 images: 6 iterations of 12


def test_epochs_and_shares_are_the_same_run_as_iterations(tmp_path: Path) -> None:
    whole, shares = tmp_path / "iterations", tmp_path / "shares"
    keys = ("checkpoint.every", "optimizer.freeze_last_layer", "optimizer.lr.warmup")
    counts = [f"{key}={n}" for key, n in zip(keys, (3, 2, 3), strict=True)]
    parts = [f"{key}='{n}%'" for key, n in zip(keys, (50, 33, 50), strict=True)]
    assert run_here(whole, *counts).returncode == 0
    assert run_here(shares, *EPOCHS, *parts).returncode == 0
    assert losses(shares) == losses(whole)
    for folder in ("checkpoints", "exports"):
        names = [sorted(p.name for p in (run / folder).iterdir()) for run in (whole, shares)]
        assert names[0] == names[1]
    again = run_here(shares, *EPOCHS, *parts)
    assert "complete" in again.stderr, "its recipe is the same as it was"


def test_a_share_survives_the_way_through_a_file() -> None:
    registry = Registry.load()
    config = structure_recipe(registry, compose(TINY, ["checkpoint.every='12.5%'"]))
    assert unstructure(registry, config)["checkpoint"]["every"] == "12.5%"


@pytest.mark.parametrize("share", ["0%", "110%", "ten", "%", "-5%"])
def test_what_is_no_share_is_refused_where_it_stands(share: str) -> None:
    with pytest.raises(RecipeError) as caught:
        structure_recipe(Registry.load(), compose(TINY, [f"optimizer.lr.warmup='{share}'"]))
    (problem,) = caught.value.problems
    assert problem.where == "optimizer.lr.warmup"
    assert "integer or share of the run" in problem.message


@pytest.mark.parametrize(
    ("overrides", "where", "words"),
    [
        (["epochs=2"], "epochs", "set epochs"),
        (["iterations=0"], "iterations", "or give epochs"),
        (["iterations=0", "epochs=0"], "epochs", "must be above 0"),
    ],
)
def test_exactly_one_of_them_says_how_long(overrides: list[str], where: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        structure_recipe(Registry.load(), compose(TINY, overrides))
    (problem,) = caught.value.problems
    assert problem.where == where
    assert words in problem.message


def test_epochs_of_data_that_are_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("dataset.use=image_folder", f"dataset.root={tmp_path / 'none'}")
    words = [str(TINY), *EPOCHS, *data, "--output-dir", str(tmp_path / "out")]
    for more in ([], ["--check"]):
        assert main([*words, *more]) == ExitCode.WRONG_INPUT
        shown = capsys.readouterr().err
        assert "does not exist" in shown
        assert "give iterations in place of epochs" in shown
    assert not (tmp_path / "out").exists()


def test_what_is_too_long_names_key_file_and_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["vitl_im1k", "iterations=30", "--check"]) == ExitCode.WRONG_INPUT
    shown = capsys.readouterr().err
    assert "dinov3_recipes:vitl_im1k: losses.dino.teacher_temp: span = 37,500" in shown
    assert '"10%"' in shown
