"""The output folder: whose it is, whether it can be written, and when it is complete."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from disks import small_disk
from trainer_support import registry, tiny_config

from dinov3_framework import CorruptSampleError, ExitCode, OutputError
from dinov3_framework.recipes.compose import compose
from dinov3_framework.recipes.structure import structure_recipe
from dinov3_framework.runtime.lock import locked, verify_held
from dinov3_framework.runtime.output import (
    RunComplete,
    overwrite,
    prepared,
    write_aside,
)
from dinov3_framework.runtime.results import write_results
from dinov3_framework.runtime.session import log_file, prepare_output


def prepare(output: Path, *overrides: str) -> None:
    prepare_output(tiny_config(*overrides), registry(), output)


def test_odd_names_are_escaped_in_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What pytest captures of it, processes of pytest-xdist could not send.
    monkeypatch.setattr(logging.getLogger("dinov3_framework"), "propagate", False)
    log = logging.getLogger("dinov3_framework.odd")
    with log_file(tmp_path):
        log.warning("left out: %s", "caf\udce9\x1b[2J.png")
        log.warning("%s", CorruptSampleError("new\nline.png", "is half"))
    first, second = (tmp_path / "run.log").read_text("utf-8").splitlines()
    assert first.endswith(r"left out: caf\xe9\x1b[2J.png")
    assert second.endswith(r"new\nline.png: is half")


@pytest.mark.parametrize("kind", ["tmpfs", "limit"])
def test_a_log_that_finds_no_room_ends_nothing(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger("dinov3_framework"), "propagate", False)
    disk = tmp_path / "disk"
    with small_disk(disk, kind), log_file(disk, "report"):
        for _ in range(5):
            logging.getLogger("dinov3_framework.full").warning("%s", "a" * 2**20)
    shown = capsys.readouterr().err
    assert shown.startswith(f"{disk / 'run.log'} cannot be written: disk full")
    assert shown.count("\n") == 1


# --------------------------------------------------------------------------- the recipe in it
def test_the_recipe_is_written_complete(tmp_path: Path) -> None:
    config = tiny_config("losses.koleo.weight=0.25", 'optimizer.clip_grad="none"')
    prepare_output(config, registry(), tmp_path / "deep" / "run")
    again = structure_recipe(registry(), compose(tmp_path / "deep" / "run" / "recipe.toml"))
    assert again == config
    names = {path.name for path in (tmp_path / "deep" / "run").iterdir()}
    assert names == {"recipe.toml", ".lock"}


def test_the_same_recipe_may_go_on(tmp_path: Path) -> None:
    prepare(tmp_path)
    prepare(tmp_path)


@pytest.mark.parametrize(
    "override",
    [
        "output_dir=elsewhere",
        "launcher.use=local",
        "loader.workers=5",
        "checkpoint.keep=9",
        "checkpoint.every=7",
        "log_every=3",
        "max_nonfinite_steps=9",
        "parallel.timeout=11.0",
        "parallel.replicas=2",
        "parallel.checkpointing=full",
        "parallel.compile=true",
        "observers.x.use=figures",
    ],
)
def test_what_teaches_nothing_may_change(tmp_path: Path, override: str) -> None:
    prepare(tmp_path)
    prepare(tmp_path, override)
    written = structure_recipe(registry(), compose(tmp_path / "recipe.toml"))
    assert written == tiny_config(override)


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (["seed=3"], ["seed: 0 there, 3 now"]),
        (
            ["batch_size=24", "losses.koleo.weight=0.5"],
            ["batch_size: 12 there, 24 now", "losses.koleo.weight: 0.1 there, 0.5 now"],
        ),
        (['drop=["losses.koleo"]'], ['losses.koleo.use: "koleo" there, nothing now']),
        (["parallel.param_dtype=bf16"], ['parallel.param_dtype: "fp32" there, "bf16" now']),
        (["parallel.fp8=emulated"], ['parallel.fp8: "off" there, "emulated" now']),
        (["loader.workers=1", "seed=3"], ["seed: 0 there, 3 now"]),
    ],
)
def test_another_recipe_is_refused(tmp_path: Path, overrides: list[str], lines: list[str]) -> None:
    prepare(tmp_path)
    before = (tmp_path / "recipe.toml").read_bytes()
    with pytest.raises(OutputError, match="holds a run of another recipe") as caught:
        prepare(tmp_path, *overrides)
    shown = str(caught.value).splitlines()
    for line in lines:
        assert f"    {line}" in shown
    assert not any("loader" in line for line in shown)
    assert "choose another --output-dir" in shown[-1]
    assert (tmp_path / "recipe.toml").read_bytes() == before


def test_a_very_different_recipe_is_not_listed_in_full(tmp_path: Path) -> None:
    prepare(tmp_path)
    with pytest.raises(OutputError, match=r"and \d+ more") as caught:
        prepare(tmp_path, "backbone.use=vit_small", "seed=3", "batch_size=24")
    assert str(caught.value).count(" now") == 8


@pytest.mark.parametrize("content", [b"not = [toml", b"\xff\xfe"])
def test_a_file_that_is_no_recipe_is_said(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "recipe.toml").write_bytes(content)
    with pytest.raises(OutputError, match="is no recipe"):
        prepare(tmp_path)


def test_a_complete_run_is_said_to_be_complete(tmp_path: Path) -> None:
    prepare(tmp_path)
    write_results(tmp_path, {"x": 1})
    with pytest.raises(RunComplete, match="This run is complete") as caught:
        prepare(tmp_path)
    assert caught.value.exit_code == ExitCode.OK
    with pytest.raises(OutputError, match="another recipe"):
        prepare(tmp_path, "seed=3")


@pytest.mark.parametrize("content", ["", "not json", "[1]", "[" * 100_000, None])
def test_results_that_complete_nothing(
    tmp_path: Path, content: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    prepare(tmp_path)
    write_results(tmp_path, {"x": 1})
    if content is None:
        (tmp_path / "recipe.toml").unlink()
    else:
        (tmp_path / "results.json").write_text(content)
    for _ in range(2):
        prepare(tmp_path)
    (said,) = caplog.messages
    assert ("no recipe" if content is None else "empty or no JSON") in said
    assert (tmp_path / "results.json.unusable").exists()


# --------------------------------------------------------------------------- who holds it
_HOLD = """
import sys
from pathlib import Path
from dinov3_framework.runtime.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    if "fork" in sys.argv:
        import os, time
        if os.fork() == 0:
            print(os.getpid(), flush=True)
            time.sleep(600)
    sys.stdin.read()
"""

Hold = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def hold() -> Iterator[Hold]:
    started = []

    def start(output: Path, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", _HOLD, str(output), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_folder_in_use_is_refused(tmp_path: Path, hold: Hold) -> None:
    process = hold(tmp_path)
    with pytest.raises(
        OutputError, match=rf"is in use by process {process.pid} on host \S+ since 20"
    ):
        prepare(tmp_path)
    assert not (tmp_path / "recipe.toml").exists()
    process.communicate("")
    prepare(tmp_path)


def test_a_killed_run_lets_go_though_its_children_live_on(tmp_path: Path, hold: Hold) -> None:
    process = hold(tmp_path, "fork")
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        process.kill()
        process.wait()
        os.kill(child, 0)  # it is alive
        prepare(tmp_path)
    finally:
        os.kill(child, 9)


def test_reading_the_folder_does_not_let_go(tmp_path: Path, hold: Hold) -> None:
    with locked(tmp_path):
        (tmp_path / ".lock").read_bytes()
        result = subprocess.run(
            [sys.executable, "-c", _HOLD, str(tmp_path)], input="", capture_output=True, text=True
        )
        assert "is in use by process" in result.stderr


def test_a_removed_lock_file_is_made_anew(tmp_path: Path, hold: Hold) -> None:
    with locked(tmp_path):
        (tmp_path / ".lock").unlink()
        verify_held()
        with (
            pytest.raises(OutputError, match=f"in use by process {os.getpid()} "),
            locked(tmp_path),
        ):
            pass


def test_a_renamed_folder_is_held_and_its_run_ends(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        verify_held()
        (tmp_path / "run").rename(tmp_path / "moved")
        with pytest.raises(OutputError, match="in use by process"), locked(tmp_path / "moved"):
            pass
        with pytest.raises(OutputError, match="run was removed or renamed while"):
            write_results(tmp_path / "run", {})
        assert not (tmp_path / "run").exists()
        (tmp_path / "run").mkdir()
        with pytest.raises(OutputError, match="run was removed or renamed while"):
            verify_held()
    verify_held()


def test_a_folder_that_another_run_took_ends_this_one(tmp_path: Path, hold: Hold) -> None:
    with locked(tmp_path):
        (tmp_path / ".lock").unlink()
        other = hold(tmp_path)
        with pytest.raises(OutputError, match=f"taken over by process {other.pid} on host "):
            verify_held()


def test_the_folder_is_held_from_the_check_to_the_end(tmp_path: Path) -> None:
    attempt = [sys.executable, "-c", _HOLD, str(tmp_path)]

    def other() -> subprocess.CompletedProcess[str]:
        return subprocess.run(attempt, input="", capture_output=True, text=True, check=False)

    with prepared(tiny_config(), registry(), tmp_path):
        assert f"is in use by process {os.getpid()} on host " in other().stderr
    assert other().returncode == 0


# --------------------------------------------------------------------------- writing
def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(OutputError, match="run cannot be written: File exists"):
        prepare(tmp_path / "run")
    with pytest.raises(OutputError, match="cannot be written: Not a directory"):
        prepare(tmp_path / "run" / "deeper")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder nobody can write to")
@pytest.mark.parametrize("name", ["recipe.toml", "results.json", "metrics.jsonl", "stage/run.log"])
def test_pipes_in_the_folder_are_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    (tmp_path / "stage").mkdir()
    os.mkfifo(tmp_path / name)
    with pytest.raises(OutputError, match=f"{name} is no regular file .* remove it"):
        prepare(tmp_path)


def test_a_folder_that_cannot_be_made() -> None:
    with pytest.raises(OutputError, match="/proc/self/run cannot be written"):
        prepare(Path("/proc/self/run"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        prepare(tmp_path / "run")


@pytest.mark.parametrize("kind", ["tmpfs", "limit"])
def test_a_full_disk_leaves_the_old_file_whole(tmp_path: Path, kind: str) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, kind):
        write_aside(disk / "x.json", "old")
        with pytest.raises(OutputError, match=r"disk full.*make room"):
            write_aside(disk / "x.json", "new" * 2**20 * 2)
        assert (disk / "x.json").read_text() == "old"
        assert [path.name for path in disk.iterdir()] == ["x.json"]


def test_locks_are_let_go(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), locked(tmp_path):
            raise ZeroDivisionError


def test_leftovers_of_a_killed_start_are_removed(tmp_path: Path) -> None:
    prepare(tmp_path)
    (tmp_path / "exports").mkdir()
    names = (".results.json.0123abcd", "exports/.x.safetensors.0a1b2c3d")
    leftovers = [tmp_path / name for name in names]
    others = [tmp_path / ".hidden", tmp_path / "exports" / ".x.safetensors", tmp_path / ".lock"]
    for path in (*leftovers, *others):
        path.touch()
    prepare(tmp_path)
    assert not any(path.exists() for path in leftovers)
    assert all(path.exists() for path in others)


# --------------------------------------------------------------------------- written anew
def evaluation(*overrides: str) -> Any:
    data = "evaluations.knn.%s.use=image_folder evaluations.knn.%s.root=x"
    sets = [word for name in ("train", "test") for word in (data % (name, name)).split()]
    return structure_recipe(registry(), compose("knn", [*sets, *overrides]))


def test_overwrite_deletes_what_the_run_left_and_nothing_else(tmp_path: Path) -> None:
    output = tmp_path / "run"
    ours = ("recipe.toml", "results.json", "results.csv", "run.log", "made/a[1].png")
    theirs = ("made/b.png", "made/a1.png", "notes.txt", "../outside.txt")
    for name in (*ours, *theirs):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).touch()
    files = ["made/a[1].png", "../outside.txt", str(tmp_path / "outside.txt")]
    (output / "results.json").write_text(json.dumps({"files": files}))
    (output / "recipe.toml").write_text('task = "features"')
    with pytest.raises(OutputError, match="the task features"):
        overwrite(evaluation(), registry(), output)
    (output / "recipe.toml").write_text('task = "evaluate"')
    overwrite(evaluation(), registry(), output)
    assert not any((output / name).exists() for name in ours)
    assert all((output / name).exists() for name in theirs)
    overwrite(evaluation(), registry(), output)  # where no run is, nothing is deleted
    assert all((output / name).exists() for name in theirs)


def test_trainings_are_not_overwritten(tmp_path: Path) -> None:
    prepare(tmp_path)
    with pytest.raises(OutputError, match="not for the task pretrain"):
        overwrite(tiny_config(), registry(), tmp_path)
    assert (tmp_path / "recipe.toml").exists()


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ((), "knn-quickstart"),
        (("weights=dinov3_vits16@lvd1689m",), "knn-dinov3_vits16@lvd1689m"),
        (("weights=/a/my vit.v1.5.pth",), "knn-my_vit.v1.5"),
        (("weights=https://host/x/w.pth?key=1",), "knn-w"),
        (("weights=runs/a/exports/w.safetensors", "head=runs/b"), "knn-a-b"),
        (("weights=none", "backbone.use=vit_small"), "knn"),
    ],
)
def test_evaluations_of_different_weights_have_folders_of_their_own(
    given: tuple[str, ...], name: str
) -> None:
    assert evaluation(*given).run_name("knn") == name


def test_leftovers_that_cannot_be_removed_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / ".results.json.0123abcd").touch()
    (tmp_path / ".recipe.toml.0123abcd").touch()
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith(".results"):
            raise PermissionError(1, "Operation not permitted")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    prepare(tmp_path)
    assert (tmp_path / "recipe.toml").exists()
    assert not (tmp_path / ".recipe.toml.0123abcd").exists()
    assert [".results.json.0123abcd" in line for line in caplog.messages] == [True]
