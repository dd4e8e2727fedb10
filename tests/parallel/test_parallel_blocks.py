"""Blocks that are recomputed or compiled: the same figures, under the same names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dinov3_convnext.configs import ConvNextConfig
from tiny_backbone import Tiny, TinyConfig
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from trainer_support import pretrain, registry, snapshot, steps, trainer

from dinov3_framework import Problem, RecipeError
from dinov3_framework.parallel import ParallelConfig, compiling
from dinov3_framework.parallel.check import network_problems
from dinov3_framework.parallel.compiling import compiler_complaint
from dinov3_framework.parallel.sharder import Sharder, initialize
from dinov3_framework.runtime.processes import process_group

CPU = torch.device("cpu")
BF16 = "parallel.param_dtype=bf16"  # and with it FSDP, on one process
VIT = {"patch_size": 7, "embed_dim": 32, "depth": 3, "num_heads": 2, "in_chans": 1}
VIT |= {"layerscale_init": 0.1, "pos_embed_rope_dtype": "fp32"}
GLOBAL, LOCAL = 28, 14


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing compiled before, and nothing counted."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    """All of the compiler but the generation of code."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")


def placed(config: ParallelConfig, backbone: Any = None, **values: Any) -> Any:
    """A small ViT in training, with first values; in a process group that is then gone."""

    def build() -> Any:
        with torch.device("meta"):
            return registry().build(backbone or registry().config_of("backbone", "vit", values))

    network = Sharder(config, CPU).place(build())
    initialize(network, build(), seed=3)
    return network.train()


def crops(count: int, size: int, channels: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(count, channels, size, size, generator=generator)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def learnt(network: Any, batches: list[Tensor]) -> dict[str, Tensor]:
    """The loss of a step and the gradients of all parameters; with random choices of one seed."""
    torch.manual_seed(7)
    network.zero_grad()
    outputs = network.forward_features(batches, [None] * len(batches))
    loss = sum((o[f"x_norm_{t}"] ** 3).mean() for o in outputs for t in ("clstoken", "patchtokens"))
    loss.backward()
    gradients = {n: whole(p.grad) for n, p in network.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        atol = rtol * value.abs().max().item()
        torch.testing.assert_close(
            actual[name], value, rtol=rtol, atol=atol, msg=lambda t, n=name: f"{n}: {t}"
        )


# --------------------------------------------------------------------------- recomputed
@pytest.mark.parametrize("precision", ["parallel.param_dtype=fp32", BF16])
@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recomputing_changes_no_bit(tmp_path: Path, kind: str, precision: str) -> None:
    """With drop path and RoPE augmentation, which draw random numbers."""
    runs = []
    for value in ("none", kind):
        with trainer(tmp_path / value, precision, f"parallel.checkpointing={value}") as ours:
            assert ours.unit.placed.student["backbone"].blocks[0].drop_path_rate == 0.3
            figures = steps(ours, 2)
            runs.append((figures, {n: whole(tensor) for n, tensor in snapshot(ours).items()}))
    (expected, before), (found, after) = runs
    assert found == expected
    assert list(after) == list(before), "names and their order"
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


class Products(TorchDispatchMode):
    """Counts matrix products, and layer norms for all else."""

    def __init__(self) -> None:
        super().__init__()
        self.count = {"product": 0, "norm": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count["product"] += name in ("mm", "addmm", "bmm")
        self.count["norm"] += name == "native_layer_norm"
        return func(*args, **(kwargs or {}))


def test_what_is_computed_twice() -> None:
    counted = {}
    for kind in ("none", "selective", "full"):
        with process_group(CPU, timeout=60):
            network = placed(ParallelConfig(checkpointing=kind), **VIT)
        with Products() as products:
            learnt(network, [crops(2, GLOBAL)])
        counted[kind] = products.count
        with Products() as products, torch.no_grad():
            network(crops(2, GLOBAL))
        assert products.count["norm"] == 2 * 3 + 3, "once, where nothing is to be learnt"
    none, selective, full = counted["none"], counted["selective"], counted["full"]
    assert selective["product"] == none["product"]
    assert full["product"] == none["product"] + 3 * 4  # qkv, proj, fc1, fc2
    assert selective["norm"] == full["norm"] == none["norm"] + 3 * 2


def test_activations_are_not_kept() -> None:
    def kept(kind: Any) -> int:
        with process_group(CPU, timeout=60):
            network = placed(ParallelConfig(checkpointing=kind), **VIT)
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            network.forward_features(crops(16, GLOBAL))
        return sum(size for address, size in sizes.items() if address not in parameters)

    assert kept("full") < 0.5 * kept("none")


def test_only_what_trains_is_recomputed() -> None:
    with process_group(CPU, timeout=60):
        sharder = Sharder(ParallelConfig(checkpointing="full"), CPU)
        blueprint = pretrain().method.prepare().blueprint.backbone
        kind = type(blueprint.blocks[0])
        frozen: Any = sharder.place(blueprint, trains=False)
    assert {type(block) for block in frozen.blocks} == {kind}


# --------------------------------------------------------------------------- compiled
@pytest.mark.slow
def test_compiled_code_computes_the_same(fresh: None) -> None:
    batches = [crops(4, GLOBAL)]
    with process_group(CPU, timeout=60):
        expected = learnt(placed(ParallelConfig(), **VIT), batches)
        network = placed(ParallelConfig(compile=True), **VIT)
        assert counters["stats"]["unique_graphs"] == 0
        # What takes longest is to find out how wide the CPU's vectors are.
        with torch._inductor.config.patch({"cpp.simdlen": 1}):
            assert_close(learnt(network, batches), expected, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1, "one version for all blocks"
    assert counters["inductor"], "code was generated"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fp8"), [("none", "off"), ("selective", "emulated"), ("full", "off")]
)
def test_compiled_and_all_else(quick: None, kind: Any, fp8: Any) -> None:
    """With drop path and FSDP; float8 rounds more where figures differ by rounding."""
    values = VIT | {"drop_path_rate": 0.3}
    batches = [crops(4, GLOBAL), crops(6, LOCAL)]
    with process_group(CPU, timeout=60):
        sharded = ParallelConfig(param_dtype="bf16", checkpointing=kind, fp8=fp8)
        expected = learnt(placed(sharded, **values), batches)
        compiled = ParallelConfig(param_dtype="bf16", checkpointing=kind, fp8=fp8, compile=True)
        network = placed(compiled, **values)
        assert all(isinstance(parameter, DTensor) for parameter in network.parameters())
        assert_close(learnt(network, batches), expected, rtol=0.03)
    assert counters["stats"]["unique_graphs"] == 1, "one version for all blocks"
    assert not counters["graph_break"]


def test_versions_of_a_block(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    """Student, teacher and evaluation want one each, and each a second one for other sizes."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    with process_group(CPU, timeout=60):
        network = placed(ParallelConfig(compile=True), **VIT, drop_path_rate=0.3)

    def versions() -> int:
        return int(counters["stats"]["unique_graphs"])

    def evaluate(count: int, size: int) -> None:
        with torch.no_grad():
            network.eval()(crops(count, size))
        network.train()

    learnt(network, [crops(4, GLOBAL), crops(6, LOCAL)])
    evaluate(4, GLOBAL)
    assert versions() == 2
    for _ in range(3):
        learnt(network, [crops(4, GLOBAL), crops(6, LOCAL)])
        evaluate(4, GLOBAL)
    assert versions() == 2, "nothing is compiled twice"
    for size in (35, 42, 49, 56, 63):
        learnt(network, [crops(4, size), crops(6, LOCAL)])
        evaluate(4, size)
    assert versions() == 4, "a size that changed once is a variable"
    for count in (3, 5, 7):
        evaluate(count, GLOBAL)
    assert versions() <= 6
    assert not counters["graph_break"]


@pytest.mark.slow
def test_stages_of_other_widths(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    """Each wants versions of its own, more in all than the compiler allows by itself."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    config = ConvNextConfig(depths=(2, 1, 2, 1), dims=(8, 12, 16, 24), in_chans=1)
    with process_group(CPU, timeout=60):
        plain = placed(ParallelConfig(), config)
        network = placed(ParallelConfig(compile=True), config)
    for size in (64, 96):
        batches = [crops(4, size), crops(6, 32)]
        expected = learnt(plain, batches)
        assert_close(learnt(network, batches), expected, rtol=1e-3)
        with torch.no_grad():
            network.eval()(crops(2, size))
        network.train()
    assert not counters["recompile_limit_hit"], dict(counters)
    assert counters["stats"]["unique_graphs"] > 8


# --------------------------------------------------------------------------- refused
def test_a_machine_without_a_compiler() -> None:
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        (said,) = pretrain("parallel.compile=true").check(1).missing
        assert "needs a C++ compiler, and none is found" in said
        with process_group(CPU, timeout=60), pytest.raises(RecipeError, match=r"C\+\+ compiler"):
            Sharder(ParallelConfig(compile=True), CPU)
        assert pretrain("parallel.compile=false").check(1).missing == []


def test_a_gpu_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    assert "needs Triton" in str(compiler_complaint(torch.device("cuda", 0)))
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    assert compiler_complaint(torch.device("cuda", 0)) is None


def test_a_backbone_without_blocks() -> None:
    def problems(config: ParallelConfig) -> list[Problem]:
        return list(network_problems(config, Tiny(TinyConfig())))

    assert problems(ParallelConfig()) == []
    found = problems(ParallelConfig(checkpointing="full", compile=True))
    assert [problem.where for problem in found] == ["parallel.checkpointing", "parallel.compile"]
    assert "a Tiny names none" in found[0].message


def test_what_a_check_says() -> None:
    rows = dict(pretrain().check(1).sections["parallel"])
    assert rows == {
        "processes": "1, networks whole",
        "precision": "fp32, gradients reduced in fp32",
        "checkpointing": "none",
        "compile": "no",
        "fp8": "off",
    }
    overrides = ("replicas=2", "checkpointing=selective", "compile=true", "param_dtype=bf16")
    report = pretrain(*(f"parallel.{override}" for override in overrides)).check(4)
    rows = dict(report.sections["parallel"])
    assert rows["processes"] == "2 replicas x 2, networks spread over each 2"
    assert rows["precision"] == "bf16, gradients reduced in fp32"
    assert rows["checkpointing"] == "selective, 2 blocks"
    assert rows["compile"] == "yes, 2 blocks"
    with pytest.raises(RecipeError, match="4 processes cannot be split into 3 replicas") as refused:
        pretrain("parallel.replicas=3").check(4)
    assert refused.value.problems[0].hint == "take 1, 2, 4, or a multiple of 3 processes"
