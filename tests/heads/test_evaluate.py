"""The task ``knn``: what it checks, and the files it leaves."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from classify_support import GREY, ClustersConfig, TinyConfig, registry, tiny
from dinov3_classify.configs import KnnTaskConfig
from dinov3_classify.task import KnnTask

from dinov3_framework.configs import ImagesConfig, InvalidOption
from dinov3_framework.errors import CheckpointError, DataError, RecipeError
from dinov3_framework.weights.export import export_backbone


def task(**options: Any) -> KnnTask:
    given = {"train": ClustersConfig(count=40), "test": ClustersConfig(count=20, seed=1)}
    return KnnTask(KnnTaskConfig(**{**given, "k": (1, 5), **options}), registry=registry())


@pytest.fixture
def weights(tmp_path: Path) -> str:
    path = tmp_path / "teacher.safetensors"
    export_backbone(
        path,
        tiny(1).state_dict(),
        component="tiny",
        config={"size": 4},
        images=GREY,
        size=4,
        provenance={"iterations": "7"},
    )
    return str(path)


def test_an_exported_backbone(
    tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    task(weights=weights).run(output)
    results = json.loads((output / "results.json").read_text())
    pixels, teacher = results["knn"]
    assert pixels["features"] == "raw pixels"
    assert teacher["features"] == weights
    assert 80 < teacher["knn@1"] <= 100
    assert results["backbone"] == {"weights": weights, "iterations": "7"}
    assert results["skipped"] == {"train": 0, "test": 0}
    assert results["size"] == 4
    with (output / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["knn@5"] for row in rows] == [str(pixels["knn@5"]), str(teacher["knn@5"])]
    assert sorted(path.name for path in output.iterdir()) == ["results.csv", "results.json"]
    printed = capsys.readouterr().out
    assert "knn@1" in printed
    assert str(teacher["knn@1"]) in printed


def test_a_randomly_initialised_backbone_repeats_with_its_seed(tmp_path: Path) -> None:
    names = ("a", "b", "c")
    hard = {"train": ClustersConfig(count=40), "test": ClustersConfig(count=400, seed=1)}
    for name, seed in zip(names, (0, 0, 1), strict=True):
        task(backbone=TinyConfig(), images=GREY, seed=seed, **hard).run(tmp_path / name)
    first, again, other = (
        json.loads((tmp_path / name / "results.json").read_text())["knn"][1] for name in names
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
    assert report.sections["data"] == [
        ("train", "clusters, 40 images"),
        ("test", "clusters, 20 images"),
        ("images", "4 px"),
    ]
    assert ("processes", "2") in report.sections["evaluation"]
    assert not report.missing
    described = task(backbone=TinyConfig(), images=GREY).check(1)
    assert ("weights", "random, seed 0") in described.sections["backbone"]
    assert ("images", "as they are") in described.sections["data"]
    assert sorted(tmp_path.iterdir()) == before


def test_a_dataset_that_is_not_here_is_missing_and_not_wrong(weights: str, tmp_path: Path) -> None:
    absent = task(weights=weights, test=ClustersConfig(there=False))
    assert absent.check(1).missing == ["clusters: not on this machine"]
    with pytest.raises(DataError, match="not on this machine"):
        absent.run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "there is no backbone to look at"),
        ({"weights": "gone.safetensors"}, "weights: there is no file gone.safetensors"),
        ({"backbone": TinyConfig()}, r"weights bring their own backbone"),
        ({"images": GREY}, "weights know what images"),
        ({"k": (1, 41)}, "k: 41 neighbours"),
        ({"size": 5}, "size: 5 px are no multiple of the backbone's patch size 2"),
        ({"test": ClustersConfig(names=("b", "a", "c", "d"))}, "test: its classes are not those"),
    ],
)
def test_recipes_that_cannot_work(weights: str, options: dict[str, Any], message: str) -> None:
    given = {"weights": weights, **options} if options else {}
    with pytest.raises(RecipeError, match=message):
        task(**given).check(1)


def test_channels_are_set_once() -> None:
    with pytest.raises(RecipeError, match=r"backbone.in_chans: is 3, but images.channels is 1"):
        task(backbone=TinyConfig(in_chans=3), images=GREY).check(1)
    colour = task(backbone=TinyConfig(in_chans=3), images=ImagesConfig())
    assert ("parameters", "288") in colour.check(1).sections["backbone"]


def test_every_mistake_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        task(weights="gone", backbone=TinyConfig(), images=GREY).check(1)
    assert [problem.where for problem in caught.value.problems] == ["backbone", "images", "weights"]


def test_a_file_that_is_no_export(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"<html>login</html>")
    with pytest.raises(CheckpointError, match="web page"):
        task(weights=str(path)).check(1)


@pytest.mark.parametrize("k", [(), (0,), (-3, 5), (5, 5)])
def test_numbers_of_neighbours_that_make_no_sense(k: tuple[int, ...]) -> None:
    with pytest.raises(InvalidOption, match="k: must be different numbers above 0"):
        task(k=k)
