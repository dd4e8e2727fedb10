"""PyTorch's own files (.pth, .pt, .bin), opened without running anything that is in them.

Such a file is a pickle, and a pickle may name any function to be called. torch's restricted
unpickler is what reads it here; where that refuses, the pickle's instructions are listed, not
followed, to say what it asked for.
"""

from __future__ import annotations

import pickletools
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from dinov3_framework.errors import CheckpointError, first_few
from dinov3_framework.weights import _file_diagnosis as diagnosis

# How far a repacked archive may have shrunk: numbers of a network hardly do, zeros without end.
_PACKED, _ALWAYS = 50, 2**20  # times its size, and bytes that are allowed to any
_DEEPEST = 32  # levels of dicts in dicts; a dict that holds itself would have no end

# What torch.save writes of tensors and plain containers.
_HARMLESS = {"torch", "torch._utils", "torch.storage", "torch._tensor", "torch.nn.parameter"}
_HARMLESS_NAMES = {"collections.OrderedDict", "collections.defaultdict"}
# What runs commands or code, or deletes files, and so has no business in a file of weights.
_DANGEROUS = {"os", "posix", "nt", "subprocess", "sys", "shutil", "socket", "pty", "runpy"}
_DANGEROUS |= {"importlib", "pickle", "_pickle", "ctypes", "code", "webbrowser", "pip"}
_HARMLESS_BUILTINS = {"set", "frozenset", "dict", "list", "tuple", "int", "float", "complex"}
_HARMLESS_BUILTINS |= {"bytearray", "slice", "range", "object", "bool", "str", "bytes"}

# Where checkpoints usually keep a state dict, the likeliest first.
_USUAL_KEYS = ("teacher", "model", "state_dict", "model_state_dict", "student", "module")


def read_pickle(path: Path) -> tuple[list[tuple[str, Tensor]], int]:
    """The tensors of a file that ``torch.save`` wrote, in its order, by dotted names.

    And the bytes of its content, unpacked.

    Those in torch's zip format are mapped, not read: they cost memory where they are used, and
    live and die with the file. The state of an optimizer, entries that are no tensors and those
    whose key is no string are left out. Raises ``CheckpointError`` for anything but a dict with
    tensors in it.
    """
    mapped, size = False, path.stat().st_size
    if diagnosis.container_of(path) == "zip":
        mapped, size = _check_zip(path)
    if (declared := _declared(path)) > size:
        what = f"its storages have {declared:,} values"
        raise diagnosis.declares_too_much(path, what, size)
    # By its suffix alone torch would take a file for safetensors, whatever is in it.
    misnamed = path.suffix == ".safetensors"
    try:
        with warnings.catch_warnings():
            # On protocols and sparse tensors; what matters of it is said below.
            warnings.simplefilter("ignore")
            if misnamed:
                with path.open("rb") as stream:
                    content = torch.load(stream, map_location="cpu", weights_only=True, mmap=False)
            else:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a malformed pickle raises whatever it likes
        raise _refusal(path, error) from error
    return _flattened(path, content), size


# --------------------------------------------------------------------------- the archive
def _check_zip(path: Path) -> tuple[bool, int]:
    """Whether a zip file's tensors can be mapped, and its size unpacked.

    Raises unless it is one that torch wrote.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path} is a PyTorch file that is truncated or damaged: its list of contents, which "
            f"comes last, is not there after {size:,} bytes\n"
            "compare its size with the original's, and download or copy it again"
        ) from error
    names = [entry.filename for entry in entries]
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        raise CheckpointError(
            f"{path} is a TorchScript program (torch.jit.save), which holds code besides weights "
            "and is not run\nsave its weights where it can be trusted: "
            "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')"
        )
    if "data.pkl" not in inner:
        raise CheckpointError(
            f"{path} is a zip archive of {len(names)} files that torch.save did not write\n"
            "if weights are among these, unpack it and give their file"
        )
    # Whoever repacked the archive may have compressed it. torch would map the compressed bytes and
    # take them for numbers.
    unpacked, size = sum(entry.file_size for entry in entries), path.stat().st_size
    if unpacked > size * _PACKED + _ALWAYS:
        raise diagnosis.declares_too_much(path, f"it unpacks to {unpacked:,} bytes", size)
    return all(entry.compress_type == zipfile.ZIP_STORED for entry in entries), unpacked


# --------------------------------------------------------------------------- the content
def _flattened(path: Path, content: Any) -> list[tuple[str, Tensor]]:
    if not isinstance(content, Mapping):
        what = f"a {type(content).__name__}"
        if isinstance(content, Tensor):
            what = f"one tensor {list(content.shape)} without a name"
        raise CheckpointError(
            f"{path} holds {what}; a file of weights holds a state dict, as model.state_dict() "
            "gives it"
        )
    tensors = list(_tensors(path, content, ()))
    if not tensors:
        raise CheckpointError(f"{path} holds no weights: {_instead(content)}")
    return tensors


def _tensors(
    path: Path, content: Mapping[Any, Any], above: tuple[str, ...]
) -> Iterator[tuple[str, Tensor]]:
    if _is_optimizer(content):
        return
    if len(above) > _DEEPEST:
        raise CheckpointError(
            f"{path}: dicts in dicts go deeper than {_DEEPEST} levels at "
            f"{'.'.join(above[:3])}...: this is no state dict"
        )
    for key, entry in content.items():
        if isinstance(key, str) and isinstance(entry, Mapping):
            yield from _tensors(path, entry, (*above, key))
        elif isinstance(key, str) and isinstance(entry, Tensor):
            name = ".".join((*above, key))
            yield name, _plain(path, name, entry)


def _is_optimizer(content: Mapping[Any, Any]) -> bool:
    """Whether this is what ``Optimizer.state_dict()`` gives."""
    return {"state", "param_groups"} <= content.keys()


def _plain(path: Path, name: str, tensor: Tensor) -> Tensor:
    kind = type(tensor).__name__
    if type(tensor) not in (Tensor, nn.Parameter):
        if "DTensor" in kind:
            raise CheckpointError(_split(path, [kind]))
        raise CheckpointError(f"{path}: {name!r} is a {kind}, not a plain tensor")
    if tensor.is_meta:
        raise CheckpointError(f"{path}: {name!r} was saved from the meta device, without values")
    if tensor.is_quantized or tensor.layout != torch.strided:
        state = "quantized" if tensor.is_quantized else "sparse"
        raise CheckpointError(f"{path}: {name!r} is {state}; save it dense and in floating point")
    return tensor.detach()


def _instead(content: Mapping[Any, Any]) -> str:
    if _is_optimizer(content):
        return "it is an optimizer's state; the model's was saved beside it, or in another file"
    names = [repr(key) for key in content][:6]
    strange = {type(key).__name__ for key in content if not isinstance(key, str)}
    if strange:
        return (
            f"its keys are of type {', '.join(sorted(strange))} ({', '.join(names)}) and not the "
            "names of tensors; save model.state_dict()"
        )
    return f"no tensor under its keys {', '.join(names)}" if names else "it is an empty dict"


# --------------------------------------------------------------------------- refusals
def _refusal(path: Path, error: Exception) -> CheckpointError:
    if isinstance(error, OSError):
        return diagnosis.unreadable(path, error)
    asks, strings = _asked(path)
    classes = [each for each in asks if not _harmless(each)]
    if any("DTensor" in each or "ShardedTensor" in each for each in classes):
        return CheckpointError(_split(path, classes))
    if classes:
        return CheckpointError(
            f"{path} asks for {first_few(classes)} besides tensors, and a pickle that does so can "
            f"run any code: refused, nothing in it was run\n{_advice(classes, strings)}"
        )
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, EOFError) or "EOF" in text or "Weights only" in text or not asks:
        return CheckpointError(
            f"{path} is a pickle that is truncated ({path.stat().st_size:,} bytes), damaged, or "
            "none that torch.save wrote\ncompare its size with the original's, and download or "
            "copy it again"
        )
    return CheckpointError(
        f"{path} cannot be read as a PyTorch file ({type(error).__name__}: {text})\n"
        "it is damaged or not what torch.save wrote; download or copy it again"
    )


def _split(path: Path, classes: Sequence[str]) -> str:
    return (
        f"{path} holds tensors that were split over processes ({', '.join(classes[:2])}), of "
        "which one file has a part only\n"
        "save whole tensors where it was made: torch.distributed.checkpoint.state_dict."
        "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))"
    )


def _advice(classes: Sequence[str], strings: Sequence[str]) -> str:
    if any(_dangerous(each) for each in classes):
        return (
            "weights have no use for this, so it may be malicious: delete it, and get the file "
            "from its publisher"
        )
    if "_parameters" in strings and "_modules" in strings:
        change = "torch.save(torch.load(FILE, weights_only=False).state_dict(), 'weights.pth')"
    else:
        key = next((each for each in _USUAL_KEYS if each in strings), "model")
        change = (
            "ckpt = torch.load(FILE, weights_only=False); "
            f"torch.save({{{key!r}: ckpt[{key!r}]}}, 'weights.pth')"
        )
    return f"if you trust its origin, save its tensors alone where it was made: {change}"


def _harmless(name: str) -> bool:
    """Whether a plain file of tensors asks for it too; for messages, not for safety."""
    module, _, attribute = name.rpartition(".")
    if module == "builtins" or module == "__builtin__":
        return attribute in _HARMLESS_BUILTINS
    return module in _HARMLESS or name in _HARMLESS_NAMES


def _dangerous(name: str) -> bool:
    top = name.partition(".")[0]
    return top in _DANGEROUS or (top in ("builtins", "__builtin__") and not _harmless(name))


def _asked(path: Path) -> tuple[list[str], list[str]]:
    """(classes and functions, strings) that a pickle names, in its order, without running it."""
    asks, strings, _ = _listed(path)
    return list(asks), list(strings)


def _declared(path: Path) -> int:
    """How many values the storages of a pickle have, which torch allocates before it reads any.

    Or the bytes of a ``bytearray``, which is made of its length alone.
    """
    asks, _, sizes = _listed(path)
    arrays = any("bytearray" in each for each in asks)
    largest = sizes.pop("", 0)
    return max(largest if arrays else 0, sum(sizes.values()))


def _listed(path: Path) -> tuple[dict[str, None], dict[str, None], dict[str, int]]:
    """Names, strings and sizes in a pickle: see :func:`_list_names`."""
    listed: tuple[dict[str, None], dict[str, None], dict[str, int]] = ({}, {}, {})
    try:
        with _pickle_of(path) as stream:
            # The older format is several pickles in a row: a magic number and versions come first.
            for _ in range(5):
                _list_names(stream, *listed)
    except Exception:  # what a malformed pickle names up to its fault is all there is to know
        pass
    return listed


def _pickle_of(path: Path) -> IO[bytes]:
    if diagnosis.container_of(path) != "zip":
        return path.open("rb")
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.partition("/")[2] == "data.pkl")
        return archive.open(name)


def _list_names(
    stream: IO[bytes], asks: dict[str, None], strings: dict[str, None], sizes: dict[str, int]
) -> None:
    """Add what one pickle names; its strings on the stack are followed through its memo.

    ``sizes`` are of its storages by their keys, and the largest number of all under "".
    """
    number = 0
    memo: dict[int, str | None] = {}
    recent: list[str | None] = [None, None]
    for opcode, argument, _ in pickletools.genops(stream):
        code = opcode.name
        if code in ("GLOBAL", "INST"):
            asks[str(argument).replace(" ", ".")] = None
        elif code == "STACK_GLOBAL":
            asks[f"{recent[-2]}.{recent[-1]}"] = None
        elif code == "MEMOIZE":
            memo[len(memo)] = recent[-1]
        elif code in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[int(argument)] = recent[-1]  # type: ignore[arg-type]
        elif code in ("BINGET", "LONG_BINGET", "GET"):
            recent = [recent[-1], memo.get(int(argument))]  # type: ignore[arg-type]
        elif code == "BINPERSID":  # (..., key, location, numel), perhaps with a view of None
            sizes[recent[-2] or "?"] = number
        elif isinstance(argument, int):
            number = argument
            sizes[""] = max(sizes.get("", 0), number)
        elif isinstance(argument, str):
            strings[argument] = None
            recent = [recent[-1], argument]
