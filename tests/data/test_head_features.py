"""The features of a backbone that a head is given."""

from __future__ import annotations

import pytest
import torch

from dinov3_framework import Backbone, FeatureNeeds, HeadFeatures, Registry
from dinov3_framework.data.tokens import head_features

SMALL = {
    "vit": {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2},
    "convnext": {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24)},
}


@pytest.fixture(params=SMALL)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    torch.manual_seed(0)
    made: Backbone = Registry.load().build("backbone", request.param, **SMALL[request.param])
    made.init_weights()
    return made.eval()


def features(backbone: Backbone, **needs: object) -> HeadFeatures:
    images = torch.randn(2, 3, 64, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return head_features(backbone, images, FeatureNeeds(**needs))  # type: ignore[arg-type]


def test_layers_come_in_the_order_of_the_head(backbone: Backbone) -> None:
    last = backbone.n_layers - 1
    found = features(backbone, layers=(-1, 0, last), class_token=True)
    first, whole = features(backbone, layers=(0,), class_token=True), features(backbone)
    assert torch.equal(found.maps[0], whole.maps[0])
    assert torch.equal(found.maps[2], whole.maps[0])
    assert torch.equal(found.maps[1], first.maps[0])
    assert torch.equal(found.cls[1], first.cls[0])
    assert found.image_size == (64, 32)


def test_they_are_what_the_backbone_says_of_itself(backbone: Backbone) -> None:
    every = tuple(range(backbone.n_layers))
    for info, grid in zip(
        backbone.feature_info, features(backbone, layers=every).maps, strict=True
    ):
        assert grid.shape == (2, info.channels, 64 // info.stride, 32 // info.stride)
    assert not features(backbone).cls


def test_the_norm_is_a_choice(backbone: Backbone) -> None:
    with_norm, without = features(backbone).maps[0], features(backbone, norm=False).maps[0]
    assert not torch.allclose(with_norm, without)


def test_sharding_finds_the_tensors_in_them() -> None:
    """FSDP casts what a network is called with, by torch's trees of values."""
    from torch.utils._pytree import tree_map

    given = HeadFeatures([torch.ones(1, 2, 3, 4)], [torch.ones(1, 2)], (24, 32))
    cast = tree_map(lambda each: each.bfloat16(), given)
    assert isinstance(cast, HeadFeatures)
    assert cast.maps[0].dtype == cast.cls[0].dtype == torch.bfloat16
    assert cast.image_size == (24, 32)
