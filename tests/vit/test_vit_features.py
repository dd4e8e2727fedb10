"""Tokens of the Vision Transformer: several batches, masks, drop path, norms, errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from dinov3_vit.block import random_subset
from dinov3_vit.configs import VitConfig
from dinov3_vit.transformer import VisionTransformer
from torch import Tensor

from dinov3_framework import UserError

SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8}
OUTPUTS = ("x_norm_clstoken", "x_storage_tokens", "x_norm_patchtokens", "x_prenorm")


def vit(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    # A layer scale near 1 lets every block be seen in the output.
    return VisionTransformer(VitConfig(**{**SMALL, "layerscale_init": 0.5, **options}))


def images(samples: int, height: int = 32, width: int = 32, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(samples * height + width)
    return torch.randn(samples, channels, height, width, generator=generator)


def test_shapes() -> None:
    features = vit(n_storage_tokens=3).forward_features(images(2, 16, 40))
    shapes = {name: list(features[name].shape) for name in OUTPUTS}
    assert shapes == {
        "x_norm_clstoken": [2, 32],
        "x_storage_tokens": [2, 3, 32],
        "x_norm_patchtokens": [2, 10, 32],
        "x_prenorm": [2, 14, 32],
    }
    assert features["masks"] is None


@pytest.mark.parametrize("channels_last", [False, True])
def test_patches_are_embedded_as_by_a_convolution(channels_last: bool) -> None:
    proj = vit(in_chans=2).patch_embed.proj
    batch = images(3, 16, 40, channels=2).requires_grad_()
    given = batch.to(memory_format=torch.channels_last) if channels_last else batch
    expected = torch.nn.functional.conv2d(batch, proj.weight, proj.bias, stride=8)
    expected = expected.flatten(2).mT
    actual = proj(given)
    torch.testing.assert_close(actual, expected)
    weights = torch.randn_like(expected)
    inputs = [batch, proj.weight, proj.bias]
    pairs = (torch.autograd.grad(tokens, inputs, weights) for tokens in (actual, expected))
    for found, wanted in zip(*pairs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_mask_token_learns() -> None:
    model = vit()
    features = model.forward_features(images(2), torch.ones(2, 16, dtype=torch.bool))
    features["x_norm_clstoken"].square().sum().backward()
    assert model.mask_token.grad.abs().sum() > 0
    assert model.patch_embed.proj.weight.grad.abs().sum() == 0


# ------------------------------------------------------------------------- drop path
def test_kept_samples() -> None:
    for samples, rate, kept in ((10, 0.4, 6), (8, 0.3, 5), (3, 0.9, 1), (1, 0.5, 1)):
        rows = random_subset(torch.empty(samples, 2), rate)
        assert len(rows) == kept == len(set(rows.tolist()))


@torch.no_grad()
def test_drop_path_computes_subsets_and_scales_them() -> None:
    model = vit(drop_path_rate=0.5, depth=1)
    block = model.blocks[0]
    block.mlp = torch.nn.Identity()
    block.ls2 = block.norm2 = torch.nn.Identity()
    seen: list[Tensor] = []
    block.attn.register_forward_hook(lambda module, args, out: seen.append(out))
    batches, tables = model._embed([images(6), images(4, 16, 16)], [None, None])
    block.train()(batches, tables)
    assert [len(out) for out in seen] == [3 * 21 + 2 * 9]

    # Through an FFN that gives back its input, a kept sample is x + 2 x and a dropped one x.
    block.attn.forward = lambda tokens, shapes, tables: torch.zeros_like(tokens)
    for before, after in zip(batches, block(batches, tables), strict=True):
        factors = (after / before).mean(dim=(1, 2))
        assert sorted(factors.round().int().tolist()) == [1] * (len(before) // 2) + [3] * (
            len(before) // 2
        )


@torch.no_grad()
def test_drop_path_keeps_the_mean() -> None:
    model = vit(drop_path_rate=0.4, depth=1).train()
    block = model.blocks[0]
    batches, tables = model._embed([images(5, 16, 16)], [None])
    block.mlp.fc2.weight.zero_()  # attention alone: its gain is linear in what is kept
    block.mlp.fc2.bias.zero_()
    exact = copy.deepcopy(block).eval()(batches, tables)[0] - batches[0]
    gains = [block(batches, tables)[0] - batches[0] for _ in range(200)]
    mean = torch.stack(gains).mean(dim=0)
    assert (mean - exact).norm() / exact.norm() < 0.15
    assert (gains[0] - exact).norm() / exact.norm() > 0.3


def test_rope_is_drawn_once_for_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit(pos_embed_rope_rescale_coords=2.0).train()
    tables: list[Any] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: tables.append(args[1]))
    model.forward_features([images(2), images(2)])
    assert all(table is tables[0] for table in tables)
    first, second = tables[0]
    assert not torch.equal(first.cos, second.cos)  # each batch has its own draw


# ------------------------------------------------------------------------- norms
@torch.no_grad()
def test_untied_norms() -> None:
    batches = [images(2), images(3, 16, 16)]
    model = vit(untie_cls_and_patch_norms=True, untie_global_and_local_cls_norm=True)
    for norm, value in ((model.norm, 1.0), (model.cls_norm, 2.0), (model.local_cls_norm, 3.0)):
        norm.weight.zero_()
        norm.bias.fill_(value)

    def values(features: dict[str, Tensor]) -> list[float]:
        names = ("x_norm_clstoken", "x_storage_tokens", "x_norm_patchtokens")
        return [features[name].mean().item() for name in names]

    training = [values(f) for f in model.train().forward_features(batches)]
    assert training == [[2, 2, 1], [3, 3, 1]]
    assert [values(f) for f in model.eval().forward_features(batches)] == [[2, 2, 1]] * 2
    patches, cls = model.get_intermediate_layers(batches[0], return_class_token=True)[0]
    assert (patches.mean(), cls.mean()) == (1, 2)


@torch.no_grad()
def test_local_norm_alone() -> None:
    model = vit(untie_global_and_local_cls_norm=True).train()
    model.local_cls_norm.weight.zero_()
    first, second = model.forward_features([images(2), images(2)])
    assert first["x_norm_clstoken"].abs().sum() > 0
    assert second["x_norm_clstoken"].abs().sum() == 0
    assert torch.equal(first["x_norm_patchtokens"], second["x_norm_patchtokens"])


@pytest.mark.parametrize(
    ("norm_layer", "eps"), [("layernorm", 1e-6), ("layernormbf16", 1e-5), ("rmsnorm", 1e-5)]
)
def test_norm_epsilon(norm_layer: str, eps: float) -> None:
    model = vit(norm_layer=norm_layer)
    assert {model.norm.eps, model.blocks[1].norm2.eps} == {eps}


# ------------------------------------------------------------------------- intermediate layers
@torch.no_grad()
def test_intermediate_layers() -> None:
    model = vit(n_storage_tokens=2).eval()
    batch = images(2, 16, 40)
    features = model.forward_features(batch)
    (last,) = model.get_intermediate_layers(batch)
    torch.testing.assert_close(last, features["x_norm_patchtokens"])
    raw, cls, storage = model.get_intermediate_layers(
        batch, n=[0, 2], return_class_token=True, return_extra_tokens=True, norm=False
    )[1]
    torch.testing.assert_close(torch.cat([cls[:, None], storage, raw], 1), features["x_prenorm"])
    maps = model.get_intermediate_layers(batch, n=2, reshape=True)
    assert [list(m.shape) for m in maps] == [[2, 32, 2, 5]] * 2
    torch.testing.assert_close(maps[1].flatten(2).mT, last)


# ------------------------------------------------------------------------- errors


def test_images_that_are_no_multiple_of_the_patch() -> None:
    with pytest.raises(UserError, match=r"33 x 30 pixels .* patch size 8; .* 32 x 24 for"):
        vit()(images(1, 33, 30))


def test_masks_that_do_not_fit() -> None:
    model = vit()
    with pytest.raises(UserError, match=r"torch\.bool \[2, 9\]; these images take .* \[2, 16\]"):
        model.forward_features(images(2), torch.zeros(2, 9, dtype=torch.bool))
    with pytest.raises(UserError, match=r"masks are torch\.float32"):
        model.forward_features(images(2), torch.zeros(2, 16))
    with pytest.raises(UserError, match="a list of 2 masks"):
        model.forward_features([images(2), images(2)], [None])
    with pytest.raises(UserError, match="one batch of images takes one mask"):
        model.forward_features(images(2), [None])
