"""Block masks: exact counts, and independence of how rows are spread."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dinov3_crops import MaskingConfig, MultiCropConfig
from dinov3_crops.masking import batch_masks, block_mask, hidden_counts
from dinov3_crops.multi_crop import MultiCrop

GRID = 14


def masks(config: MaskingConfig, total: int = 64, step: int = 3, seed: int = 0) -> torch.Tensor:
    return batch_masks(config, GRID, range(total), total, seed, step)


@pytest.mark.parametrize("total", [1, 2, 7, 64])
@pytest.mark.parametrize("probability", [0.0, 0.3, 0.5, 1.0])
def test_a_batch_hides_exactly_what_it_should(total, probability):
    config = MaskingConfig(probability=probability)
    made = masks(config, total)
    n = int(total * probability)
    ratios = torch.linspace(0.1, 0.5, n + 1)
    expected = [int(GRID * GRID * ratios[i + 1]) for i in range(n)] + [0] * (total - n)
    assert made.shape == (total, GRID * GRID)
    assert made.dtype == torch.bool
    assert sorted(made.sum(1).tolist()) == sorted(expected)


def test_rows_do_not_depend_on_how_they_are_spread():
    config = MaskingConfig()
    whole = masks(config, 48)
    for rows in ([5], [40, 3, 3, 17], list(range(1, 48, 2))):
        part = batch_masks(config, GRID, rows, 48, 0, 3)
        assert torch.equal(part, whole[rows])


def test_steps_and_seeds_differ_and_repeat():
    config = MaskingConfig()
    first = masks(config)
    assert torch.equal(first, masks(config))
    for other in (masks(config, step=4), masks(config, seed=1)):
        assert not torch.equal(first.any(1), other.any(1))
        both = first.any(1) & other.any(1)
        assert not (first[both] == other[both]).all(1).any()


def test_every_row_is_masked_equally_often():
    config = MaskingConfig()
    often = torch.stack([masks(config, 8, step).any(1) for step in range(400)]).float().mean(0)
    assert often.mean().item() == pytest.approx(0.5)
    assert (often - 0.5).abs().max() < 0.1  # four standard deviations


def test_ratio_range_is_the_mean_of_its_ends():
    counts = hidden_counts(MaskingConfig(ratio=(0.2, 0.6)), 1000, 200)
    assert len(counts) == 100
    assert counts == sorted(counts)
    assert counts[-1] == 600
    assert counts[0] == 204
    assert hidden_counts(MaskingConfig(ratio=(0.25, 0.25)), 100, 8) == [25] * 4


@pytest.mark.parametrize("count", [0, 1, 3, 50, 98, 195, 196])
def test_a_mask_hides_exactly_its_count(count):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        assert block_mask(rng, MaskingConfig(), GRID, count).sum() == count


@pytest.mark.parametrize("grid", [1, 2, 3])
def test_tiny_grids(grid):
    for count in range(grid * grid + 1):
        made = block_mask(np.random.default_rng(0), MaskingConfig(), grid, count)
        assert made.sum() == count


def neighbors_agree(mask: np.ndarray) -> float:
    return float(np.mean(mask[:, 1:] == mask[:, :-1]))


def test_masks_are_blocks_not_salt():
    rng = np.random.default_rng(0)
    blocks = [neighbors_agree(block_mask(rng, MaskingConfig(), GRID, 60)) for _ in range(50)]
    salt = [neighbors_agree(rng.permutation(196).reshape(GRID, GRID) < 60) for _ in range(50)]
    assert np.mean(blocks) > 0.85
    assert np.mean(salt) < 0.65


def test_block_options_are_obeyed():
    rng = np.random.default_rng(0)
    flat = MaskingConfig(block_aspect=(0.1, 0.15), block_min_patches=8, block_max_share=0.06)
    wide = [block_mask(rng, flat, GRID, 40) for _ in range(50)]
    along = np.mean([np.mean(m[:, 1:] == m[:, :-1]) for m in wide])
    across = np.mean([np.mean(m[1:] == m[:-1]) for m in wide])
    assert along > across + 0.1


def share_at_border(config: MaskingConfig) -> float:
    rng = np.random.default_rng(0)
    often = np.mean([block_mask(rng, config, GRID, 60) for _ in range(800)], axis=0)
    corners = often[[0, 0, -1, -1], [0, -1, 0, -1]].mean()
    return float(corners / often.mean())


def test_circular_shift_masks_borders_as_often_as_the_middle():
    assert share_at_border(MaskingConfig()) < 0.85
    assert share_at_border(MaskingConfig(circular_shift=True)) == pytest.approx(1, abs=0.12)


def test_circular_shift_rolls_the_same_mask():
    plain = block_mask(np.random.default_rng(5), MaskingConfig(), GRID, 40)
    rolled = block_mask(np.random.default_rng(5), MaskingConfig(circular_shift=True), GRID, 40)
    candidates = (np.roll(plain, (i, j), (0, 1)) for i in range(GRID) for j in range(GRID))
    assert any(np.array_equal(rolled, candidate) for candidate in candidates)


def test_the_augmentation_masks_its_global_grid():
    config = MultiCropConfig(global_size=64, local_size=32)
    augmentation = MultiCrop(config, channels=3, patch_size=16)
    assert augmentation.makes_masks
    made = augmentation.masks(rows=[0, 1, 2, 3], total=4, seed=1, step=0)
    assert made.shape == (4, 16)
    assert sorted(made.sum(1).tolist()) == [0, 0, 4, 8]


def test_masking_can_be_left_out():
    without = MultiCropConfig(masking=None)
    augmentation = MultiCrop(without, channels=3, patch_size=16)
    assert not augmentation.makes_masks
    with pytest.raises(TypeError, match="makes no masks"):
        augmentation.masks(rows=[0], total=1, seed=0, step=0)
    never = MultiCropConfig(masking=MaskingConfig(probability=0.0))
    assert not MultiCrop(never, channels=3, patch_size=16).makes_masks
