"""A run that trains on a stream, killed and resumed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from archive_support import write_shards
from run_support import export_bytes, losses, run, run_here


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides of a recipe that is to train on three shards."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, [11, 9, 14])
    options = ("use=webdataset", "mode=stream", "shuffle=5", f"shards={folder}")
    return tuple(f"dataset.{option}" for option in options)


@pytest.mark.slow
def test_killed_and_resumed_is_bit_equal(data: tuple[str, ...], tmp_path: Path) -> None:
    options = (*data, "loader.workers=2")
    whole, output = tmp_path / "whole", tmp_path / "killed"
    done = run_here(whole, *options)
    assert done.returncode == 0, done.stderr
    assert "a stream of 3 shards" in (whole / "run.log").read_text()
    killer = ("observers.killer.use=signal_at", "observers.killer.iteration=5")
    assert run(output, *options, *killer).returncode == -signal.SIGKILL
    again = run_here(output, *options)
    assert again.returncode == 0, again.stderr
    assert "Going on after iteration 4" in (output / "run.log").read_text()
    assert losses(whole) == losses(output)
    assert export_bytes(whole) == export_bytes(output)
