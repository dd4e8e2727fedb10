"""The engine: everything between a checked recipe and its results; and the tasks it offers."""

from __future__ import annotations

from dinov3_framework.engine.settings import PretrainConfig
from dinov3_framework.hookspecs import hookimpl
from dinov3_framework.registry import Component


@hookimpl
def dinov3_tasks() -> list[Component]:
    return [
        Component("pretrain", PretrainConfig, "dinov3_framework.engine.pretrain:Pretrain"),
    ]
