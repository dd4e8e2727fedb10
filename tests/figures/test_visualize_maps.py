"""Foreground, similarities and codes: what was put in must come out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dinov3_figures.maps import (
    BACKDROP,
    encode,
    foreground,
    leading,
    maps_of,
    most_typical,
    otsu,
    patch_at,
)
from torch import Tensor
from torch.nn import functional as F
from visualize_support import settings


def disc(side: int, radius: float) -> Tensor:
    """bool [side, side], True within ``radius`` patches of the middle."""
    place = torch.arange(side) - (side - 1) / 2
    return place[:, None].square() + place[None].square() < radius**2


def features_of(mask: Tensor, dim: int = 8) -> Tensor:
    """[h, w, dim]: a direction for each side, with a little noise."""
    generator = torch.Generator().manual_seed(3)
    directions = torch.randn(2, dim, generator=generator)
    return directions[mask.long()] + 0.05 * torch.randn(*mask.shape, dim, generator=generator)


# --------------------------------------------------------------------------- foreground
@pytest.mark.parametrize(("few", "gap"), [(5, 4.0), (50, 1.0), (95, 4.0)])
def test_the_threshold_parts_two_groups_of_any_share(few: int, gap: float) -> None:
    low = torch.linspace(-0.1, 0.1, few)
    high = torch.linspace(-0.1, 0.1, 100 - few) + gap
    threshold = otsu(torch.cat([high, low]))
    assert threshold == pytest.approx(gap / 2)


def test_the_threshold_maximises_the_variance_between_the_groups() -> None:
    values = torch.randn(60, generator=torch.Generator().manual_seed(0)).double()
    best = otsu(values)

    def between(threshold: float) -> float:
        low, high = values[values <= threshold], values[values > threshold]
        return float(len(low) * len(high) * (high.mean() - low.mean()) ** 2)

    candidates = values.sort().values[:-1].tolist()
    assert best is not None
    assert between(best) == pytest.approx(max(map(between, candidates)))


def test_equal_values_have_no_threshold() -> None:
    assert otsu(torch.ones(7)) is None
    assert otsu(torch.ones(1)) is None
    (mask,) = foreground([torch.zeros(3, 4)])
    assert mask.all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("radius", [2.5, 7.5])  # a tenth of the patches, and most of them
def test_the_foreground_is_inside_whatever_the_sign(sign: float, radius: float) -> None:
    inside = disc(16, radius)
    (mask,) = foreground([sign * inside.float()])
    assert torch.equal(mask, inside)


def test_images_decide_together_which_side_is_the_background() -> None:
    small, shifted = disc(12, 3.0), torch.zeros(12, 12, dtype=torch.bool)
    shifted[:, 6:] = True  # as much at the border as inside: says nothing by itself
    masks = foreground([-small.float(), -shifted.float()])
    assert torch.equal(masks[0], small)
    assert torch.equal(masks[1], shifted)


@pytest.mark.parametrize("shape", [(1, 5), (2, 2)])
def test_without_an_inside_the_smaller_side_is_the_foreground(shape: tuple[int, int]) -> None:
    scores = torch.zeros(shape)
    scores[0, 0] = -1.0
    (mask,) = foreground([scores])
    assert mask.sum() == 1
    assert mask[0, 0]


# --------------------------------------------------------------------------- maps
def test_the_subject_alone_keeps_its_colors() -> None:
    inside = disc(16, 4.0)
    (maps,) = maps_of([features_of(inside)], settings())
    assert np.array_equal(maps.foreground, inside.numpy())
    assert maps.foreground.mean() == pytest.approx(float(inside.float().mean()))
    gray = (maps.foreground_pca == BACKDROP).all(-1)
    assert np.array_equal(gray, ~inside.numpy())
    assert maps.pca_shares[0] > 0.8
    # The first component of the whole tells the two sides apart, that of the subject does not.
    assert np.ptp(maps.pca[inside.numpy()][:, 0].astype(int)) < 128
    assert np.ptp(maps.foreground_pca[inside.numpy()][:, 0].astype(int)) == 255


def test_joint_components_give_equal_patches_equal_colors() -> None:
    first, second = features_of(disc(16, 4.0)), features_of(disc(16, 6.0))
    second[0, 0] = first[8, 8]
    joint = maps_of([first, second], settings(pca="joint"))
    assert (joint[1].pca[0, 0] == joint[0].pca[8, 8]).all()
    assert joint[0].pca_shares == joint[1].pca_shares
    apart = maps_of([first, second], settings(pca="image"))
    alone = maps_of([second], settings(pca="joint"))
    assert np.array_equal(apart[1].pca, alone[0].pca)
    assert not np.array_equal(apart[1].pca, joint[1].pca)


def test_similarities_are_cosines_to_the_marked_patches() -> None:
    features = features_of(disc(10, 3.0))[:, :8]  # 10 rows, 8 columns
    points = ((0.0, 0.0), (1.0, 1.0), (0.5, 0.25))
    (maps,) = maps_of([features], settings(points=points, typical=2))
    places = [(marked.row, marked.column) for marked in maps.marks]
    assert places[:3] == [(0, 0), (9, 7), (2, 4)]
    for marked in maps.marks:
        expected = F.cosine_similarity(features, features[marked.row, marked.column], dim=-1)
        np.testing.assert_allclose(marked.similarity, expected, atol=1e-5)
    front, back = maps.marks[3:]
    assert (front.what, back.what) == ("foreground", "background")
    assert maps.foreground[front.row, front.column]
    assert not maps.foreground[back.row, back.column]


def test_a_background_that_is_not_there_has_no_typical_patch() -> None:
    (maps,) = maps_of([torch.ones(4, 4, 6)], settings(points=(), typical=2))
    assert [marked.what for marked in maps.marks] == ["foreground"]
    assert (maps.pca == 128).all()
    assert maps.pca_shares == (0.0, 0.0, 0.0)


def test_the_most_typical_patch_is_the_one_nearest_to_all() -> None:
    angles = torch.tensor([0.0, 0.3, 0.35, 0.8, 3.0])
    unit = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert most_typical(unit, torch.tensor([True, True, True, True, False])) == 2
    assert most_typical(unit, torch.tensor([False, False, False, True, True])) == 3


@pytest.mark.parametrize(("place", "patch"), [(0.0, 0), (0.24, 0), (0.26, 1), (0.99, 3), (1.0, 3)])
def test_places_and_patches(place: float, patch: int) -> None:
    assert patch_at(place, 4) == patch


def test_similarities_can_be_left_out() -> None:
    (maps,) = maps_of([features_of(disc(8, 2.0))], settings(maps=("pca",)))
    assert maps.marks == ()


# --------------------------------------------------------------------------- codes
@pytest.mark.parametrize(
    "shape", [(6, 7, 64), (30, 30, 12)]
)  # fewer patches than numbers, and more
def test_codes_give_the_cosines_back(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    # Structure of few dimensions, as features of trained backbones have it.
    features = torch.randn(*shape[:2], 6, generator=generator) @ torch.randn(
        6, shape[2], generator=generator
    )
    codes = encode(features, dims=8)
    assert codes.values.dtype == np.int8
    assert codes.values.shape == (shape[0] * shape[1], 8)
    values = codes.values.astype(float)
    decoded = (values * codes.weights) @ values.T
    unit = F.normalize(features.flatten(0, 1), dim=1)
    off = decoded - (unit @ unit.T).numpy()
    assert np.abs(off).max() < 0.05
    assert codes.error == pytest.approx(float(np.sqrt((off**2).mean())), rel=0.2)


def test_codes_say_how_far_off_they_are() -> None:
    features = torch.randn(20, 20, 300, generator=torch.Generator().manual_seed(0))
    few, many = (encode(features, dims).error for dims in (4, 128))
    assert few > 0.04
    assert many < few / 1.5


def test_leading_columns_are_the_best_of_their_number() -> None:
    for rows, columns in ((40, 9), (9, 40)):
        table = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).double() + 1
        scores, squares = leading(table, 3)
        left, values, _ = torch.linalg.svd(table, full_matrices=False)
        best = (left[:, :3] * values[:3].square()) @ left[:, :3].T
        torch.testing.assert_close(scores @ scores.T, best)
        torch.testing.assert_close(squares, values[:3].square())
    padded, _ = leading(torch.ones(2, 5), 4)
    assert padded.shape == (2, 4)
    assert (padded[:, 1:] == 0).all()
