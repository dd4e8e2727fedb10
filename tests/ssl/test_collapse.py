"""RankMe and the deviation of features, on features of which both are known."""

from __future__ import annotations

import pytest
import torch
from dinov3_ssl.collapse import feature_std, rankme


def test_the_rank_of_features() -> None:
    torch.manual_seed(0)
    alike = torch.randn(1, 32).expand(100, 32)
    assert rankme(alike) == pytest.approx(1, abs=1e-3)
    orthogonal = torch.linalg.qr(torch.randn(100, 32)).Q
    assert rankme(orthogonal) == pytest.approx(32, rel=1e-4)
    three = orthogonal.clone()
    three[:, 3:] = 0
    assert rankme(three) == pytest.approx(3, rel=1e-3)
    # Two singular values in the proportion 3 : 1: exp(-(0.75 ln 0.75 + 0.25 ln 0.25)).
    two = torch.diag(torch.tensor([3.0, 1.0]))
    assert rankme(two) == pytest.approx(1.7548, abs=1e-3)


def test_the_deviation_of_features() -> None:
    torch.manual_seed(0)
    assert feature_std(torch.randn(1, 64).expand(50, 64)) == pytest.approx(0, abs=1e-5)
    assert feature_std(7 * torch.randn(20_000, 64)) == pytest.approx(1, abs=0.02)
