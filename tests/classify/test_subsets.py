"""Which training images a try of a few-shot evaluation has, and which are held out."""

from __future__ import annotations

import numpy as np
import torch
from dinov3_classify.subsets import few_shot_draws, hold_out

LABELS = torch.from_numpy(np.random.default_rng(0).choice([0, 1, 3], 300, p=[0.6, 0.3, 0.1]))


def counts(places: torch.Tensor) -> list[int]:
    return torch.bincount(LABELS[places], minlength=4).tolist()


def test_draws() -> None:
    draws = few_shot_draws(LABELS, [2, 50], [10], tries=3, seed=0)
    assert list(draws) == ["2-shot", "50-shot", "10%"]
    all_of = counts(torch.arange(300))
    for draw in draws["2-shot"]:
        assert counts(draw) == [2, 2, 0, 2]
        assert draw.tolist() == sorted(set(draw.tolist()))
    for draw in draws["50-shot"]:
        assert counts(draw) == [50, 50, 0, min(50, all_of[3])]
    for draw in draws["10%"]:
        assert counts(draw) == [int(count / 10 + 0.5) for count in all_of]
    different = {tuple(draw.tolist()) for draw in draws["2-shot"]}
    assert len(different) == 3


def test_they_depend_on_the_seed_alone() -> None:
    def draw(seed: int) -> list[int]:
        return few_shot_draws(LABELS, [5], [], tries=1, seed=seed)["5-shot"][0].tolist()

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_a_percentage_has_one_image_of_each_class_at_least() -> None:
    assert counts(few_shot_draws(LABELS, [], [0.1], tries=1, seed=0)["0.1%"][0]) == [1, 1, 0, 1]


def test_what_is_held_out_is_not_kept() -> None:
    kept, held = hold_out(LABELS, 0.1, seed=0)
    assert len(held) == 30
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(300))
    assert min(counts(held)[:2]) > 0


def test_one_image_of_each_class_is_always_kept() -> None:
    labels = torch.tensor([0, 1, 1, 2])
    kept, held = hold_out(labels, 0.9, seed=0)
    assert sorted(labels[kept].tolist()) == [0, 1, 2]
    assert labels[held].tolist() == [1]
    assert len(hold_out(torch.arange(3), 0.1, seed=0)[1]) == 0
    assert len(hold_out(torch.tensor([0, 0]), 0.01, seed=0)[1]) == 1
