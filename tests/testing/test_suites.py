"""Suites let sound components pass, and name each broken promise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from broken_backbones import BACKBONES, SoundBackbone, ToyBackboneConfig
from broken_data import (
    AUGMENTATIONS,
    DATASETS,
    Maps,
    SoundAugmentation,
    SoundDataset,
    SoundVariants,
    ToyAugmentationConfig,
    ToyDatasetConfig,
)
from broken_losses import LOSSES, SoundLoss, ToyLossConfig
from broken_optimizers import OPTIMIZERS, SoundOptimizer, ToyOptimizerConfig
from torch import nn

from dinov3_framework import UserError
from dinov3_framework.schedules import Constant
from dinov3_framework.testing import (
    AugmentationSuite,
    BackboneSuite,
    ContractError,
    DatasetSuite,
    LossSuite,
    OptimizerSuite,
)

OPTIMIZER = ToyOptimizerConfig(lr=Constant(value=0.1), weight_decay=Constant(value=0.0))


# --------------------------------------------------------------------------- what is right
class TestSoundBackbone(BackboneSuite):
    """Those that the broken ones below differ from in one thing."""

    config = ToyBackboneConfig()
    factory = SoundBackbone


class TestSoundLoss(LossSuite):
    config = ToyLossConfig()

    def factory(config: ToyLossConfig) -> SoundLoss:  # type: ignore[misc]
        """A function, which in a class would be a method."""
        return SoundLoss(config)


class TestSoundAugmentation(AugmentationSuite):
    config = ToyAugmentationConfig()
    factory = SoundAugmentation


class TestSoundVariants(TestSoundAugmentation):
    factory = SoundVariants


class TestSoundDataset(DatasetSuite):
    config = ToyDatasetConfig()
    factory = SoundDataset


class TestTargetsOfEveryKind(TestSoundDataset):
    factory = Maps


class TestSoundOptimizer(OptimizerSuite):
    config = OPTIMIZER
    factory = SoundOptimizer


# --------------------------------------------------------------------------- what is broken
def _cases(broken: Mapping[str, tuple[Callable[..., Any], str]]) -> Any:
    values = [pytest.param(*case, id=name) for name, case in broken.items()]
    return pytest.mark.parametrize(("factory", "words"), values)


@_cases(BACKBONES)
def test_broken_backbones_are_caught(factory: Callable[..., Any], words: str) -> None:
    with pytest.raises(ContractError, match=words):
        BackboneSuite.check(ToyBackboneConfig(), factory=factory)


@_cases(LOSSES)
def test_broken_losses_are_caught(factory: Callable[..., Any], words: str) -> None:
    with pytest.raises(ContractError, match=words):
        LossSuite.check(ToyLossConfig(), factory=factory)


@_cases(AUGMENTATIONS)
def test_broken_augmentations_are_caught(factory: Callable[..., Any], words: str) -> None:
    with pytest.raises(ContractError, match=words):
        AugmentationSuite.check(ToyAugmentationConfig(), factory=factory)


@_cases(DATASETS)
def test_broken_datasets_are_caught(factory: Callable[..., Any], words: str) -> None:
    with pytest.raises(ContractError, match=words):
        DatasetSuite.check(ToyDatasetConfig(), factory=factory)


@_cases(OPTIMIZERS)
def test_broken_optimizers_are_caught(factory: Callable[..., Any], words: str) -> None:
    with pytest.raises(ContractError, match=words):
        OptimizerSuite.check(OPTIMIZER, factory=factory)


def test_a_check_leaves_the_random_state_alone() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    BackboneSuite.check(ToyBackboneConfig(), factory=SoundBackbone)
    LossSuite.check(ToyLossConfig(), factory=SoundLoss)
    AugmentationSuite.check(ToyAugmentationConfig(), factory=SoundAugmentation)
    assert torch.equal(before, torch.random.get_rng_state())


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="BackboneSuite has no option 'images_size'"):
        BackboneSuite.check(ToyBackboneConfig(), factory=SoundBackbone, images_size=8)


def test_backbones_without_masks_must_refuse_them() -> None:
    class Ignores(SoundBackbone):
        takes_masks = False

    class Refuses(Ignores):
        def __init__(self, config: ToyBackboneConfig) -> None:
            super().__init__(config)
            self.mask_token.requires_grad_(False)

        def forward_features(self, images: Any, masks: Any = None) -> Any:
            given = masks if isinstance(masks, list) else [masks]
            if any(mask is not None for mask in given):
                raise UserError("this backbone takes no masks")
            return super().forward_features(images, masks)

    BackboneSuite.check(ToyBackboneConfig(), factory=Refuses)
    with pytest.raises(ContractError, match="does not refuse them"):
        BackboneSuite.check(ToyBackboneConfig(), factory=Ignores)


def test_parameters_without_gradient_are_named_or_allowed() -> None:
    class Spare(SoundBackbone):
        def __init__(self, config: ToyBackboneConfig) -> None:
            super().__init__(config)
            self.spare = nn.Parameter(torch.zeros(1))

        def init_weights(self) -> None:
            super().init_weights()
            if hasattr(self, "spare"):
                self.spare.data.zero_()

    with pytest.raises(ContractError, match="no gradient reaches spare"):
        BackboneSuite.check(ToyBackboneConfig(), factory=Spare)
    BackboneSuite.check(ToyBackboneConfig(), factory=Spare, without_gradient=["spare"])
