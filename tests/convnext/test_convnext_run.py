"""A ConvNeXt through the whole of a run: recipe, training, checkpoint, export."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch
from dinov3_convnext.network import ConvNeXt
from run_support import run_here

from dinov3_framework import load_backbone

RECIPE = """
task = "pretrain"
iterations = 2
batch_size = 4
images = { channels = 1, mean = [0.286], std = [0.353] }
dataset = { use = "fashion_mnist", split = "train" }
augmentation = { use = "multi_crop", global_size = 64, local_size = 32, local_crops = 2 }
teacher = { momentum = 0.9 }
optimizer = { use = "adamw", lr = 1e-3, weight_decay = 0.04 }
loader = { workers = 0 }

[backbone]
use = "convnext"
depths = [1, 1, 2, 1]
dims = [8, 12, 16, 24]
drop_path_rate = 0.2

[losses.dino]
use = "dino"
head = { n_prototypes = 32, bottleneck_dim = 8, hidden_dim = 16 }
"""


def run(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE)
    return run_here(folder / "run", *overrides, recipe=recipe)


def test_a_run_and_what_it_exports(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    loaded = load_backbone(tmp_path / "run" / "exports" / "teacher_backbone.safetensors")
    assert isinstance(loaded.backbone, ConvNeXt)
    assert loaded.backbone.config.dims == (8, 12, 16, 24)
    assert loaded.backbone.norm is loaded.backbone.norms[3]
    image = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8)
    features = loaded.features(image)
    assert features.shape == (2, 24)
    assert features.isfinite().all()


def test_crops_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "augmentation.local_size=48")
    assert done.returncode == 2
    assert "48 is no multiple of the patch size 32" in done.stderr + done.stdout
    assert not (tmp_path / "run").exists()


def test_masks_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    sizes = ("augmentation.global_size=64", "augmentation.local_size=32")
    quickstart = Path(__file__).parents[2] / "recipes" / "quickstart.toml"
    done = run_here(tmp_path / "run", "backbone.use=convnext_tiny", *sizes, recipe=quickstart)
    assert done.returncode == 2
    assert "losses.ibot: needs masked patches, which a ConvNeXt cannot replace" in done.stderr
    assert not (tmp_path / "run").exists()
