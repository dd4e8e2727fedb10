"""Classifiers on features: their contracts, their training, the published one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from dinov3_classify.configs_heads import (
    AttentiveProbeConfig,
    LinearClassifierConfig,
)
from run_support import metrics, run_here

from dinov3_framework import CheckpointError, FeatureInfo, Registry, Target
from dinov3_framework.testing import HeadSuite
from dinov3_framework.weights.heads import load_head

RECIPE = Path(__file__).parents[1] / "support" / "tiny_probes.toml"


class TestLinearClassifier(HeadSuite):
    config = LinearClassifierConfig(target="label", blocks=2, label_smoothing=0.1)


class TestAttentiveProbe(HeadSuite):
    config = AttentiveProbeConfig(queries=2, heads=4, target="label")


# ---------------------------------------------------------------------------- other heads
@pytest.mark.slow
@pytest.mark.parametrize(
    "head", ['{ use="linear_classifier", blocks=2 }', '{ use="attentive_probe", heads=2 }']
)
def test_a_classifier_learns_and_is_measured(tmp_path: Path, head: str) -> None:
    evaluation = (
        '{ val={ use="classification", sets={ test={ use="fashion_mnist", split="test" }}}}'
    )
    options = (
        f"head={head}",
        "optimizer={ use='adamw', lr=0.02, weight_decay=0.0, layerwise_decay=1.0 }",
        "iterations=15",
        "observers.probes.every=15",
        'drop="observers.probes.evaluations"',
        f"observers.probes.evaluations={evaluation}",
    )
    found = run_here(tmp_path / "run", *options, recipe=RECIPE)
    assert found.returncode == 0, found.stderr
    last = metrics(tmp_path / "run")[-1]
    assert last["test/accuracy"] > 25, "ten classes: chance is 10 %"
    assert last["test/accuracy/top5"] > last["test/accuracy"]


def test_a_classifier_tuned_with_its_backbone_is_the_same_from_its_files(tmp_path: Path) -> None:
    options = (
        "head={ use='linear_classifier', label_smoothing=0.1 }",
        "tune_backbone=true",
        "optimizer={ use='adamw', lr=1e-3, weight_decay=0.05, layerwise_decay=0.5 }",
        "iterations=4",
        "observers.probes.every=4",
        'drop="observers.probes.evaluations"',
        "observers.probes.evaluations="
        '{ val={ use="classification", sets={ test={ use="fashion_mnist", split="test" }}}}',
    )
    trained, again = tmp_path / "run", tmp_path / "again"
    found = run_here(trained, *options, recipe=RECIPE)
    assert found.returncode == 0, found.stderr
    given = (f"weights={trained}", f"head={trained}", 'drop=["backbone", "images"]')
    found = run_here(again, *given, recipe=RECIPE.with_name("tiny_classification.toml"))
    assert found.returncode == 0, found.stderr
    before = np.load(trained / "val_test_confusion.npy")
    np.testing.assert_array_equal(np.load(again / "classes_other_confusion.npy"), before)
    (record, *_) = json.loads((again / "results.json").read_text())["records"]
    assert record["metric"] == "other/accuracy"
    assert record["value"] == metrics(trained)[-1]["test/accuracy"]


# ---------------------------------------------------------------------------- the published one
def official(path: Path, classes: int = 1000, width: int = 8192) -> Path:
    """A file as it is published: the state of one linear layer."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(classes, width, generator=generator)
    torch.save({"weight": weight, "bias": torch.arange(classes) / classes}, path)
    return path


def test_the_published_classifier_has_its_shapes(tmp_path: Path) -> None:
    registry = Registry.load()
    published = registry.published["dinov3_vit7b16_lc"]
    assert published.default.file == "dinov3_vit7b16_imagenet1k_linear_head-90d8ed92.pth"
    with torch.device("meta"):
        head = registry.build(
            published.default.config,
            features=(FeatureInfo(4096, 16),) * 40,
            targets={"label": Target("class", n_classes=1000)},
        )
    shapes = {name: list(value.shape) for name, value in head.state_dict().items()}
    assert shapes == {"weight": [1000, 8192], "bias": [1000]}


def test_an_official_file_loads_onto_a_backbone(tmp_path: Path) -> None:
    registry = Registry.load()
    backbone = registry.build("backbone", "vit", embed_dim=32, depth=2, num_heads=2)
    path = official(tmp_path / "head.pth", classes=7, width=64)
    loaded = load_head(path, backbone, registry=registry)
    assert loaded.head.targets["label"].count == 7
    assert torch.equal(loaded.head.bias, torch.arange(7) / 7)
    wrong = registry.build("backbone", "vit", embed_dim=48, depth=2, num_heads=2)
    with pytest.raises(CheckpointError, match=r"of another shape:\s+weight: \[7, 64\]"):
        load_head(path, wrong, registry=registry)
