"""Promises of a loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from attrs import frozen
from torch import Tensor, nn

from dinov3_framework.contracts.data import Augmentation, View
from dinov3_framework.contracts.losses import Anchor, Loss, LossResult, check_needs
from dinov3_framework.contracts.networks import Projector
from dinov3_framework.kinds import LossConfig
from dinov3_framework.registry import Registry
from dinov3_framework.testing.modules import Twins, check_weights, in_bfloat16
from dinov3_framework.testing.steps import VIEWS, Features
from dinov3_framework.testing.subject import Subject, some


def check_loss(
    config: LossConfig,
    *,
    registry: Registry | None = None,
    factory: Callable[..., Any] | None = None,
    embed_dim: int = 16,
    samples: int = 4,
) -> None:
    """Check that a loss keeps its contract, on made-up tokens of width ``embed_dim``.

    ``samples`` is the number of images in the batch, an even one.

    Promises: ``needs`` names what exists, the student among it, and all that is read; the loss has
    no parameters of its own; its projector, if any, keeps the promises of ``check_head`` and
    learns; the value is a finite scalar, the same for the same input, with finite gradient to the
    student, also where all tokens coincide and in bfloat16; features are not written to; metrics
    are numbers without gradient; without ``sees_batch``, halves of a batch average to the batch.
    """
    subject = Subject.of("loss", config, registry, factory)
    loss: Loss = subject.built(Loss)
    _check_needs(subject, loss)
    heads = _check_projector(subject, loss, embed_dim)
    own = [name for name, _ in loss.named_parameters()]
    subject.require(
        not own, f"has parameters of its own, which nobody trains (a projector's are): {some(own)}"
    )
    trial = _Trial(subject, loss.needs, heads, samples, embed_dim)
    trial.check_value()
    trial.check_repeatable()
    trial.check_extremes()
    if not loss.sees_batch:
        trial.check_halves()


class _Everything(Augmentation):
    """Offers whatever a loss may need."""

    views = {view: View(crops, 8) for view, (crops, _) in VIEWS.items()}  # noqa: RUF012
    makes_masks = True

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Mapping[str, Tensor]:
        return {}


def _check_needs(subject: Subject, loss: Loss) -> None:
    with subject.doing("anchor()"):
        anchor = loss.anchor()
    subject.require(
        anchor is None or isinstance(anchor, Anchor),
        f"anchor() must give an Anchor or None, gave {anchor!r}",
    )
    subject.require(
        isinstance(loss.needs, frozenset) and all(isinstance(need, str) for need in loss.needs),
        f"needs must be a frozenset of str, is {loss.needs!r}",
    )
    for problem in check_needs({"": loss}, _Everything()):
        subject.require(False, problem.message)
    subject.require(
        any(need.startswith("student.") for need in loss.needs),
        "needs nothing of the student, so nothing can be learnt from it",
    )


def _check_projector(subject: Subject, loss: Loss, embed_dim: int) -> Twins | None:
    with subject.doing("build_projector()"), torch.device("meta"):
        wanted = loss.build_projector(embed_dim) is not None
    if not wanted:
        return None
    projector = subject.part("the projector", lambda: loss.build_projector(embed_dim))
    return check_weights(projector, Projector)


@frozen
class _Outcome:
    """What a loss made of some features."""

    result: LossResult
    leaves: Mapping[str, Tensor]  # the student's tokens
    head: nn.Module | None  # the student's projector


@frozen
class _Trial:
    subject: Subject
    needs: frozenset[str]
    heads: Twins | None
    samples: int
    embed_dim: int

    def draw(self, **how: Any) -> Features:
        return Features.draw(self.needs, self.samples, self.embed_dim, **how)

    def run(self, features: Features, what: str = "forward()", low: bool = False) -> _Outcome:
        """A new loss on these features, as the engine would call it."""
        loss: Loss = self.subject.built(Loss)
        leaves = features.requires_grad()
        head = teacher = None
        if self.heads is not None:
            head, teacher = copy.deepcopy(self.heads.first), copy.deepcopy(self.heads.second)
            if low:
                head, teacher = in_bfloat16(head), in_bfloat16(teacher)
            teacher.requires_grad_(False)
        with torch.random.fork_rng(devices=[]), self.subject.doing(what):
            torch.manual_seed(8)
            result = loss(features.step(_projection(head), _projection(teacher)))
        self._check_result(result, what)
        return _Outcome(result, leaves, head)

    def _check_result(self, result: Any, what: str) -> None:
        require = self.subject.require
        require(isinstance(result, LossResult), f"{what} must give a LossResult, gave {result!r}")
        value = result.loss
        require(
            isinstance(value, Tensor) and value.ndim == 0 and value.is_floating_point(),
            "the loss must be a floating-point scalar, [] in shape",
        )
        require(bool(value.isfinite()), f"{what} gave {value.item()}")
        for name, figure in result.metrics.items():
            number = isinstance(figure, int | float) or (
                isinstance(figure, Tensor) and figure.numel() == 1
            )
            require(number, f"the metric {name!r} must be one number")
            require(
                not (isinstance(figure, Tensor) and figure.requires_grad),
                f"the metric {name!r} holds on to the graph; detach() it",
            )

    def learn(self, outcome: _Outcome, what: str = "the backward pass") -> None:
        """Send gradient back and look where it arrived."""
        with self.subject.doing(what):
            outcome.result.loss.backward()  # type: ignore[no-untyped-call]
        gradients = {n: leaf.grad for n, leaf in outcome.leaves.items() if leaf.grad is not None}
        if outcome.head is not None:
            for name, parameter in outcome.head.named_parameters():
                if parameter.grad is not None:
                    gradients[f"projector.{name}"] = parameter.grad
        bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
        self.subject.require(not bad, f"{what} gives a gradient that is not finite: {some(bad)}")

    # ------------------------------------------------------------------ promises
    def check_value(self) -> None:
        features = self.draw()
        before = features.copies()
        outcome = self.run(features)
        undeclared = sorted(features.reads - self.needs)
        self.subject.require(
            not undeclared, f"reads what its needs do not name: {', '.join(undeclared)}"
        )
        self.subject.require(
            outcome.result.loss.requires_grad, "no gradient flows: the loss has no graph"
        )
        self.learn(outcome)
        after = features.copies()
        written = [name for name, value in before.items() if not torch.equal(value, after[name])]
        self.subject.require(
            not written, f"writes into features that other losses see too: {some(written)}"
        )
        reached = [n for n, leaf in outcome.leaves.items() if leaf.grad is not None]
        self.subject.require(
            any(bool(outcome.leaves[name].grad.any()) for name in reached),  # type: ignore[union-attr]
            "no gradient reaches the student's tokens",
        )
        if outcome.head is not None:
            idle = [n for n, p in outcome.head.named_parameters() if p.grad is None]
            self.subject.require(
                not idle, f"no gradient reaches the student's projector: {some(idle)}"
            )

    def check_repeatable(self) -> None:
        first, second = (self.run(self.draw()).result.loss for _ in range(2))
        self.subject.require(
            torch.equal(first, second),
            f"gives {first.item()}, then {second.item()}, for the same features and the same seed "
            "of torch's generator",
        )

    def check_extremes(self) -> None:
        """The moments in which losses go to NaN."""
        equal = self.run(self.draw(collapsed=True), "forward() on tokens that are all equal")
        self.learn(equal, "the backward pass of tokens that are all equal")
        low = self.draw(dtype=torch.bfloat16)
        self.learn(
            self.run(low, "forward() in bfloat16", low=True), "the backward pass in bfloat16"
        )

    def check_halves(self) -> None:
        whole = self.run(self.draw()).result.loss
        half = self.samples // 2
        halves: Sequence[Tensor] = [
            self.run(self.draw().of_samples(start, start + half)).result.loss for start in (0, half)
        ]
        mean = torch.stack(list(halves)).mean()
        self.subject.require(
            torch.allclose(whole, mean, rtol=1e-4, atol=1e-6),
            f"gives {whole.item():g} for a batch and {mean.item():g} for its halves on average; "
            "then sees_batch must be True",
        )


def _projection(head: nn.Module | None) -> Callable[..., Tensor]:
    def project(tokens: Tensor, *others: Any) -> Tensor:
        if head is None:
            raise TypeError("it projects tokens, but build_projector() gave no projector")
        projected: Tensor = head(tokens, *others)
        return projected

    return project
