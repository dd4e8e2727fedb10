"""Heads that classify masks, trained by the task: they learn, go on with the same bits, and do not
depend on how many processes there are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from masks_support import RECIPE, mean_iou
from run_support import losses, metrics, run, run_here, two_processes
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

# That of the recipe, and Mask2Former on its adapter, with everything in it but smaller.
HEADS = {
    "plain": (),
    "mask2former": (
        "drop=head",
        'head={ use="mask2former", hidden_dim=32, queries=12, heads=4, ffn_dim=64, '
        "encoder_layers=1, decoder_layers=3, adapter_channels=8, adapter_heads=4, points=400 }",
    ),
}
SHORT = ("iterations=6", "log_every=1", "checkpoint.every=2")
# Every block on its way from masked to unmasked queries.
UNMASKING = ("head.unmask_from=[0.0, 0.0]", "head.unmask_until=[1.0, 1.0]")
# Adam would make as much of a gradient that is rounding alone, such as a bias's before a norm.
SGD = ("drop=optimizer", 'optimizer={ use="sgd", lr=0.003, weight_decay=0.0 }')
KILL = ("observers.kill.use=signal_at", "observers.kill.signal=SIGKILL")


def exported(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "exports" / "head.safetensors")


@pytest.mark.parametrize("head", HEADS)
def test_ten_pictures_are_learned_by_heart(tmp_path: Path, head: str) -> None:
    found = run_here(tmp_path / "run", *HEADS[head], recipe=RECIPE)
    assert found.returncode == 0, found.stderr
    assert mean_iou(tmp_path / "run") > 90
    first, *_, last = metrics(tmp_path / "run")
    for name in ("loss_class", "loss_mask", "loss_dice"):
        assert last[name] < first[name] / 2


@pytest.mark.parametrize("head", HEADS)
def test_killed_and_resumed_gives_the_same_bits(tmp_path: Path, head: str) -> None:
    options = (*SHORT, *HEADS[head], *(UNMASKING if head == "plain" else ()))
    whole = run_here(tmp_path / "whole", *options, recipe=RECIPE)
    assert whole.returncode == 0, whole.stderr
    killed = run(tmp_path / "cut", *options, *KILL, "observers.kill.iteration=3", recipe=RECIPE)
    assert killed.returncode != 0
    again = run_here(tmp_path / "cut", *options, recipe=RECIPE)
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    before, after = exported(tmp_path / "whole"), exported(tmp_path / "cut")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("head", HEADS)
def test_two_processes_are_one_to_rounding(tmp_path: Path, head: str) -> None:
    """Random choices, normalization and the number of masks are those of the whole batch."""
    options = (*SHORT, *HEADS[head], *(UNMASKING if head == "plain" else ()), *SGD)
    one, two = tmp_path / "one", tmp_path / "two"
    assert run_here(one, *options, recipe=RECIPE).returncode == 0
    found = two_processes(two, *options, recipe=RECIPE)
    assert found.returncode == 0, found.stderr
    for alone, both in zip(metrics(one), metrics(two), strict=True):
        for name in ("loss", "loss_class", "loss_mask", "loss_dice", "gradient_norm/head"):
            assert both[name] == pytest.approx(alone[name], rel=1e-5), (name, alone["iteration"])
    after = exported(two)
    for name, tensor in exported(one).items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-4, atol=1e-5)
