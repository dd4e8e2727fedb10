"""Images that are not RGB, from files through training to features."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3_framework import load_backbone
from dinov3_framework.cli import main

RECIPE = """
extends = ["dinov3_recipes:quickstart"]
drop = ["observers.knn"]
iterations = 2
batch_size = 4
images = {{ channels = {channels}, mean = {mean}, std = {std} }}

[dataset]
use = "image_folder"
root = "{root}"

[optimizer.lr]
warmup = 1

[loader]
workers = 0

[parallel]
device = "cpu"

[observers.figures]
use = "figures"
dataset = {{ use = "image_folder", root = "{root}" }}
"""


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 4, 13])
def test_channels_are_set_once(tmp_path: Path, channels: int) -> None:
    root = tmp_path / "images"
    root.mkdir()
    rng = np.random.default_rng(0)
    for index in range(6):
        pixels = rng.integers(0, 256, (40, 44, channels)).astype(np.uint8)
        if channels == 13:
            np.save(root / f"{index}.npy", pixels)
        else:
            Image.fromarray(pixels.squeeze()).save(root / f"{index}.png")
    mean, std = [0.25] * channels, [0.125] * channels
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(channels=channels, mean=mean, std=std, root=root))
    output = tmp_path / "run"
    assert main([str(recipe), "--output-dir", str(output)]) == 0
    assert (output / "figures" / "patch_pca.png").exists()

    loaded = load_backbone(output)
    assert loaded.backbone.in_chans == loaded.images.channels == channels
    assert loaded.images.mean == (0.25,) * channels
    pixels = torch.full((channels, 28, 28), 64, dtype=torch.uint8)
    expected = (64 / 255 - 0.25) / 0.125
    torch.testing.assert_close(loaded.transform()(pixels), torch.full((channels, 28, 28), expected))
    assert loaded.features(pixels).shape == (1, 96)

    words = ["features", f"weights={output}", f"dataset.root={root}", "parallel.device=cpu"]
    assert main([*words, "--output-dir", str(tmp_path / "features"), "workers=0"]) == 0
    results = json.loads((tmp_path / "features" / "results.json").read_text())
    assert results["task"] == "features"
    assert (tmp_path / "features" / "features.safetensors").exists()
