"""``--check`` looks at the output folder: whether a run would begin, go on, or be refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from run_support import TINY, run_here
from run_support import run as run_elsewhere

from dinov3_framework import ExitCode
from dinov3_framework.cli import main
from dinov3_framework.runtime.lock import locked


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A complete run."""
    assert run_here(tmp_path / "run").returncode == 0
    return tmp_path / "run"


def check(
    capsys: pytest.CaptureFixture[str], output: Path, *overrides: str
) -> tuple[int, str, str]:
    code = main([str(TINY), "--check", "--output-dir", str(output), *overrides])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def state(folder: Path) -> dict[str, tuple[int, int]]:
    paths = [folder, *folder.rglob("*")]
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in paths}


def test_what_a_start_would_find(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{run.parent / 'new'}, new" in check(capsys, run.parent / "new")[1]
    before = state(run)
    code, out, said = check(capsys, run)
    assert code == 0
    assert f"{run}, complete" in out
    assert "complete" in said
    code, _, said = check(capsys, run, "iterations=30")
    assert code == ExitCode.WRONG_INPUT
    assert "iterations: 6 there, 30 now" in said
    assert f"continue_from.run={run}" in said
    assert f"init_from.weights={run}" in said
    assert state(run) == before
    (run / "results.json").unlink()
    code, out, said = check(capsys, run)
    assert (code, said) == (0, "")
    assert f"{run}, goes on after iteration 6" in out


def test_the_ways_on_that_a_refusal_names_are_ways_on(run: Path, tmp_path: Path) -> None:
    for name, way in (("a", f"continue_from.run={run}"), ("b", f"init_from.weights={run}")):
        assert run_here(tmp_path / name, way, "iterations=8").returncode == 0


def test_a_folder_in_use_is_known_to_a_check(tmp_path: Path) -> None:
    with locked(tmp_path / "out"):
        found = run_elsewhere(tmp_path / "out", "--check")
    assert found.returncode == ExitCode.WRONG_INPUT
    assert "is in use" in found.stderr


def test_a_place_that_cannot_hold_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    code, _, said = check(capsys, tmp_path / "file" / "out")
    assert code == ExitCode.WRONG_INPUT
    assert f"{tmp_path / 'file'} is no folder" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_place_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    code, _, said = check(capsys, tmp_path / "out")
    assert code == ExitCode.WRONG_INPUT
    assert "cannot be written" in said
