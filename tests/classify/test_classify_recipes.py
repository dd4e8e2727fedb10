"""The recipes of classifiers run by their short keys, on folders of images; small by overrides."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dinov3_framework import WEB_IMAGES, Registry, load_backbone
from dinov3_framework.cli import main
from dinov3_framework.weights.export import export_backbone
from dinov3_framework.weights.heads import load_head

CLASSES = {"blue": (20, 40, 200), "green": (30, 180, 60), "red": (220, 50, 30)}
VIT = {"patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2, "layerscale_init": 1.0}
SMALL = (
    "iterations=6",
    "batch_size=6",
    "transform.crop=16",
    "loader.workers=0",
    "log_every=1",
    "parallel.device=cpu",
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of three colors, 8 to learn from and 4 to classify of each."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name, color in CLASSES.items():
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                noise = rng.normal(0, 20, (24, 20 + index, 3))
                pixels = (np.array(color) + noise).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{index}.jpg", quality=95)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = Registry.load().build("backbone", "vit", **VIT)
        backbone.init_weights()
    info: dict[str, Any] = {"component": "vit", "config": VIT, "images": WEB_IMAGES, "size": 16}
    export_backbone(path, backbone.state_dict(), provenance={}, **info)
    return path


def run(recipe: str, folder: Path, *overrides: str) -> dict[str, Any]:
    """The recipe, run; its results."""
    assert main([recipe, "--output-dir", str(folder), *overrides]) == 0
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def values(records: list[dict[str, Any]], model: str) -> dict[str, float]:
    return {each["metric"]: each["value"] for each in records if each["model"] == model}


def test_linear(pictures: Path, weights: Path, tmp_path: Path) -> None:
    """Thirteen classifiers, whose rates grow with the batch, on the last block's tokens."""
    size = "observers.linear.evaluations.linear.size=16"
    options = (f"weights={weights}", f"data={pictures}", size, *SMALL)
    results = run("linear", tmp_path / "run", *options, *_single("observers.linear"))
    records = results["records"]["linear"]
    assert values(records, "trained head")["val/accuracy"] > 50, "of three classes"
    assert records[-1]["protocol"]["chosen on"] == "val"
    with (tmp_path / "run" / "linear_classifiers.csv").open() as file:
        rates = [float(row["classifier"].split()[1].rstrip(",")) for row in csv.DictReader(file)]
    assert len(rates) == 13
    assert (rates[0], rates[-1]) == (1e-5, 0.1)
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    assert first["lr"] == pytest.approx(6 / 256)
    assert load_file(tmp_path / "run" / "linear_head.safetensors")["weight"].shape == (3, 64)


def test_a_classifier_of_ones_own_images(pictures: Path, weights: Path, tmp_path: Path) -> None:
    size = "observers.val.evaluations.val.size=16"
    options = (
        f"weights={weights}",
        f"data={pictures}",
        size,
        *SMALL,
        "epochs=none",
        "optimizer.lr.peak=5e-3",
    )
    results = run("classifier", tmp_path / "run", *options, *_single("observers.val"))
    assert values(results["records"]["val"], "trained head")["val/accuracy"] > 50
    registry = Registry.load()
    tuned = load_backbone(tmp_path / "run", registry=registry)
    assert not np.array_equal(
        tuned.backbone.cls_token.detach(), load_backbone(weights).backbone.cls_token.detach()
    )
    head = load_head(tmp_path / "run", tuned.backbone, registry=registry).head
    assert head.targets["label"].classes == tuple(CLASSES)


def test_all_three_evaluations(
    pictures: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the cache of features comes to lie
    frozen, linear = "stages.frozen.recipe.evaluations", "stages.linear.recipe"
    options = (
        f"weights={weights}",
        f"data={pictures}",
        f"{frozen}.knn.k=[3]",
        f"{frozen}.logistic_regression.c=[1.0]",
        f"{linear}.observers.linear.evaluations.linear.size=16",
        *(f"{linear}.{each}" for each in (*SMALL, *_single("observers.linear"))),
    )
    run("eval_classification", tmp_path / "run", *options)
    found = {
        stage: json.loads((tmp_path / "run" / stage / "results.json").read_text())
        for stage in ("frozen", "linear")
    }
    metrics = {each["metric"] for each in found["frozen"]["records"]}
    assert {"knn@3", "logistic_regression"} <= metrics
    assert "val/accuracy" in values(found["linear"]["records"]["linear"], "trained head")


def _single(observer: str) -> tuple[str, ...]:
    """Checkpoints and evaluations at the end alone, read by this process."""
    name = observer.rpartition(".")[2]
    workers = f"{observer}.evaluations.{name}.workers=0"
    return ("checkpoint.every=6", f"{observer}.every=6", workers)
