"""Data, recipes and weights of others that mean no good.

What would run a program leaves a marker at most: a folder or a file of a certain name.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from folders import vouch
from harness import (
    TINY,
    Cause,
    Fault,
    Outcome,
    Place,
    checkpoints,
    ended,
    finished,
    interrupted,
    judge,
    learnt,
    refused,
    run,
    undisturbed,
)
from PIL import Image
from run_support import environment


# --------------------------------------------------------------------------- images
def _folder(path: Path, others: Mapping[str, bytes]) -> str:
    """30 images of noise, and other files; the override that has a run read them."""
    path.mkdir(parents=True)
    noise = np.random.default_rng(0)
    for number in range(30):
        pixels = noise.integers(0, 256, (30, 30), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{number}.png")
    for name, content in others.items():
        Path(os.fsdecode(os.fsencode(path) + b"/" + os.fsencode(name))).write_bytes(content)
    return f"dataset.root={path}"


def _read(place: Place, others: Mapping[str, bytes], **options: object) -> Iterator[Outcome]:
    """A run that reads them ends as one that finds garbage in their place."""
    folder = ("dataset.use=image_folder",)
    hostile = _folder(place.work / "images", others)
    garbage = _folder(place.work / "garbage", dict.fromkeys(others, b"no image"))
    output = place.work / "run"
    yield ended(run(output, *folder, hostile, **options), 0)  # type: ignore[arg-type]
    plain = undisturbed(place, *folder, garbage)
    yield judge(learnt(output) == learnt(plain), None, "other bits than with corrupt images")
    log = (output / "run.log").read_text()
    counted = log.count("undecodable sample")
    yield judge(counted == len(others), None, f"{counted} of {len(others)} count as corrupt")


def data_changed(place: Place) -> Iterator[Outcome]:
    """One image fewer; a FIFO and a device are passed over: reading them would never end."""
    words = ("dataset.use=image_folder", _folder(place.work / "images", {}))
    os.mkfifo(place.work / "images" / "pipe.png")
    (place.work / "images" / "zeros.png").symlink_to("/dev/zero")
    output = interrupted(place, *words)
    (place.work / "images" / "3.png").unlink()
    yield refused(output, "is not the data", *words)


_EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 30 30
%%EndComments
0 setgray 0 0 30 30 rectfill
showpage
%%EOF
"""


def other_program(place: Place) -> Iterator[Outcome]:
    """PostScript by content, for which Pillow alone starts ``gs``: here one that marks it."""
    programs, marker = place.work / "programs", place.work / "marker"
    programs.mkdir(parents=True)
    (programs / "gs").write_text(f"#!/bin/sh\n: > '{marker}'\n")
    (programs / "gs").chmod(0o755)
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    outcomes = _read(place, {"7.jpg": _EPS}, fresh=True, variables={"PATH": path})
    yield from outcomes
    yield judge(not marker.exists(), None, "another program was started")
    script = "import sys; from PIL import Image; Image.open(sys.argv[1]).load()"
    line = [sys.executable, "-c", script, str(place.work / "images" / "7.jpg")]
    subprocess.run(line, env=os.environ | {"PATH": path}, capture_output=True, check=False)
    yield judge(marker.exists(), None, "Pillow alone starts none: not caused")


def _png(width: int, height: int) -> bytes:
    """The head of a PNG of any size, without its pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + pixels + chunk(b"IEND", b"")


def extreme_images(place: Place) -> Iterator[Outcome]:
    stream = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(stream, "PNG")
    sides = {"7.png": (100_000, 100_000), "8.png": (2**31 - 1, 1), "9.png": (1, 2**31 - 1)}
    others = {f"x{name}": _png(*size) for name, size in sides.items()}
    yield from _read(place, {**others, "x6.png": stream.getvalue()})


def thin_images(place: Place) -> Iterator[Outcome]:
    """Small as they are, and enormous once their shorter side is that of a network's input."""
    _folder(place.work / "images", {})
    for name, size in {"a.png": (1, 1_000_000), "b.png": (1_000_000, 1)}.items():
        Image.new("L", size).save(place.work / "images" / name)
    words = (f"weights={finished(place)}", f"dataset.root={place.work / 'images'}", "workers=1")
    output = place.work / "out"
    within = ("prlimit", "--data=1500000000", "env")  # resized whole, they would take gigabytes
    yield ended(run(output, *words, recipe=Path("features"), plain=True, within=within), 0)
    rows = (output / "index.csv").read_text().splitlines()[1:]
    yield judge(len(rows) == 32, None, f"{len(rows)} of 32 images were read")


def odd_names(place: Place) -> Iterator[Outcome]:
    names = ("x\x1b[2J\x1b]0;title\x07.jpg", "x\n2026-01-01 forged line.jpg", "x\udce9.jpg")
    yield from _read(place, dict.fromkeys(names, b"\xff\xd8 broken"))
    shown = (place.work / "run" / "run.log").read_bytes()
    raw = [part for part in (b"\x1b", b"\x07", b"\n2026-01-01 forged", b"\xe9") if part in shown]
    yield judge(not raw, None, f"in the log as they are: {raw}")


# --------------------------------------------------------------------------- recipes
def recipe(text: str, said: str) -> Cause:
    def cause(place: Place) -> Iterator[Outcome]:
        place.work.mkdir(parents=True)
        file, output = place.work / "hostile.toml", place.work / "run"
        file.write_text(text)
        yield refused(output, said, recipe=file)
        yield judge(not output.exists(), None, "something was written")

    return cause


def package(place: Place) -> Iterator[Outcome]:
    """A module in the working folder, which marks that it was imported."""
    marker = place.work / "marker"
    inner = place.work / "stranger" / "inner"
    inner.mkdir(parents=True)
    for folder in (inner.parent, inner):
        (folder / "__init__.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
        shutil.copy(TINY, folder / "recipe.toml")
    for name in ("stranger:recipe", "stranger.inner:recipe"):
        file = place.work / "extends.toml"
        file.write_text(f'extends = "{name}"\n')
        options = {"fresh": True, "cwd": place.work}
        yield refused(place.work / "run", "with recipes is installed", recipe=file, **options)
        yield refused(place.work / "run", "with recipes is installed", recipe=Path(name), **options)
        yield judge(not marker.exists(), None, "it was imported")
    line = [sys.executable, "-c", "import stranger"]
    subprocess.run(line, cwd=place.work, env=environment(), check=True)
    yield judge(marker.exists(), None, "importing it marks nothing: not caused")


# --------------------------------------------------------------------------- weights
class _Payload:
    """Leaves a marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def hostile_index(place: Place) -> Iterator[Outcome]:
    output, marker = interrupted(place), place.work / "marker"
    for checkpoint in checkpoints(output):
        vouch(checkpoint, ".metadata", pickle.dumps(_Payload(marker)))
    yield refused(output, "refused")
    yield judge(not marker.exists(), None, "a program of the file's ran")


def hostile_weights(place: Place) -> Iterator[Outcome]:
    place.work.mkdir(parents=True)
    weights, marker = place.work / "weights.pth", place.work / "marker"
    weights.write_bytes(pickle.dumps({"w": _Payload(marker)}))
    yield refused(place.work / "run", "weights.pth", f"init_from.weights={weights}")
    yield judge(not marker.exists(), None, "a program of the file's ran")


def tiny_weights(place: Place) -> Iterator[Outcome]:
    """Some bytes that declare terabytes: of one tensor, or of the head itself."""
    place.work.mkdir(parents=True)
    entry = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}
    head = json.dumps({"backbone.norm.weight": entry}).encode()
    contents = {
        "tensor": struct.pack("<Q", len(head)) + head + b"\0" * 64,
        "head": struct.pack("<Q", 1 << 60) + head,
    }
    for name, content in contents.items():
        weights = place.work / f"{name}.safetensors"
        weights.write_bytes(content)
        yield refused(place.work / "run", weights.name, f"init_from.weights={weights}")


def link_out(place: Place) -> Iterator[Outcome]:
    """A shard that is a link to a file elsewhere, whose bytes are right."""
    output = interrupted(place)
    shard = next(checkpoints(output)[-1].glob("*.distcp"))
    shard.symlink_to(shutil.move(shard, place.work / "elsewhere"))
    yield refused(output, "a link that leads out of its folder")


_NESTED = "a = " + "[" * 100_000 + "]" * 100_000
_HUGE = f'extends = "{TINY}"\nseed = {"9" * 10_000}\n'

FAULTS = [
    Fault("data changed", "an image removed; a FIFO, a device", data_changed),
    Fault("image that starts a program", "EPS named .jpg, `gs` marks it", other_program),
    Fault("images of extreme sides", "four PNGs, 400 MP to 10,000 MP", extreme_images),
    Fault("images that are thin", "1 x 1,000,000, resized for features", thin_images),
    Fault("names with control characters", "three broken images", odd_names),
    Fault("recipe nested too deep", "100,000 arrays", recipe(_NESTED, "nested too deep")),
    Fault("recipe with a huge number", "10,000 digits", recipe(_HUGE, "hostile.toml")),
    Fault("recipe of a foreign package", "a module that marks its import", package),
    Fault("hostile index", "a pickle that calls a function", hostile_index),
    Fault("hostile weights", "a pickle that calls a function", hostile_weights),
    Fault("weights that declare much", "two heads of safetensors", tiny_weights),
    Fault("link out of a checkpoint", "a shard, moved away", link_out),
]
