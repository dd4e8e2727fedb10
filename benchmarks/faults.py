"""Faults caused for real, and what a run lost by them.

Small runs on this machine's CPU are killed, signaled, starved of disk, fed with damaged and with
foreign files, and started again. *Kept* means that the run, started again by the same command,
ended with the export and the metrics of one that was never disturbed, bit for bit; *refused* that
it ended with exit code 2 and one clear complaint before anything was written; *ended* that it ended
by itself in the given time, with the code that the documentation says. Linux only; some faults need
the right to mount.

    python benchmarks/faults.py [--kills 10] [--only WORD]
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "support" / "tiny.toml"
PLUGIN = ROOT / "tests" / "support" / "faults_plugin"  # components that fail when they are told to
RUN = ("iterations=12", "checkpoint.every=2", "observers.pause.use=pause")
PAUSE = "observers.pause.seconds=0.2"
TWO = ("launcher.use=local", "launcher.processes=2", "launcher.shutdown_timeout=5")


class Outcome(NamedTuple):
    survived: bool
    lost: str


class Fault(NamedTuple):
    name: str
    how: str
    cause: Callable[[Path], Iterator[Outcome]]


def start(output: Path, *words: str, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dinov3_framework", str(TINY), "--output-dir", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(PLUGIN), environment.get("PYTHONPATH")))
    )
    return subprocess.Popen(
        [*command, *RUN, *words],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )


def run(output: Path, *words: str) -> tuple[int, str]:
    process = start(output, *words)
    _, said = process.communicate(timeout=300)
    return process.returncode, said


def learnt(output: Path) -> tuple[bytes, list[str]]:
    """The export, and every figure of metrics.jsonl that is not a time."""
    lines = []
    for line in (output / "metrics.jsonl").read_text().splitlines():
        figures = json.loads(line)
        times = ("images_per_second", "data_wait")
        kept = {k: v for k, v in figures.items() if k not in times and not k.startswith("time/")}
        lines.append(json.dumps(kept, sort_keys=True))
    return (output / "exports" / "teacher_backbone.safetensors").read_bytes(), lines


def undisturbed(work: Path, *words: str) -> tuple[bytes, list[str]]:
    """What a run leaves that nobody disturbs; made once for each set of words."""
    name = "-".join(["undisturbed", *(word.rpartition("=")[2].replace("/", "_") for word in words)])
    output = work.parent / name
    if not output.exists():
        code, said = run(output, *words)
        assert code == 0, said
    return learnt(output)


def again(output: Path, *words: str) -> Outcome:
    """Start once more, to the end, and compare."""
    code, said = run(output, *words)
    if code != 0:
        return Outcome(False, f"exit code {code}: {first_line(said)}")
    same = learnt(output) == undisturbed(output.parent, *words)
    return Outcome(same, "nothing" if same else "other bits than an undisturbed run's")


def refused(output: Path, wanted: str, *words: str) -> Outcome:
    code, said = run(output, *words)
    right = code == 2 and wanted in said and "Traceback" not in said
    return Outcome(right, "nothing" if right else f"exit code {code}: {first_line(said)}")


def first_line(text: str) -> str:
    return next((line for line in text.splitlines()[::-1] if line.strip()), "")[:80]


def wait_for(output: Path, count: int, seconds: float = 60) -> None:
    """Until so many checkpoints are there."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if len(list((output / "checkpoints").glob("step_*/COMPLETE"))) >= count:
            return
        time.sleep(0.02)
    raise TimeoutError(f"{output}: no {count} checkpoints in {seconds} s")


def interrupted(output: Path, *words: str) -> None:
    """A run that is killed after its second checkpoint."""
    process = start(output, PAUSE, *words)
    wait_for(output, 2)
    process.kill()
    process.communicate()


def ranks_of(output: Path) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if str(output).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


# --------------------------------------------------------------------------- kills and signals
def kills(count: int) -> Callable[[Path], Iterator[Outcome]]:
    def cause(work: Path) -> Iterator[Outcome]:
        chance = random.Random(0)
        for number in range(count):
            output = work / f"kill{number}"
            process = start(output, "observers.pause.seconds=0.05")
            time.sleep(chance.uniform(1.0, 7.0))
            process.kill()
            process.communicate()
            if (output / "results.json").exists():
                continue  # it was quicker
            yield again(output)

    return cause


def signaled(name: str, code: int) -> Callable[[Path], Iterator[Outcome]]:
    def cause(work: Path) -> Iterator[Outcome]:
        output = work / name
        process = start(output, PAUSE)
        wait_for(output, 1)
        process.send_signal(getattr(signal, name))
        process.communicate(timeout=60)
        if process.returncode != code:
            yield Outcome(False, f"exit code {process.returncode} instead of {code}")
        else:
            yield again(output)

    return cause


def launcher_killed(work: Path) -> Iterator[Outcome]:
    output = work / "launcher"
    process = start(output, PAUSE, *TWO)
    wait_for(output, 1)
    process.kill()
    process.communicate()
    began = time.monotonic()
    while ranks_of(output) and time.monotonic() - began < 30:
        time.sleep(0.1)
    seconds = time.monotonic() - began
    if left := ranks_of(output):
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        yield Outcome(False, "its ranks train on")
    else:
        yield Outcome(seconds < 10, f"nothing; ranks ended after {seconds:.1f} s")
        yield again(output, *TWO)


def rank_hangs(work: Path) -> Iterator[Outcome]:
    trouble = ("losses.t.use=trouble", "losses.t.what=sleep", "losses.t.rank=1")
    code, said = run(work / "hang", *TWO, *trouble, "losses.t.iteration=3", "parallel.timeout=5.0")
    right = code == 1 and "parallel.timeout = 5 s" in said
    yield Outcome(right, "nothing" if right else f"exit code {code}: {first_line(said)}")


def worker_killed(work: Path) -> Iterator[Outcome]:
    words = ("dataset.use=flaky", "dataset.kill_at=30", "loader.workers=2")
    yield refused(work / "worker", "sample 30", *words)


# --------------------------------------------------------------------------- disks and files
def disk_full(work: Path) -> Iterator[Outcome]:
    disk = work / "disk"
    disk.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        return
    try:
        code, said = run(disk / "full")
        right = code == 2 and "no space" in said.lower().replace("disk is full", "no space")
        yield Outcome(right, "nothing" if right else f"exit code {code}: {first_line(said)}")
        more = ["mount", "-o", "remount,size=64m", str(disk)]
        subprocess.run(more, check=True)
        output = work / "roomy"
        shutil.copytree(disk / "full", output)
        yield again(output)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def damaged(harm: Callable[[Path], None]) -> Callable[[Path], Iterator[Outcome]]:
    def cause(work: Path) -> Iterator[Outcome]:
        output = work / harm.__name__
        interrupted(output)
        harm(max((output / "checkpoints").glob("step_*")))
        yield again(output)

    return cause


def truncate(checkpoint: Path) -> None:
    shard = next(checkpoint.glob("*.distcp"))
    os.truncate(shard, shard.stat().st_size // 2)


def flip(checkpoint: Path) -> None:
    shard = next(checkpoint.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def remove_index(checkpoint: Path) -> None:
    (checkpoint / ".metadata").unlink()


def metrics_byte(work: Path) -> Iterator[Outcome]:
    output = work / "metrics"
    interrupted(output)
    lines = (output / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (output / "metrics.jsonl").write_bytes(b"".join([lines[0], b"\xff\x00{\n", *lines[1:]]))
    code, said = run(output)
    kept = code == 0 and learnt_lines(output) == undisturbed(output.parent)[1]
    yield Outcome(kept, "nothing" if kept else f"exit code {code}: {first_line(said)}")


def learnt_lines(output: Path) -> list[str]:
    text = (output / "metrics.jsonl").read_bytes()
    good = [line for line in text.splitlines(keepends=True) if line.startswith(b'{"')]
    (output / "metrics.jsonl").write_bytes(b"".join(good))
    return learnt(output)[1]


def other_checkpoint(work: Path) -> Iterator[Outcome]:
    ours, other = work / "ours", work / "other"
    interrupted(ours)
    interrupted(other, "seed=1")
    shutil.rmtree(ours / "checkpoints")
    shutil.copytree(other / "checkpoints", ours / "checkpoints")
    yield refused(ours, "is of another run")


def other_data(work: Path) -> Iterator[Outcome]:
    images = work / "images"
    images.mkdir(parents=True)
    noise = np.random.default_rng(0)
    for number in range(30):
        pixels = noise.integers(0, 256, (30, 30), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.png")
    os.mkfifo(images / "pipe.png")  # passed over, or reading would wait for ever
    words = ("dataset.use=image_folder", f"dataset.root={images}")
    interrupted(work / "data", *words)
    (images / "3.png").unlink()
    yield refused(work / "data", "is not the data", *words)


def two_runs(work: Path) -> Iterator[Outcome]:
    output = work / "shared"
    process = start(output, PAUSE)
    wait_for(output, 1)
    (output / ".lock").open().close()  # somebody looks at it
    yield refused(output, "in use")
    _, said = process.communicate(timeout=120)
    same = process.returncode == 0 and learnt(output) == undisturbed(work)
    yield Outcome(same, "nothing" if same else f"the first run: {first_line(said)}")


def folder_gone(work: Path) -> Iterator[Outcome]:
    output = work / "gone"
    process = start(output, PAUSE)
    wait_for(output, 1)
    output.rename(work / "moved")
    _, said = process.communicate(timeout=120)
    right = process.returncode == 2 and "Done" not in said
    yield Outcome(right, "nothing" if right else f"exit code {process.returncode}")


# --------------------------------------------------------------------------- numbers and malice
def not_finite(*words: str) -> Callable[[Path], Iterator[Outcome]]:
    def cause(work: Path) -> Iterator[Outcome]:
        output = work / f"finite{abs(hash(words))}"
        code, said = run(output, *words)
        right = code == 3 and "not finite" in said
        yield Outcome(right, "nothing" if right else f"exit code {code}: {first_line(said)}")

    return cause


class _Payload:
    """Leaves a marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def hostile_index(work: Path) -> Iterator[Outcome]:
    output, marker = work / "hostile", work / "marker"
    interrupted(output)
    for checkpoint in (output / "checkpoints").glob("step_*"):
        (checkpoint / ".metadata").write_bytes(pickle.dumps(_Payload(marker)))
    code, _ = run(output)
    right = code == 2 and not marker.exists()
    yield Outcome(right, "nothing" if right else "a program of the file's ran, or it was used")


def hostile_weights(work: Path) -> Iterator[Outcome]:
    work.mkdir(parents=True, exist_ok=True)
    weights, marker = work / "weights.pth", work / "marker-weights"
    weights.write_bytes(pickle.dumps({"w": _Payload(marker)}))
    outcome = refused(work / "init", "weights.pth", f"init_from.weights={weights}")
    yield outcome if not marker.exists() else Outcome(False, "a program of the file's ran")


def faults(count: int) -> Sequence[Fault]:
    poison = ("losses.t.use=poison", "losses.t.iterations=[3, 4, 5, 6, 7]", "max_nonfinite_steps=2")
    overflow = ("optimizer.lr.peak=1e39", "optimizer.lr.warmup=1")
    return [
        Fault("killed", "SIGKILL at random moments", kills(count)),
        Fault("asked to stop", "SIGTERM", signaled("SIGTERM", 75)),
        Fault("asked to stop", "SIGUSR2", signaled("SIGUSR2", 75)),
        Fault("terminal closed", "SIGHUP", signaled("SIGHUP", 75)),
        Fault("Ctrl-C", "SIGINT", signaled("SIGINT", 130)),
        Fault("launcher killed", "SIGKILL of the parent of two ranks", launcher_killed),
        Fault("a rank hangs", "sleeps in a loss", rank_hangs),
        Fault("a worker dies", "SIGKILL in __getitem__", worker_killed),
        Fault("disk full", "a tmpfs of 1 MB", disk_full),
        Fault("shard truncated", "os.truncate of the newest", damaged(truncate)),
        Fault("byte altered", "one bit of the newest", damaged(flip)),
        Fault("index missing", "unlink in the newest", damaged(remove_index)),
        Fault("metrics damaged", "bytes that are no text in a line", metrics_byte),
        Fault("checkpoint of another run", "copied in", other_checkpoint),
        Fault("data changed", "an image removed, a FIFO among them", other_data),
        Fault("two runs", "a second start, its lock file read", two_runs),
        Fault("folder moved away", "rename while it trains", folder_gone),
        Fault("NaN", "a loss gives it step after step", not_finite(*poison)),
        Fault("overflow", "an update after the finite check", not_finite(*overflow)),
        Fault("hostile index", "a pickle that calls a function", hostile_index),
        Fault("hostile weights", "a pickle that calls a function", hostile_weights),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10, help="how often a run is killed")
    parser.add_argument("--only", default="", help="faults whose name has this in it")
    options = parser.parse_args()
    print("| fault | injected by | survived | lost |")
    print("|---|---|---|---|")
    failed = 0
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        for number, fault in enumerate(faults(options.kills)):
            if options.only not in fault.name:
                continue
            outcomes = list(fault.cause(Path(scratch, "all") / str(number)))
            good = sum(outcome.survived for outcome in outcomes)
            failed += len(outcomes) - good
            lost = "; ".join(dict.fromkeys(o.lost for o in outcomes)) or "could not be caused here"
            print(
                f"| {fault.name} | {fault.how} | {good} of {len(outcomes)} | {lost} |", flush=True
            )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
