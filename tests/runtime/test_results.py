"""Results as files and as a table: complete, readable by others, or not there."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from disks import small_disk

from dinov3_framework import OutputError
from dinov3_framework.runtime.results import Record, print_results, write_results

RECORD = Record(
    evaluation="knn",
    model="trained teacher",
    metric="accuracy@10",
    value=76.8,
    protocol={"crop": "center", "temperature": 0.07},
    data="fashion_mnist: 1,000 images",
    weights="sha256:12ab",
    seed=3,
)


def read_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# --------------------------------------------------------------------------- files
def test_results_and_rows(tmp_path: Path) -> None:
    rows = [{"features": "a", "knn@1": 80.5}, {"features": "b", "knn@1": 79.0}]
    write_results(tmp_path / "deep" / "run", {"task": "knn", "knn": rows}, rows)
    folder = tmp_path / "deep" / "run"
    assert json.loads((folder / "results.json").read_text()) == {"task": "knn", "knn": rows}
    assert read_rows(folder) == [{k: str(v) for k, v in row.items()} for row in rows]
    assert {path.name for path in folder.iterdir()} == {"results.json", "results.csv"}


def test_without_rows_there_is_no_table(tmp_path: Path) -> None:
    write_results(tmp_path, {"x": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_rows_may_differ_in_their_keys(tmp_path: Path) -> None:
    write_results(tmp_path, {}, [{"a": 1, "b": 2}, {"a": 3, "c": "x, y"}])
    assert read_rows(tmp_path) == [
        {"a": "1", "b": "2", "c": ""},
        {"a": "3", "b": "", "c": "x, y"},
    ]


def test_a_record_keeps_what_gives_it_meaning(tmp_path: Path) -> None:
    write_results(tmp_path, {"records": [RECORD]}, [RECORD])
    (stored,) = json.loads((tmp_path / "results.json").read_text())["records"]
    assert Record(**stored) == RECORD
    assert read_rows(tmp_path) == [
        {
            "evaluation": "knn",
            "model": "trained teacher",
            "metric": "accuracy@10",
            "value": "76.8",
            "data": "fashion_mnist: 1,000 images",
            "weights": "sha256:12ab",
            "seed": "3",
            "protocol.crop": "center",
            "protocol.temperature": "0.07",
        }
    ]


def test_numbers_that_are_not_finite_are_null_for_any_reader(tmp_path: Path) -> None:
    write_results(tmp_path, {"loss": math.nan, "more": [{"x": (1.5, -math.inf)}]})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "results.json").read_text()
    found = json.loads(text, parse_constant=refuse)
    assert found == {"loss": None, "more": [{"x": [1.5, None]}]}


def test_paths_that_are_no_text_are_written(tmp_path: Path) -> None:
    name = b"\xff.jpg".decode("utf-8", "surrogateescape")
    write_results(tmp_path, {"name": name}, [{"name": name}])
    assert (tmp_path / "results.csv").read_bytes() == b"name\n\\xff.jpg\n"
    assert json.loads((tmp_path / "results.json").read_text())["name"] == name


# --------------------------------------------------------------------------- disks
@pytest.mark.parametrize("large", ["results", "rows"])
def test_a_full_disk_is_one_line_and_completes_nothing(tmp_path: Path, large: str) -> None:
    given: dict[str, Any] = {"results": {}, "rows": [{"x": 1}]}
    text = "x" * 2**20 * 4
    given |= {"results": {"x": text}} if large == "results" else {"rows": [{"x": text}]}
    with small_disk(tmp_path / "disk", "limit"):
        with pytest.raises(OutputError, match=r"results\.\w+ cannot be written: disk full") as full:
            write_results(tmp_path / "disk", **given)
        assert "\n" not in str(full.value)
        assert not (tmp_path / "disk" / "results.json").exists()
        assert not list((tmp_path / "disk").glob(".*"))


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file in its place")
    with pytest.raises(OutputError, match=r"results\.json cannot be written"):
        write_results(tmp_path / "run", {})


# --------------------------------------------------------------------------- the table
def test_the_table_shows_every_row_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    path = f"/runs/{'long/' * 40}[bold]x"
    print_results("accuracy in per cent", [{"weights": path, "knn": 80.0}, {"knn": 7.25}])
    shown, errors = capsys.readouterr()
    assert errors == ""
    assert "accuracy in per cent" in shown
    assert "80.0" in shown
    assert "7.25" in shown
    # A long cell is folded, and neither cut nor taken for markup.
    cells = [line.split("│")[1].strip() for line in shown.splitlines() if line.startswith("│")]
    assert "".join(cells) == path


def test_records_in_a_table_show_what_tells_them_apart(capsys: pytest.CaptureFixture[str]) -> None:
    other = evolve(RECORD, value=75.1, protocol={"crop": "none", "temperature": 0.07})
    print_results("k-NN", [RECORD, other])
    shown = capsys.readouterr().out
    for text in ("accuracy@10", "76.8", "75.1", "protocol.crop", "center", "none"):
        assert text in shown
    assert "temperature" not in shown
    assert "fashion_mnist" not in shown
