"""The features of a backbone that a head is given."""

from __future__ import annotations

import pytest
import torch

from dinov3_framework import Backbone, FeatureNeeds, HeadFeatures, Registry
from dinov3_framework.data.tokens import head_features

SMALL = {
    "vit": {"patch_size": 8, "n_storage_tokens": 3, "embed_dim": 16, "depth": 3, "num_heads": 2},
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


@pytest.mark.parametrize("class_token", [False, True])
def test_storage_tokens_come_where_they_are_wanted(backbone: Backbone, class_token: bool) -> None:
    found = features(backbone, layers=(-1, 0), class_token=class_token, storage=True)
    count = getattr(backbone, "n_storage_tokens", 0)
    widths = [backbone.feature_info[layer].channels for layer in (-1, 0)]
    assert [each.shape for each in found.storage] == [(2, count, width) for width in widths]
    assert len(found.cls) == 2 * class_token
    plain = features(backbone, layers=(-1, 0), class_token=True)
    assert torch.equal(found.maps[1], plain.maps[1])
    assert not plain.storage


def test_the_norm_is_a_choice(backbone: Backbone) -> None:
    with_norm, without = features(backbone).maps[0], features(backbone, norm=False).maps[0]
    assert not torch.allclose(with_norm, without)


def test_sharding_finds_the_tensors_in_them() -> None:
    """FSDP casts what a network is called with, by torch's trees of values."""
    from torch.utils._pytree import tree_map

    one = torch.ones(1, 2, 3)
    for image, storage in ((None, ()), (one, ()), (None, [one]), (one, [one])):
        given = HeadFeatures([torch.ones(1, 2, 3, 4)], [torch.ones(1, 2)], (24, 32), image, storage)
        cast = tree_map(lambda each: each.bfloat16(), given)
        assert isinstance(cast, HeadFeatures)
        assert cast.maps[0].dtype == cast.cls[0].dtype == torch.bfloat16
        assert cast.image_size == (24, 32)
        assert (cast.image is None) == (image is None)
        assert [each.dtype for each in cast.storage] == [torch.bfloat16] * len(storage)
