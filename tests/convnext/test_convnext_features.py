"""Tokens of ConvNeXt: several batches, sizes, drop path, intermediate layers, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dinov3_convnext.configs import ConvNextConfig
from dinov3_convnext.layers import Block, ChannelNorm
from dinov3_convnext.network import ConvNeXt
from torch import Tensor

from dinov3_framework import UserError

SMALL: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24)}
OUTPUTS = ("x_norm_clstoken", "x_storage_tokens", "x_norm_patchtokens", "x_prenorm")


def convnext(**options: Any) -> ConvNeXt:
    """A small one, whose layer scales let every block be seen in the output."""
    torch.manual_seed(0)
    model = ConvNeXt(ConvNextConfig(**{**SMALL, "layer_scale_init_value": 0.5, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(samples: int, height: int = 64, width: int = 64, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(samples * height + width)
    return torch.randn(samples, channels, height, width, generator=generator)


def maps(samples: int = 2, channels: int = 8, side: int = 6) -> Tensor:
    drawn = torch.randn(samples, channels, side, side, generator=torch.Generator().manual_seed(2))
    return drawn.contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------- parts
@torch.no_grad()
def test_channel_norm_is_over_the_channels_of_each_position() -> None:
    norm = ChannelNorm(8)
    norm.weight.uniform_()
    norm.bias.uniform_()
    given = maps()
    mean = given.mean(1, keepdim=True)
    deviation = (given.var(1, keepdim=True, correction=0) + 1e-6).sqrt()
    expected = (given - mean) / deviation * norm.weight.view(8, 1, 1) + norm.bias.view(8, 1, 1)
    torch.testing.assert_close(norm(given), expected)


@torch.no_grad()
def test_a_block_word_by_word() -> None:
    torch.manual_seed(0)
    block, given = Block(8, 0.5, 0.0), maps()
    block.gamma.uniform_(0.1, 1.0)
    hidden = F.conv2d(given, block.dwconv.weight, block.dwconv.bias, padding=3, groups=8)
    hidden = F.layer_norm(hidden.movedim(1, -1), (8,), eps=1e-6)
    hidden = block.pwconv2(F.gelu(block.pwconv1(hidden))) * block.gamma
    torch.testing.assert_close(block([given])[0], given + hidden.movedim(-1, 1))


@torch.no_grad()
def test_maps_stay_channels_last() -> None:
    """Otherwise each norm would copy its input, and each convolution too."""
    seen: list[Tensor] = []
    model = convnext().eval()
    for module in model.modules():
        if isinstance(module, Block):
            module.register_forward_hook(lambda module, args, out: seen.extend([*args[0], *out]))
        elif isinstance(module, ChannelNorm):
            module.register_forward_hook(lambda module, args, out: seen.extend([*args, out]))
    model(images(2))
    assert len(seen) == 2 * (5 + 4)
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in seen)


# ------------------------------------------------------------------------- tokens
@torch.no_grad()
def test_shapes_and_pooling() -> None:
    model = convnext().eval()
    features = model.forward_features(images(2, 64, 96))
    shapes = {name: list(features[name].shape) for name in OUTPUTS}
    assert shapes == {
        "x_norm_clstoken": [2, 24],
        "x_storage_tokens": [2, 0, 24],
        "x_norm_patchtokens": [2, 6, 24],
        "x_prenorm": [2, 7, 24],
    }
    assert features["masks"] is None
    pooled, patches = features["x_prenorm"].split([1, 6], dim=1)
    torch.testing.assert_close(pooled, patches.mean(1, keepdim=True))
    torch.testing.assert_close(model.norm(pooled[:, 0]), features["x_norm_clstoken"])
    torch.testing.assert_close(model.norm(patches), features["x_norm_patchtokens"])


@torch.no_grad()
def test_patches_are_in_the_order_of_rows() -> None:
    """What changes in the upper right corner changes most in the last patch of the first row."""
    model, batch = convnext().eval(), images(1, 128, 256)
    other = batch.clone()
    other[..., :16, -16:] += 3
    before, after = (model.forward_features(x)["x_norm_patchtokens"][0] for x in (batch, other))
    assert (after - before).norm(dim=-1).argmax() == 7


@torch.no_grad()
def test_pixels_over_are_left_out() -> None:
    model, batch = convnext().eval(), images(2, 95, 70)
    for layers in (model.get_intermediate_layers(batch), model.forward_features([batch])):
        tokens = layers[0] if isinstance(layers[0], Tensor) else layers[0]["x_norm_patchtokens"]
        assert tokens.shape == (2, 2 * 2, 24)


# ------------------------------------------------------------------------- drop path
def test_drop_path_is_drawn_for_each_sample() -> None:
    """A sample's branch is left out or scaled up by one over the chance to stay."""
    for initial in (0.5, None):
        torch.manual_seed(0)
        block, given = Block(8, initial, 0.25), maps(400, side=3)
        with torch.no_grad():
            if block.gamma is not None:
                block.gamma.fill_(0.5)
            (full,) = block.eval()([given])
            (drawn,) = block.train()([given])
        factors = ((drawn - given) / (full - given)).flatten(1)
        torch.testing.assert_close(
            factors, factors[:, :1].round(decimals=3).expand_as(factors), rtol=5e-2, atol=5e-2
        )
        values = factors.median(1).values
        kept = values > 0.5
        torch.testing.assert_close(values[kept], torch.full_like(values[kept], 1 / 0.75))
        assert values[~kept].abs().max() == 0
        assert kept.float().mean() == pytest.approx(0.75, abs=0.08)


# ------------------------------------------------------------------------- intermediate layers
@torch.no_grad()
def test_intermediate_layers() -> None:
    model, batch = convnext().eval(), images(2, 64, 96)
    features = model.forward_features(batch)
    ((last, cls, storage),) = model.get_intermediate_layers(
        batch, return_class_token=True, return_extra_tokens=True
    )
    torch.testing.assert_close(last, features["x_norm_patchtokens"])
    torch.testing.assert_close(cls, features["x_norm_clstoken"])
    assert storage.shape == (2, 0, 24)

    every = model.get_intermediate_layers(batch, n=4, reshape=True, norm=False)
    assert [list(each.shape) for each in every] == [
        [2, 8, 16, 24],
        [2, 12, 8, 12],
        [2, 16, 4, 6],
        [2, 24, 2, 3],
    ]
    torch.testing.assert_close(every[3].flatten(2).mT, features["x_prenorm"][:, 1:])
    (third,) = model.get_intermediate_layers(batch, n=[2])  # with norm: no norm but the last's
    torch.testing.assert_close(third, every[2].flatten(2).mT)
    out_of_order = model.get_intermediate_layers(batch, n=(3, 0))
    assert [each.shape[1:] for each in out_of_order] == [(384, 8), (6, 24)]
    torch.testing.assert_close(out_of_order[1], last)


@torch.no_grad()
def test_intermediate_layers_on_the_grid_of_a_vit() -> None:
    batch = images(2, 64, 96)
    plain, resizing = convnext().eval(), convnext(patch_size=16).eval()
    assert plain.patch_size == resizing.patch_size == 32
    wanted = {"n": 4, "reshape": True, "return_class_token": True, "norm": False}
    pairs = zip(
        plain.get_intermediate_layers(batch, **wanted),
        resizing.get_intermediate_layers(batch, **wanted),
        strict=True,
    )
    for (before, mean), (after, cls) in pairs:
        expected = F.interpolate(before, (4, 6), mode="bilinear", antialias=True)
        torch.testing.assert_close(after, expected)
        assert torch.equal(mean, cls)
    # Resized first, then normalized.
    (normed,) = resizing.get_intermediate_layers(batch)
    torch.testing.assert_close(normed, resizing.norm(expected.flatten(2).mT))
    last = resizing.forward_features(batch)["x_norm_patchtokens"]
    assert last.shape[1] == 6, "patch tokens are as they come"


# ------------------------------------------------------------------------- errors
def test_images_that_do_not_fit() -> None:
    with pytest.raises(UserError, match=r"images of 64 x 31 pixels .* at least 32 each way"):
        convnext()(images(1, 64, 31))
    with pytest.raises(UserError, match=r"64 x 64 pixels .* smaller than a patch of .* = 65"):
        convnext(patch_size=65).get_intermediate_layers(images(1))


def test_masks_are_refused() -> None:
    model, batch, mask = convnext(), images(2), torch.zeros(2, 4, dtype=torch.bool)
    for given in ((batch, mask), ([batch, batch], [mask, None])):
        with pytest.raises(UserError, match="cannot replace masked patches; leave out losses"):
            model.forward_features(*given)
