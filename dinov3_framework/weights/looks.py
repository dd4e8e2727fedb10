"""What a file is that was taken for weights and is none, in words for a person.

Everything here looks at a file's first bytes and size; nothing of it is run or believed.
"""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Literal

from dinov3_framework.errors import CheckpointError

Container = Literal["safetensors", "zip", "pickle", "onnx"]

EXPECTED = (
    "weights are a safetensors file, a PyTorch file (.pth, .pt, .bin), a folder with config.json "
    "and model.safetensors, or an .onnx file of this framework"
)

_HEAD = 512  # bytes that tell one kind of file from another
_LONGEST_HEADER = 100_000_000  # bytes; the safetensors library refuses longer ones

_ARCHIVES = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!": "rar",
}
_OTHERS = {
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG": "a PNG image",
    b"GIF8": "a GIF image",
    b"II*\0": "a TIFF image",
    b"MM\0*": "a TIFF image",
    b"\x89HDF": "an HDF5 file (Keras?)",
    b"\x93NUMPY": "a NumPy array",
    b"GGUF": "a GGUF file (llama.cpp)",
    b"%PDF": "a PDF document",
}


def container(path: Path) -> Container | None:
    """Which kind of container a file is, by its content; None if no weights are kept in such.

    Raises ``CheckpointError`` where it is missing, a folder, or cannot be read.
    """
    head = _head(path)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LONGEST_HEADER:
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if _is_pickle(head):
        return "pickle"
    # A protobuf has no magic number, only a first field: the version of the format.
    if head[:1] == b"\x08" and path.suffix.lower() == ".onnx":
        return "onnx"
    return None


def not_weights(path: Path) -> CheckpointError:
    """The error for a file of a kind that holds no weights."""
    return CheckpointError(f"{path} holds no weights: {looks_like(path)}\n{EXPECTED}")


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The error for a file or folder that the system does not let us read."""
    advice = "\nask its owner for read access to it and its folders (chmod a+rX)"
    denied = isinstance(error, PermissionError)
    return CheckpointError(
        f"{error.filename or path} cannot be read: {error.strerror or error}"
        + (advice if denied else "")
    )


def missing(path: Path) -> str:
    """What to say of a path at which there is no file."""
    if path.is_dir():
        inside = usable(path)
        hint = f"; it holds {', '.join(str(each) for each in inside)}" if inside else ""
        return f"{path} is a folder, not a file of weights{hint}"
    if path.is_symlink():
        return f"there is no file {path}: it is a link to {path.readlink()}, which is not there"
    folder = path.parent
    if path.exists():
        return f"{path} is a device or a pipe, not a file of weights"
    if not folder.is_dir():
        return f"there is no file {path}: its folder {folder} is not there either"
    names = [each.name for each in folder.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=3)
    hint = f"; {folder} holds {', '.join(sorted(near))}" if near else ""
    return f"there is no file {path}{hint}"


def usable(folder: Path) -> list[Path]:
    """What in a folder and a level below may be weights, at most six."""
    kinds = ("*.safetensors", "*.pth", "*.pt", "*.bin")
    patterns = [*kinds, *(f"*/{kind}" for kind in kinds)]
    found = {each for pattern in patterns for each in folder.glob(pattern) if each.is_file()}
    # The cache of Hugging Face keeps every revision of a model in a folder of its own.
    found |= {each.parent for each in folder.glob("snapshots/*/config.json")}
    found |= {each.parent for each in folder.glob("*/.metadata")}
    return sorted(found)[:6]


def looks_like(path: Path) -> str:
    """What a file is that is no safetensors file, and what to do about it; one line."""
    head = _head(path)
    if not head:
        return "it is empty; download or copy it again"
    if not head.strip(b"\0"):
        return "it begins with zeros, so it was never completely written; download it again"
    if answer := web_answer(head):
        again = f"download it again: wget -O {path.name} '<link>' (the quotes keep its & whole)"
        return f"it is {answer}; {again}"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the file itself with: git lfs pull"
    if head.startswith(b"PK\x03\x04") or _is_pickle(head):
        return (
            "it is a PyTorch pickle (.pth, .pt), which may hold code and is not loaded; convert "
            "it to safetensors first"
        )
    archive = next((name for magic, name in _ARCHIVES.items() if head.startswith(magic)), None)
    if archive or head[257:262] == b"ustar":
        return f"it is a {archive or 'tar'} archive; unpack it and give the file of weights in it"
    if other := next((name for magic, name in _OTHERS.items() if head.startswith(magic)), None):
        return f"it is {other}; give another file"
    return (
        looks_cut(path, path.stat().st_size)
        or _text(path, head)
        or "its content is of an unknown kind"
    )


def web_answer(head: bytes) -> str | None:
    """What a server's answer is that begins with ``head``, if it is no file but a message."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text[:1] not in (b"<", b"{", b"["):
        return None
    shown = _shown(text)
    code = re.search(rb"<Code>(\w+)</Code>", text)
    if code or b"<Error>" in text:
        name = f" ({code[1].decode()})" if code else ""
        return (
            f"an error message of the server{name} and not the file: the link has expired, was "
            "cut at an &, or is not yours"
        )
    if text.lower().startswith((b"<!doctype html", b"<html", b"<?xml", b"<head", b"<!--")):
        return "a web page, so the download gave an error or a login page"
    if text.startswith((b'{"', b"{\n", b"{\r", b"{ ", b"[", b"{}")):
        return f"JSON text and not tensors: {shown}"
    return None


def looks_cut(path: Path, size: int) -> str | None:
    """What is missing of a safetensors file of ``size`` bytes whose beginning is there."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        begins = stream.read(1) == b"{"
        if not begins or length > _LONGEST_HEADER:
            return None
        if 8 + length > size:
            return f"it is truncated: {size:,} bytes, its header alone has {8 + length:,}"
        stream.seek(8)
        try:
            header = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for k, entry in header.items() if k[:2] != "__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            return None
    if expected > size:
        return f"it is truncated: {size:,} bytes instead of {expected:,}"
    return f"it has {size:,} bytes instead of {expected:,}" if expected < size else None


def _head(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise CheckpointError(missing(path))
        with path.open("rb") as stream:
            return stream.read(_HEAD)
    except OSError as error:
        raise unreadable(path, error) from error


def _is_pickle(head: bytes) -> bool:
    return head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5")


def _text(path: Path, head: bytes) -> str | None:
    try:
        text = head.decode()
    except UnicodeDecodeError:
        return None
    if not text.replace("\n", " ").replace("\r", " ").replace("\t", " ").isprintable():
        return None
    return f"its content is of an unknown kind, text that begins with {_shown(head)}"


def _shown(text: bytes) -> str:
    """The beginning of a text in one line."""
    line = " ".join(text.decode(errors="replace").split())
    return repr(line[:80] + ("..." if len(line) > 80 else ""))
