"""Self-supervised training: a student, its teacher, any losses; one student or several."""

from __future__ import annotations

from dinov3_framework import Component, hookimpl
from dinov3_ssl.configs import DistillConfig, MultiDistillConfig, PretrainConfig, RankMeConfig


@hookimpl
def dinov3_tasks() -> list[Component]:
    return [
        Component("pretrain", PretrainConfig, "dinov3_ssl.pretrain:Pretrain.task"),
        Component("distill", DistillConfig, "dinov3_ssl.distill:Distill.task"),
        Component("multi_distill", MultiDistillConfig, "dinov3_ssl.multi_distill:MultiDistill"),
    ]


@hookimpl
def dinov3_observers() -> list[Component]:
    return [Component("rankme", RankMeConfig, "dinov3_ssl.collapse:RankMe")]
