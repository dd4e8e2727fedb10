"""What a check of ``train_head`` says, before anything is allocated."""

from __future__ import annotations

from pathlib import Path

import pytest
from heads_support import RECIPE, SEGMENTATION, TUNED, task
from run_support import run_here

from dinov3_framework import RecipeError


def test_a_sound_recipe_is_shown() -> None:
    sections = task("tune_backbone=true", "head.layers=[0, -1]").check(2).sections
    assert ("parameters", "27,392, trained with the head") in sections["backbone"]
    assert ("layers", "0, 1") in sections["head"]
    assert ("predicts label", "class, 4 classes") in sections["head"]
    assert ("images per step", "8, 28 x 28 px") in sections["batch"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("head.layers=[0, 2]",), r"head: layers are \[0, 2\], this backbone has 0 to 1"),
        ((*SEGMENTATION, "head.layers=[9]"), "head: asks for a layer that is not there"),
        (("head.target=nope",), "head: the data have no target 'nope'"),
        (("head.target=mask",), "head: the target 'mask' of the data is of kind mask"),
        (("dataset.use=fashion_mnist", *SEGMENTATION), "head: the data have no target 'mask'"),
        (("transform.crop=30",), "transform: makes images of 30 x 30 px, no multiple of the patch"),
        (("transform.area=[0.1, 1.0]", 'drop=["transform.crop"]'), "transform.area: needs crop"),
        (("images.channels=2", "images.mean=[0.5, 0.5]", "images.std=[0.2, 0.2]",
          "transform.distort=0.5"), "transform.distort: is for images of 1 or 3 channels"),
        (("weights=gone",), "backbone: weights bring their own backbone"),
        (('drop=["backbone"]', 'observers={}', "weights=gone"), "there is no file gone"),
        (("batch_size=9", "accumulation_steps=2"), "batch_size: 9 images cannot be split"),
        (("observers.score.evaluations.val.dataset.classes=5", *SEGMENTATION),
         "observers.score.evaluations.val.dataset: the target 'mask' of the data has 5 classes"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_told_with_its_place(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        task(*overrides).check(1)


def test_a_backbone_that_gives_its_last_layer_alone() -> None:
    other = 'backbone={ use = "last_layer" }'
    task(other).check(1)
    with pytest.raises(RecipeError, match=r"head: .* gives its last layer after the norm alone"):
        task(other, "head.layers=[0]").check(1)


def test_data_that_are_not_here_are_missing(tmp_path: Path) -> None:
    plan = task("dataset.there=false").check(1)
    assert plan.missing == ["squares: not on this machine"]
    assert "head" not in plan.sections
    elsewhere = task("observers.score.evaluations.val.dataset.there=false").check(1)
    assert elsewhere.missing == ["observers.score: evaluations.val: squares: not on this machine"]
    found = run_here(tmp_path / "out", "dataset.there=false", recipe=RECIPE)
    assert found.returncode == 2
    assert "squares: not on this machine" in found.stderr


def test_images_of_several_sizes_are_told_while_training(tmp_path: Path) -> None:
    odd = ("dataset.ragged=true", 'drop=["transform.crop"]', "transform.multiple_of=7")
    found = run_here(tmp_path / "out", *odd, recipe=RECIPE)
    assert found.returncode == 2
    assert "let the transform crop or pad them to one" in found.stderr
    # One by one they have no sizes to differ from.
    alone = run_here(tmp_path / "alone", *odd, "accumulation_steps=8", recipe=RECIPE)
    assert alone.returncode == 0, alone.stderr


def test_a_chain_is_checked_before_its_head_is_trained(tmp_path: Path) -> None:
    chain = tmp_path / "chain.toml"
    chain.write_text(
        f"""
task = "pipeline"
[stages.train.recipe]
extends = "{RECIPE}"
tune_backbone = true
[stages.score.recipe]
extends = "{RECIPE.with_name("tiny_evaluate.toml")}"
drop = ["backbone", "images"]
weights = "stage:train"
head = "stage:train"
"""
    )
    shown = run_here(tmp_path / "out", "--check", recipe=chain)
    assert shown.returncode == 0, shown.stderr
    assert "score: head" in shown.stdout
    wrong = run_here(
        tmp_path / "out",
        "--check",
        "stages.score.recipe.evaluations.val.dataset.use=fashion_mnist",
        'stages.score.recipe.drop=["backbone", "images", "evaluations.val.dataset.count", '
        '"evaluations.val.dataset.seed"]',
        recipe=chain,
    )
    assert wrong.returncode == 2
    done = run_here(tmp_path / "out", recipe=chain)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "score" / "results.csv").is_file()


@pytest.mark.parametrize("options", [(), TUNED, SEGMENTATION, (*TUNED, "accumulation_steps=2")])
def test_a_training_is_estimated(tmp_path: Path, options: tuple[str, ...]) -> None:
    found = run_here(tmp_path / "out", "--rehearse", *options, recipe=RECIPE)
    assert found.returncode == 0, found.stderr
    assert "memory" in found.stdout.lower()
    assert not (tmp_path / "out").exists()
