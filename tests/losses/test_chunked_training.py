"""Training steps of two processes with sharded projectors, in chunks and in one piece."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dinov3_losses.sinkhorn import balance, sinkhorn_knopp
from loss_support import Results, randn, results_of
from torch import Tensor
from torch.distributed.tensor import DTensor
from trainer_support import pretrain, steps, trainer_of

from dinov3_framework import StepOutputs

WORLD = 2
# Some passes of one image a process, so that a process often has no masked patch.
RECIPE = ("iterations=4", "batch_size=4", "accumulation_steps=2", "losses.dino.weight=0.7")
RECIPE += ("augmentation.masking.probability=0.25", 'drop=["losses.koleo"]')
# At first all tokens say nearly the same: gradients would be differences of rounding. And a masked
# token whose branches are all dropped is zero, which its projector divides by 1e-12.
RECIPE += ("backbone.layerscale_init=0.5", "backbone.drop_path_rate=0.0")
SPREAD = 20
CHUNKS = ("losses.dino.chunk=3", "losses.ibot.chunk=5")
RUNS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "chunked": CHUNKS,
    "plain bf16": ("parallel.param_dtype=bf16",),
    "chunked bf16": ("parallel.param_dtype=bf16", *CHUNKS),
}
STEPS = 2
ROWS = {"even": (5, 5), "uneven": (3, 7), "nothing on one": (0, 10)}  # of each process


def logits() -> Tensor:
    """Far apart, so that no process can do with its own largest."""
    values = randn(10, 12) / 0.1
    values[:4] += 400
    return values


def train(folder: Path, *overrides: str) -> Results:
    """Figures of some steps of the real trainer, and this process's gradients in the first."""
    task = pretrain(*RECIPE, *overrides)
    trainer = trainer_of(task, folder)
    for network in (trainer.unit.placed.student, trainer.unit.placed.teacher):
        for name, parameter in network.named_parameters():
            if name.endswith("weight") and "_head." in name:
                parameter.data.mul_(SPREAD)
    gradients: list[dict[str, Tensor]] = []
    masked: list[int] = []
    optimizer_step = trainer.optimizer.step

    def record_and_step() -> None:
        found = {n: p.grad for n, p in trainer.unit.placed.student.named_parameters()}
        assert all(isinstance(gradient, DTensor) for gradient in found.values())
        gradients.append({n: gradient.to_local().clone() for n, gradient in found.items()})
        optimizer_step()

    def count(_: Any, inputs: tuple[StepOutputs]) -> None:
        masked.append(len(inputs[0].masked_patches()))

    trainer.optimizer.step = record_and_step  # type: ignore[method-assign]
    trainer.unit.objective.losses["ibot"].register_forward_pre_hook(count)
    return {"figures": steps(trainer, STEPS), "gradients": gradients[0], "masked": masked}


def work(rank: int, folder: Path) -> Results:
    found: Results = {name: train(folder, *overrides) for name, overrides in RUNS.items()}
    slices = [slice(0, 5), slice(5, 10), slice(10, 12)]
    for name, sizes in ROWS.items():
        own = logits().split(sizes)[rank]
        parts = {some.start: own[:, some] for some in slices}

        def logits_of(some: slice, parts: dict[int, Tensor] = parts) -> Tensor:
            return parts[some.start].clone()

        balanced = balance(logits_of, slices, len(own), own.device)
        found[name] = torch.cat([balanced.assign(logits_of(s), s) for s in slices], dim=1)
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    return results_of(work, tmp_path_factory.mktemp("training"), WORLD)


pytestmark = pytest.mark.slow


def test_some_process_had_no_masked_patch(results: list[Results]) -> None:
    counts = [result["chunked"]["masked"] for result in results]
    assert any((a == 0) != (b == 0) for a, b in zip(*counts, strict=True)), counts


def test_chunks_change_nothing(results: list[Results]) -> None:
    for result in results:
        plain, chunked = result["plain"], result["chunked"]
        for expected, found in zip(plain["figures"], chunked["figures"], strict=True):
            assert {"loss", "dino", "ibot", "dino/global", "dino/local"} < expected.keys()
            assert found == pytest.approx(expected, rel=1e-5)
        assert plain["gradients"].keys() == chunked["gradients"].keys()
        for name, wanted in plain["gradients"].items():
            distance = (chunked["gradients"][name] - wanted).norm()
            # Further from the losses, sums over patches nearly cancel.
            limit = 1e-5 if "_head." in name else 1e-4
            assert distance <= limit * wanted.norm(), name


def test_bfloat16_is_rounded_little_more(results: list[Results]) -> None:
    for result in results:
        exact, plain, chunked = (result[name] for name in ("plain", "plain bf16", "chunked bf16"))
        assert plain["figures"][0]["loss"] != exact["figures"][0]["loss"]
        for expected, found in zip(plain["figures"], chunked["figures"], strict=True):
            for name in ("loss", "dino", "ibot", "dino/global", "dino/local"):
                assert found[name] == pytest.approx(expected[name], rel=0.001), name
        for name, right in exact["gradients"].items():
            wanted, found = plain["gradients"][name], chunked["gradients"][name]
            assert found.dtype == wanted.dtype == torch.float32
            # Both are some way off, where sums nearly cancel each in its own direction.
            limit = 1.5 * (wanted - right).norm() + 0.01 * right.norm()
            assert (found - right).norm() <= limit, name


@pytest.mark.parametrize("name", ROWS)
def test_sinkhorn(results: list[Results], name: str) -> None:
    parts = torch.cat([result[name] for result in results])
    torch.testing.assert_close(parts, sinkhorn_knopp(logits(), 1.0), rtol=1e-4, atol=1e-7)
