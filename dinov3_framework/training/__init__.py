"""The one trainer: its loop, its optimizer, its metrics."""

from __future__ import annotations

from typing import Literal

from dinov3_framework.configs import config, fraction, not_negative, option, positive
from dinov3_framework.schedules import Schedule


@config
class OptimizerConfig:
    """AdamW and its schedules."""

    lr: Schedule = option("learning rate, before scaling: a number or a schedule")
    lr_scaling: Literal["none", "sqrt_wrt_1024", "linear_wrt_256"] = option(
        "how the learning rate grows with the global batch: 4 sqrt(batch / 1024), batch / 256",
        default="none",
    )
    freeze_last_layer: int = option(
        "iterations in which prototypes do not learn", default=0, check=not_negative
    )
    weight_decay: Schedule = option("weight decay: a number or a schedule")
    betas: tuple[float, float] = option("AdamW's betas", default=(0.9, 0.999))
    clip_grad: float | None = option(
        'largest gradient norm of each network; "none": no clipping', default=3.0, check=positive
    )
    layerwise_decay: float = option(
        "factor of the learning rate from a layer to the one below", default=0.9, check=fraction
    )
    patch_embed_lr_mult: float = option(
        "factor of the patch embedding's learning rate", default=0.2, check=not_negative
    )
