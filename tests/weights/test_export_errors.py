"""What is wrong with an exported file is said, whatever it is."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_backbone import GRAY, build, export, tiny_registry
from torch import Tensor

from dinov3_framework.errors import CheckpointError
from dinov3_framework.registry import Registry
from dinov3_framework.weights.loading import load_backbone


@pytest.fixture
def registry() -> Registry:
    return tiny_registry()


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> None:
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def test_misfits_are_listed(tmp_path: Path, registry: Registry) -> None:
    path = export(tmp_path / "x", build(registry))

    def change(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        del tensors["offset"]
        tensors["stranger"] = torch.ones(1)
        tensors["proj.bias"] = torch.ones(7)

    rewrite(path, change)
    with pytest.raises(CheckpointError) as error:
        load_backbone(path, registry=registry)
    text = str(error.value)
    assert "missing from the file:\n    offset" in text
    assert "in the file but not in the backbone:\n    stranger" in text
    assert "proj.bias: [7] in the file, [6] in the backbone" in text


def test_values_must_be_finite(tmp_path: Path, registry: Registry) -> None:
    backbone = build(registry)
    path = export(tmp_path / "x", backbone)

    def change(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        tensors["proj.weight"].view(-1)[3] = float("nan")

    rewrite(path, change)
    with pytest.raises(CheckpointError, match=r"NaN or inf:\n    proj.weight: 1 of 288 values"):
        load_backbone(path, registry=registry)
    backbone.offset[1] = float("inf")
    with pytest.raises(CheckpointError, match=r"not exported(.|\n)*offset: 1 of 6"):
        export(tmp_path / "y", backbone)
    assert not (tmp_path / "y").exists()


def pickled() -> bytes:
    stream = io.BytesIO()
    torch.save({"w": torch.ones(2)}, stream)
    return stream.getvalue()


def legacy() -> bytes:
    stream = io.BytesIO()
    torch.save({"w": torch.ones(2)}, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html><body>403 Forbidden", "web page"),
        (pickled(), "PyTorch file, but holds no backbone of a known kind: w"),
        (legacy(), "PyTorch file, but holds no backbone of a known kind: w"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "Git LFS"),
        (b"hello, this is no model", "a text file"),
        (struct.pack("<Q", 1 << 20) + b'{"a":', "truncated"),
    ],
)
def test_other_files_are_recognized(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        load_backbone(path)
    assert str(path) in str(error.value)


def test_truncated(tmp_path: Path, registry: Registry) -> None:
    path = export(tmp_path / "x", build(registry))
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=rf"truncated: {size - 10:,} bytes.* {size:,}"):
        load_backbone(path, registry=registry)


def test_missing_files(tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(CheckpointError, match="there is no file"):
        load_backbone(tmp_path / "absent.safetensors")
    export(tmp_path / "exports" / "t.safetensors", build(registry))
    with pytest.raises(CheckpointError, match=r"is a folder.*exports/t\.safetensors"):
        load_backbone(tmp_path)


def test_safetensors_of_another_kind(tmp_path: Path, registry: Registry) -> None:
    path = tmp_path / "x"
    for metadata in (None, {"format": "pt"}):
        save_file({"w": torch.ones(1)}, path, metadata)
        with pytest.raises(CheckpointError, match="holds no backbone of a known kind"):
            load_backbone(path, registry=registry)
    export(path, build(registry))
    rewrite(path, lambda _, metadata: metadata.update(dinov3_backbone="2"))
    with pytest.raises(CheckpointError, match=r"format 2 .* reads format 1"):
        load_backbone(path, registry=registry)
    export(path, build(registry))
    rewrite(path, lambda _, metadata: metadata.pop("images"))
    with pytest.raises(CheckpointError, match=r"metadata is malformed .*images"):
        load_backbone(path, registry=registry)


def test_backbones_that_cannot_be_built(tmp_path: Path, registry: Registry) -> None:
    path = export(tmp_path / "x", build(registry), embed_dim=6)
    with pytest.raises(CheckpointError, match="'tiny' cannot be built: no backbone is named"):
        load_backbone(path, registry=Registry())
    rewrite(path, lambda _, metadata: metadata.update(config='{"embed_dimm": 6}'))
    with pytest.raises(CheckpointError, match="embed_dimm"):
        load_backbone(path, registry=registry)
    export(path, build(registry), in_chans=3, images=GRAY)
    with pytest.raises(CheckpointError, match="takes 3 channels, its images have 1"):
        load_backbone(path, registry=registry)
