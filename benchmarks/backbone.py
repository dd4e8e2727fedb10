"""Milliseconds of the Vision Transformer, beside timm's and transformers' with the same weights.

Every row times the three models in turns, in one process, after their features were compared, and
keeps the least time of each. ``ratio`` is the faster of the other two over ours: 1 or more means
that ours is at least as fast. Needs the packages timm and transformers.

    python benchmarks/backbone.py
    python benchmarks/backbone.py --models vit_small --sizes 224 --passes forward --modes eager

The whole table takes hours on one core: the largest rows run for minutes a pass.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import timm
import torch
from dinov3_vit.configs import PRESETS
from dinov3_vit.huggingface import HuggingFaceLayout
from dinov3_vit.timm import TimmLayout
from dinov3_vit.transformer import VisionTransformer
from torch import Tensor, nn
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from dinov3_framework import Layout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# How far features may lie apart, relative to their norm. In bf16 each model rounds elsewhere.
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
TIMM_NAMES = {
    "vit_small": "vit_small_patch16_dinov3_qkvb",
    "vit_base": "vit_base_patch16_dinov3_qkvb",
}
OURS = "ours"
Step = Callable[[], object]
Features = Callable[[Tensor], tuple[Tensor, Tensor]]


class Row(NamedTuple):
    """What is timed: the columns of the table that say so."""

    model: str
    dtype: str
    size: int
    batch: int
    mode: str
    passes: str

    @property
    def trains(self) -> bool:
        return self.passes != "forward"


# --------------------------------------------------------------------------- the contestants
class Contestant(NamedTuple):
    """A network, and its class tokens [B, D] and patches [B, P, D] after the final norm."""

    network: nn.Module
    features: Features


def contestants(name: str, dtype: torch.dtype) -> dict[str, Contestant]:
    """Ours and the other two, with the same weights and nothing random in training."""
    config = PRESETS[name](pos_embed_rope_rescale_coords=None)
    ours = VisionTransformer(config)
    spread(ours)
    skipped = 1 + config.n_storage_tokens

    def our_features(images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = ours.forward_features(images)
        return tokens["x_norm_clstoken"], tokens["x_norm_patchtokens"]

    eva = timm.create_model(TIMM_NAMES[name], pretrained=False, num_classes=0)
    eva.load_state_dict(named_by(TimmLayout(), ours))

    def eva_features(images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = eva.forward_features(images)
        return tokens[:, 0], tokens[:, skipped:]

    hub = DINOv3ViTModel(
        DINOv3ViTConfig(
            hidden_size=config.embed_dim,
            intermediate_size=int(config.embed_dim * config.ffn_ratio),
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            num_register_tokens=config.n_storage_tokens,
            pos_embed_rescale=None,
            attn_implementation="sdpa",
        )
    )
    hub.load_state_dict(named_by(HuggingFaceLayout(blocks="model.layer."), ours))

    def hub_features(images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = hub(images).last_hidden_state
        return tokens[:, 0], tokens[:, skipped:]

    for network in (ours, eva, hub):
        network.to(dtype)
    return {
        OURS: Contestant(ours, our_features),
        "timm": Contestant(eva, eva_features),
        "transformers": Contestant(hub, hub_features),
    }


@torch.no_grad()
def spread(model: nn.Module) -> None:
    """Weights as spread out as trained ones: initial layer scales hide what the blocks do."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("gamma"):
            parameter.copy_(0.2 + 0.05 * noise)
        elif "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.1 * noise)
        else:
            parameter.copy_(0.03 * noise)


def named_by(layout: Layout, model: VisionTransformer) -> dict[str, Tensor]:
    """The weights under another library's names."""
    state = model.state_dict()
    initial = VisionTransformer(model.config).state_dict()
    renamed: dict[str, Tensor] = {}
    for name, rule in zip(state, layout.rules(model.config, list(state)), strict=True):
        renamed |= rule.write(state[name], partial(initial.__getitem__, name))
    return renamed


# --------------------------------------------------------------------------- one row
def step(contestant: Contestant, features: Features, images: Tensor, trains: bool) -> Step:
    """What is timed: one forward pass, with ``trains`` the backward pass too."""

    @torch.inference_mode()
    def forward() -> object:
        return features(images)

    def both() -> None:
        contestant.network.zero_grad(set_to_none=True)
        tokens = features(images)
        torch.autograd.backward(tokens, [torch.ones_like(part) for part in tokens])

    return both if trains else forward


def compare(models: Mapping[str, Contestant], images: Tensor, tolerance: float) -> None:
    """Raise unless all have the same features."""
    with torch.inference_mode():
        expected = models[OURS].features(images)
        for name, model in models.items():
            for found, wanted in zip(model.features(images), expected, strict=True):
                error = ((found - wanted).float().norm() / wanted.float().norm()).item()
                if not error <= tolerance:
                    raise SystemExit(f"{name}: features differ by {error:.1e} of their norm")


def milliseconds(step: Step) -> float:
    """One thread's time is its processor's, which leaves out what else the machine does."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    step()
    return (clock() - start) * 1e3


def measure(row: Row, models: Mapping[str, Contestant], budget: float) -> dict[str, float]:
    """The least time of each contestant in about ``budget`` seconds of rounds."""
    dtype = DTYPES[row.dtype]
    for model in models.values():
        model.network.train(row.trains)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(row.batch, 3, row.size, row.size, generator=generator).to(dtype)
    compare(models, images[:1], TOLERANCE[row.dtype])
    steps = {}
    for name, model in models.items():
        features = model.features
        if row.mode == "compiled":
            features = torch.compile(features, dynamic=False)
        steps[name] = step(model, features, images, row.trains)
        steps[name]()  # compiles, and fills caches
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    start = time.perf_counter()
    while len(times[OURS]) < 3 or time.perf_counter() - start < budget:
        for name in order:
            times[name].append(milliseconds(steps[name]))
        order.append(order.pop(0))  # nobody always runs after the same one
    for model in models.values():
        model.network.zero_grad(set_to_none=True)
    return {name: min(each) for name, each in times.items()}


# --------------------------------------------------------------------------- the table
def cells(row: Row, models: Mapping[str, Contestant], budget: float) -> list[str]:
    """A row's figures, or why there are none."""
    try:
        times = measure(row, models, budget)
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
        return [f"{type(error).__name__}: {str(error).strip().splitlines()[0]}", "", "", ""]
    finally:
        torch.compiler.reset()
    fastest = min(value for name, value in times.items() if name != OURS)
    return [*(f"{value:.1f}" for value in times.values()), f"{fastest / times[OURS]:.2f}"]


def limit_memory() -> None:
    """Let a row that does not fit into memory fail, rather than the machine."""
    with open("/proc/meminfo") as lines:
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (sizes["MemAvailable"], hard))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the ViT beside timm and transformers.")
    parser.add_argument("--models", nargs="+", choices=TIMM_NAMES, default=list(TIMM_NAMES))
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 768], help="pixels")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    modes, passes = ["eager", "compiled"], ["forward", "forward+backward"]
    parser.add_argument("--modes", nargs="+", choices=modes, default=modes)
    parser.add_argument("--passes", nargs="+", choices=passes, default=passes)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=20, help="seconds of a row, about")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    limit_memory()
    print(f"torch {torch.__version__}, {options.threads} thread(s), milliseconds per pass\n")
    columns = [*Row._fields, OURS, "timm", "transformers", "ratio"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for name, dtype in itertools.product(options.models, options.dtypes):
        models = contestants(name, DTYPES[dtype])
        for rest in itertools.product(
            options.sizes, options.batches, options.modes, options.passes
        ):
            row = Row(name, dtype, *rest)
            line = [str(cell) for cell in row] + cells(row, models, options.budget)
            print("| " + " | ".join(line) + " |", flush=True)


if __name__ == "__main__":
    main()
