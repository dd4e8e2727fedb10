"""Files and folders of weights, opened for reading one tensor at a time, whatever holds them.

What a file is follows from its content, not from its name. Nothing in it is run: see ``_pickles``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from attrs import field, frozen
from torch import Tensor

from dinov3_framework.checkpoints.manifest import leads_out
from dinov3_framework.contracts.layouts import Shape
from dinov3_framework.errors import CheckpointError
from dinov3_framework.weights import _file_diagnosis as diagnosis
from dinov3_framework.weights._pickles import read_pickle

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
    "adapter_model.safetensors",  # of PEFT, whose adapters are refused for what they are
    "adapter_model.bin",
)
_ADAPTER = "adapter_config.json"


@frozen
class StoredTensor:
    """One tensor in an open file, folder or checkpoint."""

    shape: Shape
    read: Callable[[], Tensor]  # a contiguous copy on the CPU, which does not need the file


@frozen
class OpenWeights:
    """Tensors by name, and the settings that came along; a ``layouts.Content``."""

    path: Path
    description: str  # in words, for messages: "a safetensors file", "a Hugging Face folder"
    tensors: Mapping[str, StoredTensor] = field(repr=False)
    settings: Mapping[str, Any] = field(factory=dict)  # config.json of a folder
    preprocessor: Mapping[str, Any] = field(factory=dict)  # preprocessor_config.json of a folder
    metadata: Mapping[str, str] = field(factory=dict)  # of a safetensors file
    notes: Sequence[str] = ()  # what a user should know of how it was opened
    shapes: Mapping[str, Shape] = field(init=False, repr=False)

    @shapes.default
    def _shapes(self) -> Mapping[str, Shape]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, as :class:`StoredTensor` gives it."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: there is no tensor {name!r} in it")
        with diagnosis.exhaustion(self.path):
            return self.tensors[name].read()

    def below(self, prefix: str) -> OpenWeights:
        """The tensors whose names begin with ``prefix``, without it."""
        cut = len(prefix)
        tensors = {n[cut:]: each for n, each in self.tensors.items() if n.startswith(prefix)}
        return attrs.evolve(self, tensors=tensors)


@contextmanager
def open_weights(path: Path) -> Iterator[OpenWeights]:
    """Open a safetensors or PyTorch file, or a folder of Hugging Face's or timm's kind.

    Shapes and names are known at once; values are read when asked for. Names are without the parts
    that wrappers such as ``torch.compile`` put into them. Raises ``CheckpointError`` for anything
    else, saying what it is and what to do.
    """
    path = Path(path)
    with ExitStack() as stack:
        try:
            with diagnosis.exhaustion(path):
                opened = _open_folder(path, stack) if path.is_dir() else _open_file(path, stack)
        except OSError as error:
            raise diagnosis.unreadable(path, error) from error
        yield opened


# --------------------------------------------------------------------------- files
@frozen
class _File:
    """One open file, with the names that it has in it."""

    path: Path
    description: str
    tensors: Sequence[tuple[str, StoredTensor]]
    metadata: Mapping[str, str] = {}

    @classmethod
    def open(cls, path: Path, stack: ExitStack) -> _File:
        container = diagnosis.container_of(path)
        if container is None:
            raise diagnosis.not_weights(path)
        if container == "safetensors":
            file, size = _open_safetensors(path, stack), path.stat().st_size
        else:
            content, size = read_pickle(path)
            tensors = [(n, _stored(tuple(t.shape), partial(_same, t))) for n, t in content]
            file = cls(path, "a PyTorch file", tensors)
        return attrs.evolve(file, tensors=[(n, bounded(path, n, t, size)) for n, t in file.tensors])

    def named(self) -> dict[str, StoredTensor]:
        """The tensors under names without the parts of wrappers."""
        origins: dict[str, str] = {}
        found: dict[str, StoredTensor] = {}
        for origin, tensor in self.tensors:
            *parts, last = origin.split(".")
            name = ".".join([part for part in parts if part not in _WRAPPERS] + [last])
            if name in found:
                raise CheckpointError(
                    f"{self.path}: two tensors are called {name!r}, {origins[name]!r} and "
                    f"{origin!r} in the file, once the parts that wrappers add are left out\n"
                    "save one of them only"
                )
            origins[name], found[name] = origin, tensor
        if not found:
            raise CheckpointError(f"{self.path} holds no tensor at all\n{diagnosis.EXPECTED}")
        return found


def _same(tensor: Tensor) -> Tensor:
    return tensor


def bounded(path: Path, name: str, tensor: StoredTensor, size: int) -> StoredTensor:
    """The tensor, or one that refuses to be read if it has more values than a file has bytes.

    Views repeat numbers without end, and an axis of 0 hides how long the others are.
    """
    if (count := math.prod(max(1, axis) for axis in tensor.shape)) <= size:
        return tensor

    def refuse() -> Tensor:
        declared = f"{name!r} {list(tensor.shape)} has {count:,} values"
        raise diagnosis.declares_too_much(path, declared, size)

    return attrs.evolve(tensor, read=refuse)


def _open_file(path: Path, stack: ExitStack) -> OpenWeights:
    file = _File.open(path, stack)
    return OpenWeights(path, file.description, file.named(), metadata=file.metadata)


def _stored(shape: Shape, view: Callable[[], Tensor]) -> StoredTensor:
    """A tensor of which ``view`` may give the file's own memory."""

    def read() -> Tensor:
        with torch.device("cpu"):  # whatever device tensors are being made on
            return view().clone(memory_format=torch.contiguous_format)

    return StoredTensor(shape, read)


def _open_safetensors(path: Path, stack: ExitStack) -> _File:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise CheckpointError(
            f"{path} is a safetensors file; to read it: pip install safetensors"
        ) from error
    try:
        handle = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
    except SafetensorError as error:
        fault = diagnosis.wrong_size(path) or f"its header is malformed ({error})"
        raise CheckpointError(
            f"{path} is a damaged safetensors file: {fault}\ndownload or copy it again"
        ) from error
    tensors = []
    for name in handle.keys():  # noqa: SIM118  # a handle is no mapping
        entry = handle.get_slice(name)
        if (dtype := entry.get_dtype()).startswith(("F4", "F6_")):  # values share bytes
            raise CheckpointError(f"{path}: {name!r} is of type {dtype}, which is not read here")
        shape = tuple(int(size) for size in entry.get_shape())
        tensors.append((name, _stored(shape, partial(handle.get_tensor, name))))
    return _File(path, "a safetensors file", tensors, dict(handle.metadata() or {}))


# --------------------------------------------------------------------------- folders
def _open_folder(folder: Path, stack: ExitStack) -> OpenWeights:
    if (folder / ".metadata").is_file():
        raise CheckpointError(
            f"{folder} is a sharded checkpoint (torch.distributed.checkpoint) and not one file of "
            "weights\nexport a backbone from it first"
        )
    notes: list[str] = []
    weights = next((folder / n for n in _FOLDER_FILES if (folder / n).is_file()), None)
    if weights is None:
        weights = _variant_in(folder)
        notes.append(f"there are no weights but {weights.name}, which are taken")
    names = ["config.json", "open_clip_config.json"]
    if weights.name.startswith("adapter_"):
        names = [_ADAPTER]
    elif (folder / _ADAPTER).is_file():
        notes.append(f"the adapter beside its weights ({_ADAPTER}) is left out")
    file = _open_shards(weights, stack) if weights.suffix == ".json" else _File.open(weights, stack)
    settings = next(filter(None, (_json(folder / name) for name in names)), {})
    preprocessor = _json(folder / "preprocessor_config.json")
    description = _folder_description(settings)
    opened = file.named(), settings, preprocessor, file.metadata
    return OpenWeights(folder, description, *opened, notes=notes)


def _variant_in(folder: Path) -> Path:
    """The weights that transformers saved as a variant: ``model.fp16.safetensors``."""
    variants = set()
    for file in folder.iterdir():
        name, _, rest = file.stem.rpartition(".")
        known = f"{name}{file.suffix}" in _FOLDER_FILES and file.is_file()
        if known and "-" not in rest:  # as fp16-00001-of-00002 has it, one of several shards
            variants.add(rest)
    if not variants:
        raise CheckpointError(
            f"{folder} is a folder without weights ({', '.join(_FOLDER_FILES[:2])}, "
            f"pytorch_model.bin){diagnosis.usable(folder)}\n{diagnosis.EXPECTED}"
        )
    if len(variants) > 1:
        raise CheckpointError(
            f"{folder} holds weights in several variants, {', '.join(sorted(variants))}; leave "
            "those of one in it"
        )
    (variant,) = variants
    names = (name.rpartition(".") for name in _FOLDER_FILES)
    files = (folder / f"{stem}.{variant}.{suffix}" for stem, _, suffix in names)
    return next(file for file in files if file.is_file())


def _folder_description(settings: Mapping[str, Any]) -> str:
    if "model_type" in settings or "architectures" in settings:
        return "a Hugging Face folder"
    return "a timm folder" if "architecture" in settings else "a folder of weights"


def _open_shards(index: Path, stack: ExitStack) -> _File:
    """All shards that an index names, which must hold what it says and nothing else."""
    places = _json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} names no shards: its weight_map is missing or empty")
    for name, shard in places.items():
        # A path in the index could lead out of the folder, to any file of this machine.
        if not isinstance(shard, str) or shard in ("", ".", "..") or set(shard) & set("/\\\0"):
            raise CheckpointError(f"{index}: {name!r} lies at {shard!r}, not in this folder")
    tensors: list[tuple[str, StoredTensor]] = []
    metadata: dict[str, str] = {}
    for shard in sorted(set(places.values())):
        path = index.with_name(shard)
        if not path.is_file():
            raise CheckpointError(
                f"{index} names {shard}, which is not there\ndownload the missing shard, or the "
                "folder again"
            )
        if leads_out(path):
            raise CheckpointError(
                f"{path} is a link that leads out of its folder, and is not followed\n"
                "put the shard itself into the folder"
            )
        file = _File.open(path, stack)
        expected = {name for name, place in places.items() if place == shard}
        if difference := sorted(expected ^ {name for name, _ in file.tensors}):
            raise CheckpointError(
                f"{path} does not hold what {index.name} says: {len(difference)} tensors differ, "
                f"the first {difference[0]!r}\ndownload the folder again"
            )
        tensors += file.tensors
        metadata |= file.metadata
    return _File(index, "shards", tensors, metadata)


def _json(path: Path) -> dict[str, Any]:
    """The table in a file; empty where there is no file."""
    if not path.is_file():
        return {}
    data = path.read_bytes()
    try:
        content: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        answer = diagnosis.web_answer(data[:512]) if data.lstrip()[:1] == b"<" else None
        fault = f"it is {answer}" if answer else str(error)
        raise CheckpointError(f"{path} is not JSON: {fault}\ndownload the folder again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON table, but a {type(content).__name__}")
    return content
