"""Say what a file is that was taken for weights and holds none, and what to do about it.

Only first bytes and sizes are looked at; nothing in a file is run or believed, nor quoted: it may
be any file of this machine.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from dinov3_framework.errors import CheckpointError

Container = Literal["safetensors", "zip", "pickle"]

EXPECTED = (
    "weights are a safetensors file, a PyTorch file (.pth, .pt, .bin), or a folder with "
    "config.json and model.safetensors"
)

_HEAD = 512  # bytes that tell one kind of file from another
_LONGEST_HEADER = 100_000_000  # bytes; the safetensors library refuses longer ones
JSON_TEXT = "JSON text and not tensors"
WEB_PAGE = "a web page, so the download gave an error or a login page"

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


def container_of(path: Path) -> Container | None:
    """The kind of container that a file is by its content; None if weights are kept in no such.

    Raises ``CheckpointError`` where it is missing, a folder, or cannot be read.
    """
    head = _head(path)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LONGEST_HEADER:
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    return "pickle" if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5") else None


def not_weights(path: Path) -> CheckpointError:
    """The error for a file of a kind that holds no weights."""
    return CheckpointError(f"{path} holds no weights: {_diagnosis(path)}\n{EXPECTED}")


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The error for a file or folder that the system does not let us read."""
    text = f"{error.filename or path} cannot be read: {error.strerror or error}"
    if isinstance(error, PermissionError):
        text += "\nask its owner for read access to it and its folders (chmod a+rX)"
    return CheckpointError(text)


@contextmanager
def exhaustion(path: Path) -> Iterator[None]:
    """Make running out of memory or of stack the fault of what is being read."""
    try:
        yield
    except (MemoryError, RecursionError, RuntimeError) as error:
        # torch raises a bare RuntimeError for it too, which means other things elsewhere.
        if type(error) is RuntimeError and not re.search("allocate mem|overflowed", str(error)):
            raise
        what = "nested too deeply" if isinstance(error, RecursionError) else "more than the memory"
        raise CheckpointError(
            f"{path} cannot be read: what it declares is {what}\n"
            "it is damaged or malicious, or wants a larger machine"
        ) from error


def declares_too_much(path: Path, what: str, size: int) -> CheckpointError:
    """The error for a file whose ``what`` is larger than its ``size`` bytes can hold."""
    return CheckpointError(
        f"{path} is damaged or malicious: {what}, more than its {size:,} bytes can hold; nothing "
        "was read\ndownload or copy it again"
    )


def missing(path: Path) -> str:
    """What to say of a path at which there is no file."""
    if path.is_dir():
        return f"{path} is a folder, not a file of weights{usable(path)}"
    if path.is_symlink():
        return f"there is no file {path}: it is a link to {path.readlink()}, which is not there"
    if path.exists():
        return f"{path} is a device or a pipe, not a file of weights"
    folder = path.parent
    if not folder.is_dir():
        return f"there is no file {path}: its folder {folder} is not there either"
    close = difflib.get_close_matches(path.name, [each.name for each in folder.iterdir()], n=3)
    return f"there is no file {path}" + (f"; {folder} holds {', '.join(close)}" if close else "")


def usable(folder: Path) -> str:
    """What in a folder and a level below may be weights, as the end of a sentence; "" if nothing.

    The cache of Hugging Face keeps every revision of a model in a folder of its own.
    """
    kinds = ("*.safetensors", "*.pth", "*.pt", "*.bin")
    found = {each for k in kinds for p in (k, f"*/{k}") for each in folder.glob(p)}
    found = {each for each in found if each.is_file()}
    found |= {each.parent for each in folder.glob("snapshots/*/config.json")}
    found |= {each.parent for each in folder.glob("*/.metadata")}
    return f"; it holds {', '.join(str(each) for each in sorted(found)[:6])}" if found else ""


def web_answer(head: bytes) -> str | None:
    """What a server's answer is that begins with ``head``, if it is no file but a message."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    code = re.search(
        rb"<Code>(AccessDenied|ExpiredToken|NoSuch\w{3,6}|Request\w{4,24})</Code>", text
    )
    if text.startswith(b"<") and (code or b"<Error>" in text):
        name = f" ({code[1].decode()})" if code else ""
        return (
            f"an error message of the server{name} and not the file: the link has expired, was "
            "cut at an &, or is not yours"
        )
    if text.lower().startswith((b"<!doctype html", b"<html", b"<?xml", b"<head", b"<!--")):
        return WEB_PAGE
    if text.startswith((b'{"', b"{\n", b"{\r", b"{ ", b"[", b"{}")):
        return JSON_TEXT
    return None


def wrong_size(path: Path) -> str | None:
    """How a safetensors file is shorter or longer than its header says; None if that is unknown."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if stream.read(1) != b"{" or length > _LONGEST_HEADER:
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


def _diagnosis(path: Path) -> str:
    """What a file is that is no container of tensors, and what to do about it; one line."""
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
    # A protobuf has no magic number, only a first field: the version of the format.
    if head[:1] == b"\x08" and path.suffix.lower() == ".onnx":
        return (
            "it is an ONNX model, a network that runs by itself, which is not read back as "
            "weights; give the weights that it was exported from"
        )
    archive = next((name for magic, name in _ARCHIVES.items() if head.startswith(magic)), None)
    if archive or head[257:262] == b"ustar":
        return f"it is a {archive or 'tar'} archive; unpack it and give the file of weights in it"
    if other := next((name for magic, name in _OTHERS.items() if head.startswith(magic)), None):
        return f"it is {other}; give another file"
    return wrong_size(path) or _text(head) or "its content is of an unknown kind"


def _head(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise CheckpointError(missing(path))
        with path.open("rb") as stream:
            return stream.read(_HEAD)
    except OSError as error:
        raise unreadable(path, error) from error


def _text(head: bytes) -> str | None:
    try:
        text = head.decode()
    except UnicodeDecodeError:
        return None
    if not text.translate(dict.fromkeys(map(ord, "\n\r\t"), " ")).isprintable():
        return None
    return "it is a text file"
