"""DINOv3's losses: DINO on class tokens, iBOT on masked patches, KoLeo and Gram anchoring."""

from __future__ import annotations

from dinov3_framework import Component, hookimpl
from dinov3_losses.configs import DinoConfig, GramConfig, IbotConfig, KoLeoConfig


@hookimpl
def dinov3_losses() -> list[Component]:
    return [
        Component("dino", DinoConfig, "dinov3_losses.dino:DinoLoss"),
        Component("ibot", IbotConfig, "dinov3_losses.ibot:IbotLoss"),
        Component("koleo", KoLeoConfig, "dinov3_losses.koleo:KoLeoLoss"),
        Component("gram", GramConfig, "dinov3_losses.gram:GramLoss"),
    ]
