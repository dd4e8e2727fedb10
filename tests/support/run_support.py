"""Runs of the real command line on a tiny recipe, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from attrs import frozen
from fork_server import popen
from torch import Tensor

from dinov3_framework.checkpoints.store import CheckpointStore
from dinov3_framework.cli import main

HERE = Path(__file__).parent
PLUGINS = [str(HERE / "faults_plugin"), str(HERE / "heads_plugin")]
TINY = HERE / "tiny.toml"


def command(output: Path, *overrides: str, recipe: Path = TINY) -> list[str]:
    return [
        sys.executable,
        "-m",
        "dinov3_framework",
        str(recipe),
        "--output-dir",
        str(output),
        *overrides,
    ]


def environment() -> dict[str, str]:
    """One thread a process, the plugin that breaks things and that with small heads."""
    paths = [*PLUGINS, os.environ.get("PYTHONPATH", "")]
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


@frozen
class Started:
    """A run in a process of its own, and the files that its output goes to."""

    process: Any
    files: tuple[Path, Path]

    def finish(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Wait for its end."""
        try:
            code = self.process.wait(timeout)
        finally:
            self.process.kill()
        texts = [path.read_text() for path in self.files]
        return subprocess.CompletedProcess([], code, *texts)


def start(output: Path, *overrides: str, recipe: Path = TINY, **options: Any) -> Started:
    """Begin a run. Its ranks, if it starts any, are forks as well."""
    words = command(output, *overrides, recipe=recipe)
    # Processes of the run are known by this name: see processes_with.
    return started(words, quote(str(output), safe=""), env=environment(), **options)


def started(words: list[str], name: str = "run", **options: Any) -> Started:
    """A command, begun; by a fork if it is one of the framework."""
    folder = Path(tempfile.mkdtemp(prefix="run-"))
    files = (folder / f"{name}.out", folder / f"{name}.err")
    with files[0].open("w") as out, files[1].open("w") as err:
        return Started(popen(words, stdout=out, stderr=err, **options), files)


def run(output: Path, *overrides: str, recipe: Path = TINY) -> subprocess.CompletedProcess[str]:
    """One start of a run, to its end."""
    return start(output, *overrides, recipe=recipe).finish()


def run_here(
    output: Path, *overrides: str, recipe: Path = TINY
) -> subprocess.CompletedProcess[str]:
    """The same in this process, which has imported everything already."""
    torch.set_num_threads(1)
    words = [str(recipe), "--output-dir", str(output), *overrides]
    sys.path[:0] = PLUGINS
    try:
        with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as complaints:
            code = main(words)
    finally:
        del sys.path[: len(PLUGINS)]
    return subprocess.CompletedProcess(words, code, out.getvalue(), complaints.getvalue())


def two_processes(
    output: Path, *overrides: str, recipe: Path = TINY
) -> subprocess.CompletedProcess[str]:
    """The same by the local launcher."""
    return run(output, "launcher.use=local", "launcher.processes=2", *overrides, recipe=recipe)


def outside_torchrun(output: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Two processes that somebody else started."""
    python, *arguments = command(output, *overrides)
    options = ["--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    return subprocess.run(
        [python, "-m", "torch.distributed.run", *options, "--local-addr=localhost", *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def processes_with(text: str) -> list[int]:
    """Other processes that have ``text`` in their command line or in the name of their output."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                written = os.readlink(entry / "fd" / "2")
                if text in (entry / "cmdline").read_text() or quote(text, safe="") in written:
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def metrics(output: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def is_timing(name: str) -> bool:
    """Whether a figure of metrics.jsonl says how long something took, and not what was learnt."""
    return name in ("images_per_second", "data_wait") or name.startswith("time/")


def losses(output: Path) -> list[tuple[int, str]]:
    """(iteration, every learnt figure in hex) of each line of metrics.jsonl."""
    lines = []
    for line in metrics(output):
        iteration = line.pop("iteration")
        figures = {k: float(v).hex() for k, v in sorted(line.items()) if not is_timing(k)}
        lines.append((iteration, json.dumps(figures)))
    return lines


def export_bytes(output: Path) -> bytes:
    return (output / "exports" / "teacher_backbone.safetensors").read_bytes()


def saved(output: Path, step: int, scratch: Path) -> dict[str, Tensor]:
    """All tensors of the checkpoint of one step, whole."""
    folder = scratch / f"step{step}-{output.parent.name}"
    folder.mkdir()
    (folder / f"step_{step:08}").symlink_to(output / "checkpoints" / f"step_{step:08}")
    tensors, restored = CheckpointStore(folder).read()
    assert restored.step == step
    return tensors
