"""Losses over two real processes against the same in one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from dinov3_losses.configs import DinoConfig, IbotConfig, KoLeoConfig, ProjectorConfig
from dinov3_losses.dino import DinoLoss
from dinov3_losses.ibot import IbotLoss
from dinov3_losses.koleo import KoLeoLoss
from dinov3_losses.sinkhorn import sinkhorn_knopp
from loss_support import features, randn, step
from process_groups import run_processes
from torch import Tensor

from dinov3_framework import LossResult, UserError

Results = dict[str, Any]
WORLD = 2
SPLITS = {"even": (5, 5), "uneven": (3, 7), "nothing on one": (0, 10)}
KOLEO = {
    "local": KoLeoConfig(),
    "global": KoLeoConfig(distributed=True),
    "global top 2": KoLeoConfig(distributed=True, topk=2),
    "groups of 4": KoLeoConfig(distributed=True, group_size=4),
    "groups of 8": KoLeoConfig(distributed=True, group_size=8),
}
BATCH = 4  # per process
HEAD = ProjectorConfig(n_prototypes=8, bottleneck_dim=3, hidden_dim=4)


def logits() -> Tensor:
    """Far apart, so that no process can do with its own largest."""
    values = randn(10, 12)
    values[:4] += 40
    return values


def tokens() -> Tensor:
    return randn(2, WORLD * BATCH, 6, seed=5)


def koleo(config: KoLeoConfig, part: slice) -> tuple[Tensor, Tensor]:
    """Loss and gradient with respect to one's own part of the global batch."""
    cls = tokens()[:, part].clone().requires_grad_()
    loss = KoLeoLoss(config)(step(student={"global": features(cls=cls)})).loss
    loss.backward()
    return loss.detach(), cls.grad


def projected(kind: str, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
    """DINO's or iBOT's loss on a part of the batch, and the projector's gradients."""
    torch.manual_seed(0)
    student, teacher = (features(samples=WORLD * BATCH, seed=s) for s in (1, 4))
    student, teacher = (
        features(cls=view.cls[:, part], patches=view.patches[:, part])
        for view in (student, teacher)
    )
    masks = torch.zeros(2, WORLD * BATCH, 9, dtype=torch.bool)
    masks[:, BATCH:, :5] = True  # the first process has no masked patch
    loss = DinoLoss(DinoConfig(head=HEAD)) if kind == "dino" else IbotLoss(IbotConfig(head=HEAD))
    heads = [loss.build_projector(8) for _ in range(2)]
    result: LossResult = loss(
        step(
            student={"global": student},
            teacher=teacher,
            masks=masks[:, part],
            project=heads[0],
            project_teacher=lambda values: heads[1](values).detach(),
        )
    )
    result.loss.backward()
    return result.loss.detach(), {n: p.grad for n, p in heads[0].named_parameters()}


def work() -> Results:
    """All that two processes are needed for, in one go: starting them is what takes time."""
    rank = dist.get_rank()
    own = slice(rank * BATCH, (rank + 1) * BATCH)
    results: Results = {
        name: sinkhorn_knopp(logits().split(sizes)[rank], 0.1) for name, sizes in SPLITS.items()
    }
    results |= {name: koleo(config, own) for name, config in KOLEO.items()}
    results |= {kind: projected(kind, own) for kind in ("dino", "ibot")}
    try:
        koleo(KoLeoConfig(distributed=True, group_size=6), own)
    except UserError as error:
        results["error"] = str(error)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    return run_processes(WORLD, tmp_path_factory.mktemp("processes"), work)


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", SPLITS)
def test_sinkhorn(results: list[Results], name: str) -> None:
    expected = sinkhorn_knopp(logits(), 0.1)
    parts = torch.cat([result[name] for result in results])
    torch.testing.assert_close(parts, expected, rtol=1e-5, atol=1e-7)


def gathered(results: list[Results], name: str) -> tuple[Tensor, Tensor]:
    """Mean loss, and the gradient that averaging over processes leads to."""
    loss = torch.stack([result[name][0] for result in results]).mean()
    gradient = torch.cat([result[name][1] for result in results], dim=1) / WORLD
    return loss, gradient


@pytest.mark.parametrize("name", ["global", "global top 2", "groups of 8"])
def test_koleo_over_all_processes(results: list[Results], name: str) -> None:
    config = KoLeoConfig(topk=KOLEO[name].topk)
    expected = koleo(config, slice(None))
    for actual, wanted in zip(gathered(results, name), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["local", "groups of 4"])
def test_koleo_within_groups_of_one_process(results: list[Results], name: str) -> None:
    parts = [koleo(KoLeoConfig(), slice(i * BATCH, (i + 1) * BATCH)) for i in range(WORLD)]
    loss, gradient = gathered(results, name)
    torch.testing.assert_close(loss, torch.stack([part[0] for part in parts]).mean())
    torch.testing.assert_close(gradient, torch.cat([part[1] for part in parts], dim=1) / WORLD)
    everyone = koleo(KoLeoConfig(), slice(None))[0]
    assert not torch.isclose(loss, everyone), "the data does not tell the two apart"


def test_koleo_groups_that_do_not_fit(results: list[Results]) -> None:
    for result in results:
        assert "multiple of the 4 samples of a process and divide the 8 of all 2" in result["error"]


@pytest.mark.parametrize("kind", ["dino", "ibot"])
def test_averaged_gradients_are_those_of_one_process(results: list[Results], kind: str) -> None:
    loss, gradients = projected(kind, slice(None))
    parts = [result[kind] for result in results]
    torch.testing.assert_close(sum(part[0] for part in parts) / WORLD, loss)
    assert loss > 0
    for name, wanted in gradients.items():
        average = sum(part[1][name] for part in parts) / WORLD
        torch.testing.assert_close(average, wanted, rtol=1e-4, atol=1e-7)
