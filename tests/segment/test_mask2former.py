"""Mask2Former on a ViT adapter: its contract, its files, the published one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dinov3_segment.configs_mask2former import Mask2FormerConfig
from dinov3_segment.mask2former import Mask2Former

from dinov3_framework import (
    WEB_IMAGES,
    CheckpointError,
    FeatureInfo,
    InvalidOption,
    Registry,
    Target,
    UserError,
)
from dinov3_framework.contracts.networks import HeadFeatures
from dinov3_framework.testing import HeadSuite
from dinov3_framework.weights.export import export_backbone
from dinov3_framework.weights.heads import load_head

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {
    "hidden_dim": 32,
    "queries": 5,
    "heads": 2,
    "ffn_dim": 16,
    "encoder_layers": 1,
    "decoder_layers": 4,
    "adapter_channels": 4,
    "adapter_heads": 2,
    "points": 32,
}
FEATURES = (FeatureInfo(32, 16),) * 4


def small(**options: Any) -> Mask2Former:
    targets = {"mask": Target("mask", 5, ignore_index=255)}
    config = Mask2FormerConfig(**SMALL | options)
    torch.manual_seed(0)
    head = Mask2Former(config, features=FEATURES, targets=targets)
    head.init_weights()
    return head


class TestMask2Former(HeadSuite):
    config = Mask2FormerConfig(**SMALL)
    features = (FeatureInfo(32, 8),) * 4
    size = (64, 96)


def test_images_need_not_be_multiples_of_the_coarsest_stride() -> None:
    """They are filled up, and what was filled up is cut off again."""
    head = small().eval()
    torch.manual_seed(1)
    image, maps = torch.randn(1, 3, 48, 80), [torch.randn(1, 32, 3, 5) for _ in range(4)]
    filled = F.pad(image, (0, 16, 0, 16))
    more = [F.pad(each, (0, 1, 0, 1), mode="replicate") for each in maps]
    with torch.no_grad():
        found = head(HeadFeatures(maps, (), (48, 80), image))
        whole = head(HeadFeatures(more, (), (64, 96), filled))
    assert found["pred_masks"].shape == (1, 5, 12, 20)
    assert torch.equal(found["pred_masks"], whole["pred_masks"][..., :12, :20])
    assert torch.equal(found["pred_logits"], whole["pred_logits"])
    assert head.predict(found, (48, 80))["mask"].shape == (1, 5, 48, 80)


def test_what_does_not_fit_is_said() -> None:
    targets = {"mask": Target("mask", 5)}

    def build(features: Any, **options: Any) -> Mask2Former:
        config = Mask2FormerConfig(**SMALL | options)
        return Mask2Former(config, features=features, targets=targets)

    with pytest.raises(UserError, match="needs four layers, and this backbone has 3"):
        build((FeatureInfo(32, 16),) * 3)
    with pytest.raises(UserError, match="differ in width or stride: 32 at 8 px, 64 at 16 px"):
        build((FeatureInfo(32, 8),) * 2 + (FeatureInfo(64, 16),) * 2)
    with pytest.raises(InvalidOption, match="adapter_heads"):
        build(FEATURES, adapter_heads=3)
    with pytest.raises(InvalidOption, match="heads"):
        build(FEATURES, heads=3)
    with pytest.raises(InvalidOption, match="hidden_dim"):
        build(FEATURES, hidden_dim=48)
    with pytest.raises(InvalidOption, match="layers"):
        Mask2FormerConfig(layers=(1, 2))


def test_the_official_file_is_loaded_by_itself(tmp_path: Path) -> None:
    """Its shapes say all but the layers, and the head is the same again."""
    head = small().eval()
    torch.save(head.state_dict(), tmp_path / "head.pth")

    class Backbone(torch.nn.Module):
        feature_info = FEATURES

    loaded = load_head(tmp_path / "head.pth", Backbone())  # type: ignore[arg-type]
    assert loaded.head.targets["mask"].count == 5
    torch.manual_seed(1)
    maps = [torch.randn(1, 32, 4, 6) for _ in range(4)]
    features = HeadFeatures(maps, (), (64, 96), torch.randn(1, 3, 64, 96))
    with torch.no_grad():
        found, expected = loaded.head(features), head(features)
    assert torch.equal(found["pred_masks"], expected["pred_masks"])
    state = head.state_dict()
    beside = {"segmentation_model.0.backbone.cls_token": torch.zeros(1, 1, 32)}
    torch.save(state | beside, tmp_path / "head.pth")  # as the whole network saves itself
    load_head(tmp_path / "head.pth", Backbone())  # type: ignore[arg-type]
    torch.save(state | {"segmentation_model.0.other": torch.zeros(1)}, tmp_path / "head.pth")
    with pytest.raises(CheckpointError, match=r"segmentation_model\.0\.other"):
        load_head(tmp_path / "head.pth", Backbone())  # type: ignore[arg-type]
    state.pop("segmentation_model.0.level_embed")
    torch.save(state, tmp_path / "head.pth")
    with pytest.raises(CheckpointError, match=r"segmentation_model\.0\.level_embed"):
        load_head(tmp_path / "head.pth", Backbone())  # type: ignore[arg-type]


def load(name: str, **values: Any) -> Any:
    return torch.hub.load(str(ROOT), name, source="local", **values)


def test_the_published_one_has_its_size() -> None:
    with torch.device("meta"):
        whole = load("dinov3_vit7b16_ms", pretrained=False)
        outputs = whole(torch.empty(1, 3, 64, 64))
    assert outputs["pred_logits"].shape == (1, 100, 151)
    assert outputs["pred_masks"].shape == (1, 100, 16, 16)
    shapes = whole.head.state_dict()
    assert shapes["segmentation_model.0.spm.fc1.weight"].shape == (4096, 64, 1, 1)
    assert shapes["segmentation_model.1.predictor.mask_embed.layers.2.weight"].shape == (2048, 2048)
    published = Registry.load().published["dinov3_vit7b16_ms"]
    assert published.default.digest == "bf307cb1"


def test_the_hub_loads_it_from_its_files(tmp_path: Path) -> None:
    values = {"embed_dim": 32, "depth": 4, "num_heads": 2}
    backbone = load("dinov3_vit7b16", pretrained=False, **values)
    weights = tmp_path / "backbone.safetensors"
    export_backbone(
        weights,
        backbone.state_dict(),
        component="vit_7b",
        config=values,
        images=WEB_IMAGES,
        size=224,
        provenance={},
    )
    torch.save(small().state_dict(), tmp_path / "head.pth")
    given = {"weights": tmp_path / "head.pth", "backbone_weights": weights}
    model = load("dinov3_vit7b16_ms", classes=5, **given)
    images = torch.randn(1, 3, 64, 96)
    outputs = model.predict(images, rescale_to=(30, 50))
    assert outputs["pred_masks"].shape == (1, 5, 30, 50)
    assert model.scores(images).shape == (1, 5, 64, 96)
    assert not model.training
