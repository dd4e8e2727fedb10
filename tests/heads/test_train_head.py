"""The task ``train_head``: what is learned and kept, and that runs go on with the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from heads_support import RECIPE, SEGMENTATION, TUNED, registry
from run_support import losses, metrics, run, run_here, saved, two_processes
from safetensors.torch import load_file

from dinov3_framework import load_backbone
from dinov3_framework.weights.heads import load_head

pytestmark = pytest.mark.slow

KILL = ("observers.kill.use=signal_at", "observers.kill.signal=SIGKILL")
LONG = (
    *("iterations=120", "dataset.count=300", "log_every=20"),
    *("observers.score.every=120", "checkpoint.every=120"),
)
TWO = ("launcher.use=local", "launcher.processes=2")
BF16 = ("parallel.param_dtype=bf16",)


def exports(output: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in sorted((output / "exports").glob("*.safetensors"))
    }


# ---------------------------------------------------------------------------- learning
@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that had time to learn."""
    output = tmp_path_factory.mktemp("learned") / "run"
    found = run_here(output, *LONG, recipe=RECIPE)
    assert found.returncode == 0, found.stderr
    return output


def test_a_classifier_learns_and_the_table_says_so(learned: Path) -> None:
    results = json.loads((learned / "results.json").read_text())
    before, after = results["val"]
    assert before["model"] == "head before training"
    assert after["model"] == "trained head"
    assert before["accuracy"] < 60 < after["accuracy"]
    lines = metrics(learned)
    assert lines[0] == {"iteration": 0, "accuracy": before["accuracy"], "counted": 21} | {
        "accuracy": lines[0]["accuracy"]
    }
    assert {"loss", "head", "gradient_norm/head", "lr", "train_accuracy"} <= lines[-1].keys()


def test_the_export_stands_alone(learned: Path) -> None:
    """State-dict names of the head, and all that it takes to load it from Python."""
    state = load_file(learned / "exports" / "head.safetensors")
    assert set(state) == {"norm.weight", "norm.bias", "linear.weight", "linear.bias"}
    values = {"patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2, "in_chans": 1}
    backbone = registry().build("backbone", "vit", **values)
    loaded = load_head(learned, backbone, registry=registry())
    assert loaded.head.targets["label"].classes == ("a", "b", "c", "d")
    assert loaded.images.channels == 1
    assert loaded.size == 28
    assert loaded.provenance["iterations"] == "120"
    for name, value in loaded.head.state_dict().items():
        assert torch.equal(value, state[name])


def test_a_frozen_backbone_is_in_no_checkpoint_and_not_exported(
    learned: Path, tmp_path: Path
) -> None:
    assert list(exports(learned)) == ["head.safetensors"]
    names = saved(learned, 120, tmp_path)
    assert {name.partition(".")[0] for name in names} == {"head", "optimizer"}


def test_a_segmentation_head_learns(tmp_path: Path) -> None:
    found = run_here(tmp_path / "run", *LONG, *SEGMENTATION, recipe=RECIPE)
    assert found.returncode == 0, found.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["val"][1]["accuracy"] > 85
    assert results["val"][1]["counted"] == 21 * 28 * 27  # one row is ignored


def test_a_tuned_backbone_learns_with_decay_by_layer(tmp_path: Path) -> None:
    output = tmp_path / "run"
    # So small a factor by layer, that the first block all but stands still.
    found = run_here(output, *TUNED, "optimizer.layerwise_decay=1e-6", recipe=RECIPE)
    assert found.returncode == 0, found.stderr
    tuned = load_backbone(output, registry=registry()).backbone.state_dict()
    assert load_backbone(output, registry=registry()).size == 28
    first = load_backbone(_weights(tmp_path / "first"), registry=registry()).backbone.state_dict()
    moved = {name: float((tuned[name] - first[name]).abs().max()) for name in tuned}
    assert moved["norm.weight"] > 1e-4
    assert moved["patch_embed.proj.weight"] < 1e-6
    assert "gradient_norm/backbone" in metrics(output)[-1]


def _weights(folder: Path, *overrides: str) -> Path:
    """The backbone of the recipe as it is initialized, in a file: tuned in no step worth it."""
    still = ("iterations=1", "optimizer.lr=1e-30", "observers={}")
    found = run_here(folder, *TUNED, *still, *overrides, recipe=RECIPE)
    assert found.returncode == 0, found.stderr
    return folder / "exports" / "backbone.safetensors"


def test_weights_and_images_come_from_a_file(tmp_path: Path) -> None:
    weights = _weights(tmp_path / "weights")
    output = tmp_path / "run"
    given = (f"weights={weights}", 'drop=["backbone", "images"]')
    assert run_here(output, *given, recipe=RECIPE).returncode == 0
    same = tmp_path / "same"
    assert run_here(same, recipe=RECIPE).returncode == 0
    assert losses(output) == losses(same)


# ---------------------------------------------------------------------------- the same bits
@pytest.mark.parametrize(
    "options",
    [
        (),
        TUNED,
        (*SEGMENTATION, "accumulation_steps=2", "loader.workers=2"),
        TWO,
        (*TWO, *TUNED, *BF16),
        ("dataset.stream=true", "dataset.corrupt=[3, 17]"),
    ],
    ids=["frozen", "tuned", "segmentation", "two", "two tuned bf16", "stream"],
)
def test_killed_and_resumed_gives_the_same_bits(tmp_path: Path, options: tuple[str, ...]) -> None:
    whole = run(tmp_path / "whole", *options, recipe=RECIPE)
    assert whole.returncode == 0, whole.stderr
    killed = run(tmp_path / "cut", *options, *KILL, "observers.kill.iteration=5", recipe=RECIPE)
    assert killed.returncode != 0
    again = run(tmp_path / "cut", *options, recipe=RECIPE)
    assert again.returncode == 0, again.stderr
    assert exports(tmp_path / "cut") == exports(tmp_path / "whole")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    tables = [
        json.loads((tmp_path / name / "results.json").read_text())["val"]
        for name in ("whole", "cut")
    ]
    assert tables[0] == tables[1]


def test_processes_and_micro_batches_change_rounding_alone(tmp_path: Path) -> None:
    assert run_here(tmp_path / "one", recipe=RECIPE).returncode == 0
    assert two_processes(tmp_path / "two", recipe=RECIPE).returncode == 0
    assert run_here(tmp_path / "parts", "accumulation_steps=4", recipe=RECIPE).returncode == 0
    one = load_file(tmp_path / "one" / "exports" / "head.safetensors")
    for name in ("two", "parts"):
        other = load_file(tmp_path / name / "exports" / "head.safetensors")
        for key, value in one.items():
            torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-5)


def test_another_backbone_is_not_gone_on_with(tmp_path: Path) -> None:
    weights = _weights(tmp_path / "weights")
    given = (f"weights={weights}", 'drop=["backbone", "images"]')
    output = tmp_path / "run"
    killed = run(output, *given, *KILL, "observers.kill.iteration=4", recipe=RECIPE)
    assert killed.returncode != 0
    other = _weights(tmp_path / "other", "seed=5")
    weights.write_bytes(other.read_bytes())
    found = run_here(output, *given, recipe=RECIPE)
    assert found.returncode == 2
    assert "is not the backbone that this run has learned from" in found.stderr
