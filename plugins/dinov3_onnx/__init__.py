"""Backbones, and heads on them, as ONNX models: a format of weights to convert to."""

from __future__ import annotations

from dinov3_framework import WeightsWriter, hookimpl


@hookimpl
def dinov3_weights_writers() -> list[WeightsWriter]:
    write, predictions = (f"dinov3_onnx.export:export_{name}" for name in ("onnx", "predictions"))
    return [WeightsWriter("onnx", ".onnx", write, write_with_head=predictions)]
