"""Heads that were trained for a few steps, photographs to predict, and a reader of the report."""

from __future__ import annotations

import csv
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from run_support import run_here
from sklearn.datasets import load_sample_image

from dinov3_framework import ImagesConfig, Registry
from dinov3_framework.weights.export import export_backbone

RECIPE = Path(__file__).parents[2] / "recipes" / "predict.toml"
CLASSES = ("sky & sea", "land <b>", "people")
_TINY = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}

_HEAD = """\
task = "train_head"
weights = "{weights}"
iterations = 2
batch_size = 2
dataset = {dataset}
head = {head}
transform = {{ use = "joint", crop = 32 }}
optimizer = {{ use = "adamw", lr = 0.01, weight_decay = 0.0 }}
loader = {{ workers = 0 }}
"""


def backbone(path: Path, seed: int = 0) -> Path:
    """Weights of a small ViT."""
    network = Registry.load().build("backbone", "vit", **_TINY)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network.init_weights()
    export_backbone(
        path,
        network.state_dict(),
        component="vit",
        config=_TINY,
        images=ImagesConfig(),
        size=32,
        provenance={},
    )
    return path


def photos(folder: Path) -> Path:
    """Photographs of several sizes under names of several kinds."""
    china, flower = (load_sample_image(f"{name}.jpg") for name in ("china", "flower"))
    crops = {
        "china.jpg": china[:80, 200:296],
        "ein Bild ü #1.png": flower[100:196, 300:364],
        "sub folder/a/b.webp": flower[200:261, 300:371],
        "sub folder/b.JPG": china[100:148, 200:280],
    }
    for name, pixels in crops.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
    return folder


def trained(folder: Path, kind: str, *overrides: str) -> Path:
    """The run that trained a head of a kind of target on a backbone beside it."""
    data, rng = folder / f"data of {kind}", np.random.default_rng(0)
    for index in range(4):
        names = {"images": f"{index}.png", "masks": f"{index}.png", "depth": f"{index}.npy"}
        # As image_folder wants it: the folder is the class.
        names["classes"] = f"{('cat', 'dog')[index % 2]}/{index}.png"
        for part, name in names.items():
            path = data / part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if part == "depth":
                np.save(path, rng.uniform(1, 9, (40, 48)).astype(np.float32))
            elif part == "masks":
                Image.fromarray(rng.integers(0, 3, (40, 48), dtype=np.uint8)).save(path)
            else:
                Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    images = f'images = "{data}/images"'
    names = ", ".join(f'"{name}"' for name in CLASSES)
    datasets = {
        "mask": f'{{ use = "image_mask_folder", {images}, masks = "{data}/masks", '
        f"classes = [{names}] }}",
        "map": f'{{ use = "image_depth_folder", {images}, depth = "{data}/depth" }}',
        "class": f'{{ use = "image_folder", root = "{data}/classes" }}',
    }
    heads = {"mask": "linear_segmentation", "map": "linear_depth", "class": "linear_classifier"}
    recipe = folder / f"{kind}.toml"
    recipe.write_text(
        _HEAD.format(
            weights=backbone(folder / "backbone.safetensors"),
            dataset=datasets[kind],
            head=f'{{ use = "{heads[kind]}" }}',
        )
    )
    run = folder / f"run of {kind}"
    done = run_here(run, *overrides, recipe=recipe)
    assert done.returncode == 0, done.stderr
    return run


def table(output: Path, name: str = "predictions.csv") -> list[dict[str, str]]:
    with (output / name).open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def files(output: Path) -> dict[str, bytes]:
    """What is predicted and drawn, by path."""
    return {
        str(path.relative_to(output)): path.read_bytes()
        for part in ("predictions", "overlays")
        for path in sorted((output / part).rglob("*"))
        if path.is_file()
    }


class Page(HTMLParser):
    """What a person finds on the page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.images: dict[str, str] = {}  # sources, by what stands for them
        self.text, self.tags = "", list[str]()
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        if tag == "img":
            self.images[found["alt"]] = found["src"]

    def handle_data(self, data: str) -> None:
        self.text += data
