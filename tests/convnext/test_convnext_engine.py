"""What the engine does with a ConvNeXt: initial values, one layer under two names."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from dinov3_convnext.configs import ConvNextConfig
from dinov3_convnext.network import ConvNeXt
from dinov3_optimizers import AdamWConfig

from dinov3_framework import Constant
from dinov3_framework.parallel.sharder import initial_values
from dinov3_framework.training.optimizer import parameter_settings

SMALL: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24)}
ALIASES = {"norm.weight": "norms.3.weight", "norm.bias": "norms.3.bias"}


def convnext(**options: Any) -> ConvNeXt:
    torch.manual_seed(0)
    return ConvNeXt(ConvNextConfig(**{**SMALL, "layer_scale_init_value": 0.5, **options}))


def test_initial_values() -> None:
    config = ConvNextConfig(depths=(1, 1, 1, 1), dims=(32, 32, 32, 64))
    with torch.device("meta"):
        blueprint = ConvNeXt(config)
    state = initial_values(blueprint, seed=0).state_dict()
    for name in ("stages.3.0.pwconv1.weight", "stages.0.0.dwconv.weight"):
        assert state[name].std() == pytest.approx(0.02, rel=0.05), name
    assert state["stages.2.0.gamma"].unique().tolist() == pytest.approx([1e-6])
    for name, value in state.items():
        if name.endswith("bias"):
            assert value.abs().max() == 0, name
        elif value.ndim == 1 and "gamma" not in name:
            assert value.unique().tolist() == [1], name


# ------------------------------------------------------------------ one layer under two names
def test_one_layer_under_two_names() -> None:
    model = convnext()
    parameters, state = dict(model.named_parameters()), model.state_dict()
    assert state.keys() - parameters.keys() == set(ALIASES.values())
    for name, alias in ALIASES.items():
        assert state[name].data_ptr() == state[alias].data_ptr()
    with torch.device("meta"):
        drawn = ConvNeXt(ConvNextConfig(**SMALL))
    placed = copy.deepcopy(drawn).to_empty(device="cpu")
    for each in (copy.deepcopy(model), drawn, placed, copy.deepcopy(model).bfloat16()):
        assert each.norm is each.norms[3]
        assert dict(each.named_parameters()).keys() == parameters.keys()


@pytest.mark.parametrize("assign", [False, True])
def test_both_names_are_loaded_and_stay_one(assign: bool) -> None:
    with torch.no_grad():
        source = convnext()
        source.norm.weight.normal_()
    state = {name: value.clone() for name, value in source.state_dict().items()}
    with torch.device("meta" if assign else "cpu"):
        model = ConvNeXt(ConvNextConfig(**SMALL))
    model.load_state_dict(state, strict=True, assign=assign)
    assert model.norm.weight is model.norms[3].weight
    assert torch.equal(model.norm.weight, state["norm.weight"])
    del state["norms.3.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*norms\.3\.bias"):
        model.load_state_dict(state, strict=True)


def test_the_optimizer_sees_it_once() -> None:
    rates = AdamWConfig(lr=Constant(value=1.0), weight_decay=Constant(value=1.0))
    settings = parameter_settings(convnext(), rates)
    assert "norm.weight" in settings
    assert "norms.3.weight" not in settings
    # As published: one learning rate, and no decay of biases, layer scales, and of those norms
    # that are called so (the ones of the downsampling layers have numbers for names).
    assert {setting.lr_mult for setting in settings.values()} == {1.0}
    decaying = {name for name, setting in settings.items() if setting.wd_mult}
    expected = {n for n, p in convnext().named_parameters() if p.ndim > 1}
    expected |= {"downsample_layers.0.1.weight"}
    expected |= {f"downsample_layers.{stage}.0.weight" for stage in (1, 2, 3)}
    assert decaying == expected
