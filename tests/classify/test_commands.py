"""The short commands, on folders of pictures: what recipes of evaluations make of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov3_framework import ExitCode, ImagesConfig, Registry
from dinov3_framework.cli import main
from dinov3_framework.weights.export import export_backbone

GRAY = ImagesConfig(channels=1, mean=(0.5,), std=(0.25,))
CLASSES = ("bars", "dots", "plain")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small backbone of random values."""
    values = {"patch_size": 7, "embed_dim": 16, "depth": 2, "num_heads": 2, "in_chans": 1}
    values |= {"layerscale_init": 1.0}
    backbone = Registry.load().build("backbone", "vit", **values)
    backbone.init_weights()
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    export_backbone(
        path,
        backbone.state_dict(),
        component="vit",
        config=values,
        images=GRAY,
        size=28,
        provenance={},
    )
    return path


def draw(path: Path, kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pixels = rng.normal(90, 12, (36, 44))
    if kind == "bars":
        pixels[:, rng.integers(3) :: 6] += 120
    if kind == "dots":
        pixels[rng.integers(4) :: 8, ::8] += 150
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def folder(root: Path, parts: tuple[str, ...] = ("",), each: int = 10) -> Path:
    for part in parts:
        for label, kind in enumerate(CLASSES):
            (root / part / kind).mkdir(parents=True)
            for number in range(each):
                seed = 1000 * len(part) + 100 * label + number
                draw(root / part / kind / f"{part}{number}.jpg", kind, seed)
    return root


def records(output: Path) -> dict[str, dict[str, Any]]:
    """Of the weights themselves, by metric."""
    found = json.loads((output / "results.json").read_text())["records"]
    return {each["metric"]: each for each in found if each["weights"]}


@pytest.mark.parametrize("parts", [("",), ("train", "val")], ids=["split by seed", "train and val"])
def test_k_nn_of_a_folder(
    tmp_path: Path, weights: Path, parts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = folder(tmp_path / "photos", parts)
    words = ["knn", f"weights={weights}", f"data={data}", "evaluations.knn.k=[3]"]
    assert main(words) == ExitCode.OK
    output = tmp_path / "runs" / "knn-small"
    found = records(output)["knn@3"]
    assert found["value"] > 60, "three classes: chance is 33 %"
    low, high = found["interval"]
    assert low <= found["value"] <= high
    if parts == ("",):
        assert "20 %" in found["data"] or "0.2" in found["data"], "the split is stated"
    recipe = (output / "recipe.toml").read_text()
    assert str(data) in recipe
    assert "shorthand" not in recipe
    again = ["--output-dir", str(tmp_path / "again")]
    assert main([str(output / "recipe.toml"), *again]) == ExitCode.OK
    assert records(tmp_path / "again")["knn@3"]["value"] == found["value"]


def test_logistic_regression_of_a_folder(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = folder(tmp_path / "photos", ("train", "val"))
    assert main(["logistic_regression", f"weights={weights}", f"data={data}"]) == ExitCode.OK
    found = records(tmp_path / "runs" / "logistic_regression-small")["logistic_regression"]
    assert found["value"] > 60


def test_a_class_that_training_lacks_is_named(
    tmp_path: Path,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    data = folder(tmp_path / "photos", ("train", "val"), each=3)
    (data / "val" / "squares").mkdir()
    draw(data / "val" / "squares" / "0.jpg", "dots", 0)
    assert main(["knn", f"weights={weights}", f"data={data}"]) == ExitCode.WRONG_INPUT
    assert "squares" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_all_three_in_one_command_share_features(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a later run of the same weights finds them; one on a changed picture does not."""
    monkeypatch.chdir(tmp_path)
    data = folder(tmp_path / "photos", ("train", "val"))
    linear = "stages.linear.recipe"
    words = [
        "eval_classification",
        f"weights={weights}",
        f"data={data}",
        "stages.frozen.recipe.evaluations.knn.k=[3]",
        f"{linear}.iterations=20",
        f"{linear}.batch_size=16",
        f"{linear}.transform.crop=28",
        f"{linear}.loader.workers=0",
        f"{linear}.head.learning_rates=[0.01, 1.0]",
        f"{linear}.observers.linear.evaluations.linear.size=28",
        f"{linear}.observers.linear.evaluations.linear.workers=0",
        f"{linear}.observers.linear.every=10",
        f"{linear}.checkpoint.every=10",
    ]
    assert main([*words, "--output-dir", "runs/one"]) == ExitCode.OK
    assert records(Path("runs/one/frozen")).keys() >= {"knn@3", "logistic_regression"}
    results = json.loads(Path("runs/one/linear/results.json").read_text())
    trained = [r for r in results["records"]["linear"] if r["model"] == "trained head"]
    assert {r["metric"] for r in trained} == {"val/accuracy"}
    assert trained[0]["protocol"]["chosen on"] == "val"
    assert "from runs/feature_cache" in Path("runs/one/linear/run.log").read_text()
    kept = sorted(Path("runs/feature_cache").glob("*/*"))
    # Images seen in two ways, of two sets: k-NN and linear cut off their edges, regression not.
    assert len(kept) == 4
    assert main([*words, "--output-dir", "runs/two"]) == ExitCode.OK
    assert sorted(Path("runs/feature_cache").glob("*/*")) == kept
    draw(data / "val" / "bars" / "val0.jpg", "bars", 99)
    assert main([*words, "--output-dir", "runs/three"]) == ExitCode.OK
    assert len(sorted(Path("runs/feature_cache").glob("*/*"))) == 6
