"""Promises of a loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from attrs import frozen
from torch import Tensor, nn

from dinov3_framework.contracts.data import Augmentation, View
from dinov3_framework.contracts.losses import Anchor, Loss, check_needs
from dinov3_framework.contracts.networks import LossResult, Projector
from dinov3_framework.errors import first_few
from dinov3_framework.testing.backbones import in_bfloat16
from dinov3_framework.testing.steps import VIEWS, DrawnTokens
from dinov3_framework.testing.suite import NetworkSuite, Suite


class _Everything(Augmentation):
    """Offers whatever a loss may need."""

    views = {view: View(crops, 8) for view, (crops, _) in VIEWS.items()}  # noqa: RUF012
    makes_masks = True

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Mapping[str, Tensor]:
        return {}


class _ProjectorSuite(NetworkSuite):
    contract = Projector


@frozen
class _Outcome:
    """What a loss made of some tokens."""

    result: LossResult
    learning: Mapping[str, Tensor]  # the student's tokens, and parameters of its projector


class LossSuite(Suite):
    """Promises of a loss, on made-up tokens of width ``embed_dim`` of ``samples``, an even number.

    Its projector, if any, keeps the promises of a ``NetworkSuite``.
    """

    kind = "loss"
    contract = Loss
    embed_dim: int = 16
    samples: int = 4

    @cached_property
    def loss(self) -> Loss:
        loss: Loss = self.build()
        return loss

    @cached_property
    def projectors(self) -> _ProjectorSuite | None:
        """The projector's own suite, with a student's and a teacher's of equal weights."""
        with torch.device("meta"):
            if self.loss.build_projector(self.embed_dim) is None:
                return None
        suite = _ProjectorSuite()
        suite.factory = lambda _: self.loss.build_projector(self.embed_dim)
        return suite

    def draw(self, **how: Any) -> DrawnTokens:
        return DrawnTokens.draw(self.loss.needs, self.samples, self.embed_dim, **how)

    def run(self, tokens: DrawnTokens, low: bool = False) -> _Outcome:
        """What a new loss makes of these tokens, called as in training."""
        loss: Loss = self.build()
        learning = tokens.requires_grad()
        student = teacher = None
        if self.projectors is not None:
            student = copy.deepcopy(self.projectors.network)
            teacher = copy.deepcopy(self.projectors.twin).requires_grad_(False)
            if low:
                student, teacher = in_bfloat16(student), in_bfloat16(teacher)
            learning |= {f"projector.{name}": p for name, p in student.named_parameters()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(8)
            result = loss(tokens.step(_projection(student), _projection(teacher)))
        assert isinstance(result, LossResult), f"forward() must give a LossResult, gave {result!r}"
        value = result.loss
        assert isinstance(value, Tensor) and value.ndim == 0 and value.is_floating_point(), (
            "the loss must be a floating-point scalar, [] in shape"
        )
        assert value.isfinite(), f"the loss is {value.item()}"
        for name, metric in result.metrics.items():
            single = isinstance(metric, Tensor) and metric.numel() == 1
            is_number = single or isinstance(metric, int | float)
            assert is_number, f"the metric {name!r} must be one number"
            attached = isinstance(metric, Tensor) and metric.requires_grad
            assert not attached, f"the metric {name!r} holds on to the graph; detach() it"
        return _Outcome(result, learning)

    def gradients(self, outcome: _Outcome) -> dict[str, Tensor]:
        """Gradients that arrive, which must be finite."""
        assert outcome.result.loss.requires_grad, "no gradient flows: the loss has no graph"
        outcome.result.loss.backward()  # type: ignore[no-untyped-call]
        found = {n: t.grad for n, t in outcome.learning.items() if t.grad is not None}
        bad = [name for name, gradient in found.items() if not gradient.isfinite().all()]
        assert not bad, f"a gradient is not finite: {first_few(bad)}"
        return found

    # ------------------------------------------------------------------ promises
    def test_needs(self) -> None:
        """``needs`` names what exists, the student among it."""
        needs, anchor = self.loss.needs, self.loss.anchor()
        is_one = anchor is None or isinstance(anchor, Anchor)
        assert is_one, f"anchor() must give an Anchor or None, gave {anchor!r}"
        assert isinstance(needs, frozenset) and all(isinstance(need, str) for need in needs), (
            f"needs must be a frozenset of str, is {needs!r}"
        )
        for problem in check_needs({"": self.loss}, _Everything()):
            raise AssertionError(problem.message)
        assert any(need.startswith("student.") for need in needs), (
            "needs nothing of the student, so nothing can be learned from it"
        )

    def test_parameters(self) -> None:
        """The loss has none; those of its projector get values, and load."""
        own = [name for name, _ in self.loss.named_parameters()]
        assert not own, f"has parameters of its own, not in a projector: {first_few(own)}"
        for name in _ProjectorSuite.promises():
            if self.projectors is not None:
                self.projectors.keep(name)

    def test_reads(self) -> None:
        """It reads what it needs alone, and writes to none of it."""
        tokens = self.draw()
        before = tokens.copies()
        self.gradients(self.run(tokens))
        undeclared = sorted(tokens.reads - self.loss.needs)
        assert not undeclared, f"reads what its needs do not name: {first_few(undeclared)}"
        after = tokens.copies()
        written = [name for name, value in before.items() if not torch.equal(value, after[name])]
        assert not written, f"writes into features that other losses see too: {first_few(written)}"

    def test_gradient(self) -> None:
        """Gradient reaches the student's tokens and all of the projector."""
        outcome = self.run(self.draw())
        found = self.gradients(outcome)
        assert any(found[name].any() for name in found if name.startswith("student.")), (
            "no gradient reaches the student's tokens"
        )
        idle = sorted(n for n in outcome.learning.keys() - found if n.startswith("projector."))
        assert not idle, f"no gradient reaches the student's {first_few(idle)}"

    def test_repeatable(self) -> None:
        """The same features and the same seed of torch give the same value."""
        first, second = (self.run(self.draw()).result.loss for _ in range(2))
        assert torch.equal(first, second), (
            f"gives {first.item()}, then {second.item()}, for the same features and the same seed "
            "of torch's generator"
        )

    def test_equal_tokens(self) -> None:
        """Value and gradient are finite where all tokens coincide."""
        self.gradients(self.run(self.draw(collapsed=True)))

    def test_bfloat16(self) -> None:
        """Value and gradient are finite in bfloat16."""
        self.gradients(self.run(self.draw(dtype=torch.bfloat16), low=True))

    def test_halves(self) -> None:
        """Without ``sees_batch``, halves of a batch average to the batch."""
        if self.loss.sees_batch:
            return
        whole = self.run(self.draw()).result.loss
        half = self.samples // 2
        parts = [self.draw().of_samples(start, start + half) for start in (0, half)]
        mean = torch.stack([self.run(part).result.loss for part in parts]).mean()
        assert torch.allclose(whole, mean, rtol=1e-4, atol=1e-6), (
            f"gives {whole.item():g} for a batch and {mean.item():g} for its halves on average; "
            "then sees_batch must be True"
        )


def _projection(projector: nn.Module | None) -> Callable[..., Tensor]:
    def project(tokens: Tensor, *others: Any) -> Tensor:
        assert projector is not None, "projects tokens, but build_projector() gives no projector"
        projected: Tensor = projector(tokens, *others)
        return projected

    return project
