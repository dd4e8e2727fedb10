"""A small ViT's weights and folders of noise, for tests of feature extraction."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dinov3_features.task import FeaturesTask
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.recipes.structure import structure_component
from dinov3_framework.registry import Registry
from dinov3_framework.weights.export import export_backbone

PATCH, DIM, DEPTH, SIZE, STORAGE = 8, 16, 3, 32, 2


@cache
def registry() -> Registry:
    return Registry.load()


def export(path: Path, channels: int = 3, **changes: Any) -> Path:
    values = {
        "patch_size": PATCH,
        "embed_dim": DIM,
        "depth": DEPTH,
        "num_heads": 2,
        "n_storage_tokens": STORAGE,
        "in_chans": channels,
        **changes,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = registry().build("backbone", "vit", **values)
        backbone.init_weights()
    images = ImagesConfig(channels=channels, mean=(0.4,) * channels, std=(0.2,) * channels)
    export_backbone(
        path,
        backbone.state_dict(),
        component="vit",
        config=values,
        images=images,
        size=SIZE,
        provenance={},
    )
    return path


def noise(height: int, width: int, channels: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, channels)).astype(np.uint8)


def folder(path: Path, count: int = 10, corrupt: tuple[int, ...] = ()) -> Path:
    """RGB files of several shapes in two class folders; ``corrupt`` ones hold no image."""
    for index in range(count):
        file = path / "ab"[index >= count // 2] / f"{index:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        if index in corrupt:
            file.write_bytes(b"no image")
        else:
            pixels = noise(30 + index % 3 * 8, 40 + index % 2 * 5, 3, index)
            Image.fromarray(pixels).save(file)
    return path


def task(root: Path, weights: Path | None, **options: Any) -> FeaturesTask:
    dataset = {"use": "image_folder", "root": str(root)}
    given = {"dataset": dataset, "batch_size": 3, "workers": 0, "rows_per_part": 4, **options}
    if weights is not None:
        given["weights"] = str(weights)
    built = registry().build(
        structure_component(registry(), "task", "features", given), registry=registry()
    )
    assert isinstance(built, FeaturesTask)
    return built


def tensors(output: Path) -> dict[str, Tensor]:
    return load_file(output / "features.safetensors")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def files(output: Path) -> dict[str, bytes]:
    """What a run leaves for people, by name."""
    names = [*output.glob("features*.*"), output / "index.csv", output / "skipped.csv"]
    return {path.name: path.read_bytes() for path in names if path.is_file()}
