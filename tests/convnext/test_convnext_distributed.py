"""A ConvNeXt as the engine shards it over two real processes, against the same in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dinov3_convnext.configs import ConvNextConfig
from dinov3_ssl.networks import Blueprint, Networks
from torch import Tensor, multiprocessing
from torch.distributed.tensor import DTensor

from dinov3_framework import Registry
from dinov3_framework.checkpoints.store import CheckpointStore
from dinov3_framework.parallel import ParallelConfig
from dinov3_framework.parallel.sharder import Sharder, is_sharded
from dinov3_framework.parallel.state_dicts import full_state_dict

CONFIG = ConvNextConfig(depths=(1, 1, 2, 1), dims=(8, 12, 16, 24), layer_scale_init_value=0.5)
SAMPLES = 4
ALIASES = {"norm.weight": "norms.3.weight", "norm.bias": "norms.3.bias"}

pytestmark = pytest.mark.slow


def networks(seed: int) -> Networks:
    blueprint = Blueprint.draw(Registry.load(), CONFIG, {})
    return Networks(blueprint, Sharder(ParallelConfig(), torch.device("cpu")), seed)


def share(size: int, rank: int, world: int) -> Tensor:
    """This process's part of a batch of global or local crops."""
    generator = torch.Generator().manual_seed(size)
    return torch.randn(SAMPLES, 3, size, size, generator=generator).chunk(world)[rank]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def step(ours: Networks, rank: int, world: int) -> dict[str, Any]:
    """A step of gradient descent and of the teacher; what came of it."""
    backbone: Any = ours.student["backbone"]
    outputs = backbone.forward_features([share(64, rank, world), share(32, rank, world)], None)
    names = ("x_norm_clstoken", "x_norm_patchtokens")
    loss = sum((output[name] ** 3).mean() for output in outputs for name in names)
    loss.backward()
    gradients = {name: whole(p.grad) for name, p in backbone.named_parameters()}
    torch.optim.SGD(backbone.parameters(), lr=0.1).step()
    ours.update_teacher(0.75)
    return {
        "sharded": is_sharded(backbone),
        "gradients": gradients,
        "student": full_state_dict(backbone),
        "teacher": full_state_dict(ours.teacher["backbone"]),
    }


def work(rank: int, world: int, folder: str) -> None:
    """Initialise, step, save; then restore what was saved into networks with other values."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store{world}", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    ours = networks(seed=0)
    results: dict[str, Any] = {"initial": full_state_dict(ours.student["backbone"])}
    results |= step(ours, rank, world)
    checkpoints = CheckpointStore(Path(folder) / f"checkpoints{world}")
    checkpoints.save(1, ours.named_state(), {})
    others = networks(seed=1)
    checkpoints.restore(others.named_state())
    results["restored"] = full_state_dict(others.student["backbone"])
    torch.save(results, f"{folder}/{rank}of{world}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    work(0, 1, str(folder))
    multiprocessing.spawn(work, args=(2, str(folder)), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "0of1.pt", weights_only=True)


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "0of2.pt", weights_only=True)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_two_processes_begin_and_learn_as_one(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert (one["sharded"], two["sharded"]) == (False, True)
    assert_same(two["initial"], one["initial"], rtol=0, atol=0)
    for name in ("gradients", "student", "teacher"):
        assert_same(two[name], one[name], rtol=1e-4, atol=1e-5)


def test_the_layer_of_two_names_learns_once(two: dict[str, Any]) -> None:
    for name, alias in ALIASES.items():
        assert alias not in two["gradients"]
        for role in ("initial", "student", "teacher", "restored"):
            assert torch.equal(two[role][alias], two[role][name])
        moved = two["initial"][name] - 0.1 * two["gradients"][name]
        torch.testing.assert_close(two["student"][name], moved)
        assert not torch.equal(two["student"][name], two["initial"][name])
        teacher = 0.75 * two["initial"][name] + 0.25 * two["student"][name]
        torch.testing.assert_close(two["teacher"][name], teacher)


def test_checkpoints_hold_it_whole(folder: Path, one: dict[str, Any], two: dict[str, Any]) -> None:
    for world, run in ((1, one), (2, two)):
        assert_same(run["restored"], run["student"], rtol=0, atol=0)
        saved, _ = CheckpointStore(folder / f"checkpoints{world}").read("student.backbone.")
        names = {name.removeprefix("student.backbone.") for name in saved}
        assert names == run["student"].keys() - set(ALIASES.values())
