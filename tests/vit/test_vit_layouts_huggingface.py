"""Folders of transformers, against transformers itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from dinov3_vit.configs import VitConfig, VitSmallConfig, VitSmallPlusConfig
from dinov3_vit.huggingface import HuggingFaceLayout
from dinov3_vit.layouts import LAYOUTS
from dinov3_vit.transformer import VisionTransformer
from layout_support import Held, images_of, label, random_vit, restored, stored, tiny, tokens_of
from safetensors.torch import load_file, save_file

from dinov3_framework import SATELLITE_IMAGES, CheckpointError, ImagesConfig

transformers = pytest.importorskip("transformers")

LAYOUT = HuggingFaceLayout()
IN_MEMORY = HuggingFaceLayout(blocks="model.layer.")

PLAIN = tiny()
CONFIGS = [
    PLAIN,
    tiny(ffn_layer="swiglu", ffn_ratio=3.0, qkv_bias=False, norm_layer="layernorm"),
    tiny(mask_k_bias=False, in_chans=5, pos_embed_rope_base=20.0, depth=1),
    tiny(n_storage_tokens=0, ffn_bias=False, proj_bias=False, depth=1),
    tiny(pos_embed_rope_shift_coords=0.1, pos_embed_rope_rescale_coords=2.0, depth=1),
]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def write_folder(folder: Path, vit: VisionTransformer, images: ImagesConfig) -> None:
    for name, content in LAYOUT.settings(vit.config, images, size=32).items():
        (folder / name).write_text(json.dumps(content), "utf-8")
    save_file(stored(LAYOUT, vit), folder / "model.safetensors", metadata={"format": "pt"})


def settings_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text("utf-8"))  # type: ignore[no-any-return]


def recognized(content: Held) -> list[tuple[int, Any]]:
    found = [(index, layout.recognize(content)) for index, layout in enumerate(LAYOUTS)]
    return [each for each in found if each[1] is not None]


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_transformers_reads_what_is_written(config: VitConfig, tmp_path: Path) -> None:
    vit = random_vit(config)
    assert LAYOUT.refusal(config) is None
    half = (0.5,) * vit.in_chans
    write_folder(tmp_path, vit, ImagesConfig(channels=vit.in_chans, mean=half, std=half))
    model, report = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model) is transformers.DINOv3ViTModel
    assert not any(report[each] for each in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model.eval()
    for height, width in ((16, 16), (8, 24)):
        images = images_of(height, width, vit.in_chans)
        with torch.no_grad():
            theirs = model(images).last_hidden_state
            torch.testing.assert_close(theirs, tokens_of(vit, images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_what_transformers_writes_is_read(config: VitConfig, tmp_path: Path) -> None:
    """Out of the real model, in files and in memory, back to the same bits."""
    vit = random_vit(config)
    settings = LAYOUT.settings(config, ImagesConfig(), 32)["config.json"]
    model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**settings))
    model.load_state_dict(stored(IN_MEMORY, vit), strict=True)
    model.save_pretrained(tmp_path)
    by_file = load_file(tmp_path / "model.safetensors")
    for index, tensors in ((2, by_file), (3, dict(model.state_dict()))):
        ((found, back),) = recognized(Held(tensors, settings_of(tmp_path)))
        assert found == index
        assert back == config
        read = restored(LAYOUTS[index], back, tensors).state_dict()
        assert read.keys() == vit.state_dict().keys()
        for name, tensor in vit.state_dict().items():
            assert torch.equal(read[name], tensor), name


@pytest.mark.parametrize("config", [VitSmallConfig(), VitSmallPlusConfig()], ids=["S", "S+"])
@pytest.mark.parametrize("with_settings", [True, False])
def test_published_sizes_are_recognized(config: VitConfig, with_settings: bool) -> None:
    settings = LAYOUT.settings(config, ImagesConfig(), 224)["config.json"]
    with torch.device("meta"):
        model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**settings))
    tensors = {name.replace("model.layer.", "layer."): t for name, t in model.state_dict().items()}
    content = Held(tensors, settings if with_settings else {})
    assert recognized(content) == [(2, config)]
    assert content.was_read == []


def test_a_part_of_another_model_is_recognized() -> None:
    config = VitSmallConfig(depth=1)
    vit = VisionTransformer(config)
    settings = LAYOUT.settings(config, ImagesConfig(), 224)["config.json"]
    whole = {"model_type": "segmenter", "backbone_config": settings}
    assert LAYOUT.recognize(Held(stored(LAYOUT, vit), whole)) == VitConfig(
        embed_dim=384, num_heads=6, depth=1, pos_embed_rope_rescale_coords=2.0
    )


@pytest.mark.parametrize("images", [ImagesConfig(), SATELLITE_IMAGES], ids=["web", "satellite"])
def test_images_are_prepared_as_they_should(images: ImagesConfig, tmp_path: Path) -> None:
    write_folder(tmp_path, VisionTransformer(PLAIN), images)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert type(processor) is transformers.DINOv3ViTImageProcessor
    photograph = torch.randint(256, (3, 40, 50), dtype=torch.uint8)
    pixels = processor(photograph, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    untouched = processor(photograph[:, :32, :32], return_tensors="pt")["pixel_values"][0]
    mean, std = (torch.tensor(each)[:, None, None] for each in (images.mean, images.std))
    expected = (photograph[:, :32, :32] / 255 - mean) / std
    torch.testing.assert_close(untouched, expected, rtol=1e-5, atol=1e-5)


def test_what_is_lost_is_said() -> None:
    config = tiny(untie_global_and_local_cls_norm=True)
    vit = random_vit(config)
    rules = LAYOUT.rules(config, list(vit.state_dict()))
    lost = [rule.lost for rule in rules if rule.lost]
    assert [each.partition(" ")[0] for each in lost] == [
        "local_cls_norm.weight",
        "local_cls_norm.bias",
    ]
    assert "local crops in training" in lost[0]
    assert not any("local" in name for name in stored(LAYOUT, vit))


def test_a_masked_bias_may_hold_anything() -> None:
    vit = random_vit(PLAIN)
    before = tokens_of(vit, images_of(16, 16))
    with torch.no_grad():
        vit.blocks[1].attn.qkv.bias.chunk(3)[1].fill_(7)
    read = restored(LAYOUT, PLAIN, stored(LAYOUT, vit))
    torch.testing.assert_close(tokens_of(read, images_of(16, 16)), before)


# --------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_layer": "rmsnorm"}, "LayerNorm alone"),
        ({"layerscale_init": 0.0}, "layerscale_init = 0"),
        ({"layerscale_init": None}, "layerscale_init = 0"),
        ({"untie_cls_and_patch_norms": True}, "untie_cls_and_patch_norms"),
        ({"pos_embed_rope_min_period": 1.0, "pos_embed_rope_max_period": 9.0}, "min_period"),
        ({"pos_embed_rope_normalize_coords": "max"}, 'normalize_coords = "max"'),
    ],
)
def test_what_cannot_be_written(options: dict[str, Any], message: str) -> None:
    assert message in (LAYOUT.refusal(tiny(**options)) or "")


FOLDER = LAYOUT.settings(PLAIN, ImagesConfig(), 32)["config.json"]
TENSORS = stored(LAYOUT, VisionTransformer(PLAIN))
KEY_BIAS = "layer.0.attention.k_proj.bias"
QUERY_BIAS = "layer.0.attention.q_proj.bias"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_norm_eps": 1e-12}, "layer_norm_eps = 1e-12; .* have 1e-06 or 1e-05"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps = 'small', not a number"),
        ({"hidden_act": "relu"}, 'hidden_act = "relu"; .* "gelu" in a plain FFN'),
        ({"hidden_size": 64}, "hidden_size = 64, and the tensors beside it 32"),
        ({"num_hidden_layers": 3}, "num_hidden_layers = 3, and the tensors beside it 2"),
        ({"intermediate_size": 3}, "intermediate_size = 3"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0, not a number above 0"),
        ({"num_attention_heads": 5}, "no Vision Transformer of this kind: embed_dim: 32 is not"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        LAYOUT.recognize(Held(TENSORS, {**FOLDER, **settings}))


@pytest.mark.parametrize("removed", [{QUERY_BIAS}, {QUERY_BIAS, "layer.0.attention.v_proj.bias"}])
def test_biases_that_no_backbone_here_has(removed: set[str]) -> None:
    tensors = {**TENSORS, KEY_BIAS: torch.zeros(32)}
    for name in removed:
        del tensors[name]
    with pytest.raises(CheckpointError, match="some have a bias and some have none"):
        LAYOUT.recognize(Held(tensors, FOLDER))


def test_heads_of_an_unknown_width_need_config_json() -> None:
    with pytest.raises(CheckpointError, match=r"no published backbone is 32 wide; .*config\.json"):
        LAYOUT.recognize(Held(TENSORS))


def test_other_models_are_left_alone() -> None:
    assert recognized(Held(TENSORS, {**FOLDER, "model_type": "sapiens2"})) == []
    assert recognized(Held({"layer.0.attention.q_proj.weight": torch.empty(8, 8)})) == []


def test_defaults_of_transformers_are_its_own() -> None:
    """Of settings that a config.json may leave out."""
    theirs = transformers.DINOv3ViTConfig()
    left_out = {"model_type": "dinov3_vit"}
    config = LAYOUT.recognize(Held(stored(LAYOUT, VisionTransformer(tiny(embed_dim=48))), left_out))
    assert config is not None
    assert config.num_heads == theirs.num_attention_heads
    assert config.pos_embed_rope_rescale_coords == theirs.pos_embed_rescale
    assert (config.norm_layer, theirs.layer_norm_eps) == ("layernormbf16", 1e-5)
    assert (config.pos_embed_rope_base, theirs.rope_theta) == (None, 100)
    assert attrs.evolve(config, num_heads=2, pos_embed_rope_rescale_coords=None) == tiny(
        embed_dim=48
    )
