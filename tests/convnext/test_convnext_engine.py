"""What the engine does with a ConvNeXt: initial values, one layer of two names, blocks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dinov3_convnext.configs import ConvNextConfig
from dinov3_convnext.network import ConvNeXt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinov3_framework.parallel import ParallelConfig
from dinov3_framework.parallel.sharder import Sharder, initial_values
from dinov3_framework.testing import BackboneSuite
from dinov3_framework.training.optimizer import parameter_settings

SMALL: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24)}
ALIASES = {"norm.weight": "norms.3.weight", "norm.bias": "norms.3.bias"}


def convnext(**options: Any) -> ConvNeXt:
    torch.manual_seed(0)
    return ConvNeXt(ConvNextConfig(**{**SMALL, "layer_scale_init_value": 0.5, **options}))


def crops() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, s, s, generator=generator) for n, s in ((4, 64), (6, 32))]


def total(model: ConvNeXt, seed: int = 3) -> Tensor:
    """A scalar of everything a pass gives, with its random draws fixed."""
    torch.manual_seed(seed)
    return sum(
        (output[name].float() ** 3).mean()
        for output in model.forward_features(crops())
        for name in ("x_norm_clstoken", "x_norm_patchtokens", "x_prenorm")
    )


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "options",
    [
        {"drop_path_rate": 0.5},
        {"layer_scale_init_value": 0.0},
        {"in_chans": 1, "patch_size": 16},
    ],
)
def test_contract(options: dict[str, Any]) -> None:
    BackboneSuite.check(ConvNextConfig(**{**SMALL, **options}))


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
    settings = parameter_settings(convnext(), layerwise_decay=0.5, patch_embed_lr_mult=0.2)
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


# ------------------------------------------------------------------ blocks
def test_blocks_to_shard_are_the_blocks() -> None:
    model = convnext()
    names = [name for name, m in model.named_modules() if m in set(model.blocks_to_shard())]
    assert names == ["stages.0.0", "stages.1.0", "stages.2.0", "stages.2.1", "stages.3.0"]
    ran: list[nn.Module] = []
    for block in model.blocks_to_shard():
        block.register_forward_hook(lambda module, args, out: ran.append(module))
    model.forward_features(crops())
    assert ran == list(model.blocks_to_shard()), "once a pass, whatever the number of batches"


def test_activation_checkpointing_repeats_the_draws() -> None:
    model = convnext(drop_path_rate=0.6).train()
    total(model).backward()
    expected = gradients(model)

    again = copy.deepcopy(model)
    again.zero_grad()
    for block in again.blocks_to_shard():
        plain = block.forward
        block.forward = lambda *args, plain=plain: checkpoint(plain, *args, use_reentrant=False)
    total(again).backward()
    actual = gradients(again)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=lambda t, name=name: f"{name}: {t}")


@pytest.mark.slow
@pytest.mark.parametrize("drop_path_rate", [0.0, 0.6])
def test_blocks_compile_whole(drop_path_rate: float) -> None:
    model = convnext(drop_path_rate=drop_path_rate).train()
    compiled = copy.deepcopy(model)
    for block in compiled.stages[2]:
        block.compile(backend="aot_eager", fullgraph=True)
    for each in (model, compiled):
        total(each).backward()
    for name, value in gradients(model).items():
        found = gradients(compiled)[name]
        if drop_path_rate:
            assert found.isfinite().all(), name
        else:
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------ precision
@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sharded_in_bf16() -> None:
    config = ConvNextConfig(**SMALL, layer_scale_init_value=0.5, drop_path_rate=0.3, patch_size=16)
    with torch.device("meta"):
        model = ConvNeXt(config)
    parallel = ParallelConfig(param_dtype="bf16", reduce_dtype="fp32")
    model = Sharder(parallel, torch.device("cpu")).place(model)
    torch.manual_seed(0)
    model.init_weights()
    seen: set[torch.dtype] = set()
    for block in model.blocks_to_shard():
        block.register_forward_pre_hook(lambda module, args: seen.update(m.dtype for m in args[0]))
    total(model.train()).backward()
    assert seen == {torch.bfloat16}
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad.full_tensor().isfinite().all(), name
    with torch.no_grad():
        (patches,) = model.eval().get_intermediate_layers(crops()[0], n=[0])
    assert patches.isfinite().all()
