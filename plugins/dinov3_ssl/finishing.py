"""The end of a training: the file of its backbone, and what a person is told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinov3_framework.contracts.data import Augmentation
from dinov3_framework.registry import Registry
from dinov3_framework.runtime.console import print_table
from dinov3_framework.weights.export import export_gathered
from dinov3_framework.weights.info import BackboneInfo
from dinov3_ssl.configs import TrainingConfig, resolved_backbone
from dinov3_ssl.networks import Networks


def export_average(
    path: Path,
    config: TrainingConfig,
    registry: Registry,
    networks: Networks,
    augmentation: Augmentation,
    provenance: Mapping[str, str],
) -> None:
    """Write the backbone of the student's moving average as a file of its own.

    To be called by every process; raises as ``export_gathered`` does.
    """
    component, values = registry.values_of(resolved_backbone(config))
    size = augmentation.views["global"].size
    info = BackboneInfo(component, values, config.images, size, provenance)
    export_gathered(path, networks.teacher["backbone"], info)


def say_goodbye(results: Mapping[str, Any], output_dir: Path, export: Path) -> None:
    """Show tables of results, and what to do with them."""
    for name, value in results.items():
        if isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
            print_table(name, value)
    print(f"\nDone. Everything is in {output_dir}:")
    for entry in sorted(output_dir.iterdir()):
        if not entry.name.startswith("."):
            print(f"  {entry.name}{'/' if entry.is_dir() else ''}")
    print(
        "\nUse the backbone from Python:\n\n"
        "  from dinov3_framework import load_backbone\n"
        f'  backbone = load_backbone("{export}")\n'
        '  features = backbone.features("an image.png")  # [1, D] class token\n'
    )
