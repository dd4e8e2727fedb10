"""The linear head, trained by the task and measured by the evaluation: it learns, goes on with the
same bits, and does not depend on how many processes there are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from run_support import HERE, losses, metrics, run, run_here, two_processes
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

RECIPE = HERE / "tiny_segmentation.toml"
SHORT = ("iterations=6", "log_every=1", "checkpoint.every=2")
SLIDE = "{ mode = 'slide', window = 32, stride = 20, flip = true }"
WINDOWS = f"observers.score.evaluations.val.inference={SLIDE}"
# Adam would make as much of a gradient that is rounding alone.
SGD = ("drop=optimizer", 'optimizer={ use="sgd", lr=0.1, weight_decay=0.0 }')
KILL = ("observers.kill.use=signal_at", "observers.kill.signal=SIGKILL")


def exported(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "exports" / "head.safetensors")


def test_ten_pictures_are_learned_by_heart(tmp_path: Path) -> None:
    found = run_here(tmp_path / "run", recipe=RECIPE)
    assert found.returncode == 0, found.stderr
    before, after = json.loads((tmp_path / "run" / "results.json").read_text())["val"]
    assert before["mIoU"] < 50
    assert after["mIoU"] > 90
    assert set(exported(tmp_path / "run")) == {
        *(f"batchnorm_layer.{name}" for name in ("weight", "bias", "running_mean", "running_var")),
        *("batchnorm_layer.num_batches_tracked", "conv.weight", "conv.bias"),
    }


def test_killed_and_resumed_gives_the_same_bits(tmp_path: Path) -> None:
    options = (*SHORT, "head.dropout=0.1", "transform.flip=0.5", WINDOWS)
    whole = run_here(tmp_path / "whole", *options, recipe=RECIPE)
    assert whole.returncode == 0, whole.stderr
    killed = run(tmp_path / "cut", *options, *KILL, "observers.kill.iteration=3", recipe=RECIPE)
    assert killed.returncode != 0
    again = run_here(tmp_path / "cut", *options, recipe=RECIPE)
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    before, after = exported(tmp_path / "whole"), exported(tmp_path / "cut")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_two_processes_are_one_to_rounding(tmp_path: Path) -> None:
    """Normalization is over the images of both, and so is the evaluation."""
    options = (*SHORT, *SGD, "head.dice_weight=0.5", WINDOWS)
    one, two = tmp_path / "one", tmp_path / "two"
    assert run_here(one, *options, recipe=RECIPE).returncode == 0
    found = two_processes(two, *options, recipe=RECIPE)
    assert found.returncode == 0, found.stderr
    for alone, both in zip(metrics(one), metrics(two), strict=True):
        for name in {"loss", "ce", "dice", "gradient_norm/head"} & alone.keys():
            assert both[name] == pytest.approx(alone[name], rel=1e-5), (name, alone["iteration"])
    after = exported(two)
    for name, tensor in exported(one).items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-4, atol=1e-5)
    # The same head, one process's, measured by both ways: the same integers.
    confusions = []
    for name, measure in (("alone", run_here), ("together", two_processes)):
        output = tmp_path / name
        words = (f"head={one}", "evaluations.val.workers=1")
        assert measure(output, *words, recipe=evaluation(tmp_path)).returncode == 0
        confusions.append((output / "val_confusion.npy").read_bytes())
    assert confusions[0] == confusions[1]


def evaluation(folder: Path) -> Path:
    """A recipe that measures a head on the recipe's backbone."""
    path = folder / "evaluate.toml"
    text = RECIPE.read_text()
    backbone = text.partition("[backbone]")[2].partition("[dataset]")[0]
    path.write_text(
        f'task = "evaluate"\n\n[backbone]{backbone}\n'
        '[evaluations.val]\nuse = "segmentation"\ndata = { use = "shapes", count = 7, seed = 1 }\n'
        f"inference = {SLIDE}\n"
    )
    return path


def test_two_processes_in_bfloat16(tmp_path: Path) -> None:
    options = ("iterations=20", "parallel.param_dtype=bf16")
    found = two_processes(tmp_path / "run", *options, recipe=RECIPE)
    assert found.returncode == 0, found.stderr
    _, after = json.loads((tmp_path / "run" / "results.json").read_text())["val"]
    assert after["mIoU"] > 70
