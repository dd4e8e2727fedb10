"""Heads of depth learn, go on with the same bits, and are measured as published recipes say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from depth_scenes import drawn_room, write_pair, write_photo, write_rooms
from PIL import Image
from run_support import HERE, losses, metrics, run, run_here, two_processes
from safetensors.torch import load_file

RECIPE = HERE / "tiny_depth.toml"
NYU = HERE.parents[1] / "recipes" / "nyu_linear.toml"
KILL = ("observers.kill.use=signal_at", "observers.kill.signal=SIGKILL")
LONG = ("tune_backbone=true", "log_every=50", "checkpoint.every=1000")
LINEAR = ("iterations=300",)
# 16 bins, for time; the head makes them for twice as many pixels as the image has, by side.
DPT = ("head.use=dpt_depth", "head.widths=[16, 16, 16, 16]", "head.channels=16", "head.bins=16")
DPT += ("iterations=120",)
WHOLE = ('drop=["transform.crop", "transform.crop_width", "transform.crop_at"]', "transform.flip=0")


def data(train: Path, val: Path) -> tuple[str, ...]:
    """The overrides that say where images and depth are."""
    found = []
    for key, folder in (("dataset", train), ("observers.val.evaluations.val.data", val)):
        found += [f"{key}.images={folder}/images", f"{key}.depth={folder}/depth"]
        found.append(f"{key}.scale=0.001")
    return tuple(found)


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """32 drawn rooms to learn from, and 12 others."""
    root = tmp_path_factory.mktemp("rooms")
    return data(write_rooms(root / "train", 32), write_rooms(root / "val", 12, first=1000))


def table(output: Path) -> dict[str, dict[str, float]]:
    """Metrics by model."""
    rows = json.loads((output / "results.json").read_text())["val"]
    return {row.pop("model"): row for row in rows}


# --------------------------------------------------------------------------- learning
@pytest.mark.slow
@pytest.mark.parametrize("head", [LINEAR, DPT], ids=["linear_depth", "dpt_depth"])
def test_a_head_beats_the_mean_depth_on_other_rooms(
    head: tuple[str, ...], rooms: tuple[str, ...], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    found = run_here(output, *rooms, *head, *LONG, recipe=RECIPE)
    assert found.returncode == 0, found.stderr
    models = table(output)
    assert 3 * models["trained head"]["rmse"] < models["mean depth"]["rmse"]
    assert models["head before training"]["rmse"] > 0.9 * models["mean depth"]["rmse"]
    rows = (output / "val_images.csv").read_text().splitlines()
    assert len(rows) == 13
    assert rows[0].startswith("index,image,pixels,rmse,")
    assert {"sigma", "abs_rel"} <= metrics(output)[-2].keys() | metrics(output)[-1].keys()


@pytest.mark.slow
def test_a_photograph_is_completed(tmp_path: Path) -> None:
    """The depth of a stereo camera on the white squares of a board gives that on the black ones."""
    pytest.importorskip("skimage", reason="scikit-image brings the photograph")
    folders = write_photo(tmp_path / "photo")
    options = ("iterations=300", "batch_size=1", "backbone.depth=2", "backbone.embed_dim=64")
    options += ("optimizer.layerwise_decay=1", "head.l1=1", "head.max_depth=6")
    sizes = ("transform.resize=192", "transform.multiple_of=8")
    sizes += ("observers.val.evaluations.val.inference.resize=192",)
    given = (*data(folders["train"], folders["val"]), *LONG, *WHOLE, *options, *sizes)
    found = run_here(tmp_path / "run", *given, recipe=RECIPE)
    assert found.returncode == 0, found.stderr
    models = table(tmp_path / "run")
    assert 3 * models["trained head"]["rmse"] < models["mean depth"]["rmse"]
    assert models["trained head"]["a1"] > 0.94


# --------------------------------------------------------------------------- the same bits
@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_bits(rooms: tuple[str, ...], tmp_path: Path) -> None:
    given = (*rooms, "transform.turn=0.5", "transform.shade=0.5", "loader.workers=2")
    whole = run(tmp_path / "whole", *given, recipe=RECIPE)
    assert whole.returncode == 0, whole.stderr
    killed = run(tmp_path / "cut", *given, *KILL, "observers.kill.iteration=5", recipe=RECIPE)
    assert killed.returncode != 0
    again = run(tmp_path / "cut", *given, recipe=RECIPE)
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    heads = [(tmp_path / n / "exports" / "head.safetensors").read_bytes() for n in ("cut", "whole")]
    assert heads[0] == heads[1]
    assert table(tmp_path / "cut") == table(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_change_rounding_alone(rooms: tuple[str, ...], tmp_path: Path) -> None:
    one = run_here(tmp_path / "one", *rooms, recipe=RECIPE)
    two = two_processes(tmp_path / "two", *rooms, recipe=RECIPE)
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    heads = [load_file(tmp_path / n / "exports" / "head.safetensors") for n in ("one", "two")]
    for name, value in heads[0].items():
        torch.testing.assert_close(heads[1][name], value, rtol=1e-4, atol=1e-5)
    first, second = (table(tmp_path / name) for name in ("one", "two"))
    for model, found in first.items():
        for metric, value in found.items():
            assert second[model][metric] == pytest.approx(value, rel=2e-2), (model, metric)


# --------------------------------------------------------------------------- the published recipe
@pytest.fixture(scope="module")
def nyu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three drawn rooms in the layout of NYU Depth v2, of its size."""
    root = tmp_path_factory.mktemp("nyu")
    for split, count in (("train", 2), ("test", 1)):
        lines = []
        for number in range(count):
            image, depth = drawn_room(number, 480, 640)
            write_pair(root / split, str(number), image, depth)
            Image.open(root / split / "images" / f"{number}.png").save(
                root / f"{split}{number}.jpg"
            )
            lines.append(f"/{split}{number}.jpg {split}/depth/{number}.png 518.8579")
        (root / f"nyu_{split}.txt").write_text("\n".join(lines) + "\n")
    return root


def test_the_recipe_of_nyu_trains_and_measures(nyu: Path, tmp_path: Path) -> None:
    backbone = 'backbone={ use = "vit", patch_size = 16, embed_dim = 32, depth = 1, num_heads = 2 }'
    short = ("iterations=2", "batch_size=2", "optimizer.lr.warmup=1", "checkpoint.every=2")
    quiet = ("loader.workers=0", "observers.val.evaluations.nyu.workers=0", "log_every=1")
    given = (f"data={nyu}", 'drop=["weights"]', backbone, *short, *quiet)
    found = run_here(tmp_path / "run", *given, recipe=NYU)
    assert found.returncode == 0, found.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    (record,) = (
        each
        for each in results["records"]["nyu"]
        if each["metric"] == "rmse" and each["model"] == "trained head"
    )
    assert record["protocol"]["crop"] == "nyu_eigen"
    assert record["protocol"]["flip"] is True
    rows = (tmp_path / "run" / "nyu_images.csv").read_text().splitlines()
    pixels = int(rows[1].split(",")[2])
    truth = np.asarray(Image.open(nyu / "test" / "depth" / "0.png"))[45:471, 41:601]
    assert pixels == int(((truth > 1) & (truth < 10_000)).sum())
