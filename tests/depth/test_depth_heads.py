"""Depth heads: their contracts, their files, the published ones, transformers' canopy height."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from dinov3_depth.configs_heads import CHMV2, SYNTHMIX, DptDepthConfig, LinearDepthConfig
from dinov3_depth.dpt import DptDepth

from dinov3_framework import (
    SATELLITE_IMAGES,
    WEB_IMAGES,
    CheckpointError,
    FeatureInfo,
    InvalidOption,
    Model,
    Registry,
    Target,
    UserError,
    load_backbone,
)
from dinov3_framework.contracts.networks import HeadFeatures
from dinov3_framework.data.predictions import predict
from dinov3_framework.testing import HeadSuite
from dinov3_framework.weights.export import export_backbone
from dinov3_framework.weights.heads import load_head

ROOT = Path(__file__).parents[2]
TARGETS = {"depth": Target("map", unit="m")}
FEATURES = (FeatureInfo(32, 16),) * 4
SMALL: dict[str, Any] = {"widths": (4, 6, 8, 10), "channels": 8, "hidden": 6, "bins": 5}


class _Suite(HeadSuite):
    schema = TARGETS


class TestLinearDepth(_Suite):
    config = LinearDepthConfig(layers=(-2, -1), bins=6, class_token=True)


class TestRegression(_Suite):
    config = LinearDepthConfig(bins=1, batch_norm=False, spacing="sid", l1=1.0)


class TestDpt(_Suite):
    config = DptDepthConfig(**SMALL, readout="project", gradient_log=0.5)


class TestDptOfStrides(_Suite):
    """On a backbone whose layers become coarser."""

    config = DptDepthConfig(**SMALL, batch_norm=False, readout="add", layers=(0, 1, 2, 3))
    features = tuple(FeatureInfo(8 * 2**i, 4 * 2**i) for i in range(4))
    size = (64, 96)


def built(config: Any = None, features: Any = FEATURES) -> DptDepth:
    torch.manual_seed(0)
    head = DptDepth(config or DptDepthConfig(**SMALL), features=features, targets=TARGETS)
    head.init_weights()
    return head.eval()


def drawn(head: Any, height: int = 4, width: int = 6) -> HeadFeatures:
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randn(2, 32, height, width, generator=generator) for _ in range(4)]
    cls = [torch.randn(2, 32, generator=generator) for _ in range(4)]
    return HeadFeatures(maps, cls if head.needs.class_token else (), (16 * height, 16 * width))


@torch.no_grad()
def test_depth_is_resized_as_depth() -> None:
    """Not as scores: between two sure depths lies their mean, not the mean of all bins."""
    head = built()
    found = head.predict(head(drawn(head)), (30, 50))["depth"]
    assert found.shape == (2, 30, 50)
    assert head(drawn(head, 3, 5)).shape == (2, 5, 64, 96), "the coarsest map is rounded up"


@torch.no_grad()
def test_depth_by_regression_is_cut_off() -> None:
    head = built(DptDepthConfig(**{**SMALL, "bins": 1}, min_depth=0.5, max_depth=0.6))
    scores = torch.tensor([-1.0, 5.0]).view(1, 1, 1, 2)
    found = head.predict(scores, (2, 4))["depth"]
    torch.testing.assert_close(found[0, :, [0, -1]], torch.tensor([[0.5, 0.6]] * 2))


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(UserError, match="needs four layers, and this backbone has 2"):
        built(features=FEATURES[:2])
    strides = tuple(FeatureInfo(8, stride) for stride in (4, 8, 16, 12))
    with pytest.raises(UserError, match="strides of 4, 8, 16, 12 px"):
        built(features=strides)
    with pytest.raises(InvalidOption, match="widths"):
        DptDepthConfig(widths=(1, 2, 3))
    with pytest.raises(UserError, match="depth"):
        DptDepth(DptDepthConfig(), features=FEATURES, targets={"depth": Target("mask", 3)})


# --------------------------------------------------------------------------- files
class Backbone(torch.nn.Module):
    feature_info = FEATURES


@pytest.mark.parametrize("readout", ["ignore", "project"])
def test_official_files_are_loaded_by_themselves(tmp_path: Path, readout: Any) -> None:
    head = built(DptDepthConfig(**SMALL, readout=readout, bias=readout == "project"))
    torch.save(head.state_dict(), tmp_path / "head.pth")
    loaded = load_head(tmp_path / "head.pth", Backbone())  # type: ignore[arg-type]
    assert loaded.head.targets == TARGETS
    with torch.no_grad():
        torch.testing.assert_close(loaded.head(drawn(head)), head(drawn(head)), rtol=0, atol=0)
    for lost in ("convs.2.conv.weight", "convs.0.conv.weight", "conv_depth.head.2.weight"):
        state = head.state_dict()
        state.pop(lost)
        torch.save(state, tmp_path / "head.pth")
        with pytest.raises(CheckpointError, match=re.escape(lost)):
            load_head(tmp_path / "head.pth", Backbone())  # type: ignore[arg-type]


def test_the_published_heads_are_told_apart_by_their_shapes(tmp_path: Path) -> None:
    for config, width in ((SYNTHMIX, 4096), (CHMV2, 1024)):
        features = (FeatureInfo(width, 16),) * 40
        with torch.device("meta"):
            head = DptDepth(config, features=features, targets=TARGETS)
        shapes = {name: tuple(t.shape) for name, t in head.state_dict().items()}

        class Content:
            settings: dict[str, Any] = {}  # noqa: RUF012

        Content.shapes = shapes  # type: ignore[attr-defined]
        [layout] = [
            each
            for each in Registry.load().layouts
            if each.config is DptDepthConfig and each.format == "meta"
        ]
        assert layout.recognize(Content()) == config  # type: ignore[arg-type]


def load(name: str, **values: Any) -> Any:
    return torch.hub.load(str(ROOT), name, source="local", **values)


@pytest.mark.parametrize(
    ("name", "layers"), [("dinov3_vit7b16_dd", SYNTHMIX), ("dinov3_vitl16_chmv2", CHMV2)]
)
def test_published_ones_have_their_sizes(name: str, layers: Any) -> None:
    with torch.device("meta"):
        whole = load(name, pretrained=False)
        depth = whole(torch.empty(1, 3, 40, 64))
    assert depth.shape == (1, 1, 64, 64), "padded to whole patches, the coarsest map rounded up"
    assert whole.head.config == layers
    assert name in Registry.load().published


def test_the_hub_loads_one_from_its_files(tmp_path: Path) -> None:
    values = {"embed_dim": 32, "depth": 4, "num_heads": 2}
    backbone = load("dinov3_vitl16", pretrained=False, **values)
    weights = tmp_path / "backbone.safetensors"
    export_backbone(
        weights,
        backbone.state_dict(),
        component="vit_large",
        config=values,
        images=SATELLITE_IMAGES,
        size=224,
        provenance={},
    )
    head = built()
    torch.save(head.state_dict(), tmp_path / "head.pth")
    given = {"weights": tmp_path / "head.pth", "backbone_weights": weights}
    model = load("dinov3_vitl16_chmv2", **given)
    assert model.backbone.images == SATELLITE_IMAGES
    with torch.no_grad():
        depth = model(torch.randn(2, 3, 64, 80))
    assert depth.shape == (2, 1, 64, 96)
    assert not model.training
    assert bool((depth > 0).all())


# --------------------------------------------------------------------------- transformers
def canopy(folder: Path, **options: Any) -> Any:
    """A small model as transformers saves it."""
    from transformers import CHMv2Config, CHMv2ForDepthEstimation

    backbone = {
        "model_type": "dinov3_vit",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_hidden_layers": 5,
        "num_register_tokens": 4,
        "key_bias": True,
        "out_indices": [1, 2, 4, 5],
        "reshape_hidden_states": True,
        "apply_layernorm": True,
        "return_class_token": True,
        "layer_norm_eps": 1e-5,
        "image_size": 64,
    }
    values = {
        "backbone_config": {**backbone, **options.pop("backbone", {})},
        "post_process_channels": [4, 6, 8, 10],
        "fusion_hidden_size": 8,
        "head_hidden_size": 6,
        "number_output_channels": 5,
    }
    torch.manual_seed(0)
    model = CHMv2ForDepthEstimation(CHMv2Config(**values, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = math.prod(parameter.shape[1:]) if parameter.ndim > 1 else 10
            parameter.copy_(torch.randn(parameter.shape) * fan_in**-0.5)
        # Where all scores are cut off at almost 0, rounding decides on their shares.
        model.head.conv_depth.head[4].bias.add_(2)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def plain_canopy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chmv2")
    canopy(folder)
    return folder


LOG = {"bins_strategy": "log", "norm_strategy": "sigmoid", "max_depth": 40.0}


@pytest.mark.parametrize(
    "options",
    [
        {"readout_type": "project"},
        {"readout_type": "add", "backbone": {"out_indices": [1, 2, -2, -1]}},
        {"readout_type": "ignore"},
        {**LOG, "readout_type": "project"},
    ],
)
def test_canopy_height_of_transformers(tmp_path: Path, options: dict[str, Any]) -> None:
    """A folder of CHMv2 is a backbone and a head, and gives what transformers gives."""
    model = canopy(tmp_path / "chmv2", **options)
    ours = load_backbone(tmp_path / "chmv2")
    head = load_head(tmp_path / "chmv2", ours.backbone)
    images = torch.randn(2, 3, 64, 96)
    found = predict(Model(ours.backbone, WEB_IMAGES, head.head), images)["depth"]
    with torch.no_grad():
        expected = model(images).predicted_depth
    assert expected.shape == found.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bins_strategy": "linear"}, "go together"),
        ({"norm_strategy": "softmax"}, "go together"),
        ({"bins_strategy": "sid"}, "bins_strategy = 'sid'"),
        ({"reassemble_factors": [2, 1, 1, 0.5]}, "reassemble_factors"),
        ({"max_depth": "far"}, "max_depth = 'far'"),
        ({"backbone_config.out_indices": [0, 1, 2, 3]}, "out_indices"),
        ({"backbone_config.out_indices": [3, 4, 5]}, "out_indices"),
        ({"backbone_config.apply_layernorm": False}, "apply_layernorm"),
    ],
)
def test_what_config_json_says_and_is_not_known(
    tmp_path: Path, plain_canopy: Path, values: dict[str, Any], message: str
) -> None:
    """Refused, rather than taken for something else."""
    backbone = load_backbone(plain_canopy).backbone
    folder = shutil.copytree(plain_canopy, tmp_path / "chmv2")
    said = json.loads((folder / "config.json").read_text("utf-8"))
    for name, value in values.items():
        *outer, last = name.split(".")
        (said[outer[0]] if outer else said)[last] = value
    (folder / "config.json").write_text(json.dumps(said), "utf-8")
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_head(folder, backbone)
