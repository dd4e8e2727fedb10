"""Backbones as ONNX models: a format of weights to convert to."""

from __future__ import annotations

from dinov3_framework import WeightsWriter, hookimpl


@hookimpl
def dinov3_weights_writers() -> list[WeightsWriter]:
    return [WeightsWriter("onnx", ".onnx", "dinov3_onnx.export:export_onnx")]
