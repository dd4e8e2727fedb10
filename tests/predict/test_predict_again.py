"""A prediction that was stopped, its folder, and several processes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from predict_support import RECIPE, files, photos, table, trained
from run_support import run, run_here, start, two_processes

from dinov3_framework.errors import ExitCode


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    root = tmp_path_factory.mktemp("given")
    head, images = trained(root, "mask"), photos(root / "photos")
    for index in range(6):
        (images / f"more {index:02}.jpg").write_bytes((images / "china.jpg").read_bytes())
    return (
        f"weights={head}",
        f"images={images}",
        "workers=0",
        "inference.scales=[2, 3]",
        "inference.flip=true",
    )


@pytest.fixture(scope="module")
def whole(given: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of one process."""
    output = tmp_path_factory.mktemp("whole") / "run"
    done = run_here(output, *given, recipe=RECIPE)
    assert done.returncode == 0, done.stderr
    return output


def without_seconds(output: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in table(output)]


@pytest.mark.slow
def test_a_killed_run_goes_on(given: tuple[str, ...], whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    started = start(output, *given, recipe=RECIPE)
    until = time.monotonic() + 120
    while len(list((output / "overlays").rglob("*.jpg"))) < 3:
        assert time.monotonic() < until
        assert started.process.poll() is None
        time.sleep(0.01)
    os.kill(started.process.pid, signal.SIGKILL)
    started.finish()
    there = {name: os.stat(output / name).st_mtime_ns for name in files(output)}
    assert len(there) < len(files(whole))
    done = run_here(output, *given, recipe=RECIPE)
    assert done.returncode == 0, done.stderr
    assert files(output) == files(whole)
    assert without_seconds(output) == without_seconds(whole)
    assert (output / "report.html").read_bytes() == (whole / "report.html").read_bytes()
    kept = [name for name, when in there.items() if os.stat(output / name).st_mtime_ns == when]
    assert kept == list(there)  # nothing is predicted or drawn twice
    assert 2 <= sum(row["seconds"] == "" for row in table(output)) < 10


def test_a_complete_run_is_left_and_can_be_overwritten(
    given: tuple[str, ...], whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    few = (*given, "report_images=3", "overlays=false")
    assert run_here(output, *few, recipe=RECIPE).returncode == 0
    (output / "mine.txt").write_text("kept")
    before = files(output)
    done = run_here(output, *few, recipe=RECIPE)
    assert done.returncode == ExitCode.OK
    assert "complete" in done.stdout + done.stderr
    assert run_here(output, *few, "alpha=0.9", recipe=RECIPE).returncode == ExitCode.WRONG_INPUT
    assert files(output) == before
    other = run_here(output, *given[:3], "overlays=false", "--overwrite", recipe=RECIPE)
    assert other.returncode == 0, other.stderr
    assert files(output).keys() == before.keys()
    assert files(output) != before
    assert (output / "mine.txt").read_text() == "kept"


@pytest.mark.slow
def test_two_processes_leave_what_one_leaves(
    given: tuple[str, ...], whole: Path, tmp_path: Path
) -> None:
    done = two_processes(tmp_path / "run", *given, recipe=RECIPE)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "run") == files(whole)
    assert without_seconds(tmp_path / "run") == without_seconds(whole)
    page, expected = ((each / "report.html").read_bytes() for each in (tmp_path / "run", whole))
    assert page == expected


@pytest.mark.slow
def test_loader_workers_change_nothing(given: tuple[str, ...], whole: Path, tmp_path: Path) -> None:
    done = run(tmp_path / "run", *given, "workers=2", recipe=RECIPE)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "run") == files(whole)


def test_predictions_of_other_weights_are_not_mixed(given: tuple[str, ...], tmp_path: Path) -> None:
    output = tmp_path / "run"
    few = (*given[:3], "overlays=false", "report_images=0")
    assert run_here(output, *few, recipe=RECIPE).returncode == 0
    before = files(output)
    (output / "results.json").unlink()
    sidecar = output / "predictions" / "predictions.json"
    sidecar.write_text(sidecar.read_text().replace('"weights": "', '"weights": "other'))
    done = run_here(output, *few, recipe=RECIPE)
    assert done.returncode == ExitCode.WRONG_INPUT
    assert "holds other predictions" in done.stderr
    assert "weights: other" in done.stderr
    assert files(output).keys() == before.keys()
