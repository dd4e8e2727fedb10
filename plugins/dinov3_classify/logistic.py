"""Multinomial logistic regression, L2-regularized, solved to rounding for many strengths.

The objective is scikit-learn's ``LogisticRegression``, divided by C n as its solver has it:

    f(W, b) = 1/n sum_i cross_entropy(W x_i + b, y_i) + |W|^2 / (2 C n),    b without penalty.

It is convex, with one minimum (b up to a constant that is added to all classes; here their mean is
0). The solver is L-BFGS, with three things that change the way to the minimum but not the minimum:

- A preconditioner: the mean over classes of the Hessian's diagonal blocks, a weighted Gram matrix
  sum_i s_i x_i x_i' / n + 1/(C n) with s_i = mean_k p_ik (1 - p_ik), inverted once for each C.
- The values of C in increasing order, each begun where the line through the last two ends.
- Logits are linear in (W, b): along a direction only they change, so that a line search costs no
  product with the features.

Features are centered, which b takes up; where there are fewer images than features, W lies in the
span of the images, and the features are written in a basis of it.

The letters in shapes: n images, D features, d of them in that basis, K classes. Classes come first,
which is the faster way through memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from attrs import define, evolve, field, frozen
from torch import Tensor

_HISTORY = 20  # pairs that L-BFGS keeps
_ROWS = 1 << 14  # images of which the Gram matrix is made at once
_SEARCHES = 30  # steps of a line search
_FLATTER = 0.1  # a line search ends where the slope is at most so much of what it was
_DECREASE = 64 * torch.finfo(torch.float64).eps  # of the objective, relative to at least 1
_PATIENCE = 2  # steps in a row that decrease it by less, after which it has converged


@frozen(eq=False)
class Solution:
    """The minimum for one C, in float64."""

    c: float
    coefficients: Tensor  # [K, D]
    intercepts: Tensor  # [K]
    objective: float  # the mean cross-entropy and the penalty |W|^2 / (2 C n)
    gradient: float  # its largest element, absolute
    iterations: int
    converged: bool

    def to(self, device: torch.device | str) -> Solution:
        return evolve(
            self,
            coefficients=self.coefficients.to(device),
            intercepts=self.intercepts.to(device),
        )

    def scores(self, features: Tensor) -> Tensor:
        """Logits [n, K] of features [n, D]."""
        return features.to(self.coefficients) @ self.coefficients.T + self.intercepts


@torch.no_grad()
def solve(
    features: Tensor,
    labels: Tensor,
    n_classes: int,
    strengths: Sequence[float],
    *,
    tolerance: float = 1e-12,
    max_iterations: int = 1000,
    start: Solution | None = None,
    device: torch.device | None = None,
) -> Iterator[Solution]:
    """Solutions for the values of C in ``strengths``, which should increase.

    ``features`` are [n, D], ``labels`` int64 [n]. The work is done on ``device``, or left out where
    the features are; it takes their memory in float64, and four times that of all logits.

    Converged is: the largest element of the gradient is at most ``tolerance``, or two steps in a
    row decrease the objective by no more than 64 times the rounding of max(objective, 1), which is
    the rule of scipy's L-BFGS-B (that has it of one step). ``start`` is where the first begins.
    """
    problem = _Problem.of(features, labels, n_classes, device or features.device)
    now = problem.zeros() if start is None else problem.inner(start)
    before = now
    for c in strengths:
        penalty = 1 / (c * len(features))
        begun = problem.at(now, penalty)
        if before is not now:
            ahead = problem.at(2 * now - before, penalty)
            begun = min(begun, ahead, key=lambda point: float(point.objective))
        point, iterations, converged = _minimize(problem, begun, penalty, tolerance, max_iterations)
        before, now = now, point.weights
        yield problem.outer(c, point, iterations, converged)


# --------------------------------------------------------------------------- the objective
@frozen(eq=False)
class _Point:
    """A place, and what is known of it."""

    weights: Tensor  # [K, d + 1], the last column the intercepts
    logits: Tensor  # [K, n]
    residual: Tensor  # [K, n]: probabilities less the one-hot labels
    objective: Tensor
    gradient: Tensor  # [K, d + 1]


@frozen(eq=False)
class _Problem:
    """Centered features with a column of ones, [n, d + 1], and how they came about."""

    inputs: Tensor
    labels: Tensor  # [1, n]
    mean: Tensor  # [D]
    basis: Tensor | None  # [D, d]
    n_classes: int

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, n_classes: int, device: torch.device) -> _Problem:
        n, width = features.shape
        inputs = torch.ones(n, width + 1, dtype=torch.float64, device=device)
        inputs[:, :-1] = features
        mean, basis = inputs[:, :-1].mean(dim=0), None
        inputs[:, :-1] -= mean
        if n < width:
            basis, triangular = torch.linalg.qr(inputs[:, :-1].T)
            inputs = torch.cat([triangular.T, inputs[:, -1:]], dim=1)
        return cls(inputs, labels.to(device)[None], mean, basis, n_classes)

    def zeros(self) -> Tensor:
        return self.inputs.new_zeros(self.n_classes, self.inputs.shape[1])

    def inner(self, solution: Solution) -> Tensor:
        weights = solution.coefficients.to(self.inputs)
        intercepts = solution.intercepts.to(self.inputs) + weights @ self.mean
        if self.basis is not None:
            weights = weights @ self.basis
        return torch.cat([weights, intercepts[:, None]], dim=1)

    def outer(self, c: float, point: _Point, iterations: int, converged: bool) -> Solution:
        weights, intercepts = point.weights[:, :-1], point.weights[:, -1]
        if self.basis is not None:
            weights = weights @ self.basis.T
        intercepts = intercepts - weights @ self.mean
        return Solution(
            c=c,
            coefficients=weights.clone(),
            intercepts=intercepts - intercepts.mean(),
            objective=float(point.objective),
            gradient=float(point.gradient.abs().max()),
            iterations=iterations,
            converged=converged,
        )

    def loss(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The mean cross-entropy, and probabilities [K, n]."""
        most = logits.amax(dim=0, keepdim=True)
        powers = (logits - most).exp_()
        total = powers.sum(dim=0, keepdim=True)
        loss = (total.log() + most - logits.gather(0, self.labels)).mean()
        return loss, powers.div_(total)

    def at(self, weights: Tensor, penalty: float) -> _Point:
        logits = weights @ self.inputs.T
        return self.point(weights, logits, *self.loss(logits), penalty)

    def point(
        self, weights: Tensor, logits: Tensor, loss: Tensor, probabilities: Tensor, penalty: float
    ) -> _Point:
        """The probabilities given become its residual."""
        residual = probabilities.scatter_add_(
            0, self.labels, probabilities.new_full((1, 1), -1.0).expand(self.labels.shape)
        )
        gradient = residual @ self.inputs / len(self.inputs)
        gradient[:, :-1] += penalty * weights[:, :-1]
        objective = loss + penalty / 2 * weights[:, :-1].square().sum()
        return _Point(weights, logits, residual, objective, gradient)

    def preconditioner(self, point: _Point, penalty: float) -> Tensor:
        """The inverse [d + 1, d + 1] of the classes' mean Hessian."""
        # Of a probability p, and p - 1 of the true class: p (1 - p) is |r| (1 - |r|) of both.
        size = point.residual.abs()
        share = (size - size.square()).mean(dim=0)
        width = self.inputs.shape[1]
        gram = self.inputs.new_zeros(width, width)
        for rows, weights in zip(self.inputs.split(_ROWS), share.split(_ROWS), strict=True):
            gram.addmm_(rows.T, rows * weights[:, None], alpha=1 / len(self.inputs))
        diagonal = gram.diagonal()
        diagonal[:-1] += penalty
        # Not of the objective: it keeps a problem whose images are all certain from failing.
        diagonal += 1e-10 * diagonal.max()
        return torch.cholesky_inverse(torch.linalg.cholesky(gram))


# --------------------------------------------------------------------------- the solver
@define(eq=False)
class _Memory:
    """What L-BFGS knows of the curvature: steps, and by how much they changed the gradient."""

    inverse: Tensor  # the preconditioner, which is symmetric
    steps: list[Tensor] = field(factory=list)
    changes: list[Tensor] = field(factory=list)
    conditioned: list[Tensor] = field(factory=list)  # changes times the preconditioner
    curvatures: list[Tensor] = field(factory=list)  # steps times changes

    def direction(self, gradient: Tensor, conditioned: Tensor) -> Tensor:
        """Downhill, by the two-loop recursion (Nocedal 1980).

        ``conditioned`` is the gradient times the preconditioner; what the first loop takes off the
        gradient is taken off there, too, which saves a product.
        """
        rest, ahead, shares = gradient.clone(), conditioned.clone(), []
        for step, change, preconditioned, curvature in self._pairs(-1):
            shares.append((step * rest).sum() / curvature)
            rest -= shares[-1] * change
            ahead -= shares[-1] * preconditioned
        if self.steps:
            ahead *= self.curvatures[-1] / (self.changes[-1] * self.conditioned[-1]).sum()
        for (step, change, _, curvature), share in zip(
            self._pairs(1), reversed(shares), strict=True
        ):
            ahead += (share - (change * ahead).sum() / curvature) * step
        return ahead.neg_()

    def remember(self, step: Tensor, change: Tensor, conditioned: Tensor) -> None:
        curvature = (step * change).sum()
        if float(curvature) <= 0:
            return
        for kept, new in (
            (self.steps, step),
            (self.changes, change),
            (self.conditioned, conditioned),
            (self.curvatures, curvature),
        ):
            kept.append(new)
            del kept[:-_HISTORY]

    def _pairs(self, way: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        lists = (self.steps, self.changes, self.conditioned, self.curvatures)
        yield from zip(*(each[::way] for each in lists), strict=True)


def _minimize(
    problem: _Problem, point: _Point, penalty: float, tolerance: float, max_iterations: int
) -> tuple[_Point, int, bool]:
    """The minimum, iterations, and whether it converged."""
    memory = _Memory(problem.preconditioner(point, penalty))
    conditioned = point.gradient @ memory.inverse
    idle = 0
    for iteration in range(max_iterations):
        if float(point.gradient.abs().max()) <= tolerance:
            return point, iteration, True
        found = _search(problem, point, memory.direction(point.gradient, conditioned), penalty)
        if found is None and memory.steps:  # perhaps what is remembered misleads
            memory = _Memory(memory.inverse)
            continue
        if found is None:  # nothing is lower, to rounding
            return point, iteration, True
        least = _DECREASE * max(abs(float(point.objective)), 1.0)
        idle = idle + 1 if float(point.objective - found.objective) <= least else 0
        ahead = found.gradient @ memory.inverse
        memory.remember(
            found.weights - point.weights, found.gradient - point.gradient, ahead - conditioned
        )
        point, conditioned = found, ahead
        if idle == _PATIENCE:
            return point, iteration + 1, True
    return point, max_iterations, False


def _search(problem: _Problem, point: _Point, direction: Tensor, penalty: float) -> _Point | None:
    """A lower point along the direction, or None: Newton's method in one dimension, in bounds."""
    n = len(problem.inputs)
    moved = direction @ problem.inputs.T
    shrinking = penalty * (point.weights[:, :-1] * direction[:, :-1]).sum()
    along = float(shrinking - moved.gather(0, problem.labels).mean())
    curve = float(penalty * direction[:, :-1].square().sum())
    slope_before = float((point.gradient * direction).sum())
    step = following = 1.0
    low, high = 0.0, math.inf
    for _ in range(_SEARCHES):
        step = following
        logits = torch.add(point.logits, moved, alpha=step)
        loss, probabilities = problem.loss(logits)
        weighed = probabilities * moved
        slope = float(weighed.sum()) / n + along + step * curve
        if abs(slope) <= _FLATTER * abs(slope_before):
            break
        low, high = (step, high) if slope < 0 else (low, step)
        means = weighed.sum(dim=0)
        second = float(weighed.mul_(moved).sum() - means.square().sum()) / n + curve
        following = step - slope / second if second > 0 else math.inf
        furthest = 10 * max(low, 1.0)
        if not low < following < min(high, furthest):
            following = (low + high) / 2 if high < math.inf else furthest
    weights = torch.add(point.weights, direction, alpha=step)
    found = problem.point(weights, logits, loss, probabilities, penalty)
    return found if float(found.objective) < float(point.objective) else None
