"""Records every operation while a step runs, in real or in fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dinov3_estimate.ledger import ACTIVATIONS, BATCH, GATHERED, GRADIENTS, TEMPORARY, Ledger
from dinov3_estimate.tally import Product, Tally, message

_aten = torch.ops.aten
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
_IDLE = {_aten.empty, _aten.empty_like, _aten.empty_strided}
_IDLE |= {_aten.new_empty, _aten.new_empty_strided}


class OpRecorder(TorchDispatchMode):
    """Keeps a ledger of memory and a tally of work while a ``with`` lasts.

    ``phase`` is what goes on, to be set by who runs the step: ``batch``, ``forward``, ``backward``
    or another word. The kind of a storage follows from the operation and the phase, unless
    ``ledger.assign`` says otherwise.
    """

    def __init__(self, granularity: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger = Ledger(granularity)
        self.tally = Tally()
        self.phase = ""
        self._resize = torch.UntypedStorage.resize_

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
        packet, tally = func._overloadpacket, self.tally
        if (found := message(func, args, result, self.phase == "backward")) is not None:
            tally.messages[found] += 1
        elif self.phase == "batch" or packet in _IDLE or _is_view(func, inputs, outputs):
            pass  # batches are made beside the step
        else:
            moved = sum(map(_size, inputs)) + sum(map(_size, outputs))
            tally.kernels += 1
            if packet in _FORMULAS:
                flops = int(_FORMULAS[packet](*args, **kwargs, out_val=result))
                tally.products[Product(_dtype(inputs), flops, moved)] += 1
            else:
                tally.moved += moved
        return result

    def _remember(
        self, func: Any, inputs: list[Tensor], outputs: list[Tensor], kwargs: Mapping[str, Any]
    ) -> None:
        ledger, name = self.ledger, func._schema.name
        kind = self._kind()
        if name == "aten::_to_copy" and ledger.kind_of(inputs[0]) == GRADIENTS:
            kind = GRADIENTS
        when = f"{self.phase}, at {name.partition('::')[2]}"
        for tensor in outputs:
            ledger.note(tensor, kind, when)
        if name == "fsdp::all_gather_copy_in":
            ledger.assign(outputs, GATHERED)
        elif name == "fsdp::split_with_sizes_copy":
            ledger.assign(_tensors(kwargs["out"]), GATHERED)
        elif name == "c10d::_reduce_scatter_base_":
            ledger.assign(inputs[:1], GRADIENTS)

    def _kind(self) -> str:
        if self.phase == "batch":
            return BATCH
        # In a backward pass gradients are asked for only where activations are computed again.
        if self.phase == "forward" or (self.phase == "backward" and torch.is_grad_enabled()):
            return ACTIVATIONS
        return TEMPORARY


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
    name = str(tensor.dtype).removeprefix("torch.").partition("_")[0]
    return name.replace("bfloat", "bf").replace("float", "fp")
