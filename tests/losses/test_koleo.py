"""KoLeo in one process."""

from __future__ import annotations

import math

import pytest
import torch
from dinov3_losses.configs import KoLeoConfig
from dinov3_losses.koleo import KoLeoLoss, koleo_loss
from loss_support import features, randn, step
from torch import Tensor

from dinov3_framework import InvalidOption, UserError


def run(cls: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    result = KoLeoLoss(KoLeoConfig(**options))(step(student={"global": features(cls=cls)}))
    return result.loss, result.metrics["mean"]


@pytest.mark.parametrize("topk", [1, 3])
@pytest.mark.parametrize("distributed", [False, True])
def test_by_definition(topk: int, distributed: bool) -> None:
    cls = randn(2, 7, 5)
    means = []
    for crop in torch.nn.functional.normalize(cls.double(), dim=-1):
        distances = torch.cdist(crop, crop).fill_diagonal_(math.inf)
        means.append(-distances.sort(dim=1).values[:, :topk].log().mean().item())
    loss, mean = run(cls, topk=topk, distributed=distributed)
    assert mean.item() == pytest.approx(sum(means) / 2, rel=1e-5)
    assert loss.item() == pytest.approx(sum(means), rel=1e-5)


def test_length_does_not_matter() -> None:
    cls = randn(1, 6, 5)
    scale = torch.arange(1.0, 7.0)[None, :, None]
    torch.testing.assert_close(run(cls * scale)[0], run(cls)[0])


def test_descent_spreads() -> None:
    cls = (randn(1, 16, 4) * 0.1 + 1).requires_grad_()
    optimizer = torch.optim.SGD([cls], lr=0.5)
    before = torch.nn.functional.normalize(cls.detach()[0], dim=-1)
    for _ in range(50):
        optimizer.zero_grad()
        run(cls)[0].backward()
        optimizer.step()
    after = torch.nn.functional.normalize(cls.detach()[0], dim=-1)
    assert torch.pdist(after).min() > 2 * torch.pdist(before).min()


def test_one_sample_has_no_neighbor() -> None:
    cls = randn(2, 1, 8).requires_grad_()
    loss, mean = run(cls)
    loss.backward()
    assert loss == mean == 0
    assert cls.grad.abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("special", ["duplicates", "all equal", "zeros", "opposite", "huge"])
def test_finite_in_corner_cases(special: str, dtype: torch.dtype) -> None:
    cls = randn(2, 4, 8)
    if special == "duplicates":
        cls[:, 1] = cls[:, 0]
    elif special == "all equal":
        cls[:] = cls[:1, :1]
    elif special == "zeros":
        cls[:, :2] = 0
    elif special == "opposite":
        cls[:, 2:] = -cls[:, :2]
    else:
        cls *= 1e18
    cls = cls.to(dtype).requires_grad_()
    loss, _ = run(cls)
    loss.backward()
    assert loss.isfinite()
    assert cls.grad.isfinite().all()


def test_a_token_is_not_its_own_neighbor() -> None:
    # Of two opposite tokens, each is as far from the other as can be, yet its only neighbor.
    cls = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    assert run(cls)[0].item() == pytest.approx(-math.log(2), rel=1e-5)


def test_fewer_samples_than_neighbors() -> None:
    cls = randn(1, 3, 8)
    assert run(cls, topk=9)[0] == run(cls, topk=2)[0]


def test_place_among_candidates() -> None:
    tokens = torch.nn.functional.normalize(randn(1, 6, 8), dim=-1)
    whole = koleo_loss(tokens, tokens)
    halves = [koleo_loss(tokens[:, i : i + 3], tokens, first=i) for i in (0, 3)]
    torch.testing.assert_close(sum(halves) / 2, whole)


def test_groups_that_do_not_fit() -> None:
    message = "group_size = 6 must be a multiple of the 4 samples of a process and divide the 4"
    with pytest.raises(UserError, match=message):
        run(randn(2, 4, 8), distributed=True, group_size=6)
    assert run(randn(2, 4, 8), distributed=True, group_size=4)[0].isfinite()


def test_impossible_configs() -> None:
    with pytest.raises(InvalidOption, match="group_size: has no effect without distributed"):
        KoLeoConfig(group_size=4)
    with pytest.raises(InvalidOption, match="topk: must be above 0"):
        KoLeoConfig(topk=0)


def test_what_it_says_of_itself() -> None:
    loss = KoLeoLoss(KoLeoConfig())
    assert loss.needs == {"student.global.class"}
    assert loss.sees_batch
    assert loss.build_projector(8) is None
    assert loss.anchor() is None
