"""The head ``linear_probes`` and its evaluation: many classifiers trained at once, one chosen."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from dinov3_classify.configs_heads import LinearProbesConfig
from dinov3_classify.probes import LinearProbes
from run_support import losses, metrics, run, run_here, two_processes
from safetensors.torch import load_file

from dinov3_framework import FeatureInfo, Registry, Target, load_recipe_backbone
from dinov3_framework.contracts.networks import HeadFeatures
from dinov3_framework.recipes.compose import compose
from dinov3_framework.recipes.structure import structure_recipe
from dinov3_framework.testing import HeadSuite
from dinov3_framework.training.optimizer import Optimizer

RECIPE = Path(__file__).parents[1] / "support" / "tiny_probes.toml"
KILL = ("observers.kill.use=signal_at", "observers.kill.iteration=5")
# As in the recipe, in the order of the head.
PROBES = [(rate, blocks) for blocks in (1, 2) for rate in (0.1, 0.3, 1.0)]


class TestProbes(HeadSuite):
    config = LinearProbesConfig(
        learning_rates=(0.1, 1.0), blocks=(1, 3), mean_patch=(True, False), target="label"
    )


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
    rows = classifiers(probed)
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


def classifiers(folder: Path) -> list[dict[str, str]]:
    """The table of all classifiers."""
    with (folder / "probes_classifiers.csv").open() as file:
        return list(csv.DictReader(file))


def test_accuracies_are_those_of_the_exported_weights(probed: Path) -> None:
    """Computed again with numpy, from the backbone's tokens and the file of the head."""
    registry = Registry.load()
    backbone = load_recipe_backbone(structure_recipe(registry, compose(RECIPE)), registry, "cpu")
    dataset = registry.build(
        registry.config_of("dataset", "fashion_mnist", {"split": "test"}), channels=1
    )
    samples = [dataset[index] for index in range(len(dataset))]
    tokens = backbone.extract(
        [sample.image for sample in samples], ["class", "mean_patch"], layers=[0, 1], size=28
    )
    first, last, mean = (
        tokens[name].double().numpy()
        for name in ("layer0.class", "layer1.class", "layer1.mean_patch")
    )
    seen = {1: np.hstack([last, mean]), 2: np.hstack([first, last, mean])}
    labels = np.array([sample.label for sample in samples])
    state = load_file(probed / "exports" / "head.safetensors")
    for index, ((_, blocks), row) in enumerate(zip(PROBES, classifiers(probed), strict=True)):
        weight, bias = (
            state[f"classifiers.{index}.{part}"].double().numpy() for part in ("weight", "bias")
        )
        right = (seen[blocks] @ weight.T + bias).argmax(1) == labels
        # An image whose two best scores are all but equal may fall either way in float32.
        assert float(row["val"]) == pytest.approx(100 * right.mean(), abs=0.11)


def test_the_kept_classifier_is_the_chosen_one(probed: Path) -> None:
    (chosen,) = (index for index, row in enumerate(classifiers(probed)) if row["chosen"])
    rate, blocks = PROBES[chosen]
    name = f"lr {rate:g}, {'1 block' if blocks == 1 else '2 blocks'}, mean patch"
    assert classifiers(probed)[chosen]["classifier"] == name
    state = load_file(probed / "exports" / "head.safetensors")
    kept = load_file(probed / "probes_head.safetensors")
    for part in ("weight", "bias"):
        assert torch.equal(kept[part], state[f"classifiers.{chosen}.{part}"])


@pytest.mark.slow
def test_killed_probes_go_on_to_the_same_bits(probed: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    assert run(cut, *KILL, recipe=RECIPE).returncode == -9
    assert not (cut / "exports").exists()
    assert run(cut, recipe=RECIPE).returncode == 0
    assert "Going on after iteration 4" in (cut / "run.log").read_text()
    assert losses(cut) == losses(probed)
    for name in ("exports/head.safetensors", "probes_head.safetensors"):
        whole, again = (load_file(folder / name) for folder in (probed, cut))
        assert all(torch.equal(again[key], value) for key, value in whole.items())
    assert classifiers(cut) == classifiers(probed)


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
        (["optimizer.clip_grad=3.0"], "optimizer.clip_grad: clips by the gradient of all"),
        (["tune_backbone=true"], "tune_backbone: tunes the backbone by the losses of all"),
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
