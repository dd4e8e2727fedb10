"""Memory and time of predicting a large image in windows, beside the straightforward way.

That one has the scores of all classes at the size of the image for each window, and adds them up
(as the reference does). Each is measured in a process of its own: the peak of memory above that of
the network's own calls, and the time that is not the backbone's. The labels are compared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from dinov3_segment.configs_linear import LinearSegmentationConfig
from dinov3_segment.linear import LinearSegmentation
from torch import Tensor, nn

from dinov3_framework import Backbone, ImagesConfig, Model, Target
from dinov3_framework.data.dense import DensePredictor
from dinov3_framework.data.dense_config import DenseInferenceConfig
from dinov3_framework.data.tokens import head_features

WINDOW, STRIDE = 512, 341


class Patches(Backbone):
    """One convolution in place of a network, and how long its calls took."""

    patch_size, in_chans = 16, 3

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed_dim = width
        self.embed = nn.Conv2d(3, width, 16, stride=16)
        self.wall = self.processor = 0.0

    def init_weights(self) -> None:
        self.embed.reset_parameters()

    def forward_features(self, images: Any, masks: Any = None) -> dict[str, Tensor]:
        wall, processor = time.perf_counter(), time.process_time()
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        self.wall += time.perf_counter() - wall
        self.processor += time.process_time() - processor
        return {"x_norm_clstoken": tokens[:, 0], "x_norm_patchtokens": tokens}


def built(classes: int, width: int) -> Model:
    torch.manual_seed(0)
    backbone = Patches(width).eval()
    targets = {"mask": Target("mask", n_classes=classes, ignore_index=255)}
    head = LinearSegmentation(
        LinearSegmentationConfig(), features=backbone.feature_info, targets=targets
    ).eval()
    return Model(backbone, ImagesConfig(), head, WINDOW)


def ours(model: Model, image: Tensor, size: tuple[int, int]) -> Tensor:
    config = DenseInferenceConfig(mode="slide", window=WINDOW, stride=STRIDE)
    return DensePredictor(model, config, "mask").labels([image], size)


@torch.no_grad()
def straightforward(model: Model, image: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = image.shape[1:]
    head: Any = model.head
    total = torch.zeros(1, head.targets["mask"].count, height, width)
    counts = torch.zeros(1, 1, height, width)
    for row in range(-(-(height - WINDOW) // STRIDE) + 1):
        for column in range(-(-(width - WINDOW) // STRIDE) + 1):
            top, left = min(row * STRIDE, height - WINDOW), min(column * STRIDE, width - WINDOW)
            window = image[None, :, top : top + WINDOW, left : left + WINDOW]
            features = head_features(model.backbone, window, head.needs)
            scores = head.predict(head(features), (WINDOW, WINDOW))["mask"]
            margins = (left, width - left - WINDOW, top, height - top - WINDOW)
            total += F.pad(scores, margins)
            counts[..., top : top + WINDOW, left : left + WINDOW] += 1
    scores = F.interpolate(total / counts, size, mode="bilinear", align_corners=False)
    return scores.softmax(1).argmax(1)[0]


def own_calls(model: Model, image: Tensor, size: tuple[int, int]) -> Tensor:
    """The network alone on four windows, which is how many ours takes at a time."""
    head: Any = model.head
    with torch.no_grad():
        windows = image[None, :, :WINDOW, :WINDOW].expand(4, -1, -1, -1).contiguous()
        found: Tensor = head(head_features(model.backbone, windows, head.needs))
    return found


WAYS: dict[str, Callable[[Model, Tensor, tuple[int, int]], Tensor]] = {
    "network": own_calls,
    "ours": ours,
    "straightforward": straightforward,
}


def peak() -> float:
    """MiB of this process since it was last reset."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def measure(options: argparse.Namespace) -> None:
    """One way, in this process; prints what it took."""
    torch.set_num_threads(1)
    model = built(options.classes, options.width)
    height, width = options.image
    image = torch.randn(3, height, width, generator=torch.Generator().manual_seed(0))
    size = (options.truth[0], options.truth[1])
    own_calls(model, image, size)
    backbone: Any = model.backbone
    walls, processors = [], []
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak()
    for _ in range(options.repeat):
        backbone.wall = backbone.processor = 0.0
        wall, processor = time.perf_counter(), time.process_time()
        found = WAYS[options.way](model, image, size)
        walls.append(time.perf_counter() - wall - backbone.wall)
        processors.append(time.process_time() - processor - backbone.processor)
    torch.save(found, options.labels)
    print(json.dumps([peak() - before, min(walls), min(processors)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--image", type=int, nargs=2, default=[1024, 2048])
    parser.add_argument("--truth", type=int, nargs=2, default=[1024, 2048])
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--part", choices=("windows", "training", "all"), default="all")
    parser.add_argument("--labels", default="")
    options = parser.parse_args()
    if options.way:
        measure(options)
        return
    if options.part != "training":
        measure_windows()
    if options.part != "windows":
        subprocess.run([sys.executable, Path(__file__).with_name("dense_training.py")], check=True)


def measure_windows() -> None:
    found, labels = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for way in WAYS:
            path = f"{folder}/{way}.pt"
            words = [sys.executable, *sys.argv, "--way", way, "--labels", path]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
            found[way], labels[way] = json.loads(done.stdout), torch.load(path)
    own = found["network"][0]
    same = float((labels["ours"] == labels["straightforward"]).double().mean())
    print("| way | memory above the network's, MiB | wall, s | processor, s |\n|---|---|---|---|")
    for way in ("ours", "straightforward"):
        memory, wall, processor = found[way]
        print(f"| {way} | {memory - own:,.0f} | {wall:.2f} | {processor:.2f} |")
    mine, theirs = found["ours"], found["straightforward"]
    shown = [(theirs[0] - own) / max(mine[0] - own, 1), theirs[1] / mine[1], theirs[2] / mine[2]]
    print("| ratio | " + " | ".join(f"{ratio:.1f}" for ratio in shown) + " |")
    print(f"same labels: {same:.7f}; the network's own calls take {own:,.0f} MiB")


if __name__ == "__main__":
    main()
