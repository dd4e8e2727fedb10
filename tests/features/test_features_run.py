"""The task ``features`` in processes of its own: killed, stopped, several, sharded."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from features_support import export, files, folder, noise
from PIL import Image
from run_support import Started, processes_with, run, start

from dinov3_framework.errors import ExitCode

RECIPE = Path(__file__).parents[2] / "recipes" / "features.toml"
IMAGES = 60
TWO = ("launcher.use=local", "launcher.processes=2")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """30 parts of a padded folder, a few images of which are corrupt."""
    root = tmp_path_factory.mktemp("given")
    weights = export(root / "w.safetensors", embed_dim=64, depth=6)
    images = folder(root / "images", IMAGES, corrupt=(5, 17, 18, 59))
    return (
        f"weights={weights}",
        f"dataset.root={images}",
        'outputs=["class", "mean_patch", "patches", "storage"]',
        "layers=[1, -1]",
        "fit=pad",
        "size=160",
        "batch_size=2",
        "rows_per_part=2",
        "workers=0",
    )


@pytest.fixture(scope="module")
def whole(given: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an uninterrupted run of one process."""
    output = tmp_path_factory.mktemp("whole") / "run"
    done = run(output, *given, recipe=RECIPE)
    assert done.returncode == 0, done.stderr
    assert "4 of 60 images cannot be read" in done.stderr
    assert "56 images" in done.stderr
    found = files(output)
    assert found.keys() == {"features.safetensors", "index.csv", "skipped.csv"}
    return found


def wait_for_parts(started: Started, output: Path, more: int) -> None:
    """Until so many more parts are written; the process must still be at work then."""
    until = time.monotonic() + 120

    def written() -> int:
        return len(list(output.glob("features/part-*")))

    count = written() + more
    while written() < count:
        assert started.process.poll() is None, started.finish().stderr
        assert time.monotonic() < until
        time.sleep(0.001)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [(), TWO], ids=["one", "two"])
def test_stopped_and_killed_it_goes_on(
    given: tuple[str, ...], whole: dict[str, bytes], tmp_path: Path, launcher: tuple[str, ...]
) -> None:
    output = tmp_path / "run"
    started = start(output, *given, *launcher, recipe=RECIPE)
    wait_for_parts(started, output, more=3)
    started.process.send_signal(signal.SIGTERM)
    done = started.finish()
    assert done.returncode == ExitCode.REQUEUE, done.stderr
    assert "of 30 parts; the state is saved, the same command goes on" in done.stderr

    started = start(output, *given, *launcher, recipe=RECIPE)
    wait_for_parts(started, output, more=1)
    for pid in processes_with(str(output)):
        os.kill(pid, signal.SIGKILL)
    assert started.finish().returncode == -signal.SIGKILL
    assert not (output / "features.safetensors").exists()

    done = run(output, *given, *launcher, recipe=RECIPE)
    assert done.returncode == 0, done.stderr
    assert "of 30 parts are there" in done.stderr
    assert files(output) == whole
    assert not (output / "features").exists()


@pytest.mark.slow
@pytest.mark.parametrize("sharded", ["false", "true"])
def test_two_processes(
    given: tuple[str, ...], whole: dict[str, bytes], tmp_path: Path, sharded: str
) -> None:
    output = tmp_path / "run"
    done = run(output, *given, *TWO, f"sharded={sharded}", recipe=RECIPE)
    assert done.returncode == 0, done.stderr
    assert "30/30 images of this process" in done.stderr
    assert files(output) == whole


@pytest.mark.slow
def test_what_happens_on_one_process_ends_a_sharded_run(
    given: tuple[str, ...], tmp_path: Path
) -> None:
    """An image that does not fit, in the second process's first part; nobody waits for it."""
    images = tmp_path / "images"
    images.mkdir()
    for index in range(40):
        side = 31 if index == 3 else 32
        Image.fromarray(noise(side, 32, 3, index)).save(images / f"{index:02}.png")
    output = tmp_path / "run"
    native = ("fit=native", "size=none", f"dataset.root={images}", "sharded=true")
    began = time.monotonic()
    done = run(output, *given, *native, *TWO, recipe=RECIPE)
    assert done.returncode == ExitCode.WRONG_INPUT, done.stderr
    assert "03.png: 31 x 32 pixels" in done.stderr
    assert time.monotonic() - began < 60
    assert not (output / "results.json").exists()
