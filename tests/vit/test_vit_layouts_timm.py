"""Folders of timm, against timm itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dinov3_vit.configs import (
    PRESETS,
    Vit7bConfig,
    VitConfig,
    VitSmallConfig,
)
from dinov3_vit.layouts import LAYOUTS
from dinov3_vit.timm import _ARCHITECTURES, TimmLayout
from dinov3_vit.transformer import VisionTransformer
from layout_support import Held, images_of, label, random_vit, restored, stored, tiny, tokens_of
from safetensors.torch import load_file, save_file

from dinov3_framework import SATELLITE_IMAGES, CheckpointError, ImagesConfig, load_backbone

timm = pytest.importorskip("timm")

LAYOUT = TimmLayout()

PLAIN = tiny()
CONFIGS = [
    PLAIN,
    tiny(ffn_layer="swiglu", ffn_ratio=3.0, qkv_bias=False),
    tiny(ffn_layer="swiglu", ffn_ratio=5.25, depth=1, pos_embed_rope_base=20.0),
    tiny(in_chans=5, depth=1, ffn_ratio=83 / 32, n_storage_tokens=0),
    tiny(layerscale_init=0.0, depth=1),
]


def write_folder(folder: Path, vit: VisionTransformer, size: int = 32) -> None:
    images = ImagesConfig()
    if vit.in_chans != 3:
        numbers = (0.5,) * vit.in_chans
        images = ImagesConfig(channels=vit.in_chans, mean=numbers, std=numbers)
    for name, content in LAYOUT.settings(vit.config, images, size).items():
        (folder / name).write_text(json.dumps(content), "utf-8")
    save_file(stored(LAYOUT, vit), folder / "model.safetensors", metadata={"format": "pt"})


def recognized(content: Held) -> list[tuple[str, Any]]:
    found = [(layout.format, layout.recognize(content)) for layout in LAYOUTS]
    return [each for each in found if each[1] is not None]


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def stored_shapes(config: VitConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        official = shapes_of(VisionTransformer(config))
    rules = LAYOUT.rules(config, list(official))
    stored = [rule.stored(official[rule.official]) for rule in rules]
    return {name: tuple(shape) for each in stored for name, shape in each.items()}


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_timm_reads_what_is_written_and_back(config: VitConfig, tmp_path: Path) -> None:
    vit = random_vit(config)
    assert LAYOUT.refusal(config) is None
    write_folder(tmp_path, vit)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    theirs = model.state_dict()
    written = load_file(tmp_path / "model.safetensors")
    assert theirs.keys() == written.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in written.items())
    for height, width in ((16, 16), (8, 24)):
        images = images_of(height, width, vit.in_chans)
        with torch.no_grad():
            ours = tokens_of(vit, images)
            torch.testing.assert_close(model.forward_features(images), ours, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(model(images), ours[:, 0], rtol=1e-4, atol=1e-5)

    settings = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert recognized(Held(theirs, settings)) == [("timm", config)]
    back = restored(LAYOUT, config, theirs).state_dict()
    expected = {**vit.state_dict(), "mask_token": torch.zeros(1, config.embed_dim)}
    assert back.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize("name", _ARCHITECTURES)
def test_architectures_are_timms(name: str) -> None:
    """Every architecture in the table is timm's; of each, the shapes alone are enough."""
    with torch.device("meta"):
        model = timm.create_model(name)
    content = Held(model.state_dict())
    ((format, config),) = recognized(content)
    assert (format, content.was_read) == ("timm", [])
    assert config.num_heads == model.blocks[0].attn.num_heads
    assert config.qkv_bias == name.endswith("_qkvb")
    assert LAYOUT.settings(config, ImagesConfig(), 224)["config.json"]["architecture"] == name
    assert stored_shapes(config) == shapes_of(model)


def test_every_architecture_of_timm_is_known() -> None:
    assert set(timm.list_models("vit_*_dinov3*")) == set(_ARCHITECTURES)


OWN = {
    "vit_small": "vit_small_patch16_dinov3_qkvb",
    "vit_small_plus": "vit_small_plus_patch16_dinov3_qkvb",
    "vit_base": "vit_base_patch16_dinov3_qkvb",
    "vit_large": "vit_large_patch16_dinov3_qkvb",
    "vit_huge_plus": "vit_huge_plus_patch16_dinov3_qkvb",
    "vit_7b": "vit_7b_patch16_dinov3",
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_an_architecture(name: str) -> None:
    """Their own where timm has it, and where not, one with other arguments."""
    config = PRESETS[name]()
    settings = LAYOUT.settings(config, SATELLITE_IMAGES, 224)["config.json"]
    assert settings["pretrained_cfg"]["mean"] == [0.43, 0.411, 0.296]
    own = settings["model_args"] == {"global_pool": "token"}
    assert own == (name in OWN)
    assert settings["architecture"] == OWN.get(name, settings["architecture"])
    with torch.device("meta"):
        model = timm.create_model(settings["architecture"], **settings["model_args"])
    assert stored_shapes(config) == shapes_of(model)


def test_a_wider_multiple_is_not_inherited() -> None:
    """The nearest architecture may round its SwiGLU up to more than this backbone's width."""
    config = Vit7bConfig(ffn_layer="swiglu", ffn_ratio=1.5 * 72 / 4096)
    assert config.ffn_hidden == 72
    settings = LAYOUT.settings(config, ImagesConfig(), 224)["config.json"]
    assert settings["architecture"] == "vit_7b_patch16_dinov3"
    with torch.device("meta"):
        model = timm.create_model(
            settings["architecture"], **{**settings["model_args"], "depth": 1}
        )
    assert model.blocks[0].mlp.fc1_g.out_features == 72


def test_what_is_lost_is_said() -> None:
    config = tiny(untie_global_and_local_cls_norm=True)
    rules = LAYOUT.rules(config, list(VisionTransformer(config).state_dict()))
    lost = {rule.official: rule.lost for rule in rules if rule.lost}
    assert lost.keys() == {"mask_token", "local_cls_norm.weight", "local_cls_norm.bias"}
    assert "masked patches in training" in str(lost["mask_token"])


def test_a_bias_of_the_keys_has_no_place() -> None:
    vit = random_vit(tiny(mask_k_bias=False))
    with pytest.raises(CheckpointError, match=r"'blocks\.0\.attn\.qkv\.bias': part 2 of 3"):
        stored(LAYOUT, vit)


def test_a_classifier_by_the_mean_of_patches(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As timm's trainer leaves it: with the backbone's norm, or with one of the mean alone."""
    options = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    classifier = timm.create_model("vit_small_patch16_dinov3", **options)
    both = timm.create_model(
        "vit_small_patch16_dinov3", use_fc_norm=True, use_post_transformer_norm=True, **options
    )
    for model, beside in ((classifier, "head.bias"), (both, "fc_norm.bias")):
        settings = {"architecture": "vit_small_patch16_dinov3", "model_args": options}
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(settings))
        loaded = load_backbone(tmp_path, images=ImagesConfig())
        with torch.no_grad():
            images = images_of(32, 32)
            ours = loaded.backbone(images)
            theirs = model.eval().forward_features(images)[:, 0]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert beside in caplog.text
    mean = timm.create_model("vit_small_patch16_dinov3", use_fc_norm=True, **options)
    with pytest.raises(CheckpointError, match=r"fc_norm.*no features.*fine-tune without"):
        LAYOUT.recognize(Held(mean.state_dict(), settings))


# --------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_layer": "rmsnorm"}, 'norm_layer = "rmsnorm"'),
        ({"norm_layer": "layernorm"}, 'norm_layer = "layernorm"'),
        ({"proj_bias": False}, "proj_bias = false"),
        ({"ffn_bias": False}, "ffn_bias = false"),
        ({"untie_cls_and_patch_norms": True}, "untie_cls_and_patch_norms"),
        ({"pos_embed_rope_min_period": 1.0, "pos_embed_rope_max_period": 9.0}, "min_period"),
        ({"pos_embed_rope_normalize_coords": "min"}, 'normalize_coords = "min"'),
    ],
)
def test_what_cannot_be_written(options: dict[str, Any], message: str) -> None:
    assert message in (LAYOUT.refusal(tiny(**options)) or "")


TENSORS = stored(LAYOUT, VisionTransformer(PLAIN))
FOLDER = LAYOUT.settings(PLAIN, ImagesConfig(), 32)["config.json"]


def test_other_architectures_are_left_alone() -> None:
    other = {**FOLDER, "architecture": "vit_base_patch16_rope_reg1_gap_256"}
    assert recognized(Held(TENSORS, other)) == []
    assert recognized(Held({**TENSORS, "pos_embed": torch.empty(1, 9, 32)}, FOLDER)) == []


def test_another_rope_cannot_be_used() -> None:
    arguments = {**FOLDER["model_args"], "rope_rotate_half": False}
    with pytest.raises(CheckpointError, match=r"rope_rotate_half = False; .* have True"):
        LAYOUT.recognize(Held(TENSORS, {**FOLDER, "model_args": arguments}))


def test_heads_of_an_unknown_width_need_config_json() -> None:
    with pytest.raises(CheckpointError, match=r"no published backbone is 32 wide; .*config\.json"):
        LAYOUT.recognize(Held(TENSORS))


def test_a_published_size_without_biases() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_dinov3")
    settings = {"architecture": "vit_small_patch16_dinov3", "num_classes": 0}
    expected = VitSmallConfig(qkv_bias=False)
    assert recognized(Held(model.state_dict(), settings)) == [("timm", expected)]
