"""What a checkpoint folder must hold: every file's size and SHA-256, and a marker that it is whole.

Neither torch's sharded checkpoints nor safetensors notice flipped bytes, so the manifest is what
tells a sound checkpoint from a damaged one. The marker is written last; it names the version of
the format and the SHA-256 of the manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from attrs import asdict, frozen

from dinov3_framework.errors import CheckpointError
from dinov3_framework.runtime.durable import open_file, parse_json, read_file, sync, write_and_sync

FORMAT = 1
MANIFEST = "manifest.json"
MARKER = "COMPLETE"
STATE = "state.json"

_MAGIC = "dinov3 checkpoint"


class Damage(Exception):
    """A file of a checkpoint that is missing, truncated or altered: which, and how."""

    def __init__(self, file: str, reason: str) -> None:
        self.file, self.reason = file, reason
        super().__init__(f"{file}: {reason}")


@frozen
class FileRecord:
    """Size in bytes and SHA-256 (hex) of one file."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        with open_file(path) as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            return cls(stream.tell(), digest)


@frozen
class Manifest:
    """The files of one checkpoint, by name, and the step it was made after."""

    step: int
    files: Mapping[str, FileRecord]

    def write(self, folder: Path) -> None:
        """Write the manifest, then the marker, and bring both to the disk."""
        records = {name: asdict(record) for name, record in sorted(self.files.items())}
        text = json.dumps({"format": FORMAT, "step": self.step, "files": records}, indent=1)
        data = text.encode()
        write_and_sync(folder / MANIFEST, data)
        digest = hashlib.sha256(data).hexdigest()
        write_and_sync(folder / MARKER, f"{_MAGIC} {FORMAT}\n{digest}\n".encode())
        sync(folder)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read marker and manifest.

        Raises ``Damage`` where one is missing or altered, ``CheckpointError`` where a newer
        version of the format was used.
        """
        marker = _read(folder / MARKER).decode(errors="replace")
        first, _, rest = marker.partition("\n")
        version = first.removeprefix(_MAGIC).strip()
        if not first.startswith(_MAGIC) or not version.isdecimal():
            raise Damage(MARKER, "is not a checkpoint's marker")
        if int(version) != FORMAT:
            raise CheckpointError(
                f"{folder}: written in format {version} of checkpoints, this version of "
                f"dinov3_framework reads format {FORMAT}; use the version that wrote it"
            )
        data = _read(folder / MANIFEST)
        if hashlib.sha256(data).hexdigest() != rest.strip():
            raise Damage(MANIFEST, f"does not have the SHA-256 in {MARKER}: altered or truncated")
        try:
            return cls._parse(parse_json(data))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise Damage(MANIFEST, f"is malformed ({type(error).__name__}: {error})") from error

    @classmethod
    def _parse(cls, content: Any) -> Manifest:
        files = {}
        for name, record in content["files"].items():
            if not is_plain_name(name):
                raise ValueError(f"{name!r} is not a plain file name")
            files[name] = FileRecord(int(record["bytes"]), str(record["sha256"]))
        return cls(int(content["step"]), files)

    def share(self, rank: int, world_size: int) -> list[str]:
        """The files that one of several processes checks: about as many bytes for each."""
        loads = [0] * world_size
        mine = []
        for name in sorted(self.files, key=lambda name: (-self.files[name].bytes, name)):
            lightest = loads.index(min(loads))
            loads[lightest] += self.files[name].bytes
            if lightest == rank:
                mine.append(name)
        return mine

    def damages(self, folder: Path, names: Iterable[str]) -> list[str]:
        """What is wrong with these files, one line each."""
        return [line for name in names if (line := self._damage(folder, name)) is not None]

    def _damage(self, folder: Path, name: str) -> str | None:
        expected = self.files[name]
        try:
            size = (folder / name).stat().st_size
            if size != expected.bytes:
                return f"{name}: has {size:,} bytes, the manifest says {expected.bytes:,}"
            if FileRecord.of(folder / name) != expected:
                return f"{name}: does not have the manifest's SHA-256: its bytes were altered"
        except FileNotFoundError:
            return f"{name}: is missing"
        except OSError as error:
            return f"{name}: cannot be read ({error.strerror})"
        return None


def parse_state(data: bytes) -> dict[str, Any]:
    """The JSON object that a ``state.json`` holds; raises ``Damage`` where it holds none."""
    try:
        state = parse_json(data)
    except ValueError as error:
        raise Damage(STATE, f"is malformed ({type(error).__name__}: {error})") from error
    if not isinstance(state, dict):
        raise Damage(STATE, f"is malformed (a {type(state).__name__} where a table should be)")
    return state


def is_plain_name(name: object) -> bool:
    """Whether ``name`` is the name of a file and cannot lead out of its folder."""
    if not isinstance(name, str):
        return False
    return bool(name) and name not in (".", "..") and not set(name) & {"/", "\\", "\0"}


def leads_out(path: Path) -> bool:
    """Whether a file is a link to the outside of its folder.

    In Hugging Face's cache all files are links: to blobs in the folder of their model, or in one
    beside it that models share (huggingface_hub 2).
    """
    folder, file = path.parent.resolve(), path.resolve()
    models = (each for each in folder.parents if each.name.startswith("models--"))
    inside = [folder, *(place for each in models for place in (each, each.with_name("blobs")))]
    return not any(file.is_relative_to(each) for each in inside)


def _read(path: Path) -> bytes:
    try:
        return read_file(path)
    except FileNotFoundError:
        raise Damage(path.name, "is missing") from None
    except OSError as error:
        raise Damage(path.name, f"cannot be read ({error.strerror})") from error
