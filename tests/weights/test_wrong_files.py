"""A file that holds no weights is refused, with what it is and what to do; nothing in it is run."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import pickle
import re
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save
from torch import nn

from dinov3_framework import Registry
from dinov3_framework.errors import CheckpointError
from dinov3_framework.weights import _files
from dinov3_framework.weights._files import open_weights
from dinov3_framework.weights.cli import main as weights_main


def refusal(path: Path) -> str:
    """What is said of a file or folder: at most three lines that name it."""
    with pytest.raises(CheckpointError) as caught, open_weights(path):
        pass
    text = str(caught.value)
    assert path.name in text
    assert len(text.splitlines()) <= 3
    return text


def saved(content: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def legacy(content: Any) -> bytes:
    return saved(content, _use_new_zipfile_serialization=False)


def zipped(**files: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return stream.getvalue()


def tarred() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pth"))
    return stream.getvalue()


WEIGHTS = {"w": torch.arange(300.0)}
DENIED = b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code><Message>No</Message></Error>'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "is empty", id="empty"),
        pytest.param(b"\0" * 900, "begins with zeros", id="zeros"),
        pytest.param(b"\n<!DOCTYPE html><title>Log in", "web page.*\n*.*wget -O x.pth", id="html"),
        pytest.param(DENIED, r"error message of the server \(AccessDenied\).*expired", id="s3"),
        pytest.param(b'{"error": "gated repo"}', "JSON text", id="json"),
        pytest.param(
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull", id="lfs"
        ),
        pytest.param(gzip.compress(b"x"), "gzip archive; unpack it", id="gzip"),
        pytest.param(tarred(), "tar archive; unpack it", id="tar"),
        pytest.param(b"\x89PNG\r\n\x1a\n", "a PNG image", id="png"),
        pytest.param(b"\xff\xd8\xff\xe0..JFIF", "a JPEG image", id="jpeg"),
        pytest.param(b"\x89HDF\r\n\x1a\n", "an HDF5 file", id="hdf5"),
        pytest.param(b"hello, no model", "it is a text file", id="text"),
        pytest.param(b"\x01\x02\xfe" * 50, "of an unknown kind", id="noise"),
        pytest.param(
            struct.pack("<Q", 1 << 20) + b'{"a":', "truncated: 13 bytes.* 1,048,584", id="header"
        ),
        pytest.param(save(WEIGHTS)[:-10], r"truncated: [\d,]+ bytes instead of", id="cut"),
        pytest.param(save(WEIGHTS) + b"?", r"has [\d,]+ bytes instead of", id="long"),
        pytest.param(
            struct.pack("<Q", 12) + b'{"a": "none"', "header is malformed", id="header-malformed"
        ),
        pytest.param(
            saved(WEIGHTS)[:-50], r"truncated or damaged.*\d bytes\n.*download", id="zip-cut"
        ),
        pytest.param(
            legacy(WEIGHTS)[:-50], r"truncated \([\d,]+ bytes\).*\n.*download", id="legacy-cut"
        ),
        pytest.param(legacy(WEIGHTS)[:40], r"truncated \(40 bytes\)", id="legacy-head"),
        pytest.param(zipped(a=b"1", b=b"2"), "of 2 files that torch.save did not write", id="zip"),
        pytest.param(saved(torch.ones(3)), r"holds one tensor \[3\] without a name", id="tensor"),
        pytest.param(saved([torch.ones(3)]), "holds a list", id="list"),
        pytest.param(saved({}), "no weights: it is an empty dict", id="nothing"),
        pytest.param(saved({"epoch": 3}), "no tensor under its keys 'epoch'", id="no-tensor"),
        pytest.param(
            saved({0: torch.ones(1)}), r"keys are of type int \(0\).*state_dict\(\)", id="numbers"
        ),
        pytest.param(
            saved({"w": torch.ones(2, device="meta")}), "'w' was saved from the meta", id="meta"
        ),
        pytest.param(saved({"w": torch.eye(2).to_sparse()}), "'w' is sparse", id="sparse"),
        pytest.param(pickle.dumps({"w": 1.0}), "none that torch.save wrote", id="plain-pickle"),
    ],
)
def test_what_holds_no_weights(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    assert re.search(message, refusal(path), re.MULTILINE)


SECRET = "hunter2"


@pytest.mark.parametrize(
    "content",
    [
        f"{SECRET}:x:0:0\n".encode(),
        f'{{"token": "{SECRET}"}}'.encode(),
        f"<html><title>{SECRET}".encode(),
        f"<Error><Code>{SECRET}</Code>".encode(),
        zipped(hunter2=b"1"),
        SECRET.encode("utf-16"),
    ],
    ids=["text", "json", "html", "xml", "zip", "binary"],
)
def test_no_other_file_is_quoted(tmp_path: Path, content: bytes) -> None:
    for name in ("x.pth", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(content)
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(CheckpointError) as caught, open_weights(tmp_path / name):
            pass
        assert SECRET not in str(caught.value)
        with pytest.raises(CheckpointError) as caught, open_weights(tmp_path):
            pass
        assert SECRET not in str(caught.value)


def test_an_optimizer_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    moments = {"step": torch.tensor(3.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
    torch.save({"state": {0: moments}, "param_groups": [{"lr": 0.1, "params": [0]}]}, path)
    assert "it is an optimizer's state" in refusal(path)


def test_dicts_without_an_end(tmp_path: Path) -> None:
    endless: dict[str, Any] = {"w": torch.ones(1)}
    endless["again"] = endless
    torch.save(endless, tmp_path / "x.pth")
    assert "deeper than 32 levels" in refusal(tmp_path / "x.pth")


def test_torchscript(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), path)
    assert "is a TorchScript program" in refusal(path)


def test_onnx(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(b"\x08\x0a\x12\x07pytorch")
    assert "is an ONNX model" in refusal(path)


@pytest.mark.parametrize("content", [save(WEIGHTS), saved(WEIGHTS), legacy(WEIGHTS)])
def test_wherever_a_file_is_cut(tmp_path: Path, content: bytes) -> None:
    """What is left is refused with a message for a person, and never read as weights."""
    path = tmp_path / "x"
    for size in [*range(64), *range(64, len(content), 61), len(content) - 1]:
        path.write_bytes(content[:size])
        assert "\n" in refusal(path)


# --------------------------------------------------------------------------- what is declared
ENTRY = {"dtype": "F32", "shape": [2_500_000_000_000], "data_offsets": [0, 10**13]}
TABLE = json.dumps({"w": ENTRY}).encode()
# In a pickle of 777 values that number is M, 0x0309; ten million millions are a long of 6 bytes.
FEW, MANY = b"M\x09\x03", b"\x8a\x06" + (10**13).to_bytes(6, "little")


class Reserved:
    """Made of its length alone when it is unpickled."""

    def __reduce__(self) -> tuple[type[bytearray], tuple[int]]:
        return bytearray, (10**13,)


def repacked(data: bytes, method: int, **more: bytes) -> bytes:
    """An archive of torch with a storage declared far too large, or with more in it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w", method) as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, content if more else content.replace(FEW, MANY))
        for name, content in more.items():
            new.writestr(f"archive/data/{name}", content)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(struct.pack("<Q", len(TABLE)) + TABLE, "is truncated", id="safetensors"),
        pytest.param(struct.pack("<Q", 9 * 10**7) + b'{"w":', "is truncated", id="header"),
        pytest.param(legacy({"w": torch.ones(777)}).replace(FEW, MANY), "can hold", id="legacy"),
        pytest.param(
            repacked(saved({"w": torch.ones(777)}), zipfile.ZIP_STORED), "can hold", id="zip"
        ),
        pytest.param(
            repacked(saved({"w": torch.ones(777)}), zipfile.ZIP_DEFLATED), "can hold", id="deflated"
        ),
        pytest.param(
            repacked(saved(WEIGHTS), zipfile.ZIP_DEFLATED, x=bytes(2**23)),
            "can hold",
            id="zip-bomb",
        ),
        pytest.param(saved(WEIGHTS | {"x": Reserved()}), "can hold", id="bytearray"),
        pytest.param(legacy(WEIGHTS | {"x": Reserved()}), "can hold", id="legacy-bytearray"),
        pytest.param(b"\x80\x02" + b"]" * 10**5 + b"a" * 99_999 + b".", "pickle", id="nested"),
    ],
)
def test_a_tiny_file_that_declares_much(tmp_path: Path, content: bytes, message: str) -> None:
    """It is refused by its sizes before torch reads it."""
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    assert path.stat().st_size < 2**18
    assert message in refusal(path)


def test_a_view_without_end_is_not_read(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1).expand(10**6, 10**6), "v": torch.ones(3)}, tmp_path / "x.pth")
    with open_weights(tmp_path / "x.pth") as opened:
        assert opened.read("v").sum() == 3
        with pytest.raises(
            CheckpointError, match=r"damaged or malicious: 'w' \[1000000, 1000000\]"
        ):
            opened.read("w")


def test_memory_and_stack_that_give_out_are_the_files_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(
        save(WEIGHTS, {"dinov3_backbone": "1", "component": "vit", "images": "[" * 99999})
    )
    assert weights_main(["show", str(path)]) == 2
    state = Registry.load().build("backbone", "vit_small").state_dict()
    torch.save({"blocks.99999999.norm1.weight": torch.ones(384), **state}, tmp_path / "deep.pth")
    assert weights_main(["show", str(tmp_path / "deep.pth")]) == 2
    torch.save(state, tmp_path / "x.pth")
    for error in (MemoryError(), RecursionError(), RuntimeError("can't allocate memory")):
        for place in (f"{_files.__name__}.read_pickle", "torch.Tensor.clone"):
            with monkeypatch.context() as patched:
                patched.setattr(place, Mock(side_effect=error))
                assert weights_main(["show", str(tmp_path / "x.pth")]) == 2


# --------------------------------------------------------------------------- pickles with code
class Payload:
    """Runs a function of this machine when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("write", [saved, legacy, pickle.dumps])
@pytest.mark.parametrize("function", [os.system, eval, exec], ids=lambda f: f.__name__)
def test_code_is_not_run(tmp_path: Path, write: Any, function: Callable[..., Any]) -> None:
    marker, path = tmp_path / "marker", tmp_path / "x.pth"
    python = f"open({str(marker)!r}, 'w')"
    argument = f"touch {marker}" if function is os.system else python
    path.write_bytes(write({"w": torch.ones(2), "x": Payload(function, argument)}))
    text = refusal(path)
    assert not marker.exists()
    assert "nothing in it was run" in text
    assert "may be malicious" in text
    # Protocol 2, which torch writes, has the names of Python 2.
    modules = {function.__module__, function.__module__.replace("builtins", "__builtin__")}
    assert any(f"{module}.{function.__name__}" in text for module in modules)
    with path.open("rb") as stream:  # the same file does run when it is trusted
        pickle.load(stream) if write is pickle.dumps else torch.load(stream, weights_only=False)
    assert marker.exists()


class Options:
    """Some library's own class, which this process could import."""


@pytest.mark.parametrize("write", [saved, legacy])
def test_classes_beside_the_tensors_are_named(tmp_path: Path, write: Any) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(write({"teacher": WEIGHTS, "args": argparse.Namespace(lr=1, more=Options())}))
    text = refusal(path)
    assert "asks for argparse.Namespace, " in text
    assert f"{Options.__module__}.Options besides tensors" in text
    assert "weights_only=False); torch.save({'teacher': ckpt['teacher']}, 'weights.pth')" in text
    assert "malicious" not in text


def test_a_pickled_network(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "x.pt")
    text = refusal(tmp_path / "x.pt")
    assert "asks for torch.nn.modules.linear.Linear" in text
    assert "torch.load(FILE, weights_only=False).state_dict()" in text


def test_tensors_split_over_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed.tensor as module

    class DTensor:
        pass

    DTensor.__module__, DTensor.__qualname__ = module.__name__, "DTensor"
    monkeypatch.setattr(module, "DTensor", DTensor)
    safe = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        torch.save({"w": DTensor()}, tmp_path / "x.pth")
        text = refusal(tmp_path / "x.pth")
    finally:
        torch.serialization.add_safe_globals(safe)
    assert "were split over processes (torch.distributed.tensor.DTensor)" in text
    assert "full_state_dict=True" in text


# --------------------------------------------------------------------------- paths
def test_missing_paths(tmp_path: Path) -> None:
    (tmp_path / "teacher.safetensors").write_bytes(save(WEIGHTS))
    text = refusal(tmp_path / "teachers.safetensors")
    assert "there is no file" in text
    assert "holds teacher.safetensors" in text
    assert "its folder" in refusal(tmp_path / "absent" / "x.pth")
    (tmp_path / "link.pth").symlink_to(tmp_path / "blob")
    assert "it is a link to" in refusal(tmp_path / "link.pth")
    os.mkfifo(tmp_path / "pipe.pth")
    assert "is a device or a pipe" in refusal(tmp_path / "pipe.pth")


def test_folders_without_weights(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "exports").mkdir(parents=True)
    assert "is a folder without weights" in refusal(run)
    (run / "exports" / "teacher.safetensors").write_bytes(save(WEIGHTS))
    assert f"it holds {run}/exports/teacher.safetensors" in refusal(run)


def test_a_folder_says_where_its_weights_are(tmp_path: Path) -> None:
    """Hugging Face's cache of a model, and checkpoints of a training run."""
    revision = tmp_path / "cache" / "snapshots" / "0123abcd"
    revision.mkdir(parents=True)
    (revision / "config.json").write_text("{}")
    assert f"it holds {revision}" in refusal(tmp_path / "cache")
    step = tmp_path / "checkpoints" / "step_7"
    step.mkdir(parents=True)
    (step / ".metadata").write_bytes(b"")
    assert f"it holds {step}" in refusal(tmp_path / "checkpoints")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "config.json is not JSON: Expecting"),
        ("<html>", "config.json is not JSON: it is a web page"),
        ("[1]", "config.json holds no JSON table, but a list"),
        ("\xff", "config.json is not JSON"),
    ],
)
def test_a_folder_with_a_wrong_config(tmp_path: Path, config: str, message: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(save(WEIGHTS))
    (folder / "config.json").write_bytes(config.encode("latin-1"))
    with pytest.raises(CheckpointError) as caught:
        open_weights(folder).__enter__()
    assert message in str(caught.value)


def test_a_file_that_must_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The superuser may read anything, so the refusal comes from where the file is opened."""
    path = tmp_path / "x.pth"
    path.write_bytes(saved(WEIGHTS))

    def deny(self: Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", deny)
    assert "cannot be read: Permission denied\nask its owner" in refusal(path)


def test_a_type_that_torch_does_not_have(tmp_path: Path) -> None:
    table = json.dumps({"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(table)) + table + b"\0")
    assert "F4" in refusal(path)


def test_nothing_is_imported_for_a_pickle(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(b"\x80\x02cantigravity\nfly\n.")
    assert "antigravity.fly" in refusal(path)
    assert "antigravity" not in sys.modules
