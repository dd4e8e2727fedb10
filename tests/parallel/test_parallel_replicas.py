"""Replicas of sharded networks, and networks on some of the processes, learn the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import parallel_processes as processes
import pytest
import torch
from checkpoint_processes import run_processes
from dinov3_ssl.networks import Networks
from torch import Tensor
from trainer_support import trainer

from dinov3_framework import RecipeError
from dinov3_framework.parallel import ParallelConfig
from dinov3_framework.parallel.sharder import Sharder
from dinov3_framework.runtime.processes import process_group

# KoLeo looks at one process's samples, and drop path picks among them.
SAME = ("backbone.drop_path_rate=0.0", "backbone.pos_embed_rope_rescale_coords=1.0")
SAME += ('drop=["losses.koleo"]',)
CPU = torch.device("cpu")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("replicas")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    with process_group(CPU, timeout=60):
        return processes.learn(folder / "alone", 4, *SAME)


@pytest.fixture(scope="module")
def four(folder: Path) -> list[dict[str, Any]]:
    return run_processes(4, folder / "scratch", processes.four, folder, SAME)


def assert_same_figures(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    assert len(ours) == len(theirs) > 0
    for expected, actual in zip(ours, theirs, strict=True):
        assert expected.keys() == actual.keys()
        for name, value in expected.items():
            assert actual[name] == pytest.approx(value, rel=1e-3, abs=1e-7), name


def assert_same_state(actual: dict[str, Tensor], expected: dict[str, Tensor], **by: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, **by, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_all_ways_of_spreading_learn_the_same(
    alone: dict[str, Any], four: list[dict[str, Any]]
) -> None:
    main = four[0]
    assert main["sharded"]["mesh"] == ([0, 1, 2, 3], None)
    assert main["replicated"]["mesh"] == ([[0, 1], [2, 3]], ("replicate", "shard"))
    assert main["whole"]["mesh"] == ([[0], [1], [2], [3]], ("replicate", "shard"))
    for rank in four:
        for way in ("sharded", "replicated", "whole"):
            assert_same_figures(alone["figures"][:2], rank[way]["figures"])
            assert_same_state(rank[way]["state"], main["sharded"]["state"], rtol=1e-3, atol=1e-6)
    assert main["replicated"]["export"].keys() == alone["export"].keys()
    for name, tensor in main["replicated"]["export"].items():
        assert torch.equal(tensor, main["replicated"]["state"][f"teacher.backbone.{name}"])


def test_a_run_of_replicas_goes_on_without(
    folder: Path, alone: dict[str, Any], four: list[dict[str, Any]]
) -> None:
    output = folder / "replicated"
    on_two = run_processes(2, folder / "two", processes.learn, output, 2, *SAME)
    for rank in on_two:
        assert rank["begun"] == 2
        assert rank["mesh"] == ([0, 1], None)
        assert_same_figures(alone["figures"][2:], rank["figures"])
    with trainer(output, *SAME) as one:
        one.resume()
        saved = {name: tensor.detach() for name, tensor in one.tensors().items()}
        assert_same_state(four[0]["replicated"]["state"], saved, rtol=0, atol=0)


def test_recomputing_changes_no_bit(four: list[dict[str, Any]]) -> None:
    for rank in four:
        for way in ("full", "selective"):
            assert rank[way]["figures"] == rank["sharded"]["figures"]
            assert_same_state(rank[way]["state"], rank["sharded"]["state"], rtol=0, atol=0)


def test_float8_is_the_same_on_one_process_and_four(
    folder: Path, four: list[dict[str, Any]]
) -> None:
    with process_group(CPU, timeout=60):
        expected = processes.learn(folder / "fp8_alone", 2, *SAME, "parallel.fp8=emulated")
    for ours, theirs, full in zip(
        expected["figures"], four[0]["fp8"]["figures"], four[0]["sharded"]["figures"], strict=True
    ):
        # Rounding may carry a value over the edge to the next float8, but few of them.
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-3)
        assert theirs["loss"] != pytest.approx(full["loss"], rel=1e-6)
    assert four[0]["fp8"]["state"].keys() == four[0]["sharded"]["state"].keys()


@pytest.mark.parametrize("key", ["groups", "groups_of_replicas"])
def test_networks_side_by_side(four: list[dict[str, Any]], key: str) -> None:
    expected = [_reference(index) for index in range(2)]
    first, second = (expected[index]["student"]["cls_token"] for index in range(2))
    assert not torch.equal(first, second)
    for rank, seen in enumerate(four):
        index = rank // 2
        row = [2 * index, 2 * index + 1]
        assert seen[key]["mesh"] == (row if key == "groups" else [[row[0]], [row[1]]])
        assert_same_state(seen[key]["student"], expected[index]["student"], rtol=0, atol=0)
        gradients = expected[index]["gradients"]
        assert_same_state(seen[key]["gradients"], gradients, rtol=1e-4, atol=1e-6)


def _reference(index: int) -> dict[str, Any]:
    """What a group of two comes to, in one process and by hand."""
    blueprint = processes.pretrain(*SAME).method.prepare().blueprint
    with process_group(CPU, timeout=60):
        networks = Networks(blueprint, Sharder(ParallelConfig(), CPU), seed=index)
    backbone: Any = networks.student["backbone"]
    student = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    for step in range(1 + index):
        images = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(step))
        (backbone(images) ** 3).mean().backward()
    gradients = {n: p.grad for n, p in backbone.named_parameters() if p.grad is not None}
    return {"student": student, "gradients": gradients}


def test_a_group_that_cannot_be_split_is_refused() -> None:
    with process_group(CPU, timeout=60), pytest.raises(RecipeError, match="into 3 replicas"):
        Sharder(ParallelConfig(replicas=3), CPU)
