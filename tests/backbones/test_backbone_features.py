"""What all backbones promise of tokens and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backbone_families import CONVNEXT, EACH_FAMILY, VIT, Family, gradients
from torch import nn
from torch.utils.checkpoint import checkpoint

from dinov3_framework import UserError
from dinov3_framework.testing import BackboneSuite


@pytest.mark.parametrize(
    ("family", "options"),
    [
        (VIT, {"drop_path_rate": 0.5, "pos_embed_rope_rescale_coords": 2.0}),
        (VIT, {"n_storage_tokens": 0, "norm_layer": "rmsnorm", "mask_k_bias": False}),
        (VIT, {"ffn_layer": "swiglu", "untie_global_and_local_cls_norm": True, "qkv_bias": False}),
        (VIT, {"in_chans": 1, "layerscale_init": None, "untie_cls_and_patch_norms": True}),
        (CONVNEXT, {"drop_path_rate": 0.5}),
        (CONVNEXT, {"layer_scale_init_value": 0.0}),
        (CONVNEXT, {"in_chans": 1, "patch_size": 16}),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_contract(family: Family, options: dict[str, Any]) -> None:
    unseen = ["local_cls_norm"] if options.get("untie_global_and_local_cls_norm") else []
    BackboneSuite.check(family.config(**{**family.small, **options}), without_gradient=unseen)


@EACH_FAMILY
@torch.no_grad()
def test_samples_do_not_see_each_other(family: Family) -> None:
    model, batch = family.build().eval(), family.images(4)
    torch.testing.assert_close(model(batch)[2:3], model(batch[2:3]), rtol=1e-4, atol=1e-5)


@EACH_FAMILY
def test_drop_path_zero_is_the_same_in_training(family: Family) -> None:
    model, batches = family.build(drop_path_rate=0.0), family.crops()
    expected = model.eval().forward_features(batches)
    for a, b in zip(model.train().forward_features(batches), expected, strict=True):
        torch.testing.assert_close(a["x_prenorm"], b["x_prenorm"])


# --------------------------------------------------------------------------- intermediate layers
@EACH_FAMILY
@torch.no_grad()
def test_the_last_intermediate_layer_is_what_a_pass_gives(family: Family) -> None:
    model, batch = family.build().eval(), family.images(2)
    features = model.forward_features(batch)
    ((last, cls, storage),) = model.get_intermediate_layers(
        batch, return_class_token=True, return_extra_tokens=True
    )
    torch.testing.assert_close(last, features["x_norm_patchtokens"])
    torch.testing.assert_close(cls, features["x_norm_clstoken"])
    torch.testing.assert_close(storage, features["x_storage_tokens"])
    every = model.get_intermediate_layers(batch, n=family.n_layers, reshape=True)
    assert len(every) == model.n_layers == len(model.feature_info)
    for each, info in zip(every, model.feature_info, strict=True):
        side = batch.shape[-1] // info.stride
        assert each.shape == (2, info.channels, side, side)
    torch.testing.assert_close(every[-1].flatten(2).mT, last)
    first, again = model.get_intermediate_layers(batch, n=(family.n_layers - 1, 0))
    torch.testing.assert_close(first, every[0].flatten(2).mT)
    torch.testing.assert_close(again, last)


@EACH_FAMILY
@torch.no_grad()
def test_blocks_after_the_last_one_wanted_do_not_run(family: Family) -> None:
    model, ran = family.build().eval(), []
    for index, block in enumerate(model.blocks_to_shard()):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    model.get_intermediate_layers(family.images(1), n=[1])
    assert ran == [0, 1]


@EACH_FAMILY
@pytest.mark.parametrize("n", [0, 5, [4], [-1], []])
def test_unknown_layers(family: Family, n: Any) -> None:
    with pytest.raises(UserError, match=rf"this model has \w+ 0 to {family.n_layers - 1}"):
        family.build().get_intermediate_layers(family.images(1), n=n)


# --------------------------------------------------------------------------- precision, errors
@EACH_FAMILY
@torch.no_grad()
def test_bf16_is_close_to_float32(family: Family) -> None:
    model, batch = family.build().eval(), family.images(4)
    wanted = {"n": family.n_layers, "return_class_token": True}
    expected = [model(batch), *_flat(model.get_intermediate_layers(batch, **wanted))]
    low, model = batch.bfloat16(), model.bfloat16()
    actual = [model(low), *_flat(model.get_intermediate_layers(low, **wanted))]
    for whole, rounded in zip(expected, actual, strict=True):
        assert rounded.dtype == torch.bfloat16
        assert F.cosine_similarity(rounded.float(), whole, dim=-1).min() > 0.995


def _flat(pairs: Any) -> list[Any]:
    return [tensor for pair in pairs for tensor in pair]


@EACH_FAMILY
def test_images_that_do_not_fit(family: Family) -> None:
    model = family.build(in_chans=5)
    assert model(family.images(1, channels=5)).shape == (1, model.embed_dim)
    with pytest.raises(UserError, match=r"takes \[batch, 5, height, width\].*must agree"):
        model(family.images(1))
    with pytest.raises(UserError, match=r"images of shape \[3, \d+, \d+\]"):
        family.build()(family.images(1)[0])


# --------------------------------------------------------------------------- blocks
@EACH_FAMILY
def test_blocks_to_shard_run_once_a_pass_in_order(family: Family) -> None:
    model = family.build()
    blocks, ran = list(model.blocks_to_shard()), []
    for block in blocks:
        block.register_forward_hook(lambda module, args, out: ran.append(module))
    model.forward_features(family.crops())
    assert ran == blocks, "whatever the number of batches"
    inside = {id(p) for block in blocks for p in block.parameters()}
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sum(p.numel() for p in model.parameters() if id(p) in inside) > total / 2


@EACH_FAMILY
def test_activation_checkpointing_repeats_the_draws(family: Family) -> None:
    model = family.build(**family.random).train()
    family.total(model).backward()
    expected = gradients(model)
    again = copy.deepcopy(model)
    again.zero_grad()
    for block in again.blocks_to_shard():
        plain = block.forward
        block.forward = lambda *args, plain=plain: checkpoint(plain, *args, use_reentrant=False)
    family.total(again).backward()
    assert_same_gradients(again, expected)


@pytest.mark.slow
@EACH_FAMILY
def test_a_block_compiles_whole(family: Family) -> None:
    model = family.build().train()
    compiled = _with_a_compiled_block(model)
    for each in (model, compiled):
        family.total(each).backward()
    assert_same_gradients(compiled, gradients(model), rtol=1e-4, atol=1e-6)
    # The draws of drop path are not the same.
    compiled = _with_a_compiled_block(family.build(**family.random).train())
    family.total(compiled).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(compiled).values())


def _with_a_compiled_block(model: Any) -> Any:
    compiled = copy.deepcopy(model)
    list(compiled.blocks_to_shard())[-1].compile(backend="aot_eager", fullgraph=True)
    return compiled


def assert_same_gradients(model: nn.Module, expected: dict[str, Any], **tolerance: float) -> None:
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
