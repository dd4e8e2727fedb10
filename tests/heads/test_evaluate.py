"""The task ``evaluate``: what it checks, what it measures, and the files it leaves."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from classify_support import GRAY, ClustersConfig, TinyConfig, knn, registry, tiny
from dinov3_heads import EvaluateConfig
from dinov3_heads.evaluate import Evaluate
from heads_support import RECIPE, SEGMENTATION, TUNED
from run_support import HERE, metrics, run_here, two_processes

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.errors import CheckpointError, DataError, RecipeError
from dinov3_framework.weights.export import export_backbone

EVALUATE = HERE / "tiny_evaluate.toml"


def task(*, evaluations: Any = None, **options: Any) -> Evaluate:
    known = {"knn": knn()} if evaluations is None else evaluations
    return Evaluate(EvaluateConfig(evaluations=known, **options), registry=registry())


@pytest.fixture
def weights(tmp_path: Path) -> str:
    path = tmp_path / "teacher.safetensors"
    export_backbone(
        path,
        tiny(1).state_dict(),
        component="tiny",
        config={"size": 4},
        images=GRAY,
        size=4,
        provenance={"iterations": "7"},
    )
    return str(path)


# ---------------------------------------------------------------------------- backbones
def test_an_exported_backbone(
    tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    task(weights=weights).run(output)
    results = json.loads((output / "results.json").read_text())
    pixels, teacher = results["evaluations"]["knn"]
    assert pixels["features"] == "raw pixels"
    assert teacher["features"] == weights
    assert 80 < teacher["knn@1"] <= 100
    assert results["backbone"] == {"weights": weights, "iterations": "7"}
    with (output / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    of = {(row["model"], row["metric"]): row for row in rows}
    found = of[weights, "knn@5"]
    assert round(float(found["value"]), 1) == teacher["knn@5"]
    assert found["protocol.size"] == "4"
    assert found["protocol.temperature"] == "0.07"
    assert len(found["weights"]) == 16
    assert of["raw pixels", "knn@5"]["weights"] == ""
    details = ["knn_classes.csv", "knn_confusion.npy"]
    written = sorted(path.name for path in output.iterdir())
    assert written == [*details, "results.csv", "results.json"]
    printed = capsys.readouterr().out
    assert "knn@1" in printed
    assert str(teacher["knn@1"]) in printed


def test_the_hash_is_that_of_the_values(tmp_path: Path, weights: str) -> None:
    """However the file is called and made."""
    again = tmp_path / "again.safetensors"
    export_backbone(
        again,
        tiny(1).state_dict(),
        component="tiny",
        config={"size": 4},
        images=GRAY,
        size=4,
        provenance={},
    )

    def hashes(name: str, path: str) -> set[str]:
        task(weights=path).run(tmp_path / name)
        results = json.loads((tmp_path / name / "results.json").read_text())
        return {record["weights"] for record in results["records"] if record["weights"]}

    assert hashes("one", weights) == hashes("two", str(again))


def test_a_randomly_initialized_backbone_repeats_with_its_seed(tmp_path: Path) -> None:
    names = ("a", "b", "c")
    hard = {"knn": knn(test=ClustersConfig(count=400, seed=1))}
    for name, seed in zip(names, (0, 0, 1), strict=True):
        task(backbone=TinyConfig(), images=GRAY, seed=seed, evaluations=hard).run(tmp_path / name)
    first, again, other = (
        json.loads((tmp_path / name / "results.json").read_text())["evaluations"]["knn"][1]
        for name in names
    )
    assert first["features"] == "random-init backbone"
    assert first == again
    assert first != other


def test_the_check_reports_and_writes_nothing(tmp_path: Path, weights: str) -> None:
    before = sorted(tmp_path.iterdir())
    report = task(weights=weights).check(2)
    assert report.sections["backbone"] == [
        ("weights", weights),
        ("iterations", "7"),
        ("parameters", "96"),
    ]
    (name, data), protocol, processes = report.sections["evaluations"]
    assert name == "knn"
    assert data == "clusters, 40 images; classified: clusters, 20 images"
    assert protocol[0] == "protocol"
    assert "size 4" in protocol[1]
    assert processes == ("processes", "2")
    assert not report.missing
    described = task(backbone=TinyConfig(), images=GRAY).check(1)
    assert ("weights", "random, seed 0") in described.sections["backbone"]
    assert sorted(tmp_path.iterdir()) == before


def test_data_that_are_not_here_are_missing_and_not_wrong(weights: str, tmp_path: Path) -> None:
    absent = task(weights=weights, evaluations={"knn": knn(test=ClustersConfig(there=False))})
    assert absent.check(1).missing == ["evaluations.knn: clusters: not on this machine"]
    with pytest.raises(DataError, match="not on this machine"):
        absent.run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "there is no backbone to look at"),
        ({"weights": "gone.safetensors"}, "weights: there is no file gone.safetensors"),
        ({"backbone": TinyConfig()}, r"weights bring their own backbone"),
        ({"images": GRAY}, "weights know what images"),
        ({"evaluations": {}}, "evaluations: there is nothing to measure"),
        ({"evaluations": {"knn": knn(k=(1, 41))}}, "evaluations.knn.k: 41 neighbors"),
        ({"evaluations": {"a": knn(size=5)}}, "evaluations.a.size: 5 px are no multiple"),
    ],
)
def test_recipes_that_cannot_work(weights: str, options: dict[str, Any], message: str) -> None:
    given = {"weights": weights, **options} if options else {}
    with pytest.raises(RecipeError, match=message):
        task(**given).check(1)


def test_channels_are_set_once() -> None:
    with pytest.raises(RecipeError, match=r"backbone.in_chans: is 3, but images.channels is 1"):
        task(backbone=TinyConfig(in_chans=3), images=GRAY).check(1)
    color = task(backbone=TinyConfig(in_chans=3), images=ImagesConfig())
    assert ("parameters", "288") in color.check(1).sections["backbone"]


def test_every_mistake_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        task(weights="gone", backbone=TinyConfig(), images=GRAY).check(1)
    assert [problem.where for problem in caught.value.problems] == ["backbone", "images", "weights"]
    wrong = {"a": knn(k=(41,)), "b": knn(test=ClustersConfig(labeled=False))}
    with pytest.raises(RecipeError) as caught:
        task(backbone=TinyConfig(), images=GRAY, evaluations=wrong).check(1)
    places = [problem.where for problem in caught.value.problems]
    assert places == ["evaluations.a.k", "evaluations.b.test"]


def test_a_file_that_is_no_export(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"<html>login</html>")
    with pytest.raises(CheckpointError, match="web page"):
        task(weights=str(path)).check(1)


@pytest.mark.parametrize("kind", ["task", "observers.knn.use"])
def test_the_old_names_say_the_new_ones(kind: str, tmp_path: Path) -> None:
    found = run_here(tmp_path / "out", f"{kind}=knn", recipe=RECIPE)
    assert found.returncode == 2
    assert "'knn'" in found.stderr
    assert "'evaluate' now" in found.stderr


# ---------------------------------------------------------------------------- heads
@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trained a classifier."""
    output = tmp_path_factory.mktemp("trained") / "run"
    assert run_here(output, recipe=RECIPE).returncode == 0
    return output


def results_of(output: Path, *overrides: str, recipe: Path = EVALUATE) -> dict[str, float]:
    """Metrics of the model of one evaluation, in this process."""
    found = run_here(output, *overrides, recipe=recipe)
    assert found.returncode == 0, found.stderr
    return values_in(output)


def values_in(output: Path) -> dict[str, float]:
    records = json.loads((output / "results.json").read_text())["records"]
    return {record["metric"]: record["value"] for record in records}


@pytest.mark.slow
def test_a_head_is_worth_what_it_was_worth_in_training(trained: Path, tmp_path: Path) -> None:
    last = metrics(trained)[-1]
    for name, head in (
        ("run", trained),
        ("file", trained / "exports" / "head.safetensors"),
        ("checkpoint", trained / "checkpoints" / "step_00000006"),
    ):
        found = results_of(tmp_path / name, f"head={head}")
        assert found == {"accuracy": last["accuracy"], "counted": 21}
    earlier = results_of(tmp_path / "earlier", f"head={trained}/checkpoints/step_00000004")
    assert earlier["counted"] == 21


@pytest.mark.slow
def test_no_sample_counts_twice(trained: Path, tmp_path: Path) -> None:
    """21 images on two processes, in batches of 8, some of several sizes, one of them broken."""
    odd = (f"head={trained}", "evaluations.val.dataset.ragged=true")
    odd += ("evaluations.val.transform.multiple_of=7", 'drop=["evaluations.val.transform.crop"]')
    odd += ("evaluations.val.dataset.corrupt=[5]",)
    alone = results_of(tmp_path / "alone", *odd)
    assert alone["counted"] == 20
    found = two_processes(tmp_path / "two", *odd, recipe=EVALUATE)
    assert found.returncode == 0, found.stderr
    assert values_in(tmp_path / "two") == pytest.approx(alone)


@pytest.mark.slow
def test_a_tuned_backbone_goes_with_its_head(tmp_path: Path) -> None:
    run = tmp_path / "tuned"
    assert run_here(run, *TUNED, *SEGMENTATION, recipe=RECIPE).returncode == 0
    own = (f"weights={run}", f"head={run}", 'drop=["backbone", "images"]')
    found = results_of(tmp_path / "own", *own, "evaluations.val.target=mask")
    assert found["accuracy"] == metrics(run)[-1]["accuracy"]
    report = json.loads((tmp_path / "own" / "results.json").read_text())
    assert report["backbone"]["tuned from"] == "random-init backbone"
    # On another backbone it is of little use, which is said.
    other = run_here(
        tmp_path / "other", f"head={run}", "evaluations.val.target=mask", recipe=EVALUATE
    )
    assert other.returncode == 0
    assert "was trained on random-init backbone, not on" in other.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "evaluations.val: measures a head, and there is none"),
        (("head=nowhere",), "there is no file nowhere"),
        (("head={run}", "backbone.embed_dim=64"), "does not fit the head"),
        (
            ("head={run}", "evaluations.val.dataset.use=fashion_mnist",
             'drop=["evaluations.val.dataset.count", "evaluations.val.dataset.seed"]'),
            "evaluations.val.dataset: the target 'label' of the data has 10 classes, not 4",
        ),
    ],
)  # fmt: skip
def test_heads_that_do_not_fit(
    trained: Path, tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    words = [word.format(run=trained) for word in overrides]
    found = run_here(tmp_path / "out", *words, recipe=EVALUATE)
    assert found.returncode == 2, found.stderr
    assert message in found.stderr
