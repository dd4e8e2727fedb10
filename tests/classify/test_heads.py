"""Classifiers on features: their contracts, their training, the published one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from classify_support import GRAY, ClustersConfig
from classify_support import registry as tiny_registry
from dinov3_classify.classification import ClassificationEvaluation
from dinov3_classify.configs_heads import (
    AttentiveProbeConfig,
    ClassificationConfig,
    LinearClassifierConfig,
    LinearProbesConfig,
)
from heads_fixed import FixedHead
from process_groups import run_processes
from run_support import metrics, run_here

from dinov3_framework import CheckpointError, FeatureInfo, Model, Registry, Target
from dinov3_framework.testing import HeadSuite
from dinov3_framework.testing.toy_backbone import ToyBackbone
from dinov3_framework.weights.heads import load_head

RECIPE = Path(__file__).parents[1] / "support" / "tiny_probes.toml"
KILL = ("observers.kill.use=kill", "observers.kill.iteration=5")


class TestLinearClassifier(HeadSuite):
    config = LinearClassifierConfig(target="label", blocks=2, label_smoothing=0.1)


class TestProbes(HeadSuite):
    config = LinearProbesConfig(
        learning_rates=(0.1, 1.0), blocks=(1, 3), mean_patch=(True, False), target="label"
    )


class TestAttentiveProbe(HeadSuite):
    config = AttentiveProbeConfig(queries=2, heads=4, target="label")


# ---------------------------------------------------------------------------- other heads
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


def test_a_processes_share_is_counted_once(tmp_path: Path) -> None:
    """Eleven images on three processes: none twice, whatever pads them."""
    results = run_processes(3, tmp_path, _accuracy_of_eleven)
    assert results == [_accuracy_of_eleven()] * 3


def _accuracy_of_eleven() -> dict[str, Any]:
    config = ClassificationConfig(sets={"a": ClustersConfig(count=11)}, size=8, batch_size=2)
    evaluation = ClassificationEvaluation(config)
    evaluation.prepare(tiny_registry().build, GRAY)
    model = Model(ToyBackbone(1).eval(), GRAY, FixedHead(), 8)
    found = dict(evaluation.run(model))
    confusion = evaluation.details().arrays["a_confusion"]
    return {"metrics": found, "images": int(confusion.sum())}
