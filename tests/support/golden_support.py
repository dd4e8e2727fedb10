"""What the golden cases are read and filled with; see golden/README.md for the rule."""

from __future__ import annotations

import json
import math
import os
import warnings
import zlib
from collections.abc import Iterator, Mapping
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

RECIPES = Path(__file__).parents[2] / "recipes"
RTOL, ATOL = 1e-4, 1e-5


# --------------------------------------------------------------------------- cases
class Noted(Mapping[str, Any]):
    """The values of a case; it notes which of them are read, in the mappings inside it too.

    Asking for its names, or whether it has one, reads nothing.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = {name: _noted(value) for name, value in values.items()}
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        value = self._values[name]
        self._read.add(name)
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def unread(self) -> list[str]:
        """The names of values that were not read, as ``gram.tokens_used`` or ``steps.0.terms``."""
        names = []
        for name, value in self._values.items():
            if name not in self._read:
                names.append(name)
                continue
            parts = enumerate(value) if isinstance(value, list) else [(None, value)]
            for index, part in parts:
                if isinstance(part, Noted):
                    place = name if index is None else f"{name}.{index}"
                    names += [f"{place}.{inside}" for inside in part.unread()]
        return names


def _noted(value: Any) -> Any:
    if isinstance(value, list):
        return [_noted(part) for part in value]
    return Noted(value) if isinstance(value, dict) else value


@attrs.frozen
class Case:
    """One case: what was computed, and the arrays by name."""

    name: str
    spec: Noted
    tensors: Noted

    @property
    def kind(self) -> str:
        return str(self.spec["kind"])


def read_case(folder: Path) -> Case:
    tensors = {}
    if (file := folder / "tensors.npz").exists():  # some kinds are numbers alone
        with np.load(file) as arrays:
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays}
    spec = json.loads((folder / "case.json").read_text())
    return Case(folder.name, Noted(spec), Noted(tensors))


def case_folders(kind: str | None = None) -> list[Path]:
    """Folders with a case.json, of one kind or all, under $GOLDEN_DIR, or else tests/golden."""
    root = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parents[1] / "golden")
    found = sorted(path.parent for path in root.glob("*/case.json"))
    return [folder for folder in found if kind in (None, read_case(folder).kind)]


class CannotExpress(Exception):
    """A case has a value that no option of this project stands for."""


def require(name: str, value: Any, only: Any) -> None:
    if value != only:
        raise CannotExpress(f"{name} is {value!r}, and {only!r} is all there is")


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


def assert_sums(value: Tensor, expected: list[float], what: str) -> None:
    """The sum of a parameter and that of its absolute values agree, relative to the latter.

    Adam turns a gradient of almost nothing into a step of full size, so that the error of a sum
    is a share of what was summed, however much of it cancels out.
    """
    total, size = expected
    value = value.detach().double()
    error = max(abs(float(value.sum()) - total), abs(float(value.abs().sum()) - size))
    assert error <= ATOL + RTOL * size, f"{what}: the sums are off by {error}; golden {expected}"


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


@attrs.frozen(kw_only=True)
class Published:
    """A recipe of this project beside a published one.

    ``per_process`` is the batch that the published file says or else 64, whatever the batch of the
    recipe is; ``student`` says which, where there are several.
    """

    recipe: str
    per_process: int
    student: str | None = None

    def schedules(self, world_size: int) -> Schedules:
        """The schedules that the recipe gives the engine."""
        config: Any = structure_recipe(Registry.load(), compose(RECIPES / f"{self.recipe}.toml"))
        if self.student is not None:
            config = of_student(config, self.student, None)
        optimizer, losses = config.optimizer, config.losses
        assert losses["ibot"].teacher_temp == losses["dino"].teacher_temp
        return Schedules(
            lr=optimizer.lr.scaled(lr_factor(optimizer, self.per_process * world_size)),
            wd=optimizer.weight_decay,
            momentum=momentum(config),
            teacher_temp=losses["dino"].teacher_temp,
            freeze=optimizer.freeze_last_layer,
            iterations=config.iterations,
        )


PUBLISHED = {
    "dinov3_vit7b16_pretrain": Published(recipe="vit7b_pretrain", per_process=16),
    "dinov3_vit7b16_gram_anchor": Published(recipe="vit7b_gram_anchor", per_process=16),
    "dinov3_vit7b16_high_res_adapt": Published(recipe="vit7b_high_res_adapt", per_process=8),
    "vitl_im1k_lin834": Published(recipe="vitl_im1k", per_process=64),
    "dinov3_vitl16_lvd1689m_distilled": Published(
        recipe="lvd1689m_distill", per_process=3, student="vitl"
    ),
    "distillation_convnext__convnext_tiny_p16": Published(
        recipe="convnext_distill", per_process=64, student="tiny"
    ),
    "multidist_tests__vits_p16": Published(recipe="im1k_distill", per_process=64, student="vits"),
}
