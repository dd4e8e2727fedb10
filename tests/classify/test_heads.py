"""Classifiers on features: their contracts, their training, the published one."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from classify_support import GRAY, ClustersConfig
from classify_support import registry as tiny_registry
from dinov3_classify.classification import ClassificationEvaluation
from dinov3_classify.configs_heads import (
    AttentiveProbeConfig,
    ClassificationConfig,
    LinearClassifierConfig,
    LinearProbesConfig,
)
from dinov3_classify.heads import LinearClassifier
from dinov3_classify.probes import LinearProbes
from heads_fixed import FixedHead
from process_groups import run_processes
from run_support import metrics, run, run_here, two_processes
from safetensors.torch import load_file

from dinov3_framework import CheckpointError, FeatureInfo, Model, Registry, Target
from dinov3_framework.contracts.networks import HeadFeatures
from dinov3_framework.testing import HeadSuite
from dinov3_framework.testing.toy_backbone import ToyBackbone
from dinov3_framework.training.optimizer import Optimizer
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


# ---------------------------------------------------------------------------- the grid
@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six classifiers of a small frozen backbone, trained at once."""
    folder = tmp_path_factory.mktemp("probes") / "run"
    found = run_here(folder, recipe=RECIPE)
    assert found.returncode == 0, found.stderr
    return folder


def test_each_probe_is_trained_as_it_would_be_alone() -> None:
    """By SGD with momentum: three rates at once, and each by itself from the same values."""
    rates, infos = (0.1, 0.3, 1.0), (FeatureInfo(16, 8),) * 2
    schema = {"label": Target("class", n_classes=5)}

    def head(*chosen: float) -> LinearProbes:
        config = LinearProbesConfig(learning_rates=chosen)
        return LinearProbes(config, features=infos, targets=schema)

    def train(probes: LinearProbes) -> None:
        values = {"lr": 2.0, "weight_decay": 0.0, "clip_grad": None}
        config = Registry.load().config_of("optimizer", "sgd", values)
        optimizer = Optimizer({"head": probes}, config, Registry.load().build(config), 8)
        generator = torch.Generator().manual_seed(1)
        for step in range(5):
            maps = torch.randn(8, 16, 3, 3, generator=generator)
            cls = torch.randn(8, 16, generator=generator)
            wanted = torch.randint(5, (8,), generator=generator)
            optimizer.zero_grad()
            outputs = probes(HeadFeatures([maps], [cls], (24, 24)))
            probes.loss(outputs, {"label": wanted}).loss.backward()
            optimizer.set_values(optimizer.values(step, 5))
            optimizer.step()

    together = head(*rates)
    together.init_weights()
    first = {name: value.clone() for name, value in together.state_dict().items()}
    train(together)
    for index, rate in enumerate(rates):
        alone = head(rate)
        for part in ("weight", "bias"):
            alone.classifiers[0].state_dict()[part].copy_(first[f"classifiers.{index}.{part}"])
        train(alone)
        for part in ("weight", "bias"):
            found = together.state_dict()[f"classifiers.{index}.{part}"]
            torch.testing.assert_close(found, alone.classifiers[0].state_dict()[part])
            assert not torch.equal(found, first[f"classifiers.{index}.{part}"])


def test_the_best_is_chosen_on_val_and_kept(probed: Path) -> None:
    results = json.loads((probed / "results.json").read_text())
    records = results["records"]["probes"]
    last = {r["metric"]: r for r in records if r["model"] == "trained head"}
    assert set(last) == {
        f"{name}/accuracy{top}" for name in ("val", "other") for top in ("", "/top5")
    }
    protocol = last["other/accuracy"]["protocol"]
    assert protocol["chosen on"] == "val"
    assert protocol["classifiers"] == 6
    low, high = last["other/accuracy"]["interval"]
    assert low <= last["other/accuracy"]["value"] <= high
    with (probed / "probes_classifiers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert max(float(row["val"]) for row in rows) == last["val/accuracy"]["value"]
    (chosen,) = (row["classifier"] for row in rows if row["chosen"])
    assert protocol["chosen"] == chosen
    confusion = np.load(probed / "probes_other_confusion.npy")
    assert confusion.sum() == 1000
    assert 100 * np.trace(confusion) / 1000 == pytest.approx(last["other/accuracy"]["value"])


def test_the_kept_classifier_scores_the_same(probed: Path, tmp_path: Path) -> None:
    """Alone in its file, through another evaluation."""
    found = run_here(
        tmp_path / "out",
        f"head={probed / 'probes_head.safetensors'}",
        recipe=RECIPE.with_name("tiny_classification.toml"),
    )
    assert found.returncode == 0, found.stderr
    records = json.loads((tmp_path / "out" / "results.json").read_text())["records"]
    again = {r["metric"]: r["value"] for r in records}
    results = json.loads((probed / "results.json").read_text())
    before = {
        r["metric"]: r["value"]
        for r in results["records"]["probes"]
        if r["model"] == "trained head"
    }
    assert again["other/accuracy"] == pytest.approx(before["other/accuracy"], abs=0.11)


def test_the_scores_are_those_of_the_weights(probed: Path) -> None:
    """Recomputed with numpy from the file of the chosen classifier and features."""
    registry = Registry.load()
    values = {"patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2, "in_chans": 1}
    with torch.random.fork_rng():
        backbone = registry.build("backbone", "vit", **values)
    head = load_head(probed / "probes_head.safetensors", backbone, registry=registry).head
    assert isinstance(head, LinearClassifier)
    features = torch.randn(5, head.weight.shape[1])
    expected = features.numpy() @ head.weight.detach().numpy().T + head.bias.detach().numpy()
    found = F.linear(features, head.weight, head.bias).detach()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_killed_probes_go_on_to_the_same_bits(probed: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "cut", *KILL, recipe=RECIPE).returncode != 0
    assert run(tmp_path / "cut", recipe=RECIPE).returncode == 0
    name = Path("exports") / "head.safetensors"
    whole, cut = (load_file(folder / name) for folder in (probed, tmp_path / "cut"))
    assert all(torch.equal(cut[key], value) for key, value in whole.items())


@pytest.mark.slow
def test_two_processes_choose_the_same(probed: Path, tmp_path: Path) -> None:
    assert two_processes(tmp_path / "two", recipe=RECIPE).returncode == 0
    name = Path("exports") / "head.safetensors"
    one, two = (load_file(folder / name) for folder in (probed, tmp_path / "two"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-4)
    assert metrics(tmp_path / "two")[-1]["val/accuracy"] == pytest.approx(
        metrics(probed)[-1]["val/accuracy"], abs=0.3
    )
    loaded = load_file(tmp_path / "two" / "probes_head.safetensors")
    assert set(loaded) == {"weight", "bias"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["head.blocks=[3]"], "blocks = 3: the backbone has 2 layers"),
        (["head.learning_rates=[0.1, 0.1]"], "must be different numbers above 0"),
        (
            ["head={ use='linear_classifier' }"],
            "measures a head linear_probes, and this is LinearClassifier",
        ),
        (
            ["observers.probes.evaluations.probes.val={ use='squares' }"],
            "has 4 classes, the head predicts 10",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_trained(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    found = run_here(tmp_path / "run", *overrides, recipe=RECIPE)
    assert found.returncode == 2
    assert message in found.stderr
    assert not (tmp_path / "run").exists()


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
        "iterations=30",
        "observers.probes.every=30",
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
