"""The contract checks let the first-party components pass and catch each broken promise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from broken_backbones import BACKBONES, SoundBackbone, ToyBackboneConfig
from broken_data import (
    AUGMENTATIONS,
    DATASETS,
    SoundAugmentation,
    SoundDataset,
    SoundVariants,
    ToyAugmentationConfig,
    ToyDatasetConfig,
)
from broken_losses import LOSSES, SoundLoss, ToyLossConfig
from torch import nn

from dinov3_framework import (
    Head,
    HeadConfig,
    Registry,
    UserError,
    config,
)
from dinov3_framework.recipes.structure import structure_component
from dinov3_framework.testing import (
    ContractError,
    check_augmentation,
    check_backbone,
    check_dataset,
    check_head,
    check_loss,
)

HEAD = {"n_prototypes": 32, "bottleneck_dim": 8, "hidden_dim": 16}
VIT = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
UNTIED = {
    "untie_global_and_local_cls_norm": True,
    "untie_cls_and_patch_norms": True,
    "n_storage_tokens": 0,
    "ffn_layer": "swiglu",
    "norm_layer": "rmsnorm",
    "drop_path_rate": 0.3,
    "pos_embed_rope_rescale_coords": 2.0,
    "in_chans": 1,
}


@pytest.fixture(scope="module")
def installed() -> Registry:
    return Registry.load()


# --------------------------------------------------------------------------- what is right
@pytest.mark.parametrize("extra", [{}, UNTIED], ids=["plain", "untied"])
def test_vision_transformers_pass(installed: Registry, extra: dict[str, Any]) -> None:
    settings = structure_component(installed, "backbone", "vit", VIT | extra)
    check_backbone(settings, registry=installed)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("dino", {"head": HEAD}),
        ("dino", {"head": HEAD, "local_weight": 0.0}),
        ("dino", {"head": HEAD, "chunk": 3}),
        ("ibot", {"head": HEAD}),
        ("ibot", {"head": HEAD, "chunk": 3}),
        ("koleo", {}),
        ("koleo", {"distributed": True, "topk": 2}),
        ("gram", {}),
        ("gram", {"image_level": False, "tokens": "masked", "compute_stats": True}),
    ],
)
def test_losses_pass(installed: Registry, name: str, values: dict[str, Any]) -> None:
    check_loss(structure_component(installed, "loss", name, values), registry=installed)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"anchor_size": 24, "local_from_global": True},
        {"resolutions": [{"ratio": 0.4}, {"ratio": 0.6, "global_size": 24}], "teacher_scale": 0.5},
    ],
    ids=["plain", "anchors", "resolutions"],
)
def test_multi_crop_passes(installed: Registry, extra: dict[str, Any], channels: int) -> None:
    values = {"global_size": 16, "local_size": 8, "local_crops": 2} | extra
    settings = structure_component(installed, "augmentation", "multi_crop", values)
    check_augmentation(settings, registry=installed, channels=channels)


@pytest.mark.parametrize("channels", [1, 3])
def test_fashion_mnist_passes(installed: Registry, channels: int) -> None:
    settings = structure_component(installed, "dataset", "fashion_mnist", {"split": "test"})
    check_dataset(settings, registry=installed, channels=channels)


def test_sound_components_pass() -> None:
    """Those that the broken ones below differ from in one thing."""
    check_backbone(ToyBackboneConfig(), factory=SoundBackbone)
    check_loss(ToyLossConfig(), factory=SoundLoss)
    check_augmentation(ToyAugmentationConfig(), factory=SoundAugmentation)
    check_augmentation(ToyAugmentationConfig(), factory=SoundVariants)
    check_dataset(ToyDatasetConfig(), factory=SoundDataset)


# --------------------------------------------------------------------------- what is broken
def _cases(broken: Mapping[str, tuple[Callable[..., Any], str]]) -> Any:
    values = [pytest.param(*case, id=name) for name, case in broken.items()]
    return pytest.mark.parametrize(("factory", "words"), values)


@_cases(BACKBONES)
def test_broken_backbones_are_caught(factory: Callable[..., Any], words: str) -> None:
    with pytest.raises(ContractError, match=words):
        check_backbone(ToyBackboneConfig(), factory=factory)


@_cases(LOSSES)
def test_broken_losses_are_caught(factory: Callable[..., Any], words: str) -> None:
    with pytest.raises(ContractError, match=words):
        check_loss(ToyLossConfig(), factory=factory)


@_cases(AUGMENTATIONS)
def test_broken_augmentations_are_caught(factory: Callable[..., Any], words: str) -> None:
    with pytest.raises(ContractError, match=words):
        check_augmentation(ToyAugmentationConfig(), factory=factory)


@_cases(DATASETS)
def test_broken_datasets_are_caught(factory: Callable[..., Any], words: str) -> None:
    with pytest.raises(ContractError, match=words):
        check_dataset(ToyDatasetConfig(), factory=factory)


def test_a_check_leaves_the_random_state_alone() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    check_backbone(ToyBackboneConfig(), factory=SoundBackbone)
    check_loss(ToyLossConfig(), factory=SoundLoss)
    check_augmentation(ToyAugmentationConfig(), factory=SoundAugmentation)
    assert torch.equal(before, torch.random.get_rng_state())


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

    check_backbone(ToyBackboneConfig(), factory=Refuses)
    with pytest.raises(ContractError, match="does not refuse them"):
        check_backbone(ToyBackboneConfig(), factory=Ignores)


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
        check_backbone(ToyBackboneConfig(), factory=Spare)
    check_backbone(ToyBackboneConfig(), factory=Spare, without_gradient=["spare"])


# --------------------------------------------------------------------------- heads
@config
class ToyHeadConfig(HeadConfig):
    """Config of the heads below."""


class LinearHead(Head):
    def __init__(self, config: ToyHeadConfig, *, embed_dim: int) -> None:
        super().__init__()
        self.layer = nn.Linear(embed_dim, 3)

    def init_weights(self) -> None:
        self.layer.reset_parameters()


class ForgetfulHead(LinearHead):
    def init_weights(self) -> None:
        nn.init.zeros_(self.layer.weight)


def test_heads() -> None:
    check_head(ToyHeadConfig(), factory=LinearHead)
    with pytest.raises(ContractError, match=r"left 'layer\.bias' without a finite value"):
        check_head(ToyHeadConfig(), factory=ForgetfulHead)
