"""Targets of a sample as tensors and JSON, and back: what files hold of them.

A nested value becomes a table that JSON can hold, and tensors by name beside it. Integers are kept
in the smallest type that holds them all, a mask of 150 classes in a byte a pixel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinov3_framework import DataError

_SMALLER = (torch.uint8, torch.int16, torch.int32)
_INTEGERS = (*_SMALLER, torch.int8, torch.int64)


def pack(value: Any, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What JSON holds of a target; its tensors are added to ``tensors`` under names with ``name``.

    Raises ``DataError`` for what is no tensor, number, text, or list or dict of them.
    """
    if isinstance(value, Tensor):
        return _pack_tensor(value, name, tensors)
    if isinstance(value, list | tuple):
        items = [pack(each, f"{name}.{place}", tensors) for place, each in enumerate(value)]
        return {"list": items, "tuple": isinstance(value, tuple)}
    if isinstance(value, Mapping):
        items = [[key, pack(each, f"{name}.{key}", tensors)] for key, each in value.items()]
        return {"items": items}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise DataError(
        f"the target {name.partition('.')[2]} holds a {type(value).__name__}, which cannot be kept "
        'with features; set reuse_features = "never"'
    )


def unpack(packed: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """The value that :func:`pack` was given."""
    if "tensor" in packed:
        return _unpack_tensor(packed, tensors)
    if "list" in packed:
        found = [unpack(each, tensors) for each in packed["list"]]
        return tuple(found) if packed["tuple"] else found
    if "items" in packed:
        return {key: unpack(each, tensors) for key, each in packed["items"]}
    return packed["value"]


def _pack_tensor(value: Tensor, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    from torchvision import tv_tensors

    plain = value.detach().as_subclass(Tensor).contiguous()
    tensors[name] = _smallest(plain)
    packed = {"tensor": name, "dtype": str(plain.dtype).removeprefix("torch."), "type": ""}
    if isinstance(value, tv_tensors.Mask):
        packed["type"] = "mask"
    if isinstance(value, tv_tensors.BoundingBoxes):
        packed |= {"type": "boxes", "format": value.format.value, "canvas": [*value.canvas_size]}
    return packed


def _unpack_tensor(packed: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    from torchvision import tv_tensors

    # A copy, whatever the type: what is kept must not be written to.
    plain = tensors[packed["tensor"]].to(getattr(torch, packed["dtype"]), copy=True)
    if packed["type"] == "mask":
        return tv_tensors.Mask(plain)
    if packed["type"] == "boxes":
        size = tuple(packed["canvas"])
        return tv_tensors.BoundingBoxes(plain, format=packed["format"], canvas_size=size)  # type: ignore[call-overload,no-any-return]
    return plain


def _smallest(tensor: Tensor) -> Tensor:
    if tensor.dtype not in _INTEGERS or not tensor.numel():
        return tensor.clone()
    low, high = (int(each) for each in tensor.aminmax())
    for dtype in _SMALLER:
        if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max:
            return tensor.to(dtype, copy=True)
    return tensor.clone()
