"""What the engine does with a Vision Transformer: meta device, sharding, compiling, loading."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dinov3_vit.configs import VitConfig
from dinov3_vit.transformer import VisionTransformer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
RANDOM: dict[str, Any] = {"drop_path_rate": 0.5, "pos_embed_rope_rescale_coords": 2.0}


def vit(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(VitConfig(**{**SMALL, "layerscale_init": 0.5, **options}))


def crops() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, s, s, generator=generator) for n, s in ((4, 32), (6, 16))]


def total(model: VisionTransformer, seed: int = 3) -> Tensor:
    """A scalar of everything a pass gives, with its random draws fixed."""
    torch.manual_seed(seed)
    masks = [torch.arange(4 * 16).view(4, 16) % 3 == 0, None]
    outputs = model.forward_features(crops(), masks)
    return sum(
        output[name].float().square().mean()
        for output in outputs
        for name in ("x_norm_clstoken", "x_norm_patchtokens", "x_prenorm")
    )


def state_is_finite(model: nn.Module) -> bool:
    return all(value.isfinite().all() for value in model.state_dict().values())


def test_initial_values() -> None:
    model = VisionTransformer(VitConfig(embed_dim=128, depth=1, num_heads=2, layerscale_init=1e-5))
    assert state_is_finite(model)
    state = model.state_dict()
    assert state["blocks.0.attn.qkv.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert state["cls_token"].std() == pytest.approx(0.02, rel=0.3)
    bound = (3 * 16 * 16) ** -0.5
    assert bound * 0.99 < state["patch_embed.proj.weight"].abs().max() <= bound
    assert state["blocks.0.ls1.gamma"].unique().tolist() == pytest.approx([1e-5])
    assert state["blocks.0.attn.qkv.bias_mask"].tolist() == [1] * 128 + [0] * 128 + [1] * 128
    assert state["mask_token"].abs().sum() == 0


def test_key_bias_stays_out() -> None:
    model = vit().eval()
    with torch.no_grad():
        before = total(model)
        for block in model.blocks:
            block.attn.qkv.bias[32:64] = 5.0
        assert torch.equal(total(model), before)


@pytest.mark.parametrize("assign", [False, True])
def test_a_bias_mask_of_nan_is_put_right(assign: bool) -> None:
    state = vit().state_dict()
    name = "blocks.0.attn.qkv.bias_mask"
    state = {**state, name: torch.full_like(state[name], float("nan"))}
    model = vit()
    model.load_state_dict(state, assign=assign)
    assert state_is_finite(model)
    assert torch.equal(model.state_dict()[name], vit().state_dict()[name])
    assert state[name].isnan().all()  # the caller's tensors are left alone


def test_layer_of() -> None:
    model = vit(untie_cls_and_patch_norms=True, untie_global_and_local_cls_norm=True)
    layers: dict[int, set[str]] = {}
    for name in model.state_dict():
        layer, last = model.layer_of(name)
        assert last == 3
        layers.setdefault(layer, set()).add(
            ".".join(name.split(".")[: 2 if "blocks" in name else 1])
        )
    assert layers == {
        0: {"cls_token", "storage_tokens", "mask_token", "patch_embed", "rope_embed"},
        1: {"blocks.0"},
        2: {"blocks.1"},
        3: {"norm", "cls_norm", "local_cls_norm"},
    }


def test_compiles_without_graph_breaks() -> None:
    model = vit().eval()
    compiled = torch.compile(model.forward_features, backend="eager", fullgraph=True)
    for images in crops():
        expected, actual = model.forward_features(images), compiled(images)
        for name in ("x_norm_clstoken", "x_storage_tokens", "x_norm_patchtokens", "x_prenorm"):
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-5)


def test_a_compiled_model_makes_its_rope_tables_once() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    model = vit(depth=3).eval()
    torch.compile(model.forward_features, backend=keep, fullgraph=True)(crops()[0])
    called = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("rotary_table" in name for name in called) == 1
    assert not any(name in ("cos", "sin") for name in called)  # which would be fused into blocks


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("options", [{}, {"untie_cls_and_patch_norms": True}])
def test_sharded_models_give_no_views(
    options: dict[str, Any], recwarn: pytest.WarningsRecorder
) -> None:
    model = vit(**options).train()
    mesh = init_device_mesh("cpu", (1,))
    for module in [*model.blocks_to_shard(), model]:
        fully_shard(module, mesh=mesh)
    dist.fsdp.register_fsdp_forward_method(model, "forward_features")
    total(model).backward()
    assert not [str(each.message) for each in recwarn if "view" in str(each.message)]


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sharded_in_bf16_with_float32_positions() -> None:
    with torch.device("meta"):
        model = VisionTransformer(VitConfig(**SMALL, **RANDOM))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = init_device_mesh("cpu", (1,))
    for module in [*model.blocks_to_shard(), model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    dist.fsdp.register_fsdp_forward_method(model, "forward_features")
    model.to_empty(device="cpu")
    model.init_weights()
    precisions: list[tuple[torch.dtype, torch.dtype]] = []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(
            lambda module, args: precisions.append((args[0].dtype, args[2][0].cos.dtype))
        )
    total(model.train()).backward()
    assert precisions == [(torch.bfloat16, torch.float32)] * 2
    for name, parameter in model.named_parameters():
        assert parameter.grad.full_tensor().isfinite().all(), name
