"""Principal components of patch features, and their colours."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F

# A component with a smaller share of the first one's variance is rounding, not structure.
_NEGLIGIBLE = 1e-6


@attrs.frozen(eq=False)
class Components:
    """Scores [m, count] in the order of their variance, and the share of it that each holds."""

    scores: Tensor
    shares: tuple[float, ...]

    @property
    def explained(self) -> float:
        """The share of the variance that the components hold together, in 0..1."""
        return min(sum(self.shares), 1.0)


def principal_components(tokens: Tensor, count: int = 3) -> Components:
    """The first ``count`` principal components of tokens [m, D].

    Each has the sign that makes its distribution lean to the right. Components that do not exist
    (fewer tokens or dimensions, or no variance left) are 0.
    """
    centred = tokens - tokens.mean(0)
    scores, variances = leading(centred, count)
    lean = scores.pow(3).sum(0)
    scores = torch.where(lean < 0, -scores, scores)
    total = float(centred.square().sum())
    shares = (variances / total if total > 0 else torch.zeros_like(variances)).tolist()
    return Components(scores, tuple(shares))


def leading(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best approximation of ``rows @ rows.T`` by ``count`` columns: scores @ scores.T.

    ``rows`` [m, D] are taken as they are, not centred. Returns scores [m, count] and the sum of
    squares of each, in falling order; columns past the rank are 0.
    """
    few = len(rows) < rows.shape[1]
    # Whichever is smaller: both have the same eigenvalues but for zeros.
    gram = rows @ rows.T if few else rows.T @ rows
    squares, vectors = torch.linalg.eigh(gram)
    squares = squares.clamp_min(0).flip(0)[:count]
    vectors = vectors.flip(1)[:, :count]
    scores = vectors * squares.sqrt() if few else rows @ vectors
    real = squares > _NEGLIGIBLE * squares[:1].clamp_min(torch.finfo(scores.dtype).tiny)
    missing = count - scores.shape[1]
    return F.pad(torch.where(real, scores, 0), (0, missing)), F.pad(
        torch.where(real, squares, 0), (0, missing)
    )


def to_colours(scores: Tensor) -> Tensor:
    """Scores [m, 3] as red, green and blue, uint8 [m, 3].

    A component runs from its 2nd to its 98th percentile; one without variance is mid-grey.
    """
    low, high = (_percentile(scores, part) for part in (0.02, 0.98))
    flat = high - low <= 0
    values = torch.where(flat, 0.5, (scores - low) / torch.where(flat, 1.0, high - low))
    return (values.clamp(0, 1) * 255).round().to(torch.uint8)


def _percentile(scores: Tensor, part: float) -> Tensor:
    # By sorting: torch.quantile refuses more than 16 million values.
    return scores.sort(0).values[round(part * (len(scores) - 1))]
