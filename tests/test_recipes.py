"""Every recipe of this project is sound, says what it costs, and runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov3_framework import ExitCode, Registry
from dinov3_framework.cli import main
from dinov3_framework.recipe import compose
from dinov3_framework.structure import structure_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
NAMES = [path.stem for path in RECIPES]


def test_there_are_recipes() -> None:
    assert {"quickstart", "knn", "vit7b_pretrain", "vitl_im1k"} <= set(NAMES)


@pytest.mark.parametrize("by", ["path", "name"])
@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_a_recipe_passes_its_check(
    path: Path,
    by: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    config = structure_recipe(Registry.load(), compose(path))
    weights = getattr(config, "weights", None)
    here = [] if weights is None else [f"weights={_export(tmp_path)}"]
    assert main([str(path) if by == "path" else path.stem, "--check", *here]) == 0, (
        capsys.readouterr().err
    )
    assert capsys.readouterr().out.strip()
    assert not (tmp_path / "runs").exists()


def _export(folder: Path) -> Path:
    """Weights such as an earlier recipe would have left."""
    from dinov3_framework.configs import ImagesConfig
    from dinov3_framework.engine.export import export_backbone

    values = {"patch_size": 7, "embed_dim": 16, "depth": 1, "num_heads": 2, "in_chans": 1}
    backbone = Registry.load().build("backbone", "vit", **values)
    backbone.init_weights()
    path = folder / "weights.safetensors"
    export_backbone(
        path,
        backbone.state_dict(),
        component="vit",
        config=values,
        images=ImagesConfig(channels=1, mean=(0.286,), std=(0.353,)),
        size=28,
        provenance={},
    )
    return path


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_the_header_states_command_cost_and_expectation(path: Path) -> None:
    lines = path.read_text().splitlines()
    header = []
    for line in lines:
        if not line.startswith("#"):
            break
        header.append(line)
    text = "\n".join(header)
    for word in ("Run", "Cost", "Expected"):
        assert re.search(rf"^# {word}: +[^\s@]", text, re.MULTILINE), f"{path.name} lacks {word}:"
    commands = re.findall(r"(?:dinov3-run|recipes)[ /](\S+)", text)
    assert path.stem in {Path(command).stem for command in commands}


# --------------------------------------------------------------------------- runs
TINY_HEAD = ("n_prototypes=32", "bottleneck_dim=8", "hidden_dim=16")
TINY = (
    "iterations=3",
    "batch_size=8",
    "backbone.use=vit",
    "backbone.patch_size=7",
    "backbone.embed_dim=32",
    "backbone.depth=2",
    "backbone.num_heads=2",
    "augmentation.global_size=28",
    "augmentation.local_size=14",
    *(f"losses.{loss}.head.{option}" for loss in ("dino", "ibot") for option in TINY_HEAD),
    "optimizer.lr.warmup=1",
    "optimizer.freeze_last_layer=1",
    "losses.dino.teacher_temp.warmup=1",
    "losses.ibot.teacher_temp.warmup=1",
    "loader.workers=0",
    "log_every=1",
    "parallel.device=cpu",
    "launcher.use=local",
    "launcher.processes=2",
)
SPANS = ("losses.dino.teacher_temp.span=1", "losses.ibot.teacher_temp.span=1")
EXTRA = {"vitl_im1k": SPANS, "vit7b_pretrain": ()}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen small colour images in files of two kinds."""
    folder = tmp_path_factory.mktemp("photographs")
    with np.load(ROOT / "plugins/dinov3_datasets/fashion_mnist/train.npz") as arrays:
        grey = next(array for array in arrays.values() if array.ndim == 3)[:12]
    for index, pixels in enumerate(grey):
        colours = np.stack([pixels, 255 - pixels, pixels // 2], axis=-1)
        image = Image.fromarray(colours).resize((40 + index, 36))
        image.save(folder / f"{index:02}.{'png' if index % 2 else 'jpg'}")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", sorted(EXTRA))
def test_a_published_recipe_runs_small(
    name: str, precision: str, photographs: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "dinov3_framework", str(ROOT / "recipes" / f"{name}.toml")),
            *("--output-dir", str(output), *TINY, *EXTRA[name]),
            *("dataset.use=image_folder", f"dataset.root={photographs}"),
            f"parallel.param_dtype={precision}",
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert None not in line.values()
        assert {"dino", "ibot", "koleo", "gradient_norm/ibot_head"} <= line.keys()
    assert (output / "exports" / "teacher_backbone.safetensors").exists()
    assert json.loads((output / "results.json").read_text())["images_seen"] == 24


def test_what_an_observer_misses_is_known_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    missing = ("train.use=image_folder", f"train.root={tmp_path / 'nowhere'}")
    words = ["quickstart", *(f"observers.knn.{part}" for part in missing)]
    words += ["--output-dir", str(output)]
    assert main([*words, "--check"]) == 0
    assert main(words) == ExitCode.WRONG_INPUT
    message = capsys.readouterr().err
    assert "observers.knn" in message
    assert "does not exist" in message
    assert not output.exists()
