"""What the golden cases are read and filled with; see golden/README.md for the rule."""

from __future__ import annotations

import json
import math
import os
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from dinov3_ssl.configs import momentum, of_student
from torch import Tensor, nn

from dinov3_framework import Registry, Schedule
from dinov3_framework.recipes.compose import compose
from dinov3_framework.recipes.structure import structure_recipe
from dinov3_framework.training.optimizer import lr_factor

RECIPES = Path(__file__).parents[1] / "recipes"
RTOL, ATOL = 1e-4, 1e-5


# --------------------------------------------------------------------------- cases
@attrs.frozen
class Case:
    """One folder: what was computed, and the arrays."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def spec(self) -> dict[str, Any]:
        return json.loads((self.folder / "case.json").read_text())

    def tensors(self) -> dict[str, Tensor]:
        with np.load(self.folder / "tensors.npz") as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays}


def cases() -> list[Case]:
    """Every folder with a case.json under $GOLDEN_DIR, or else beside this file."""
    root = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parent / "golden")
    return [Case(path.parent) for path in sorted(root.glob("*/case.json"))]


# --------------------------------------------------------------------------- seeded values
def random_state(key: str, seed: int) -> np.random.RandomState:
    return np.random.RandomState((zlib.crc32(key.encode()) ^ seed) & 0x7FFFFFFF)


def seeded(key: str, seed: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 numbers for a key; images are made so."""
    return torch.from_numpy(random_state(key, seed).standard_normal(shape).astype(np.float32))


def filled(key: str, seed: int, shape: tuple[int, ...]) -> Tensor:
    """The value of the parameter that a state dict calls ``key``."""
    z = seeded(key, seed, shape)
    if key.endswith("gamma"):
        return 0.5 + 0.1 * z
    if key.endswith("weight"):
        if len(shape) == 1:
            return 1 + 0.1 * z
        return z * math.prod(shape[1:]) ** -0.5
    return 0.1 * z


@torch.no_grad()
def fill(module: nn.Module, seed: int, prefix: str = "") -> None:
    """Fill every parameter by ``prefix`` + its name; buffers stay."""
    for name, parameter in module.named_parameters():
        parameter.copy_(filled(prefix + name, seed, tuple(parameter.shape)))


# --------------------------------------------------------------------------- comparing
def assert_close(actual: Any, expected: Any, what: str) -> None:
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float32),
        torch.as_tensor(expected, dtype=torch.float32),
        rtol=RTOL,
        atol=ATOL,
        msg=lambda text: f"{what}: {text}",
    )


def assert_figure(actual: Any, golden: Tensor, textbook: Tensor, what: str) -> None:
    """``actual`` agrees with a plain float64 calculation, and with the golden figure if it is one.

    The reference exponentiates logits over a temperature as they are, in float32; where that
    overflows, its figure is NaN and says nothing.
    """
    assert_close(actual, textbook, f"{what}, textbook")
    if golden.isnan().all():
        warnings.warn(f"{what}: the golden figure is NaN; compared in float64 alone", stacklevel=2)
    else:
        assert_close(actual, golden, what)


def textbook_sinkhorn(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    """Sinkhorn-Knopp word by word, in float64, where these logits do not overflow: [n, K]."""
    q = (logits.double() / temperature).exp()
    n, k = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(dim=0, keepdim=True) / k
        q = q / q.sum(dim=1, keepdim=True) / n
    return q * n


def textbook_cross_entropy(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Of rows [n, K], in float64: [n]."""
    return -(targets.double() * (logits.double() / temperature).log_softmax(dim=-1)).sum(dim=-1)


# --------------------------------------------------------------------------- schedules
@attrs.frozen(kw_only=True)
class Schedules:
    """The five schedules of a recipe; the last layer's rate is 0 for ``freeze`` iterations."""

    lr: Schedule
    wd: Schedule
    momentum: Schedule
    teacher_temp: Schedule
    freeze: int
    iterations: int

    def at(self, iteration: int) -> dict[str, float]:
        names = ("lr", "wd", "momentum", "teacher_temp")
        values = {name: getattr(self, name).at(iteration, self.iterations) for name in names}
        values["last_layer_lr"] = 0.0 if iteration < self.freeze else values["lr"]
        return values


def of_recipe(name: str, *, batch_size: int, student: str | None = None) -> Schedules:
    """The schedules that a recipe of this project gives the engine, for a batch of any size.

    ``student`` says which, where there are several.
    """
    config: Any = structure_recipe(Registry.load(), compose(RECIPES / f"{name}.toml"))
    if student is not None:
        config = of_student(config, student, None)
    optimizer, losses = config.optimizer, config.losses
    assert losses["ibot"].teacher_temp == losses["dino"].teacher_temp
    return Schedules(
        lr=optimizer.lr.scaled(lr_factor(optimizer, batch_size)),
        wd=optimizer.weight_decay,
        momentum=momentum(config),
        teacher_temp=losses["dino"].teacher_temp,
        freeze=optimizer.freeze_last_layer,
        iterations=config.iterations,
    )


# Most golden figures are for so many processes, each with the batch that its published file says
# or else 64, whatever the batch of the recipe is.
WORLD = 256

PUBLISHED: Mapping[str, Schedules] = {
    "dinov3_vit7b16_pretrain": of_recipe("vit7b_pretrain", batch_size=16 * WORLD),
    "dinov3_vit7b16_gram_anchor": of_recipe("vit7b_gram_anchor", batch_size=16 * WORLD),
    "dinov3_vit7b16_high_res_adapt": of_recipe("vit7b_high_res_adapt", batch_size=8 * WORLD),
    "vitl_im1k_lin834": of_recipe("vitl_im1k", batch_size=64 * 32),
    "dinov3_vitl16_lvd1689m_distilled": of_recipe(
        "lvd1689m_distill", batch_size=3 * WORLD, student="vitl"
    ),
    "distillation_convnext__convnext_tiny_p16": of_recipe(
        "convnext_distill", batch_size=64 * WORLD, student="tiny"
    ),
    "multidist_tests__vits_p16": of_recipe("im1k_distill", batch_size=64 * WORLD, student="vits"),
}
