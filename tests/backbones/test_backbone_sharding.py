"""Backbones as the sharder places them: on two real processes against one, and in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from backbone_families import CONVNEXT, EACH_FAMILY, FAMILIES, Family
from dinov3_ssl.networks import Blueprint, Networks
from torch import Tensor, multiprocessing
from torch.distributed.tensor import DTensor

from dinov3_framework import Registry
from dinov3_framework.checkpoints.store import CheckpointStore
from dinov3_framework.parallel import ParallelConfig
from dinov3_framework.parallel.sharder import Sharder, initial_values, is_sharded
from dinov3_framework.parallel.state_dicts import full_state_dict

CPU = torch.device("cpu")
# ConvNeXt has one layer under two names.
ALIASES = {"norm.weight": "norms.3.weight", "norm.bias": "norms.3.bias"}


# --------------------------------------------------------------------------- one process
@EACH_FAMILY
def test_initial_values_are_drawn_from_the_seed_alone(family: Family) -> None:
    with torch.device("meta"):
        blueprint = family.network(family.config(**family.small))
    drawn = [initial_values(blueprint, seed).state_dict() for seed in (0, 0, 1)]
    for name, value in drawn[0].items():
        assert value.isfinite().all(), name
        assert torch.equal(value, drawn[1][name]), name
    assert any(not torch.equal(value, drawn[2][name]) for name, value in drawn[0].items())


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@EACH_FAMILY
@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sharded_in_bf16(family: Family) -> None:
    options = {**family.small, family.scale: 0.5, **family.random}
    with torch.device("meta"):
        model = family.network(family.config(**options))
    parallel = ParallelConfig(param_dtype="bf16", reduce_dtype="fp32")
    model = Sharder(parallel, CPU).place(model)
    torch.manual_seed(0)
    model.init_weights()
    seen: set[torch.dtype] = set()
    for block in model.blocks_to_shard():
        block.register_forward_pre_hook(lambda module, args: seen.update(m.dtype for m in args[0]))
    family.total(model.train()).backward()
    assert seen == {torch.bfloat16}
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad.full_tensor().isfinite().all(), name
    with torch.no_grad():
        (patches,) = model.eval().get_intermediate_layers(family.images(2), n=[0])
    assert patches.isfinite().all()


# --------------------------------------------------------------------------- two processes
def networks(family: Family, seed: int) -> Networks:
    config = family.config(**family.small, **{family.scale: 0.5})
    blueprint = Blueprint.draw(Registry.load(), config, {})
    return Networks(blueprint, Sharder(ParallelConfig(), CPU), seed)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def step(family: Family, ours: Networks, rank: int, world: int) -> dict[str, Any]:
    """A step of gradient descent and of the teacher; what came of it."""
    backbone: Any = ours.student["backbone"]
    share = [crops.chunk(world)[rank] for crops in family.crops()]
    names = ("x_norm_clstoken", "x_norm_patchtokens")
    outputs = backbone.forward_features(share)
    loss = sum((output[name] ** 3).mean() for output in outputs for name in names)
    loss.backward()
    gradients = {
        name: whole(p.grad) for name, p in backbone.named_parameters() if p.grad is not None
    }
    torch.optim.SGD(backbone.parameters(), lr=0.1).step()
    ours.update_teacher(0.75)
    return {
        "sharded": is_sharded(backbone),
        "gradients": gradients,
        "student": full_state_dict(backbone),
        "teacher": full_state_dict(ours.teacher["backbone"]),
    }


def work(rank: int, world: int, folder: str) -> None:
    """Initialize, step, save; then restore what was saved into networks with other values."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store{world}", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    results = {}
    for family in FAMILIES:
        ours = networks(family, seed=0)
        found = {"initial": full_state_dict(ours.student["backbone"])}
        found |= step(family, ours, rank, world)
        checkpoints = CheckpointStore(Path(folder) / f"{family.name}{world}")
        checkpoints.save(1, ours.named_state(), {})
        others = networks(family, seed=1)
        checkpoints.restore(others.named_state())
        found["restored"] = full_state_dict(others.student["backbone"])
        results[family.name] = found
    torch.save(results, f"{folder}/{rank}of{world}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    work(0, 1, str(folder))
    multiprocessing.spawn(work, args=(2, str(folder)), nprocs=2)
    return folder


def results(folder: Path, family: Family) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of one process, and of the first of two."""
    one, two = (torch.load(folder / f"0of{world}.pt", weights_only=True) for world in (1, 2))
    return one[family.name], two[family.name]


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.slow
@EACH_FAMILY
def test_two_processes_begin_and_learn_as_one(family: Family, folder: Path) -> None:
    one, two = results(folder, family)
    assert (one["sharded"], two["sharded"]) == (False, True)
    assert_same(two["initial"], one["initial"], rtol=0, atol=0)
    for name in ("gradients", "student", "teacher"):
        assert_same(two[name], one[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@EACH_FAMILY
def test_checkpoints_hold_it_whole(family: Family, folder: Path) -> None:
    aliases = set(ALIASES.values()) if family is CONVNEXT else set()
    for world, run in enumerate(results(folder, family), 1):
        assert_same(run["restored"], run["student"], rtol=0, atol=0)
        saved, _ = CheckpointStore(folder / f"{family.name}{world}").read("student.backbone.")
        names = {name.removeprefix("student.backbone.") for name in saved}
        assert names == run["student"].keys() - aliases


@pytest.mark.slow
def test_a_layer_of_two_names_learns_once(folder: Path) -> None:
    _, two = results(folder, CONVNEXT)
    for name, alias in ALIASES.items():
        assert alias not in two["gradients"]
        for role in ("initial", "student", "teacher", "restored"):
            assert torch.equal(two[role][alias], two[role][name])
        moved = two["initial"][name] - 0.1 * two["gradients"][name]
        torch.testing.assert_close(two["student"][name], moved)
        assert not torch.equal(two["student"][name], two["initial"][name])
        teacher = 0.75 * two["initial"][name] + 0.25 * two["student"][name]
        torch.testing.assert_close(two["teacher"][name], teacher)
