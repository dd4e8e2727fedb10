"""Patch features as colors: segments that were put in must come out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from dinov3_figures.maps import principal_components, to_colors
from dinov3_figures.observer import patch_features, pca_figure
from dinov3_figures.sheet import save_png
from figures_support import BlockMeans, drawn_on, read_png, texts_on
from torch import Tensor

from dinov3_framework import ImagesConfig


def segmented(segments: Tensor, dim: int, noise: float = 0.02) -> Tensor:
    """Features [n, h, w, dim]: a direction for each segment, and a little noise."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(int(segments.max()) + 1, dim, generator=generator)
    return directions[segments] + noise * torch.randn(*segments.shape, dim, generator=generator)


def colored(features: Tensor) -> np.ndarray:
    """The colors [n, h, w, 3] of features [n, h, w, D]."""
    scores, _ = principal_components(features.flatten(0, 2))
    return to_colors(scores).unflatten(0, features.shape[:3]).numpy()


def explained(features: Tensor) -> float:
    """The share of the variance of features [n, h, w, D] that their colors show."""
    return sum(principal_components(features.flatten(0, 2))[1])


def four_segments() -> Tensor:
    """Two images [2, 8, 8]: one split left and right, one in four quarters."""
    halves = torch.zeros(8, 8, dtype=torch.long)
    halves[:, 4:] = 1
    quarters = halves.clone()
    quarters[4:] += 2
    return torch.stack([halves, quarters])


@pytest.mark.parametrize("dim", [16, 500])  # fewer and more dimensions than patches
def test_segments_get_a_color_each_alike_in_all_images(dim: int) -> None:
    segments = four_segments()
    features = segmented(segments, dim)
    found = colored(features)
    assert found.shape == (2, 8, 8, 3)
    assert found.dtype == np.uint8
    assert explained(features) > 0.95
    colors = torch.from_numpy(found).float()
    means = torch.stack([colors[segments == segment].mean(0) for segment in range(4)])
    nearest = torch.cdist(colors.flatten(0, 2), means).argmin(1)
    assert torch.equal(nearest, segments.flatten())
    assert torch.pdist(means).min() > 60


def test_components_agree_with_a_singular_value_decomposition() -> None:
    for rows, columns in ((50, 12), (12, 50)):
        tokens = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).double()
        scores, found = principal_components(tokens)
        left, values, _ = torch.linalg.svd(tokens - tokens.mean(0), full_matrices=False)
        torch.testing.assert_close(scores.abs(), (left * values)[:, :3].abs())
        shares = values.square() / values.square().sum()
        assert found == pytest.approx(shares[:3].tolist())
        assert (scores.pow(3).sum(0) > 0).all()


def test_signs_do_not_depend_on_the_basis() -> None:
    tokens = segmented(four_segments(), 16).flatten(0, 2).double()
    random = torch.randn(16, 16, generator=torch.Generator().manual_seed(2)).double()
    turned, _ = principal_components(tokens @ torch.linalg.qr(random).Q)
    torch.testing.assert_close(turned, principal_components(tokens)[0])


def test_missing_components_are_mid_gray() -> None:
    line = torch.arange(16.0).reshape(1, 4, 4, 1) * torch.tensor([1.0, 2.0])
    found = colored(line)
    assert len(np.unique(found[..., 0])) > 8
    assert (found[..., 1:] == 128).all()
    assert explained(line) == pytest.approx(1.0)
    constant = torch.ones(1, 4, 4, 7)
    assert (colored(constant) == 128).all()
    assert explained(constant) == 0.0


def test_one_extreme_patch_leaves_the_others_their_colors() -> None:
    ramp = torch.linspace(0, 1, 100).square().reshape(1, 10, 10, 1)
    extreme = ramp.clone()
    extreme[0, 9, 9] = 20.0
    plain, red = (colored(features)[0, ..., 0] for features in (ramp, extreme))
    assert int(plain.max()) - int(plain.min()) == 255
    assert np.abs(red.astype(int) - plain).max() <= 5


# ---------------------------------------------------------------------- features of a backbone
def test_features_keep_the_image_layout_at_any_size() -> None:
    backbone = BlockMeans(3, patch_size=7)
    images = torch.zeros(2, 3, 28, 28)
    images[1, 0, 7:14, 21:] = 1.0  # one patch: row 1, column 3
    features = patch_features(backbone, images, scale=1)
    assert features.shape == (2, 4, 4, 3)
    assert not features.requires_grad
    assert [tuple(place) for place in features[..., 0].nonzero().tolist()] == [(1, 1, 3)]
    enlarged = patch_features(backbone, images, scale=4)
    assert enlarged.shape == (2, 16, 16, 3)
    torch.testing.assert_close(
        enlarged[1, 5:7, 13:15, 0].mean(), torch.tensor(1.0), rtol=0, atol=0.1
    )
    assert backbone.sizes == [28, 28, 112, 112]


def test_features_follow_the_type_of_the_parameters() -> None:
    backbone = BlockMeans(1, patch_size=7).to(torch.bfloat16)
    features = patch_features(backbone, torch.rand(1, 1, 14, 14), scale=2)
    assert features.dtype == torch.float32
    assert features.shape == (1, 4, 4, 1)


# ---------------------------------------------------------------------- the sheet
def test_maps_stand_beside_their_images_as_squares() -> None:
    features = segmented(four_segments(), 16)
    levels = torch.tensor([10, 20], dtype=torch.uint8)
    images = levels[:, None, None, None].expand(2, 3, 28, 28)
    figure = pca_figure(images, {28: features}, ImagesConfig())
    assert any(text.startswith("at 28 px: 8 x 8 patches") for text in texts_on(figure))
    for (image, shown), level, colors in zip(
        drawn_on(figure), (10, 20), colored(features), strict=True
    ):
        assert image.pixels.shape == shown.pixels.shape == (196, 196, 3)
        assert (image.pixels == level).all()
        # The middle of each patch has the patch's very color.
        middles = ((np.arange(8) + 0.5) * 196 / 8).astype(int)
        assert np.array_equal(shown.pixels[middles][:, middles], colors)


def test_figure_is_a_png_of_sensible_size(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (6, 1, 28, 28), dtype=torch.uint8)
    spec = ImagesConfig(channels=1, mean=(0.3,), std=(0.2,))
    features = torch.randn(6, 4, 4, 8)
    save_png(pca_figure(images, {28: features, 56: features}, spec), tmp_path / "patch_pca.png")
    picture = read_png(tmp_path / "patch_pca.png")
    assert 500 <= picture.shape[1] <= 2000
    assert 500 <= picture.shape[0] <= 2000
    assert 0.2 < (picture < 250).mean() < 0.95
