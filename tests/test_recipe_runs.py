"""Every recipe of a training runs, stage after stage, small by overrides alone.

All sizes shrink; what is left is the recipe's: its losses, architecture, kinds of schedules,
anchors, recomputing, precision, number of passes, and the runs that it continues from by name.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov3_framework.cli import main
from dinov3_framework.recipes.compose import compose
from dinov3_framework.recipes.toml_text import inline
from dinov3_framework.schedules import SCHEDULES

ROOT = Path(__file__).parents[1]
STEPS = 3

# Sizes of crops, in patches of 4 pixels and whole multiples of that, but for the one that is none.
PATCH = 4
SIDES = {
    "global_size": {224: 16, 256: 16, 512: 32, 768: 48},
    "local_size": {96: 8, 112: 8, 168: 10, 224: 16, 336: 24},
    "anchor_size": {512: 32, 768: 48, 1152: 72},
}
TINY_VIT = {"patch_size": PATCH, "embed_dim": 32, "depth": 2, "num_heads": 2}
TINY_CONVNEXT = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}
TINY_HEAD = {"n_prototypes": 32, "bottleneck_dim": 8, "hidden_dim": 16}
HERE = {
    "loader.workers": 0,
    "log_every": 1,
    "parallel.device": "cpu",
    "parallel.compile": False,  # takes longer than all the rest
}

# Chains of recipes, some with an overlay: each but the first takes what one before it has left.
CHAINS = {
    "vits": ("vits_pretrain", "vits_gram_anchor", "vits_high_res_adapt"),
    "vitb": ("vitb_pretrain", "vitb_gram_anchor", "vitb_high_res_adapt"),
    "vitl": ("vitl_pretrain", "vitl_gram_anchor", "vitl_high_res_adapt"),
    "vith_plus": ("vith_plus_pretrain", "vith_plus_gram_anchor", "vith_plus_high_res_adapt"),
    "vit7b": (
        *("vit7b_pretrain", "vit7b_gram_anchor", "vit7b_high_res_adapt"),
        *("vits_distill", "vits_plus_distill", "vitb_distill", "vitl_distill"),
        "lvd1689m_distill",
    ),
    "vitl_im1k": ("vitl_im1k", "im1k_distill", "convnext_tiny_distill", "convnext_distill"),
}
CHAINS |= {
    f"{size} on {gpus}": (
        *(f"{size}_pretrain {gpus}", f"{size}_gram_anchor {gpus}"),
        f"{size}_high_res_adapt {gpus}_high_res",
    )
    for size in ("vits", "vitb", "vitl", "vith_plus")
    for gpus in ("1gpu", "8gpu")
}
PROCESSES = {"im1k_distill": 2, "convnext_distill": 4, "lvd1689m_distill": 4}


def test_every_recipe_of_a_training_is_run_here() -> None:
    names = [path.stem for path in (ROOT / "recipes").glob("*.toml")]
    tasks = {"pretrain", "distill", "multi_distill"}
    trainings = {name for name in names if _recipe(name).get("task") in tasks}
    run = {name.split()[0] for chain in CHAINS.values() for name in chain}
    assert run <= trainings
    assert trainings - run == {"quickstart", "my_images"}  # which their own tests run


# --------------------------------------------------------------------------- overrides
def tiny(name: str) -> list[str]:
    """The overrides that make a recipe small and have it run here."""
    recipe, processes = _recipe(name), PROCESSES.get(name, 1)
    values: dict[str, Any] = {"launcher.use": "local", "launcher.processes": processes}
    stages = recipe.get("stages", {})
    tables = {f"stages.{stage}.recipe.": table["recipe"] for stage, table in stages.items()}
    for prefix, table in (tables or {"": recipe}).items():
        values |= {f"{prefix}{key}": value for key, value in _sizes(table, processes).items()}
    return [f"{key}={inline(value)}" for key, value in values.items()]


def _files(name: str) -> list[str]:
    return [str(ROOT / "recipes" / f"{word}.toml") for word in name.split()]


def _recipe(name: str) -> Mapping[str, Any]:
    return compose(_files(name)).data


def _sizes(recipe: Mapping[str, Any], processes: int) -> dict[str, Any]:
    goes_on = "continue_from" in recipe
    values = HERE | _schedules(recipe) | _crops(recipe["augmentation"])
    values |= _networks(recipe) | _anchors(recipe)
    values["batch_size"] = max(2 * recipe.get("accumulation_steps", 1), 4) * processes
    values["iterations"] = 2 * STEPS if goes_on else STEPS
    # A later stage wants the first iteration of a first one.
    first = recipe["task"] == "pretrain" and not goes_on and "init_from" not in recipe
    values["checkpoint.every"] = 1 if first else STEPS
    if "group_size" in recipe["losses"]["koleo"]:
        values["losses.koleo.group_size"] = values["batch_size"]
    if goes_on:
        values["continue_from.iteration"] = STEPS
    return values


def _schedules(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every length of a schedule is one iteration."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            if value.get("use") in SCHEDULES:
                lengths = value.keys() & {"warmup", "cosine", "span"}
                found |= {f"{prefix}{key}.{length}": 1 for length in lengths}
            found |= _schedules(value, f"{prefix}{key}.")
    if "freeze_last_layer" in table:
        found[f"{prefix}freeze_last_layer"] = min(table["freeze_last_layer"], 1)
    return found


def _crops(augmentation: Mapping[str, Any]) -> dict[str, Any]:
    def small(table: Mapping[str, Any]) -> dict[str, Any]:
        return {key: SIDES[key].get(table[key], table[key]) for key in SIDES if key in table}

    values = {f"augmentation.{key}": side for key, side in small(augmentation).items()}
    if "resolutions" in augmentation:
        rows = [dict(row) | small(row) for row in augmentation["resolutions"]]
        values["augmentation.resolutions"] = rows
    if "teacher_scale" in augmentation:
        # A ConvNeXt's map of crops of 64 pixels is 2 x 2, and so are the teacher's patches of 8.
        values |= {"augmentation.global_size": 64, "augmentation.local_size": 32}
        values["augmentation.teacher_scale"] = 2 * PATCH / 64
    return values


def _networks(recipe: Mapping[str, Any]) -> dict[str, Any]:
    backbones = {"backbone": recipe["backbone"]} if "backbone" in recipe else {}
    values: dict[str, Any] = {}
    for student, table in recipe.get("students", {}).items():
        backbones[f"students.{student}.backbone"] = table["backbone"]
        values[f"students.{student}.processes"] = 1
    for key, backbone in backbones.items():
        sizes = TINY_CONVNEXT if backbone["use"].startswith("convnext") else TINY_VIT
        if backbone.get("patch_size", 16) != 16:  # small as it is
            sizes = {}
        values |= {f"{key}.{size}": value for size, value in sizes.items()}
    for loss in ("dino", "ibot"):
        values |= {f"losses.{loss}.head.{size}": value for size, value in TINY_HEAD.items()}
    return values


def _anchors(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Anchors begin as the teacher of the first step, and the first step here refreshes them."""
    anchor = recipe["losses"].get("gram", {}).get("anchor", {})
    values: dict[str, Any] = {}
    if "checkpoints" in anchor.get("weights", ""):
        folder = anchor["weights"].rpartition("/")[0]
        values["losses.gram.anchor.weights"] = f"{folder}/step_00000001"
    if "period" in anchor:
        values |= {"losses.gram.anchor.period": 1, "losses.gram.anchor.first_refresh": STEPS + 1}
    return values


# --------------------------------------------------------------------------- runs
@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen small color images in files of two kinds."""
    folder = tmp_path_factory.mktemp("photographs")
    with np.load(ROOT / "plugins/dinov3_datasets/fashion_mnist/train.npz") as arrays:
        gray = next(array for array in arrays.values() if array.ndim == 3)[:12]
    for index, pixels in enumerate(gray):
        colors = np.stack([pixels, 255 - pixels, pixels // 2], axis=-1)
        image = Image.fromarray(colors).resize((40 + index, 36))
        image.save(folder / f"{index:02}.{'png' if index % 2 else 'jpg'}")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("chain", list(CHAINS))
def test_stages_run_one_after_another(
    chain: str, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Runs are where the recipes look for those that they continue from: runs/<name> below here.
    monkeypatch.chdir(tmp_path)
    for name in CHAINS[chain]:
        words = [*_files(name), f"dataset.root={photographs}", *tiny(name)]
        if PROCESSES.get(name, 1) == 1:
            assert main(words) == 0, name
        else:
            _run_apart(words)
        recipe = _recipe(name)
        for student in recipe.get("students", ["."]):
            _look_at(tmp_path / "runs" / name.split()[0] / student, recipe)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit7b", "quickstart_pipeline"])
def test_all_stages_run_in_one_command(
    name: str, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stages, words = _recipe(name)["stages"], tiny(name)
    for stage, table in stages.items():
        if table["recipe"]["dataset"]["use"] == "image_folder":
            words.append(f"stages.{stage}.recipe.dataset.root={photographs}")
        if "observers" in table["recipe"]:
            words.append(f"stages.{stage}.recipe.drop=observers")
    assert main([*_files(name), *words]) == 0
    for stage, table in stages.items():
        _look_at(tmp_path / "runs" / name / stage, table["recipe"])


def _run_apart(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dinov3_framework", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def _look_at(output: Path, recipe: Mapping[str, Any]) -> None:
    """What a run of three steps has left."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    first = STEPS if "continue_from" in recipe else 0
    assert [line["iteration"] for line in lines] == [first + step for step in (1, 2, 3)]
    for line in lines:
        assert None not in line.values()
        assert {*recipe["losses"], "gradient_norm/ibot_head"} <= line.keys()
    if "gram" in recipe["losses"]:
        assert sum(line["gram"] for line in lines) > 0
    assert (output / "exports" / "teacher_backbone.safetensors").exists()
    assert json.loads((output / "results.json").read_text())["iterations"] == len(lines) + first
