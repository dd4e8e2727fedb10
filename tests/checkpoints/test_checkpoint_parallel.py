"""Several processes save, restore and fail together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoint_processes as processes
import pytest
import torch
from checkpoint_processes import run_processes
from torch import Tensor

from dinov3_framework.checkpoints.store import CheckpointStore


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Where two processes worked, and what each of them saw."""
    folder = tmp_path_factory.mktemp("on_two")
    return folder, run_processes(2, folder / "scratch", processes.on_two, folder)


@pytest.mark.slow
def test_resharding(tmp_path: Path, on_two: tuple[Path, list[dict[str, Any]]]) -> None:
    """Parameters, buffers and AdamW's state, saved by 2 processes, on 1 and 3; then by 3, on 1."""
    folder, (main, _) = on_two
    saved = main["sharded"]
    store = CheckpointStore(folder / "sharded")
    assert {"__0_0.distcp", "__1_0.distcp"} <= set(names_in(store.folder / "step_00000005"))
    assert any(name.endswith("exp_avg_sq") for name in saved)

    alone = processes.trained_tensors(steps=0)[1]
    assert any((alone[name] != saved[name]).any() for name in saved)
    assert store.restore(alone).state == {"saved_by": 2}  # type: ignore[union-attr]
    on_three = run_processes(3, tmp_path, processes.restore_and_save_trained, store.folder)
    for step, state, tensors in [(5, {"saved_by": 2}, alone), *on_three]:
        assert (step, state) == (5, {"saved_by": 2})
        assert tensors.keys() == saved.keys()
        for name, tensor in saved.items():
            assert torch.equal(tensors[name], tensor), name

    alone = processes.trained_tensors(steps=0)[1]  # what the three saved again, all plus 1
    assert store.restore(alone).state == {"saved_by": 3}  # type: ignore[union-attr]
    assert all(torch.equal(alone[name], tensor + 1) for name, tensor in saved.items())


@pytest.mark.slow
def test_full_state_dict(on_two: tuple[Path, list[dict[str, Any]]]) -> None:
    (main, tensors), (other, _) = (seen["gathered"] for seen in on_two[1])
    assert other == {}
    assert set(main) == {"0.weight", "0.bias", "2.weight", "2.bias", "counts"}
    for name, tensor in main.items():
        assert type(tensor) is Tensor
        assert torch.equal(tensor, tensors[f"model.{name}"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("damage", "__1_0.distcp: bad sector"),
        ("unreadable", "rank 1: OSError: [Errno 5] Input/output error"),
    ],
)
def test_processes_agree_on_what_to_restore(
    on_two: tuple[Path, list[dict[str, Any]]], fault: str, reason: str
) -> None:
    found = [seen[fault] for seen in on_two[1]]
    assert [(step, w.tolist()) for step, _, w in found] == [(1, [1.0] * 4)] * 2
    assert [len(lines) for _, lines, _ in found] == [1, 0]  # rank 0 says it, once
    assert reason in found[0][1][0]


@pytest.mark.slow
def test_processes_refuse_together(on_two: tuple[Path, list[dict[str, Any]]]) -> None:
    first, second = (seen["disagreement"] for seen in on_two[1])
    assert len(first) == len(second) == 2
    assert "[4] in the checkpoint, [5] here" in first[0]
    assert "[4] in the checkpoint, [5] here" in second[0]
    assert first[1] == "rank 1: another recipe"
    assert second[1] == "another recipe"


@pytest.mark.slow
def test_processes_fail_to_save_together(on_two: tuple[Path, list[dict[str, Any]]]) -> None:
    first, second = (seen["unwritable"] for seen in on_two[1])
    assert len(first) == len(second) == 3
    for message, names in first + second:
        assert "disk full" in message
        assert names == ["step_00000001"]
    assert names_in(on_two[0] / "unwritable") == ["step_00000001", "step_00000009"]
