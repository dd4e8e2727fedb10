"""Checkpoints hold what they were given, fit or say why not, and do not pile up."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dinov3_framework.checkpoints.store import CheckpointStore
from dinov3_framework.errors import CheckpointError

SHARD = "__0_0.distcp"


def some_tensors(value: float = 1.0) -> dict[str, Tensor]:
    return {
        "w": torch.full((3, 4), value),
        "optimizer.step": torch.tensor(value),
        "half": torch.full((5,), value, dtype=torch.bfloat16),
        "mask": torch.tensor([True, False]),
        "rng": torch.arange(9, dtype=torch.uint8),
        "count": torch.tensor([2**40]),
        "empty": torch.empty(0, 3),
        "transposed": torch.arange(6.0).reshape(2, 3).T * value,
    }


def zeros() -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in some_tensors().items()}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "deep" / "checkpoints")
    saved = some_tensors(1.5)
    state = {"config": "abc", "nested": {"list": [1, 2.5, None, True]}}
    path = store.save(1200, saved, state)
    assert path.name == "step_00001200"
    assert names_in(path) == sorted(["COMPLETE", "manifest.json", "state.json", ".metadata", SHARD])
    assert (path / "COMPLETE").read_text().startswith("dinov3 checkpoint 1\n")
    assert names_in(store.folder) == ["step_00001200"]
    assert store.steps() == [1200]

    loaded = zeros()
    before = dict(loaded)
    restored = CheckpointStore(store.folder).restore(loaded)
    assert restored is not None
    assert (restored.step, restored.state, restored.path) == (1200, state, path)
    for name, tensor in saved.items():
        assert loaded[name] is before[name]  # in place
        assert torch.equal(loaded[name], tensor), name


def test_nothing_to_restore(tmp_path: Path) -> None:
    tensors = zeros()
    assert CheckpointStore(tmp_path / "absent").restore(tensors) is None
    assert CheckpointStore(tmp_path).restore(tensors) is None
    (tmp_path / ".saving-step_00000005-abc").mkdir()
    (tmp_path / "notes.txt").touch()
    assert CheckpointStore(tmp_path).restore(tensors) is None
    assert CheckpointStore(tmp_path).steps() == []
    assert not tensors["w"].any()


def test_read_without_a_model(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        store.read()
    store.save(3, {"teacher.w": torch.ones(2), "student.w": torch.zeros(2)}, {"a": 1})
    tensors, restored = store.read("teacher.")
    assert list(tensors) == ["teacher.w"]
    assert tensors["teacher.w"].tolist() == [1, 1]
    assert (restored.step, restored.state) == (3, {"a": 1})
    with pytest.raises(CheckpointError, match=r"starts with 'x.'.*student, teacher"):
        store.read("x.")


def test_pruning_keeps_the_newest_and_every_nth(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2, keep_every=30)
    for step in range(10, 101, 10):
        store.save(step, {"w": torch.ones(1)}, {})
    assert store.steps() == [30, 60, 90, 100]
    assert names_in(tmp_path) == [f"step_000000{n}" for n in (30, 60, 90)] + ["step_00000100"]
    with pytest.raises(ValueError, match="at least 1"):
        CheckpointStore(tmp_path, keep=0)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for value in (1.0, 2.0):
        store.save(7, {"w": torch.full((2,), value)}, {"value": value})
    assert names_in(tmp_path) == ["step_00000007"]
    assert store.read()[0]["w"].tolist() == [2, 2]


def test_killed_while_replacing_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(7, {"w": torch.ones(2)}, {})
    rename = Path.rename

    def die_before_the_second(path: Path, target: Path) -> Path:
        if path.name.startswith(".saving-"):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", die_before_the_second)
    with pytest.raises(KeyboardInterrupt):
        store.save(7, {"w": torch.zeros(2)}, {})
    monkeypatch.undo()
    assert "step_00000007.replaced" in names_in(tmp_path)
    assert store.steps() == [7]
    assert store.read()[0]["w"].tolist() == [1, 1]
    store.save(8, {"w": torch.ones(2)}, {})
    assert names_in(tmp_path) == ["step_00000008"]


def test_state_must_be_json(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for state in ({"x": float("nan")}, {"x": object()}):
        with pytest.raises(CheckpointError, match=r"step 1 .*JSON"):
            store.save(1, {"w": torch.ones(1)}, state)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_pruned_is_left_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, elsewhere = CheckpointStore(tmp_path / "run", keep=1), tmp_path / "elsewhere"
    store.save(1, {"w": torch.ones(1)}, {})
    (tmp_path / "run" / "step_00000001").rename(elsewhere)
    (tmp_path / "run" / "step_00000001").symlink_to(elsewhere)
    store.save(2, {"w": torch.ones(1)}, {})

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    for step in (3, 4):  # 2 stays, half removed, and is tried no more
        store.save(step, {"w": torch.ones(1)}, {})
    monkeypatch.undo()
    CheckpointStore(tmp_path / "run", keep=1).save(5, {"w": torch.ones(1)}, {})
    assert store.steps() == [1, 5]
    assert (elsewhere / "state.json").exists()
    for name in ("step_00000001", ".removing-step_00000002", ".removing-step_00000003"):
        found = [line for line in caplog.messages if "is left there" in line and name in line]
        assert len(found) == (2 if name == "step_00000001" else 1)  # by two stores


def test_misfits_are_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    saved = {
        "same": torch.ones(2),
        "gone": torch.ones(1),
        "w": torch.ones(3, 4),
        "h": torch.ones(2),
    }
    store.save(1, saved, {})
    store.save(2, saved, {})
    wanted = {
        "same": torch.zeros(2),
        "new": torch.zeros(7),
        "w": torch.zeros(4, 3),
        "h": torch.zeros(2, dtype=torch.bfloat16),
    }
    with pytest.raises(CheckpointError) as error:
        store.restore(wanted)
    text = str(error.value)
    assert "step_00000002" in text  # no fallback
    assert "1 tensors not in the checkpoint:\n    new [7]" in text
    assert "1 tensors in the checkpoint but not in this run:\n    gone [1]" in text
    assert "w: [3, 4] in the checkpoint, [4, 3] here" in text
    assert "h: torch.float32 in the checkpoint, torch.bfloat16 here" in text
    assert not any(tensor.any() for tensor in wanted.values())


def test_many_misfits_are_cut(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, {"w": torch.ones(1)}, {})
    with pytest.raises(CheckpointError, match=r"100 tensors not in(.|\n)* and 88 more") as error:
        store.restore({f"block.{n}": torch.ones(1) for n in range(100)})
    assert len(str(error.value).splitlines()) < 25


def test_accept_decides_before_anything_is_loaded(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, {"w": torch.ones(2)}, {"recipe": "a"})

    class OtherRecipe(CheckpointError):
        pass

    def refuse(state: dict[str, str]) -> None:
        raise OtherRecipe(f"made with recipe {state['recipe']}")

    tensors = {"w": torch.zeros(2)}
    with pytest.raises(OtherRecipe, match="made with recipe a"):
        store.restore(tensors, accept=refuse)
    assert not tensors["w"].any()
