"""The recipe for somebody with photographs and one machine, on forty real ones."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from run_support import HERE, run_here

from dinov3_framework import Registry, load_backbone

RECIPES = HERE.parents[1] / "recipes"
CHAIN = (str(RECIPES / "cpu.toml"), "loader.workers=0")
# Smaller crops and one pass: seconds instead of minutes.
BRIEF = (
    "epochs=1",
    "augmentation.global_size=64",
    "augmentation.local_size=32",
    "augmentation.local_crops=2",
)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty JPEG files: parts of photographs that matplotlib ships."""
    folder = tmp_path_factory.mktemp("photographs")
    samples = Path(matplotlib.get_data_path()) / "sample_data"
    whole = [Image.open(path).convert("RGB") for path in sorted(samples.glob("*.jpg"))]
    random = np.random.default_rng(0)
    for number in range(40):
        image = whole[number % len(whole)]
        width, height = (int(random.integers(180, side)) for side in image.size)
        left = int(random.integers(0, image.width - width))
        top = int(random.integers(0, image.height - height))
        image.crop((left, top, left + width, top + height)).save(folder / f"{number:03}.jpg")
    return folder


@pytest.mark.slow
def test_photographs_train_from_published_weights(tmp_path: Path, photographs: Path) -> None:
    torch.manual_seed(0)
    weights = tmp_path / "dinov3_vits16.pth"
    torch.save(Registry.load().build("backbone", "vit_small").state_dict(), weights)
    words = (*CHAIN, f"dataset.root={photographs}", f"init_from.weights={weights}", *BRIEF)
    recipe, output = RECIPES / "my_images.toml", tmp_path / "run"
    checked = run_here(output, *words, "--check", recipe=recipe)
    assert checked.returncode == 0, checked.stderr
    assert "40 images" in checked.stdout
    assert "note" not in checked.stdout
    done = run_here(output, *words, recipe=recipe)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    watched = [row["rankme"] for row in rows if "rankme" in row]
    assert len(watched) == 1 + 2, "before the first of two iterations, and after each"
    assert all(1 <= rank <= 256 for rank in watched)
    for name in ("crops", "curves", "patch_pca"):
        assert (output / "figures" / f"{name}.png").stat().st_size > 10_000
    features = load_backbone(output).features(sorted(photographs.iterdir())[:3])
    assert features.shape == (3, 384)
    assert features.isfinite().all()
