"""Predictions for anybody's images: files, pictures and one report."""

from __future__ import annotations

from dinov3_framework import Component, hookimpl


@hookimpl
def dinov3_tasks() -> list[Component]:
    return []
