"""Looks on while a step runs: every operation, in real or in pretended tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dinov3_estimate.memory import Kind, Ledger
from dinov3_estimate.messages import message
from dinov3_estimate.tally import Product, Tally

_aten = torch.ops.aten
_DTYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8",
    torch.float8_e5m2: "fp8",
}
# The CPU's name of attention has no formula in torch.
_FLASH = flop_registry[_aten._scaled_dot_product_flash_attention]
_FLASH_BACKWARD = flop_registry[_aten._scaled_dot_product_flash_attention_backward]
_FORMULAS: Mapping[Any, Callable[..., int]] = flop_registry | {
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, out_val, **__: _FLASH(
        q, k, v, out_val=out_val
    ),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda g, q, k, v, *_, out_val, **__: _FLASH_BACKWARD(g, q, k, v, out_val=out_val)
    ),
}
# What only asks, or takes memory without touching it.
_IDLE = {
    _aten.empty,
    _aten.empty_like,
    _aten.empty_strided,
    _aten.new_empty,
    _aten.new_empty_strided,
}


class Watch(TorchDispatchMode):
    """Keeps a ledger of memory and a tally of work while a ``with`` lasts.

    ``phase`` is what goes on, to be set by who runs the step: ``forward``, ``backward`` or another
    word. What it has not been told by ``ledger.call``, it judges by the operation and the phase.
    """

    def __init__(self, granularity: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger = Ledger(granularity)
        self.tally = Tally()
        self.phase = ""
        self._resize = torch.UntypedStorage.resize_

    # ------------------------------------------------------------------ entering, leaving
    def __enter__(self) -> Self:
        # FSDP frees and takes memory by resizing storages, which is no operation.
        original, ledger = self._resize, self.ledger

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = original(storage, size)
            ledger.resized(storage, f"{self.phase}, gathering parameters")
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign,assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    @contextmanager
    def counting(self, tally: Tally) -> Iterator[None]:
        """Count into another tally for a while."""
        before, self.tally = self.tally, tally
        try:
            yield
        finally:
            self.tally = before

    # ------------------------------------------------------------------ operations
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # Sharded tensors first turn into operations on their parts, which come here again.
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace in ("prim", "profiler"):
            return result
        outputs = list(_tensors(result))
        inputs = [*_tensors(args), *_tensors(kwargs.values())]
        self._remember(func, inputs, outputs, kwargs)
        if (found := message(func, args, result, self.phase == "backward")) is not None:
            self.tally.messages[found] += 1
        else:
            self._count(func, args, kwargs, result, inputs, outputs)
        return result

    def _remember(
        self, func: Any, inputs: list[Tensor], outputs: list[Tensor], kwargs: Mapping[str, Any]
    ) -> None:
        ledger, name = self.ledger, func._schema.name
        kind = self._kind()
        if name == "aten::_to_copy" and ledger.kind_of(inputs[0]) is Kind.GRADIENTS:
            kind = Kind.GRADIENTS
        when = f"{self.phase}, at {name.partition('::')[2]}"
        for tensor in outputs:
            ledger.note(tensor, kind, when)
        if name == "fsdp::all_gather_copy_in":
            ledger.call(outputs, Kind.GATHERED)
        elif name == "fsdp::split_with_sizes_copy":
            ledger.call(_tensors(kwargs["out"]), Kind.GATHERED)
        elif name == "c10d::_reduce_scatter_base_":
            ledger.call(inputs[:1], Kind.GRADIENTS)

    def _kind(self) -> Kind:
        # In a backward pass gradients are asked for only where activations are computed again.
        if self.phase == "forward" or (self.phase == "backward" and torch.is_grad_enabled()):
            return Kind.ACTIVATIONS
        return Kind.TEMPORARY

    def _count(
        self,
        func: Any,
        args: Any,
        kwargs: Mapping[str, Any],
        result: Any,
        inputs: list[Tensor],
        outputs: list[Tensor],
    ) -> None:
        packet = func._overloadpacket
        if packet in _IDLE or _is_view(func, inputs, outputs):
            return
        moved = sum(map(_size, inputs)) + sum(map(_size, outputs))
        self.tally.kernels += 1
        if packet in _FORMULAS:
            flops = int(_FORMULAS[packet](*args, **kwargs, out_val=result))
            self.tally.products[Product(_dtype(inputs), flops, moved)] += 1
        else:
            self.tally.moved += moved


def _is_view(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Whether an operation only looks at memory in another way."""
    if func._schema.is_mutable or not outputs:
        return False
    if func.is_view:
        return True
    known = {tensor.untyped_storage()._cdata for tensor in inputs}
    return all(tensor.untyped_storage()._cdata in known for tensor in outputs)


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors among nested lists and tuples."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)) or type(values).__name__ == "dict_values":
        for value in values:
            yield from _tensors(value)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _dtype(inputs: list[Tensor]) -> str:
    """What a product is calculated in: the type of its second factor, as the first may be added."""
    tensor = inputs[min(1, len(inputs) - 1)]
    return _DTYPES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
