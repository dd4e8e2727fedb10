"""One process and two come to the same; lower precision stays sound."""

from __future__ import annotations

from itertools import filterfalse
from pathlib import Path

import pytest
import torch
from dinov3_vit.rope import RotaryTable
from run_support import is_timing, metrics, outside_torchrun, run_here, saved, two_processes
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from trainer_support import snapshot, steps, trainer

# KoLeo looks at one process's samples, and drop path picks among them.
SAME = ("backbone.drop_path_rate=0.0", "backbone.pos_embed_rope_rescale_coords=1.0")
SAME += ('drop=["losses.koleo"]', "iterations=4", "checkpoint.every=1", "checkpoint.keep=9")
BF16 = "parallel.param_dtype=bf16"


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("one") / "run"
    done = run_here(output, *SAME)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("two") / "run"
    done = two_processes(output, *SAME)
    assert done.returncode == 0, done.stderr
    return output


def assert_same_figures(one: Path, other: Path, rel: float) -> None:
    ours, theirs = metrics(one), metrics(other)
    assert len(ours) == len(theirs) == 4
    for expected, actual in zip(ours, theirs, strict=True):
        assert expected.keys() == actual.keys()
        for name in filterfalse(is_timing, expected):
            assert actual[name] == pytest.approx(expected[name], rel=rel, abs=1e-7), (
                f"{name} at iteration {expected['iteration']}"
            )


@pytest.mark.slow
def test_two_processes_learn_what_one_does(one: Path, two: Path) -> None:
    assert_same_figures(one, two, rel=1e-3)


@pytest.mark.slow
def test_first_values_do_not_depend_on_processes(one: Path, two: Path, tmp_path: Path) -> None:
    # In the first iteration the learning rate is 0, so that the teacher is still as it was.
    ours, theirs = saved(one, 1, tmp_path), saved(two, 1, tmp_path)
    assert ours.keys() == theirs.keys()
    compared = [name for name in ours if name.startswith(("student.", "teacher."))]
    assert len(compared) > 40
    for name in compared:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.slow
def test_an_outside_torchrun_runs_it_unchanged(two: Path, tmp_path: Path) -> None:
    output = tmp_path / "outside"
    launcher = ("launcher.use=local", "launcher.processes=7")  # not a number to split 12 over
    done = outside_torchrun(output, *SAME, *launcher)
    assert done.returncode == 0, done.stderr
    assert_same_figures(two, output, rel=0)
    assert done.stdout.count("images per step") == 1, "only one process speaks"


@pytest.mark.slow
def test_two_processes_in_bfloat16_stay_close_and_finite(one: Path, tmp_path: Path) -> None:
    done = two_processes(tmp_path / "bf16", *SAME, BF16, "parallel.reduce_dtype=fp32")
    assert done.returncode == 0, done.stderr
    for expected, actual in zip(metrics(one), metrics(tmp_path / "bf16"), strict=True):
        assert actual["loss"] == pytest.approx(expected["loss"], rel=0.02)
        assert None not in actual.values()
    for name, tensor in saved(tmp_path / "bf16" / ".", 4, tmp_path).items():
        assert tensor.dtype == torch.float32, name
        assert tensor.isfinite().all(), name


def test_one_process_in_bfloat16(tmp_path: Path) -> None:
    with trainer(tmp_path / "fp32", *SAME) as plain:
        expected = steps(plain, 2)
    with trainer(tmp_path / "bf16", *SAME, BF16) as ours:
        parameters = list(ours.unit.placed.student.parameters())
        assert all(isinstance(parameter, DTensor) for parameter in parameters)
        assert all(parameter.dtype == torch.float32 for parameter in parameters)
        assert all(tensor.dtype == torch.float32 for tensor in snapshot(ours).values())
        before = snapshot(ours, ["student."])
        found = steps(ours, 2)
        after = snapshot(ours, ["student."])
    assert any(not torch.equal(_whole(after[name]), _whole(old)) for name, old in before.items())
    for a, b in zip(expected, found, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.02)
        assert b["loss"] != a["loss"], "computed in another precision"


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def test_rope_tables_stay_float32_in_bfloat16(tmp_path: Path) -> None:
    seen: dict[str, list[torch.dtype]] = {"tokens": [], "tables": []}

    def record(module: nn.Module, arguments: tuple[object, ...], options: object) -> None:
        for value in _tensors([arguments, options]):
            seen["tokens" if value.shape[-1] == 32 else "tables"].append(value.dtype)

    with trainer(tmp_path, BF16) as ours:
        backbone = ours.unit.placed.student["backbone"]
        for block in backbone.blocks:
            block.register_forward_pre_hook(record, with_kwargs=True)
        steps(ours, 1)
        periods = dict(backbone.named_buffers())
        assert {tensor.dtype for tensor in periods.values()} == {torch.float32}
    assert set(seen["tokens"]) == {torch.bfloat16}
    assert set(seen["tables"]) == {torch.float32}


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, RotaryTable):
        return [value.cos, value.sin]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in _tensors(part)]
    return []
