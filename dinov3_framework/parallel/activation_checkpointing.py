"""Blocks whose backward pass computes their activations anew instead of keeping them.

Random numbers are drawn again as they were, so that every figure stays what it was, bit for bit.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

# What takes longest to compute for the memory that its result takes.
_KEPT = frozenset(
    operator
    for name in (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "convolution",
        "_scaled_mm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    )
    if (packet := getattr(torch.ops.aten, name, None)) is not None
    for operator in (packet.default,)
)


def recompute(block: nn.Module, *, selective: bool) -> None:
    """Have a block recomputed; with ``selective`` all but its products and attention.

    The block stays the same object under the same names: only its class is replaced, by one whose
    ``forward`` goes through ``torch.utils.checkpoint``. Without gradients it does what it did.
    """
    block.__class__ = _recomputed(type(block), selective)  # type: ignore[arg-type]


@cache  # one class for all blocks alike: they then share what torch.compile makes of them
def _recomputed(cls: type[nn.Module], selective: bool) -> type[nn.Module]:
    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return cls.forward(self, *args, **kwargs)
        return checkpoint(partial(cls.forward, self), *args, **options, **kwargs)

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
