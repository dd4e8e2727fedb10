"""Files and folders of weights, opened for reading one tensor at a time, whatever holds them.

What a file is follows from its content, not from its name. Nothing in it is run: see ``pickles``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from attrs import field, frozen
from torch import Tensor

from dinov3_framework.contracts.layouts import Shape
from dinov3_framework.errors import CheckpointError
from dinov3_framework.weights import looks
from dinov3_framework.weights.containers import Contained, Stored, open_file

# Parts that wrappers (torch.compile, FSDP, activation checkpointing, data parallel) put into names.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"}

# What the weights of a folder are called, the preferred first.
_FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)


@frozen
class Source:
    """An open file or folder of weights (``layouts.Content``); to be used inside ``open_source``.

    Names are without the parts that wrappers such as ``torch.compile`` put into them.
    """

    path: Path
    kind: str  # in words, for messages: "a safetensors file", "a Hugging Face folder"
    shapes: Mapping[str, Shape] = field(repr=False)
    dtypes: Mapping[str, torch.dtype] = field(repr=False)
    settings: Mapping[str, Any]  # config.json of a folder
    preprocessor: Mapping[str, Any]  # preprocessor_config.json of a folder
    metadata: Mapping[str, str]  # of a safetensors file
    ignored: Sequence[str]  # entries of a PyTorch file that are no weights: epoch, args, optimizer
    _stored: Mapping[str, Stored] = field(repr=False)

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU: a contiguous copy, which does not need the file any longer."""
        with torch.device("cpu"):  # whatever device tensors are being made on
            return _copy(self._find(name).rows(None, None))

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` along the first axis, as a copy; reads no others.

        Raises ``IndexError`` unless ``0 <= start <= stop <= rows``.
        """
        stored = self._find(name)
        if not stored.shape or not 0 <= start <= stop <= stored.shape[0]:
            raise IndexError(f"{name!r} {list(stored.shape)} has no rows {start}:{stop}")
        with torch.device("cpu"):
            return _copy(stored.rows(start, stop))

    def _find(self, name: str) -> Stored:
        if name not in self._stored:
            raise CheckpointError(f"{self.path}: there is no tensor {name!r} in it")
        return self._stored[name]


@contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """Open a safetensors, PyTorch or ONNX file, or a folder of Hugging Face's or timm's kind.

    Shapes and names are known at once; values are read when asked for. Raises ``CheckpointError``
    for anything else, saying what it is and what to do.
    """
    path = Path(path)
    with ExitStack() as stack:
        try:
            if path.is_dir():
                source = _open_folder(path, stack)
            else:
                source = _source(path, *open_file(path, stack))
        except OSError as error:
            raise looks.unreadable(path, error) from error
        yield source


def is_sharded_folder(path: Path) -> bool:
    """Whether a folder is a checkpoint of torch.distributed.checkpoint: shards and their index."""
    return (path / ".metadata").is_file() and any(path.glob("*.distcp"))


def _source(
    path: Path,
    kind: str,
    opened: Contained,
    settings: Mapping[str, Any] | None = None,
    preprocessor: Mapping[str, Any] | None = None,
) -> Source:
    stored = _unwrapped(path, opened.tensors)
    if not stored:
        raise CheckpointError(f"{path} holds no tensor at all\n{looks.EXPECTED}")
    return Source(
        path=path,
        kind=kind,
        shapes={name: each.shape for name, each in stored.items()},
        dtypes={name: each.dtype for name, each in stored.items()},
        settings=settings or {},
        preprocessor=preprocessor or {},
        metadata=opened.metadata,
        ignored=tuple(opened.ignored),
        stored=stored,
    )


def _unwrapped(path: Path, tensors: Iterable[tuple[str, Stored]]) -> dict[str, Stored]:
    origins: dict[str, str] = {}
    stored: dict[str, Stored] = {}
    for origin, tensor in tensors:
        *parts, last = origin.split(".")
        name = ".".join([part for part in parts if part not in _WRAPPERS] + [last])
        if name in stored:
            raise CheckpointError(
                f"{path}: two tensors are called {name!r}, {origins[name]!r} and {origin!r} in the "
                "file, once the parts that wrappers add are left out\nsave one of them only"
            )
        origins[name], stored[name] = origin, tensor
    return stored


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


# --------------------------------------------------------------------------- folders
def _open_folder(folder: Path, stack: ExitStack) -> Source:
    if is_sharded_folder(folder):
        raise CheckpointError(
            f"{folder} is a sharded checkpoint (torch.distributed.checkpoint) and not one file of "
            "weights\nexport a backbone from it first"
        )
    weights = next((folder / n for n in _FOLDER_FILES if (folder / n).is_file()), None)
    if weights is None:
        inside = looks.usable(folder)
        hint = f"; it holds {', '.join(str(each) for each in inside)}" if inside else ""
        raise CheckpointError(
            f"{folder} is a folder without weights ({', '.join(_FOLDER_FILES[:2])}, "
            f"pytorch_model.bin){hint}\n{looks.EXPECTED}"
        )
    index = weights.name.endswith(".index.json")
    opened = _open_shards(weights, stack) if index else open_file(weights, stack)[1]
    configs = [folder / "config.json", folder / "open_clip_config.json"]
    settings = next((_json(each) for each in configs if each.is_file()), {})
    preprocessor = folder / "preprocessor_config.json"
    return _source(
        folder,
        _folder_kind(settings),
        opened,
        settings,
        _json(preprocessor) if preprocessor.is_file() else {},
    )


def _folder_kind(settings: Mapping[str, Any]) -> str:
    if "model_type" in settings or "architectures" in settings:
        return "a Hugging Face folder"
    return "a timm folder" if "architecture" in settings else "a folder of weights"


def _open_shards(index: Path, stack: ExitStack) -> Contained:
    """All shards that an index names, which must hold what it says and nothing else."""
    places = _json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} names no shards: its weight_map is missing or empty")
    for name, shard in places.items():
        # A path in the index could lead out of the folder, to any file of this machine.
        if not isinstance(shard, str) or shard in ("", ".", "..") or set(shard) & set("/\\\0"):
            raise CheckpointError(f"{index}: {name!r} lies at {shard!r}, not in this folder")
    tensors: list[tuple[str, Stored]] = []
    metadata: dict[str, str] = {}
    for shard in sorted(set(places.values())):
        path = index.with_name(shard)
        if not path.is_file():
            raise CheckpointError(
                f"{index} names {shard}, which is not there\ndownload the missing shard, or the "
                "folder again"
            )
        opened = open_file(path, stack)[1]
        expected = {name for name, place in places.items() if place == shard}
        difference = sorted(expected ^ {name for name, _ in opened.tensors})
        if difference:
            raise CheckpointError(
                f"{path} does not hold what {index.name} says: {len(difference)} tensors differ, "
                f"the first {difference[0]!r}\ndownload the folder again"
            )
        tensors += opened.tensors
        metadata |= opened.metadata
    return Contained(tensors, metadata)


def _json(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    try:
        content: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        markup = data.lstrip()[:1] == b"<"
        fault = f"it is {looks.web_answer(data[:512])}" if markup else str(error)
        raise CheckpointError(f"{path} is not JSON: {fault}\ndownload the folder again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON table, but a {type(content).__name__}")
    return content
