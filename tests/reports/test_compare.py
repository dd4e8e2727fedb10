"""The task ``compare``, on what real runs have left."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dinov3_reports import CompareConfig
from dinov3_reports.comparison import Row
from dinov3_reports.runs import class_names
from reports_support import SCRIPT, Page
from run_support import HERE, TINY, run_here

from dinov3_framework import Record
from dinov3_framework.testing import TaskSuite

RECIPE = HERE.parents[1] / "recipes" / "compare.toml"
KNN = HERE / "tiny_knn.toml"
OBSERVED = (
    "observers.knn.use=evaluate",
    "observers.knn.every=2",
    'observers.knn.evaluations.knn={use="knn",k=[5,10],train={use="fashion_mnist",split="test"},'
    'test={use="fashion_mnist",split="test"}}',
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Evaluations of two seeds, one at another size, and a training."""
    folder = tmp_path_factory.mktemp("runs")
    for name, *given in (
        ("one", "seed=1"),
        ("two", "seed=2", "backbone.embed_dim=8"),
        ("larger", "seed=1", "evaluations.knn.size=14"),
    ):
        done = run_here(folder / name, *given, recipe=KNN)
        assert done.returncode == 0, done.stderr
    done = run_here(folder / "training", *OBSERVED, recipe=TINY)
    assert done.returncode == 0, done.stderr
    return folder


def compare(runs: Path, output: Path, *names: str, given: tuple[str, ...] = ()) -> Any:
    """The finished command on some of the runs."""
    folders = json.dumps([str(runs / name) for name in names])
    return run_here(output, f"runs={folders}", *given, recipe=RECIPE)


def compared(runs: Path, output: Path, *names: str, given: tuple[str, ...] = ()) -> dict[str, Any]:
    """By metric, what results.json holds."""
    done = compare(runs, output, *names, given=given)
    assert done.returncode == 0, done.stderr
    rows = json.loads((output / "results.json").read_text())["metrics"]
    return {row["metric"]: row for row in rows}


def values(folder: Path) -> dict[str, float]:
    """By metric, what a run measured of its model."""
    records = json.loads((folder / "results.json").read_text())["records"]
    return {each["metric"]: each["value"] for each in records if each["model"] != "raw pixels"}


def copied(runs: Path, folder: Path, **changes: Any) -> Path:
    """A run of which every record is changed."""
    shutil.copytree(runs / "one", folder)
    path = folder / "results.json"
    results = json.loads(path.read_text())
    results["records"] = [record | changes for record in results["records"]]
    path.write_text(json.dumps(results))
    return folder


METRICS = ["knn@5", "knn@5/top5", "knn@10", "knn@10/top5"]


def _charts(page: Page) -> list[Any]:
    """Its pictures besides confusion matrices."""
    return [each for each in page.all("img") if "taken for" not in str(each["alt"])]


# --------------------------------------------------------------------------- side by side
def test_metrics_of_two_evaluations(runs: Path, tmp_path: Path) -> None:
    found = compared(runs, tmp_path / "out", "one", "two")
    measured = {name: values(runs / name) for name in ("one", "two")}
    assert list(found) == METRICS
    for metric, row in found.items():
        assert row["values"] == {name: each[metric] for name, each in measured.items()}
        assert row["comparable"]
        best = max(row["values"], key=row["values"].get)
        assert row["marks"][best] == "best"
    page = Page(tmp_path / "out" / "report.html")
    page.assert_stands_alone()
    assert len(_charts(page)) == 1
    assert "★ best" in page.text
    assert "NOT COMPARABLE" not in page.text
    assert class_names(runs / "one", "knn", 10)[1] == "Trouser"
    assert "raw pixels" in page.text
    for each in measured.values():
        assert f"{each['knn@5']:.4g}" in page.text


def test_the_table_has_a_line_for_each_value(runs: Path, tmp_path: Path) -> None:
    compared(runs, tmp_path / "out", "one", "two", "larger")
    with (tmp_path / "out" / "comparison.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["run"], row["metric"]) for row in rows] == [
        (run, metric) for metric in METRICS for run in ("one", "two", "larger")
    ]
    for row in rows:
        assert float(row["value"]) == values(runs / row["run"])[row["metric"]]
        assert row["comparable"] == "NO"
        assert row["protocol.size"] == ("14" if row["run"] == "larger" else "as they are")


def test_another_protocol_is_said_loudly(runs: Path, tmp_path: Path) -> None:
    found = compared(runs, tmp_path / "out", "one", "two", "larger")
    for row in found.values():
        assert not row["comparable"]
        assert "size: as they are (one, two) | 14 (larger)" in row["differences"]
        # Those that were measured alike are compared all the same.
        assert row["marks"]["larger"] == "odd"
        assert "best" in (row["marks"]["one"], row["marks"]["two"])
    text = Page(tmp_path / "out" / "report.html").text
    assert "NOT COMPARABLE" in text
    assert "size: as they are (one, two) | 14 (larger)" in text


def test_nothing_is_best_of_two_that_differ(runs: Path, tmp_path: Path) -> None:
    done = compare(runs, tmp_path / "out", "one", "larger")
    assert "NOT COMPARABLE" in done.stderr
    for row in json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]:
        assert row["marks"] == {"one": "odd", "larger": "odd"}


def test_other_data_are_another_measurement(runs: Path, tmp_path: Path) -> None:
    copied(runs, tmp_path / "elsewhere", data="other images")
    shutil.copytree(runs / "one", tmp_path / "one")
    found = compared(tmp_path, tmp_path / "out", "one", "elsewhere")
    assert all("data: " in row["differences"][0] for row in found.values())


def test_intervals(runs: Path, tmp_path: Path) -> None:
    for name, value, interval in (
        ("first", 90.0, [88, 92]),
        ("close", 89.0, [87, 91]),
        ("far", 70.0, [68, 72]),
    ):
        copied(runs, tmp_path / name, value=value, interval=interval, model="m")
    found = compared(tmp_path, tmp_path / "out", "first", "close", "far")["knn@5"]
    assert found["marks"] == {"first": "best", "close": "near", "far": ""}
    assert found["intervals"]["far"] == [68, 72]
    text = Page(tmp_path / "out" / "report.html").text
    assert "90 (88 to 92) ★ best" in text
    assert "89 (87 to 91) ≈ best" in text


@pytest.mark.parametrize(
    ("metric", "more"),
    [
        *((name, True) for name in ("knn@10", "accuracy", "mIoU", "AP50", "delta1", "relevance")),
        *((name, False) for name in ("rmse", "abs_rel", "val/loss", "top1_error", "log10")),
    ],
)
def test_which_metrics_are_better_when_they_are_less(metric: str, more: bool) -> None:
    records = {
        name: Record("e", "m", metric, value, {}, "data", "", 0)
        for name, value in (("low", 1.0), ("high", 2.0))
    }
    row = Row("e", metric, records, [])
    assert row.best == ["high" if more else "low"]


# --------------------------------------------------------------------------- trainings
def test_a_training_beside_an_evaluation(runs: Path, tmp_path: Path) -> None:
    found = compared(runs, tmp_path / "out", "training", "one")
    lines = (runs / "training" / "metrics.jsonl").read_text().splitlines()
    last = [each["knn@5"] for line in lines if "knn@5" in (each := json.loads(line))][-1]
    assert found["knn@5"]["values"]["training"] == pytest.approx(last)
    page = Page(tmp_path / "out" / "report.html")
    assert len(_charts(page)) == 2  # bars and curves
    (curves,) = (str(each["alt"]) for each in page.all("img") if "iterations" in str(each["alt"]))
    assert curves.endswith(", ".join([*METRICS, "loss"]))
    assert "backbone before training" in page.text


def test_which_curves(runs: Path, tmp_path: Path) -> None:
    given = ('curves=["dino", "gradient_norm/*"]',)
    compared(runs, tmp_path / "out", "training", "one", given=given)
    alts = [str(each["alt"]) for each in Page(tmp_path / "out" / "report.html").all("img")]
    assert "dino, gradient_norm/backbone" in alts[1]
    assert "knn@5" not in alts[1]


def test_a_training_that_goes_on_has_curves(runs: Path, tmp_path: Path) -> None:
    for name in ("before", "after"):
        shutil.copytree(runs / "training", tmp_path / name)
    (tmp_path / "after" / "results.json").unlink()
    with (tmp_path / "after" / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 7, "lo')  # as it is being written
    assert compared(tmp_path, tmp_path / "out", "before", "after")
    page = Page(tmp_path / "out" / "report.html")
    assert "NOT COMPLETE" in page.text
    assert len(_charts(page)) == 2


# --------------------------------------------------------------------------- confusion
def test_confusion_matrices(runs: Path, tmp_path: Path) -> None:
    names = ["cat", SCRIPT, "cow"]
    for name in ("left", "right"):
        copied(runs, tmp_path / name)
        counts = np.diag([5, 6, 7])
        counts[1, 2] = 4
        np.save(tmp_path / name / "knn_confusion.npy", counts)
        lines = "\n".join(["class,accuracy", *(f"{each},1" for each in names)])
        (tmp_path / name / "knn_per_class.csv").write_text(f"{lines}\n")
    compared(tmp_path, tmp_path / "out", "left", "right")
    page = Page(tmp_path / "out" / "report.html")
    page.assert_stands_alone()
    assert "Confusion of knn" in page.text
    assert SCRIPT in page.text
    assert "40.0%" in page.text  # 4 of 10


def test_a_confusion_matrix_that_is_none(runs: Path, tmp_path: Path) -> None:
    copied(runs, tmp_path / "bad")
    shutil.copytree(runs / "two", tmp_path / "two")
    for content in (b"", b"\x93NUMPY garbage"):
        (tmp_path / "bad" / "knn_confusion.npy").write_bytes(content)
        done = compare(tmp_path, tmp_path / "out", "bad", "two")
        assert done.returncode == 2
        assert "knn_confusion.npy" in done.stderr
        assert "Traceback" not in done.stderr
    np.save(tmp_path / "bad" / "knn_confusion.npy", np.ones((2, 3)))
    assert "no confusion matrix" in compare(tmp_path, tmp_path / "out", "bad", "two").stderr


# --------------------------------------------------------------------------- names and errors
def test_names(runs: Path, tmp_path: Path) -> None:
    given = (f'names=["first", {json.dumps(SCRIPT)}]',)
    found = compared(runs, tmp_path / "out", "one", "two", given=given)
    assert set(found["knn@5"]["values"]) == {"first", SCRIPT}
    page = Page(tmp_path / "out" / "report.html")
    page.assert_stands_alone()
    assert SCRIPT in page.text


def test_folders_of_one_name_are_told_apart(runs: Path, tmp_path: Path) -> None:
    for name in ("a/knn", "b/knn"):
        copied(runs, tmp_path / name)
    found = compared(tmp_path, tmp_path / "out", "a/knn", "b/knn")
    assert set(found["knn@5"]["values"]) == {"a/knn", "b/knn"}


def refused(runs: Path, output: Path, *names: str, given: tuple[str, ...] = ()) -> str:
    done = compare(runs, output, *names, given=given)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert not output.exists()
    return str(done.stderr)


def test_what_is_refused(runs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert "no such folder" in refused(runs, output, "one", "nowhere")
    assert "dinov3-run knn" in refused(tmp_path, output, ".")
    assert "there are 2 runs" in refused(runs, output, "one", "two", given=('names=["a"]',))
    copied(runs, tmp_path / "broken")
    (tmp_path / "broken" / "results.json").write_text('{"records": [')
    said = refused(tmp_path, output, "broken")
    assert "results.json cannot be read" in said
    assert "dinov3-run" in said
    (tmp_path / "broken" / "results.json").unlink()
    assert f"dinov3-run {tmp_path / 'broken' / 'recipe.toml'}" in refused(
        tmp_path, output, "broken"
    )
    (tmp_path / "broken" / "results.json").write_text('{"task": "visualize"}')
    assert "measures nothing" in refused(tmp_path, output, "broken")
    pipeline = {"task": "pipeline", "stages": {"pretrain": {}, "knn": {}}}
    (tmp_path / "broken" / "results.json").write_text(json.dumps(pipeline))
    assert "pretrain, knn" in refused(tmp_path, output, "broken")


def test_runs_without_anything_in_common(runs: Path, tmp_path: Path) -> None:
    copied(runs, tmp_path / "one", evaluation="another")
    shutil.copytree(runs / "two", tmp_path / "two")
    said = refused(tmp_path, tmp_path / "out", "one", "two")
    assert "nothing in common" in said
    assert "another knn@5" in said


def test_a_check_writes_nothing(runs: Path, tmp_path: Path) -> None:
    done = compare(runs, tmp_path / "out", "one", "two", given=("--check",))
    assert done.returncode == 0, done.stderr
    assert "4 of more than one run" in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_overwriting(runs: Path, tmp_path: Path) -> None:
    compared(runs, tmp_path / "out", "one", "two")
    assert compare(runs, tmp_path / "out", "one", "larger").returncode == 2
    compared(runs, tmp_path / "out", "one", "larger", given=("--overwrite",))


@pytest.mark.slow
def test_as_the_last_stage_of_a_pipeline(tmp_path: Path) -> None:
    recipe = tmp_path / "chain.toml"
    recipe.write_text(f"""
        task = "pipeline"
        [stages.one.recipe]
        extends = "{KNN}"
        [stages.two.recipe]
        extends = "{KNN}"
        backbone = {{ embed_dim = 8 }}
        [stages.compare.recipe]
        task = "compare"
        runs = ["stage:one", "stage:two"]
    """)
    done = run_here(tmp_path / "out", recipe=recipe)
    assert done.returncode == 0, done.stderr
    assert "★ best" in Page(tmp_path / "out" / "compare" / "report.html").text


class TestCompare(TaskSuite):
    @pytest.fixture(autouse=True)
    def _config(self, runs: Path) -> None:
        self.config = CompareConfig(runs=(str(runs / "one"), str(runs / "training")))
