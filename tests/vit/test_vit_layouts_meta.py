"""Files under the official names: what is recognized in them, from shapes and a few numbers."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from dinov3_vit.components import PUBLISHED
from dinov3_vit.configs import PRESETS, Vit7bConfig, VitConfig, VitLargeConfig, VitSmallConfig
from dinov3_vit.layouts import LAYOUTS, MetaLayout
from dinov3_vit.recognition import ratio_of
from dinov3_vit.transformer import VisionTransformer
from layout_support import Held, label, random_vit, restored, stored, tiny

from dinov3_framework import SATELLITE_IMAGES, WEB_IMAGES, CheckpointError, Content

META = MetaLayout()
PARAMETERS = MetaLayout(buffers=False)


def held(config: VitConfig, **changes: Any) -> Held:
    """A file of a backbone, on the meta device but for its buffers."""
    with torch.device("meta"):
        vit = VisionTransformer(config)
    vit.rope_embed.to_empty(device="cpu").init_weights()
    return Held({**vit.state_dict(), **changes})


def without_buffers(content: Held) -> Held:
    dropped = ("periods", "bias_mask")
    return Held({n: t for n, t in content.tensors.items() if not n.endswith(dropped)})


def recognized(content: Content) -> list[tuple[str, Any]]:
    found = [(each.format, each.recognize(content)) for each in LAYOUTS]
    return [(format, config) for format, config in found if config is not None]


# --------------------------------------------------------------------------- recognition
@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_presets_are_recognized(preset: type[VitConfig]) -> None:
    content = held(preset())
    assert recognized(content) == [("meta", preset())]
    assert content.was_read == ["rope_embed.periods"]


@pytest.mark.parametrize(
    "config",
    [
        VitLargeConfig(untie_global_and_local_cls_norm=True),
        Vit7bConfig(untie_global_and_local_cls_norm=False),
        Vit7bConfig(qkv_bias=True),
        VitSmallConfig(in_chans=4),
        VitSmallConfig(qkv_bias=False, n_storage_tokens=0),
        VitSmallConfig(pos_embed_rope_base=250.0),
        VitConfig(embed_dim=384, num_heads=6, patch_size=8),
        VitConfig(embed_dim=384, num_heads=12),
        tiny(),
        tiny(in_chans=1, n_storage_tokens=0, layerscale_init=0.0, norm_layer="rmsnorm"),
        tiny(qkv_bias=False, proj_bias=False, ffn_bias=False),
        tiny(mask_k_bias=False, untie_cls_and_patch_norms=True),
        tiny(ffn_ratio=2.5),
        tiny(embed_dim=24, num_heads=1, ffn_ratio=131 / 24),
        tiny(ffn_ratio=6.0, ffn_layer="swiglu"),
        tiny(embed_dim=40, num_heads=1, pos_embed_rope_base=1e4),
        tiny(embed_dim=64, pos_embed_rope_min_period=0.1, pos_embed_rope_max_period=33.3),
        tiny(embed_dim=64, pos_embed_rope_min_period=5.0, pos_embed_rope_max_period=5.0),
        tiny(embed_dim=8),  # one period, which no base changes
    ],
    ids=label,
)
def test_other_backbones_are_recognized(config: VitConfig) -> None:
    assert recognized(held(config)) == [("meta", config)]


def test_a_swiglu_is_recognized_by_its_width() -> None:
    """What it was rounded up to is not in the file, and is of no consequence."""
    config = tiny(ffn_layer="swiglu64", ffn_ratio=3.3)
    ((_, found),) = recognized(held(config))
    assert (found.ffn_layer, found.ffn_hidden) == ("swiglu", config.ffn_hidden) == ("swiglu", 128)


def test_every_ratio_gives_its_width_back() -> None:
    pairs = [(width, hidden) for width in (24, 49, 1152) for hidden in range(1, 5000)]
    assert any(int(width * (hidden / width)) != hidden for width, hidden in pairs)
    assert all(int(width * ratio_of(hidden, width)) == hidden for width, hidden in pairs)


def test_the_ffn_is_as_wide_as_its_config_says() -> None:
    configs = [*(preset() for preset in PRESETS.values()), tiny(ffn_layer="swiglu32")]
    for config in configs:
        shapes = held(config).shapes
        first = "fc1" if config.ffn_layer == "mlp" else "w1"
        assert shapes[f"blocks.0.mlp.{first}.weight"] == (config.ffn_hidden, config.embed_dim)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pos_embed_rope_base": 150.0},
        {"pos_embed_rope_min_period": 0.3, "pos_embed_rope_max_period": 70.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widened", [False, True])
def test_rounded_periods(options: dict[str, Any], dtype: torch.dtype, widened: bool) -> None:
    """Published files have them in bfloat16, or as bfloat16 left them."""
    content = held(VitSmallConfig(**options))
    periods = content.tensors["rope_embed.periods"].to(dtype)
    content = Held(
        {**content.tensors, "rope_embed.periods": periods.float() if widened else periods}
    )
    assert META.recognize(content) == VitSmallConfig(**options)


def test_periods_that_were_never_set() -> None:
    periods = torch.full((16,), float("nan"))
    content = held(VitConfig(embed_dim=640, num_heads=10), **{"rope_embed.periods": periods})
    assert META.recognize(content) == VitConfig(embed_dim=640, num_heads=10)


# --------------------------------------------------------------------------- parameters alone
@pytest.mark.parametrize("preset", [VitSmallConfig, Vit7bConfig])
def test_parameters_alone_are_recognized_by_their_width(preset: type[VitConfig]) -> None:
    content = without_buffers(held(preset()))
    if preset().qkv_bias:
        content = Held({**content.tensors, "blocks.0.attn.qkv.bias": torch.zeros(3 * 384)})
    assert recognized(content) == [("meta", preset())]


@pytest.mark.parametrize("masked", [True, False])
def test_parameters_alone_are_read(masked: bool) -> None:
    config = tiny(embed_dim=384, num_heads=6, depth=1, mask_k_bias=masked)
    vit = random_vit(config)
    tensors = stored(PARAMETERS, vit)
    assert tensors.keys() == {name for name, _ in vit.named_parameters()}
    found = PARAMETERS.recognize(Held(tensors))
    assert found == config
    assert_same(restored(PARAMETERS, found, tensors), vit)


def test_parameters_alone_of_a_width_that_nobody_published() -> None:
    vit = random_vit(tiny())
    content = Held(stored(PARAMETERS, vit))
    with pytest.raises(
        CheckpointError, match=r"how many heads .* no published backbone is 32 wide"
    ):
        PARAMETERS.recognize(content)


def assert_same(one: VisionTransformer, other: VisionTransformer) -> None:
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_round_trip() -> None:
    vit = random_vit(tiny(ffn_layer="swiglu", untie_cls_and_patch_norms=True))
    tensors = stored(META, vit)
    assert tensors.keys() == vit.state_dict().keys()
    assert_same(restored(META, vit.config, tensors), vit)


# --------------------------------------------------------------------------- refusals
SMALL = held(VitSmallConfig()).tensors


def changed(**changes: torch.Tensor | None) -> Held:
    new = {**SMALL, **{name.replace("__", "."): value for name, value in changes.items()}}
    return Held({name: tensor for name, tensor in new.items() if tensor is not None})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(pos_embed=torch.empty(1, 257, 384)), "this is a DINOv2 model"),
        (changed(patch_embed__proj__weight=torch.empty(384, 3, 16, 8)), "patches are 16 x 8 pix"),
        (changed(patch_embed__proj__weight=torch.empty(384, 768)), r"\[384, 768\]; .* has 4 axes"),
        (changed(storage_tokens=torch.empty(4, 384)), r"storage_tokens is of shape \[4, 384\]"),
        (changed(blocks__0__mlp__fc1__weight=None), "no FFN that is known"),
        (
            changed(blocks__0__mlp__w1__weight=torch.empty(1023, 384)),
            "1023 wide; .* a multiple of 8",
        ),
        (
            changed(rope_embed__periods=torch.ones(18)),
            r"shape \[18\], which does not fit tokens 384",
        ),
        (changed(rope_embed__periods=torch.ones(0)), r"shape \[0\], which does not fit"),
        (changed(rope_embed__periods=torch.arange(1.0, 17)), "not evenly spaced on a logarithmic"),
        (changed(rope_embed__periods=torch.zeros(16)), "not evenly spaced on a logarithmic"),
        (changed(rope_embed__periods=torch.tensor([3.0, 2.25])), "min_period: 3 is above"),
    ],
)
def test_what_no_backbone_here_can_hold(content: Held, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        META.recognize(content)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"weight": torch.empty(3)},
        {f"backbone.{name}": tensor for name, tensor in SMALL.items()},
        {name: tensor for name, tensor in SMALL.items() if name != "norm.weight"},
        # Another library's Vision Transformer with learnt positions.
        {
            name: tensor
            for name, tensor in {**SMALL, "pos_embed": torch.empty(1, 197, 384)}.items()
            if "ls" not in name and name not in ("mask_token", "storage_tokens")
            if not name.endswith(("periods", "bias_mask"))
        },
    ],
)
def test_what_is_no_backbone_of_this_family(tensors: dict[str, torch.Tensor]) -> None:
    assert recognized(Held(tensors)) == []


def test_gaps_are_left_to_the_reader() -> None:
    """A lost block is recognized as the same backbone, so that it can be reported as missing."""
    content = Held({n: t for n, t in SMALL.items() if not n.startswith("blocks.5.")})
    assert META.recognize(content) == VitSmallConfig()


# --------------------------------------------------------------------------- published
def test_published_files() -> None:
    files = {
        (published.name, weights): file
        for published in PUBLISHED
        for weights, file in published.files.items()
    }
    assert len(files) == 9
    for (name, weights), file in files.items():
        pattern = rf"{name}_pretrain_{weights.lower()}-{file.digest}\.pth"
        assert re.fullmatch(pattern, file.file)
        assert re.fullmatch("[0-9a-f]{8}", file.digest)
        assert file.images == (SATELLITE_IMAGES if weights == "SAT493M" else WEB_IMAGES)
        assert META.recognize(held(file.config)) == file.config
    satellites = files["dinov3_vitl16", "SAT493M"]
    assert satellites.file == "dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth"
    assert satellites.config.untie_global_and_local_cls_norm
    assert files["dinov3_vith16plus", "LVD1689M"].file.endswith("lvd1689m-7c1da9a5.pth")
    assert all(next(iter(published.files)) == "LVD1689M" for published in PUBLISHED)


def test_layouts_need_attrs_alone() -> None:
    """torch.hub users have neither pluggy nor cattrs."""
    script = (
        "import sys\n"
        "for name in ('torch', 'numpy', 'pluggy', 'cattrs', 'timm', 'transformers'):\n"
        "    sys.modules[name] = None\n"
        "from dinov3_vit.layouts import LAYOUTS\n"
        "from dinov3_vit.components import PUBLISHED\n"
        "print(len(LAYOUTS), len(PUBLISHED))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["5", "7"]
