"""Which linear layers of a backbone multiply in float8, and how they are told to.

A layer whose class is ``nn.Linear`` itself, or that has an attribute ``product``, can be told:
that is the function, ``F.linear`` until then, which its ``forward`` calls in its place with tokens,
weight and bias. Parameters, their names and what ``init_weights`` sees stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from dinov3_framework.errors import Problem, first_few
from dinov3_framework.parallel import ParallelConfig
from dinov3_framework.parallel.fp8 import MULTIPLE, linear_emulated, linear_on_chip

_PRODUCTS = {"on": linear_on_chip, "emulated": linear_emulated}


class _Linear(nn.Linear):
    """``nn.Linear`` whose product can be replaced."""

    product = staticmethod(F.linear)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.product(tokens, self.weight, self.bias)


def chosen(config: ParallelConfig, backbone: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a backbone that ``fp8`` concerns, by name."""
    linears = _linears(backbone)
    return {n: linear for n, linear in linears.items() if re.search(config.fp8_filter, n)}


def _linears(backbone: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in backbone.named_modules() if isinstance(m, nn.Linear)}


def use_fp8(config: ParallelConfig, backbone: nn.Module) -> None:
    """Have a backbone multiply in float8 where ``fp8_filter`` says so."""
    for linear in chosen(config, backbone).values():
        if type(linear) is nn.Linear:
            linear.__class__ = _Linear
        linear.product = _PRODUCTS[config.fp8]  # type: ignore[assignment]


def layer_problems(config: ParallelConfig, backbone: nn.Module) -> Iterator[Problem]:
    """Layers that cannot multiply in float8, or that there are none."""
    layers = chosen(config, backbone)
    where = "parallel.fp8_filter"
    if not layers:
        names = list(_linears(backbone))
        there = f"there are {first_few(names)}" if names else "it has none"
        yield Problem(where, f"{config.fp8_filter!r} is in no linear layer's name", there)
    fixed = [n for n, m in layers.items() if type(m) is not nn.Linear and not hasattr(m, "product")]
    if fixed:
        yield Problem(
            where,
            f"layers that cannot be told to multiply in float8: {first_few(fixed)}",
            "leave them out, or have their class call self.product where it calls F.linear",
        )
    odd = [
        f"{name} ({linear.in_features} to {linear.out_features})"
        for name, linear in layers.items()
        if linear.in_features % MULTIPLE or linear.out_features % MULTIPLE
    ]
    if odd and config.fp8 == "on":
        yield Problem(
            where,
            f"layers whose widths are no multiples of {MULTIPLE}, as float8 wants: "
            f"{first_few(odd)}",
            "leave them out, or change the backbone's widths",
        )
