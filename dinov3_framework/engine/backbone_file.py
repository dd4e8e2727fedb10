"""The file format of exported backbones: safetensors, with metadata that tells what to build.

Keys of the metadata, all strings: ``dinov3_backbone`` (version of this format), ``component``,
``config`` (JSON), ``images`` (JSON), ``size`` (pixels), ``provenance`` (JSON), and ``format``,
which other libraries expect to be ``pt``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attrs import asdict, frozen
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.errors import CheckpointError

FORMAT_KEY = "dinov3_backbone"
FORMAT = "1"


@frozen
class BackboneInfo:
    """What is in an exported file besides the tensors."""

    component: str
    config: Mapping[str, Any]  # plain values, as a recipe's [backbone] without its ``use``
    images: ImagesConfig
    size: int  # pixels
    provenance: Mapping[str, str]

    def to_metadata(self) -> dict[str, str]:
        return {
            "format": "pt",
            FORMAT_KEY: FORMAT,
            "component": self.component,
            "config": json.dumps(dict(self.config), sort_keys=True),
            "images": json.dumps(asdict(self.images), sort_keys=True),  # type: ignore[arg-type]
            "size": str(self.size),
            "provenance": json.dumps(dict(self.provenance), sort_keys=True),
        }

    @classmethod
    def from_metadata(cls, path: Path, metadata: Mapping[str, str] | None) -> BackboneInfo:
        """Raises ``CheckpointError`` for another format, or another version of this one."""
        version = (metadata or {}).get(FORMAT_KEY)
        if metadata is None or version is None:
            raise CheckpointError(
                f"{path} holds tensors but does not say of what: it is no backbone that "
                "dinov3_framework exported"
            )
        if version != FORMAT:
            raise CheckpointError(
                f"{path} is in format {version} of exported backbones, this version of "
                f"dinov3_framework reads format {FORMAT}; use the version that wrote it"
            )
        try:
            images = json.loads(metadata["images"])
            return cls(
                component=metadata["component"],
                config=dict(json.loads(metadata["config"])),
                images=ImagesConfig(
                    channels=int(images["channels"]),
                    mean=tuple(images["mean"]),
                    std=tuple(images["std"]),
                ),
                size=int(metadata["size"]),
                provenance=dict(json.loads(metadata["provenance"])),
            )
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{path}: its metadata is malformed ({type(error).__name__}: {error})"
            ) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; the same bytes for the same input."""
    save_file(_separate(tensors), path, dict(metadata))
    _sort_metadata(path)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, none sharing memory with another, as safetensors wants.

    Copies only those that need it.
    """
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if hasattr(tensor, "full_tensor"):  # a DTensor, whose module takes long to import
            raise TypeError(f"{name!r} is sharded: gather it first, as full_state_dict does")
        stored = tensor.detach().cpu().contiguous()
        storage = stored.untyped_storage()
        if storage.nbytes() != stored.nbytes or storage.data_ptr() in seen:
            stored = stored.clone()
        seen.add(stored.untyped_storage().data_ptr())
        separate[name] = stored
    return separate


def _sort_metadata(path: Path) -> None:
    """Sort the metadata's keys in place: safetensors writes them in a random order."""
    with path.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise RuntimeError(f"the header of {path} grew from {length} to {len(text)} bytes")
        stream.seek(8)
        stream.write(text.ljust(length))


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A ``safetensors.safe_open`` handle; ``CheckpointError`` says what a wrong file looks like."""
    if not path.is_file():
        raise CheckpointError(_missing(path))
    try:
        handle = safe_open(path, framework="pt", device="cpu")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {_looks_like(path)}") from error
    with handle as file:
        yield file


def _missing(path: Path) -> str:
    if not path.is_dir():
        return f"there is no file {path}"
    inside = [*path.glob("*.safetensors"), *path.glob("exports/*.safetensors")]
    hint = f"; it holds {', '.join(str(each) for each in sorted(inside))}" if inside else ""
    return f"{path} is a folder, not an exported backbone{hint}"


def _looks_like(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(512)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if size == 0:
        return "it is empty"
    if text.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "it is a web page, so the download gave an error or a login page; download it again"
    if text.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the file itself with: git lfs pull"
    if head.startswith(b"PK\x03\x04") or (head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5"):
        return (
            "it is a PyTorch pickle (.pth, .pt), which may hold code and is not loaded; convert "
            "it to safetensors first"
        )
    return _looks_cut(path, size) or "its content is of an unknown kind"


def _looks_cut(path: Path, size: int) -> str | None:
    """What is missing of a safetensors file whose beginning is there."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        begins = stream.read(1) == b"{"
        if not begins or length > 2**32:
            return None
        if 8 + length > size:
            return f"it is truncated: {size:,} bytes, its header alone has {8 + length:,}"
        stream.seek(8)
        try:
            header = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for k, entry in header.items() if k[:2] != "__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return None
    if expected > size:
        return f"it is truncated: {size:,} bytes of {os.fspath(path)} instead of {expected:,}"
    return f"it has {size:,} bytes instead of {expected:,}"
