"""The recipes of ADE20K by their short keys, on a drawn ADE20K; small by overrides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3_framework import WEB_IMAGES, Registry
from dinov3_framework.cli import main
from dinov3_framework.weights.export import export_backbone

pytestmark = pytest.mark.slow

VIT = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "layerscale_init": 1.0}
SMALL = (
    *("iterations=4", "batch_size=3", "transform.resize=32", "transform.crop=32"),
    *("loader.workers=0", "log_every=1", "parallel.device=cpu"),
    *("optimizer.lr.warmup=1", "checkpoint.every=2", "observers.val.every=4"),
)
IN_LOOP = "observers.val.evaluations.ade20k"
MASK2FORMER = (
    'drop=["head", "observers"]',
    'head={ use="mask2former", hidden_dim=64, queries=6, heads=4, ffn_dim=32, encoder_layers=1, '
    "decoder_layers=2, adapter_channels=8, adapter_heads=4, points=100 }",
)


@pytest.fixture(scope="module")
def ade20k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two colors, with ids 1 and 5 of the files' and some pixels of none."""
    root = tmp_path_factory.mktemp("ade") / "ADEChallengeData2016"
    rng = np.random.default_rng(0)
    for folder, split, count in (("training", "train", 6), ("validation", "val", 3)):
        for part in ("images", "annotations"):
            (root / part / folder).mkdir(parents=True)
        for index in range(count):
            height, width = 40 + 3 * index, 60 - 5 * index
            mask = np.full((height, width), 1, dtype=np.uint8)
            mask[:, width // (2 + index % 2) :] = 5
            mask[:4] = 0
            colors = np.array([[0, 0, 0], [200, 40, 20], [20, 60, 220]])[np.minimum(mask, 2)]
            pixels = (colors + rng.normal(0, 15, colors.shape)).clip(0, 255).astype(np.uint8)
            name = f"ADE_{split}_{index + 1:08}"
            Image.fromarray(pixels).save(root / "images" / folder / f"{name}.jpg", quality=95)
            Image.fromarray(mask).save(root / "annotations" / folder / f"{name}.png")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = Registry.load().build("backbone", "vit", **VIT)
        backbone.init_weights()
    info: dict[str, Any] = {"component": "vit", "config": VIT, "images": WEB_IMAGES, "size": 32}
    export_backbone(path, backbone.state_dict(), provenance={}, **info)
    return path


def small(table: str) -> tuple[str, ...]:
    """The overrides that shrink the windows of an evaluation."""
    sizes = {"resize": 32, "window": 32, "stride": 21}
    return (*(f"{table}.inference.{key}={value}" for key, value in sizes.items()),)


def run(recipe: str, folder: Path, *overrides: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    assert main([recipe, "--output-dir", str(folder), *overrides]) == 0
    return json.loads((folder / "results.json").read_text())  # type: ignore[no-any-return]


def values(results: dict[str, Any]) -> dict[str, float]:
    return {each["metric"]: each["value"] for each in results["records"]}


def test_a_linear_head_is_trained_and_measured_again(
    ade20k: Path, weights: Path, tmp_path: Path
) -> None:
    given = (f"weights={weights}", f"data={ade20k}")
    trained = tmp_path / "trained"
    run("ade20k_linear", trained, *given, *SMALL, *small(IN_LOOP), f"{IN_LOOP}.workers=0")
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    found = run(
        "eval_ade20k",
        tmp_path / "again",
        *(*given, f"head={trained}", 'evaluations.ade20k.save=["png"]'),
        *(*small("evaluations.ade20k"), "evaluations.ade20k.workers=1"),
    )
    assert values(found)["mIoU"] == lines[-1]["mIoU"]
    (record, *_) = found["records"]
    assert record["protocol"]["window"] == 32
    assert record["protocol"]["classes"] == 150
    pictures = sorted((tmp_path / "again" / "ade20k").rglob("*.png"))
    assert [path.stem for path in pictures] == [f"ADE_val_{n:08}" for n in (1, 2, 3)]
    with Image.open(pictures[0]) as picture:
        assert picture.size == (60, 40), "the size of the truth"
        assert picture.mode == "P"
    confusion = np.load(tmp_path / "again" / "ade20k_confusion.npy")
    assert confusion.shape == (150, 150)
    known = sum((36 + 3 * n) * (60 - 5 * n) for n in range(3))
    assert confusion.sum() == known, "4 rows of each are none of the classes"
    assert set(np.flatnonzero(confusion.sum(1))) == {0, 4}


def test_mask2former_is_measured_at_five_scales(
    ade20k: Path, weights: Path, tmp_path: Path
) -> None:
    given, trained = (f"weights={weights}", f"data={ade20k}"), tmp_path / "trained"
    options = [each for each in SMALL if not each.startswith("observers")]
    options += MASK2FORMER
    run("ade20k_linear", trained, *given, *options)
    found = run(
        "ade20k_m2f",
        tmp_path / "measured",
        *(*given, f"head={trained}", *small("evaluations.ade20k")),
        "evaluations.ade20k.workers=0",
    )
    assert 0 <= values(found)["mIoU"] <= 100
    protocol = found["records"][0]["protocol"]
    assert (protocol["scales"], protocol["flip"]) == ([0.9, 0.95, 1.0, 1.05, 1.1], True)
