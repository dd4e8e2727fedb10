"""Time the training of a linear segmentation head on a frozen ViT-S, beside a plain loop.

The loop calls the backbone on every batch, as the reference does, with the same weights, samples,
transform, head, loss and optimizer. Once the transform draws nothing at random, so that the
framework extracts features once; and once it draws places and mirror images, so that both have the
same work. Each run is a process of its own, one thread, no loader workers, that has taken one step
before, which imports everything; all else is counted: recipe, reading, extraction, checkpoints.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dinov3_segment.linear import LinearSegmentation
from PIL import Image

from dinov3_framework import Registry, keyed_seed, load_backbone
from dinov3_framework.cli import main as run_recipe
from dinov3_framework.configs import WEB_IMAGES
from dinov3_framework.data.loader import Layout, TransformedBatches
from dinov3_framework.data.tokens import head_features
from dinov3_framework.parallel.sharder import initial_values
from dinov3_framework.recipes.compose import compose
from dinov3_framework.recipes.structure import structure_recipe
from dinov3_framework.weights.export import export_backbone

STILL = {"resize": "{size}", "side": '"both"'}
RANDOM = {"resize": "{larger}", "crop": "{size}", "crop_at": '"random"', "flip": "0.5"}
RECIPE = """
task = "train_head"
iterations = {iterations}
batch_size = {batch}
log_every = 1

weights = "{folder}/backbone.safetensors"

[dataset]
use = "image_mask_folder"
images = "{folder}/images"
masks = "{folder}/masks"
n_classes = 21
ignore_index = 255

[transform]
use = "joint"
{transform}

[head]
use = "linear_segmentation"
dropout = 0.0

[optimizer]
use = "adamw"
lr = 1e-3
weight_decay = 1e-3
clip_grad = "none"

[loader]
workers = 0

[checkpoint]
every = {iterations}
keep = 1
"""


def draw(folder: Path, count: int) -> None:
    """JPEGs of 480 x 640 px with masks of 21 classes."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for number in range(count):
        coarse = rng.integers(0, 21, (6, 8), dtype=np.uint8)
        mask = coarse.repeat(80, 0).repeat(80, 1)
        noise = rng.integers(0, 40, (480, 640, 3), dtype=np.uint8)
        image = np.stack([mask * 10, mask * 7, 210 - mask * 10], -1) // 2 + noise
        Image.fromarray(image.astype(np.uint8)).save(folder / "images" / f"{number:04}.jpg")
        Image.fromarray(mask).save(folder / "masks" / f"{number:04}.png")


def write_recipe(path: Path, folder: Path, options: argparse.Namespace, augment: bool) -> None:
    values = {"size": str(options.size), "larger": str(options.size * 9 // 8)}
    lines = (RANDOM if augment else STILL).items()
    transform = "\n".join(f"{name} = {value.format(**values)}" for name, value in lines)
    iterations = options.images * options.epochs // options.batch
    text = RECIPE.format(
        iterations=iterations, batch=options.batch, folder=folder, transform=transform
    )
    path.write_text(text)


def ours(recipe: Path, output: Path, *overrides: str) -> list[float]:
    if code := run_recipe([str(recipe), "--output-dir", str(output), *overrides]):
        raise SystemExit(code)
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines]


def plain(recipe: Path, output: Path, *overrides: str) -> list[float]:
    config: Any = structure_recipe(registry := Registry.load(), compose(recipe, overrides))
    backbone = load_backbone(config.weights).backbone
    dataset = registry.build(config.dataset, channels=3)
    transform = registry.build(config.transform, images=WEB_IMAGES, targets=dataset.targets)
    with torch.device("meta"):
        features, targets = backbone.feature_info, dataset.targets
        blueprint = LinearSegmentation(config.head, features=features, targets=targets)
    head: Any = initial_values(blueprint, keyed_seed(config.seed, "init.head")).train()
    batches = TransformedBatches(
        dataset, transform, Layout(1, 0, 1, config.batch_size), config.seed, 0
    )
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=1e-3)
    losses = []
    for step in range(config.iterations):
        batch = batches[step, 0].samples
        with torch.no_grad():
            found = head_features(backbone, batch.images, head.needs)
        loss = head.loss(head(found), batch.targets).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    torch.save(head.state_dict(), output)
    return losses


WAYS = {"ours": ours, "plain": plain}


def measure(options: argparse.Namespace) -> None:
    """One way, in this process; writes what it took."""
    torch.set_num_threads(1)
    folder = Path(options.folder)
    output = folder / f"{options.way}-{options.name}"
    WAYS[options.way](Path(options.recipe), folder / f"{output.name}-first", "iterations=1")
    wall, processor = time.perf_counter(), time.process_time()
    losses = WAYS[options.way](Path(options.recipe), output)
    took = [time.perf_counter() - wall, time.process_time() - processor]
    (folder / "took.json").write_text(json.dumps([*took, losses]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeat", type=int, default=2)
    for inner in ("--way", "--recipe", "--folder", "--name"):
        parser.add_argument(inner, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        measure(options)
        return
    seen = options.images * options.epochs // options.batch * options.batch
    print("| transform | way | images a second | processor, s | wall, s |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw(folder, options.images)
        write_backbone(folder / "backbone.safetensors")
        for augment in (False, True):
            recipe = folder / f"{augment}.toml"
            write_recipe(recipe, folder, options, augment)
            compare(recipe, folder, options.repeat, seen, "random" if augment else "fixed")


def compare(recipe: Path, folder: Path, repeat: int, seen: int, transform: str) -> None:
    """Both ways in turns; the least of each counts."""
    best: dict[str, Any] = {}
    for turn in range(repeat):
        for way in WAYS:
            words = [sys.executable, *sys.argv, "--way", way, "--recipe", str(recipe)]
            words += ["--folder", str(folder), "--name", f"{transform}-{turn}"]
            subprocess.run(words, stdout=subprocess.DEVNULL, check=True)
            wall, processor, losses = json.loads((folder / "took.json").read_text())
            if way not in best or processor < best[way][1]:
                best[way] = wall, processor, losses
    for way, (wall, processor, _) in best.items():
        print(f"| {transform} | {way} | {seen / processor:.2f} | {processor:.1f} | {wall:.1f} |")
    (wall, processor, mine), (wall2, processor2, theirs) = best["ours"], best["plain"]
    ratios = f"{processor2 / processor:.2f} | | {wall2 / wall:.2f}"
    print(f"| {transform} | ratio | {ratios} |", flush=True)
    apart = max(abs(a - b) / b for a, b in zip(mine, theirs, strict=True))
    print(f"losses differ by {apart:.1e} at most, {mine[0]:.3f} at first, {mine[-1]:.3f} at last")


def write_backbone(path: Path) -> None:
    registry = Registry.load()
    values = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    torch.manual_seed(0)
    backbone = registry.build("backbone", "vit", **values)
    export_backbone(
        path,
        backbone.state_dict(),
        component="vit",
        config=values,
        images=WEB_IMAGES,
        size=224,
        provenance={},
    )


if __name__ == "__main__":
    main()
