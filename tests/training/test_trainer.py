"""Steps of the real trainer: the guard against NaN, accumulation, buffers, memory."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from trainer_support import NO_LOSSES, changed, save, snapshot, steps, trainer

from dinov3_framework.errors import DivergenceError, ExitCode
from dinov3_framework.training.trainer import OutOfMemory, Trainer

GRAM = (
    "losses.gram.use=gram",
    "losses.gram.anchor.period=2",
    "losses.gram.anchor.first_refresh=2",
    "augmentation.anchor_size=28",
)


def poison(iterations: str, value: str = "NaN") -> tuple[str, ...]:
    return (
        "losses.poison.use=poison",
        f"losses.poison.iterations={iterations}",
        f"losses.poison.value={value}",
    )


# --------------------------------------------------------------------------- the guard
@pytest.mark.parametrize("value", ["NaN", "infinity", "-infinity"])
def test_a_poisoned_step_changes_nothing(
    tmp_path: Path, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    with trainer(tmp_path, *poison("[2]", value)) as ours:
        steps(ours, 1)
        before = snapshot(ours)
        assert any(name.startswith("optimizer.") for name in before)
        assert any(name.startswith("teacher.") for name in before)
        with caplog.at_level(logging.WARNING):
            (figures,) = steps(ours, 1)
        assert changed(before, ours) == set()
        assert not math.isfinite(figures["loss"])
        assert "iteration 2: not finite: " in caplog.text
        assert "loss 'poison' on rank 0" in caplog.text
        assert "loss 'dino'" not in caplog.text
        assert "the step is skipped" in caplog.text
        (figures,) = steps(ours, 1)
        assert math.isfinite(figures["loss"])
        for role in ("student.", "teacher.", "optimizer."):
            assert any(name.startswith(role) for name in changed(before, ours))


def test_a_gradient_alone_can_be_poisoned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with trainer(tmp_path) as ours:
        steps(ours, 1)
        before = snapshot(ours)
        norm = ours.unit.placed.student["backbone"].norm
        hook = norm.weight.register_hook(lambda gradient: gradient / 0)
        (figures,) = steps(ours, 1)
        hook.remove()
        assert math.isfinite(figures["loss"])
        assert changed(before, ours) == set()
        assert "gradient of backbone on rank 0" in caplog.text


def test_too_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    with trainer(tmp_path, *poison("[2, 3, 4, 5]"), "max_nonfinite_steps=2") as ours:
        steps(ours, 3)
        with pytest.raises(DivergenceError, match="iteration 4: not finite: ") as caught:
            steps(ours, 1)
    message = str(caught.value)
    assert "loss 'poison' on rank 0" in message
    assert "3 steps in a row (max_nonfinite_steps = 2)" in message
    assert caught.value.exit_code == ExitCode.DIVERGED


def test_sound_steps_between_start_the_count_anew(tmp_path: Path) -> None:
    with trainer(tmp_path, *poison("[1, 3, 5]"), "max_nonfinite_steps=1") as ours:
        assert len(steps(ours, 6)) == 6


# --------------------------------------------------------------------------- buffers
CENTER = ("losses.center.use=center",)


def test_a_losss_buffer_is_restored_with_the_rest(tmp_path: Path) -> None:
    with trainer(tmp_path, *CENTER, "losses.center.poisoned=[2]") as ours:
        steps(ours, 1)
        before = snapshot(ours, ["losses."])
        assert before["losses.center.center"] > 0
        steps(ours, 1)
        assert changed(before, ours) == set()
        steps(ours, 1)
        assert changed(before, ours) == {"losses.center.center"}
        assert ours.tensors()["losses.center.center"].isfinite()


def test_a_losss_buffer_is_saved_and_resumed(tmp_path: Path) -> None:
    with trainer(tmp_path, *CENTER) as ours:
        steps(ours, 2)
        save(ours)
        before = snapshot(ours)
        expected = steps(ours, 1)
    with trainer(tmp_path, *CENTER) as resumed:
        assert changed(before, resumed)
        resumed.resume()
        assert resumed.done == 2
        assert changed(before, resumed) == set()
        assert steps(resumed, 1) == expected


class Statistics(nn.Module):
    """Keeps running statistics, as batch norm does, in front of a backbone's last norm."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.mean.mul_(0.9).add_(tokens.detach().mean() / (0 if self.poisoned else 1))
        normed: torch.Tensor = self.inner(tokens)
        return normed * self.mean.isfinite()  # a loss of its own would be finite

    poisoned = False


def test_a_students_buffers_are_restored_too(tmp_path: Path) -> None:
    with trainer(tmp_path, *poison("[2]")) as ours:
        backbone = ours.unit.placed.student["backbone"]
        backbone.norm = Statistics(backbone.norm)
        steps(ours, 1)
        before = backbone.norm.mean.clone()
        backbone.norm.poisoned = True
        steps(ours, 1)
        assert torch.equal(backbone.norm.mean, before)


# --------------------------------------------------------------------------- anchors
def test_an_anchor_is_refreshed_in_a_skipped_step_too(tmp_path: Path) -> None:
    with trainer(tmp_path, *GRAM, *poison("[2]")) as ours:
        steps(ours, 1)
        assert distance_to_anchor(ours) > 0
        steps(ours, 1)
        assert distance_to_anchor(ours) == 0


def distance_to_anchor(ours: Trainer) -> float:
    anchor = dict(ours.unit.placed.anchors["gram"].named_parameters())
    teacher = ours.unit.placed.teacher["backbone"].named_parameters()
    return max(float((anchor[name] - value).abs().max()) for name, value in teacher)


# --------------------------------------------------------------------------- accumulation
def test_two_passes_are_one_to_rounding(tmp_path: Path) -> None:
    plain = (
        NO_LOSSES,
        "losses.mean.use=scaled_mean",
        "backbone.drop_path_rate=0.0",
        "backbone.pos_embed_rope_rescale_coords=1.0",
        "optimizer.lr=1e-3",
    )
    with trainer(tmp_path / "one", *plain) as one:
        whole = steps(one, 3)
        state = snapshot(one)
    with trainer(tmp_path / "two", *plain, "accumulation_steps=2") as two:
        initial = snapshot(two)
        halves = steps(two, 3)
        assert any(not torch.equal(initial[name], value) for name, value in state.items())
        for name, value in two.tensors().items():
            # This loss takes the last bias out; AdamW then makes a whole step of rounding errors.
            if name.endswith("backbone.norm.bias"):
                continue
            torch.testing.assert_close(value, state[name], rtol=1e-3, atol=1e-6, msg=name)
    for a, b in zip(whole, halves, strict=True):
        assert b == pytest.approx(a, rel=1e-4)


# --------------------------------------------------------------------------- memory
def test_out_of_memory_says_what_helps(tmp_path: Path) -> None:
    trouble = ("losses.t.use=trouble", "losses.t.what=out_of_memory", "losses.t.iteration=2")
    with trainer(tmp_path, *trouble, "accumulation_steps=2", "losses.dino.chunk=8") as ours:
        with pytest.raises(OutOfMemory) as caught:
            ours.train()
        assert ours.done == 1
    message = str(caught.value)
    assert "6 images per process and micro-batch (2 x 28 px, 2 x 14 px each)" in message
    assert "tried to allocate 1.5 TiB" in message
    helps = [
        'parallel.checkpointing = "full"',
        'parallel.param_dtype = "bf16"',
        "losses.ibot.chunk",
        "a larger accumulation_steps",
        "more processes",
        "smaller crops",
        "fewer prototypes",
    ]
    assert not [hint for hint in helps if hint not in message]
    assert "losses.dino.chunk" not in message  # in use already
    assert caught.value.exit_code == ExitCode.WRONG_INPUT
