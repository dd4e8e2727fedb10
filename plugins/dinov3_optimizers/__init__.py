"""Optimizers: AdamW and SGD, as torch has them."""

from __future__ import annotations

from dinov3_framework import Component, OptimizerConfig, config, fraction, hookimpl, option


@config
class AdamWConfig(OptimizerConfig):
    """AdamW (Loshchilov and Hutter 2019), as DINOv3 was trained with."""

    betas: tuple[float, float] = option("AdamW's betas", default=(0.9, 0.999))


@config
class SgdConfig(OptimizerConfig):
    """Stochastic gradient descent with momentum."""

    momentum: float = option("share of the last step in the next", default=0.9, check=fraction)
    nesterov: bool = option("Nesterov's momentum", default=False)


@hookimpl
def dinov3_optimizers() -> list[Component]:
    return [
        Component("adamw", AdamWConfig, "dinov3_optimizers.factories:AdamW"),
        Component("sgd", SgdConfig, "dinov3_optimizers.factories:Sgd"),
    ]
