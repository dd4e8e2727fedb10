"""Products of linear layers in float8, scaled by rows.

Activations, weights and the gradients of outputs are rounded to float8 (e4m3: 3 bits of mantissa)
just before they are multiplied, each row divided by a scale that makes its largest magnitude the
largest float8, 448; the products are accumulated in float32 and multiplied by the scales. As in
the DINOv3 paper's training, gradients of weights are computed without float8, and in the backward
pass all of a weight has one scale: its rows are then summed over.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
MULTIPLE = 16  # of which the kernel wants both sides of a weight to be
CAPABILITY = (8, 9)  # of the first CUDA devices with float8
_SMALLEST = 1e-12  # a row of zeros has no largest magnitude to be divided by

# (a [M, K], scales [M, 1], b [N, K], scales [N, 1], dtype of the result) -> [M, N]
Multiply = Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype], Tensor]


def row_scales(rows: Tensor) -> Tensor:
    """What each row of [M, K] is divided by, float32 [M, 1]."""
    return rows.abs().amax(dim=1, keepdim=True).float().clamp(min=_SMALLEST) / LARGEST


def quantise(rows: Tensor, scales: Tensor) -> Tensor:
    """Rows [M, K] over their scales, in float8."""
    return (rows / scales).to(E4M3)


def multiply_on_chip(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, dtype: torch.dtype
) -> Tensor:
    """a b^T by the device's float8 kernel; bfloat16 is the one type that it gives with scales by
    rows, and so the one that ``dtype`` may be."""
    return torch._scaled_mm(a, b.t(), scale_a=a_scales, scale_b=b_scales.t(), out_dtype=dtype)


def multiply_emulated(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, dtype: torch.dtype
) -> Tensor:
    """The same from float8 put back into float32, which holds every product exactly."""
    return (torch.mm(a.float(), b.float().t()) * a_scales * b_scales.t()).to(dtype)


class _RowwiseProduct(torch.autograd.Function):
    """tokens [M, K] times weight [N, K] transposed: [M, N]."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, multiply: Multiply) -> Tensor:
        token_scales, weight_scales = row_scales(tokens), row_scales(weight)
        ctx.multiply = multiply
        ctx.save_for_backward(tokens, weight, weight_scales.max())
        return multiply(
            quantise(tokens, token_scales),
            token_scales,
            quantise(weight, weight_scales),
            weight_scales,
            tokens.dtype,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        tokens, weight, weight_scale = ctx.saved_tensors
        of_tokens = of_weight = None
        if ctx.needs_input_grad[0]:
            scales = row_scales(gradient)
            of_tokens = ctx.multiply(
                quantise(gradient, scales),
                scales,
                quantise(weight, weight_scale).t().contiguous(),
                weight_scale.repeat(weight.shape[1], 1),
                tokens.dtype,
            )
        if ctx.needs_input_grad[1]:
            of_weight = gradient.t() @ tokens
        return of_tokens, of_weight, None


def _linear(tokens: Tensor, weight: Tensor, bias: Tensor | None, multiply: Multiply) -> Tensor:
    rows = tokens.reshape(-1, tokens.shape[-1])
    product: Tensor = _RowwiseProduct.apply(rows, weight, multiply)  # type: ignore[no-untyped-call]
    if bias is not None:
        product = product + bias
    return product.view(*tokens.shape[:-1], -1)


def linear_on_chip(tokens: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As ``F.linear``, in float8; all in bfloat16, on a device of which ``chip_complaint`` has
    none."""
    return _linear(tokens, weight, bias, multiply_on_chip)


def linear_emulated(tokens: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As ``F.linear``, with the rounding of float8, in any precision and on any device."""
    return _linear(tokens, weight, bias, multiply_emulated)


def chip_complaint(device: torch.device) -> str | None:
    """Why a device cannot multiply in float8; None if it can."""
    if device.type != "cuda":
        return f"the CPU ({platform.machine()}) has no float8 products"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return (
            f"{torch.cuda.get_device_name(device)} (compute capability "
            f"{'.'.join(map(str, capability))}) has no float8 products"
        )
    return None
