"""Which parameter learns how fast, decays or is clipped; and what is kept of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from dinov3_optimizers import AdamWConfig
from torch import nn
from trainer_support import registry

from dinov3_framework import Backbone, Constant, Cosine
from dinov3_framework.contracts.networks import Shardable
from dinov3_framework.training.optimizer import Optimizer, lr_factor, parameter_settings


def vit() -> Backbone:
    model = registry().build(
        "backbone",
        "vit",
        patch_size=7,
        embed_dim=16,
        depth=3,
        num_heads=2,
        layerscale_init=0.1,
        in_chans=1,
    )
    model.init_weights()
    assert isinstance(model, Backbone)
    return model


class Head(Shardable):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(16, 8)
        self.last_layer = nn.Linear(8, 32, bias=False)

    def init_weights(self) -> None:
        raise NotImplementedError

    def role_of(self, name: str) -> str | None:
        return "prototypes" if name.startswith("last_layer.") else None


def config(**changes: Any) -> AdamWConfig:
    values = {"lr": Constant(value=0.01), "weight_decay": Constant(value=0.1)} | changes
    return AdamWConfig(**values)


def optimizer_of(
    modules: dict[str, nn.Module], settings: AdamWConfig, batch_size: int = 8
) -> Optimizer:
    return Optimizer(modules, settings, registry().build(settings), batch_size)


def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"backbone": vit(), "dino_head": Head()}


def give_gradients(modules: dict[str, nn.Module], scale: float = 1.0) -> None:
    torch.manual_seed(1)
    for module in modules.values():
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter) * scale


# --------------------------------------------------------------------------- settings
def test_multipliers() -> None:
    settings = parameter_settings(vit(), config(layerwise_decay=0.9, patch_embed_lr_mult=0.2))
    layers = 4  # three blocks, and what follows
    assert settings["norm.weight"].lr_mult == 1.0
    for block in range(3):
        names = [name for name in settings if name.startswith(f"blocks.{block}.")]
        assert names
        for name in names:
            assert settings[name].lr_mult == pytest.approx(0.9 ** (layers - 1 - block)), name
    assert settings["cls_token"].lr_mult == pytest.approx(0.9**layers)
    assert settings["patch_embed.proj.weight"].lr_mult == pytest.approx(0.2 * 0.9**layers)
    assert not any(setting.is_last_layer for setting in settings.values())


def test_what_does_not_decay() -> None:
    settings = parameter_settings(vit(), config(layerwise_decay=0.9, patch_embed_lr_mult=0.2))
    for name, setting in settings.items():
        part = name.rpartition(".")
        exempt = part[2] in ("bias", "gamma") or "norm" in part[0]
        assert setting.wd_mult == (0.0 if exempt else 1.0), name
    assert {setting.wd_mult for setting in settings.values()} == {0.0, 1.0}


def test_a_head_learns_at_full_rate_and_knows_its_prototypes() -> None:
    settings = parameter_settings(Head(), config(layerwise_decay=0.9, patch_embed_lr_mult=0.2))
    assert {name: setting.lr_mult for name, setting in settings.items()} == {
        "mlp.weight": 1.0,
        "mlp.bias": 1.0,
        "last_layer.weight": 1.0,
    }
    assert [name for name, setting in settings.items() if setting.is_last_layer] == [
        "last_layer.weight"
    ]


def test_a_networks_own_factor_is_on_top_of_layers() -> None:
    class Own(type(vit())):  # type: ignore[misc]
        def lr_mult(self, name: str) -> float:
            return 3.0 if name == "blocks.2.attn.proj.weight" else 1.0

    network = vit()
    network.__class__ = Own
    values = config(layerwise_decay=0.5, patch_embed_lr_mult=1.0)
    settings, before = parameter_settings(network, values), parameter_settings(vit(), values)
    assert settings["blocks.2.attn.proj.weight"].lr_mult == pytest.approx(1.5)
    changed = {name for name in before if settings[name] != before[name]}
    assert changed == {"blocks.2.attn.proj.weight"}


def test_what_needs_no_gradient_is_left_out() -> None:
    head = Head()
    head.mlp.requires_grad_(False)
    settings = parameter_settings(head, config(layerwise_decay=1.0, patch_embed_lr_mult=1.0))
    assert list(settings) == ["last_layer.weight"]


@pytest.mark.parametrize(
    ("rule", "batch", "factor"),
    [("none", 4096, 1.0), ("sqrt_wrt_1024", 4096, 8.0), ("linear_wrt_256", 512, 2.0)],
)
def test_scaling_rules(rule: str, batch: int, factor: float) -> None:
    scaling = config(lr_scaling=rule)
    assert lr_factor(scaling, batch) == factor
    values = optimizer_of(networks(), scaling, batch).values(0, 10)
    assert values["lr"] == pytest.approx(0.01 * factor)


# --------------------------------------------------------------------------- steps
def test_steps_are_torchs_adamw_on_one_parameter_at_a_time() -> None:
    modules = networks()
    twins = copy.deepcopy(modules)
    lr = Cosine(start=0.0, peak=0.01, end=0.001, warmup=2)
    settings = config(lr=lr, freeze_last_layer=2, clip_grad=None, betas=(0.8, 0.9))
    optimizer = optimizer_of(modules, settings)
    plain: dict[str, torch.optim.AdamW] = {}
    multipliers = {}
    for network, module in twins.items():
        found = parameter_settings(module, config(layerwise_decay=0.9, patch_embed_lr_mult=0.2))
        for name, parameter in module.named_parameters():
            multipliers[f"{network}.{name}"] = found[name]
            plain[f"{network}.{name}"] = torch.optim.AdamW([parameter], betas=(0.8, 0.9))
    for iteration in range(4):
        give_gradients(modules, scale=iteration + 1)
        give_gradients(twins, scale=iteration + 1)
        optimizer.set_values(optimizer.values(iteration, 4))
        optimizer.step()
        for name, adamw in plain.items():
            setting, (group,) = multipliers[name], adamw.param_groups
            rate = 0.0 if setting.is_last_layer and iteration < 2 else lr.at(iteration, 4)
            group["lr"] = rate * setting.lr_mult
            group["weight_decay"] = 0.1 * setting.wd_mult
            adamw.step()
    for network, module in modules.items():
        for name, parameter in module.named_parameters():
            expected = dict(twins[network].named_parameters())[name]
            torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-7)


def test_prototypes_stay_while_they_are_frozen() -> None:
    modules = networks()
    optimizer = optimizer_of(modules, config(freeze_last_layer=2))
    last = modules["dino_head"].last_layer.weight
    before = last.detach().clone()
    for iteration in range(3):
        assert torch.equal(last, before)
        give_gradients(modules)
        values = optimizer.values(iteration, 10)
        assert values["last_layer_lr"] == (0.01 if iteration == 2 else 0.0)
        optimizer.set_values(values)
        optimizer.step()
    assert not torch.equal(last, before)


# --------------------------------------------------------------------------- clipping
@pytest.mark.parametrize("limit", [0.5, 1e6, None])
def test_clipping_is_torchs_per_network(limit: float | None) -> None:
    modules, twins = networks(), networks()
    give_gradients(modules)
    give_gradients(twins)
    optimizer = optimizer_of(modules, config(clip_grad=limit))
    norms = optimizer.gradient_norms()
    optimizer.clip(norms)
    for network, twin in twins.items():
        expected = torch.nn.utils.clip_grad_norm_(twin.parameters(), limit or float("inf"))
        torch.testing.assert_close(norms[network], expected)
        for ours, theirs in zip(modules[network].parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_network_without_gradients_has_norm_0() -> None:
    modules = networks()
    give_gradients({"backbone": modules["backbone"]})
    optimizer = optimizer_of(modules, config())
    norms = optimizer.gradient_norms()
    assert norms["dino_head"].item() == 0.0
    optimizer.clip(norms)
    optimizer.set_values(optimizer.values(0, 10))
    before = copy.deepcopy(modules["dino_head"].state_dict())
    optimizer.step()
    for name, value in modules["dino_head"].state_dict().items():
        assert torch.equal(value, before[name])


# --------------------------------------------------------------------------- state
def test_state_has_every_moment_by_name_from_the_start() -> None:
    modules = networks()
    state = optimizer_of(modules, config()).state()
    names = {f"{net}.{name}" for net, m in modules.items() for name, _ in m.named_parameters()}
    assert state.keys() == {
        f"{name}.{entry}" for name in names for entry in ("step", "exp_avg", "exp_avg_sq")
    }
    assert state["dino_head.last_layer.weight.exp_avg"].shape == (32, 8)
    assert not any(tensor.any() for tensor in state.values())


def test_state_loaded_in_place_goes_on_with_the_same_bits() -> None:
    modules = networks()
    one = optimizer_of(modules, config())

    def step(optimizer: Optimizer, nets: dict[str, nn.Module], iteration: int) -> None:
        give_gradients(nets, scale=iteration)
        optimizer.set_values(optimizer.values(iteration, 10))
        optimizer.step()

    step(one, modules, 1)
    resumed = copy.deepcopy(modules)
    for module in resumed.values():
        module.zero_grad()
    other = optimizer_of(resumed, config())
    for name, tensor in other.state().items():
        tensor.copy_(one.state()[name])
    for iteration in (2, 3):
        step(one, modules, iteration)
        step(other, resumed, iteration)
    for network, module in modules.items():
        for name, value in module.state_dict().items():
            assert torch.equal(resumed[network].state_dict()[name], value)
    for name, tensor in other.state().items():
        assert torch.equal(tensor, one.state()[name])
