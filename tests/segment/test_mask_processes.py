"""The loss of mask classification on several processes."""

from __future__ import annotations

from pathlib import Path

import torch
from masks_processes import loss_of_part
from process_groups import run_processes


def test_processes_share_the_loss_of_the_whole_batch(tmp_path: Path) -> None:
    """The mean over processes, as training takes it, is what one process has.

    With more images on one than on the other, and unequally many masks.
    """
    found = run_processes(2, tmp_path, loss_of_part)
    whole = loss_of_part()
    mean = torch.stack([each["loss"] for each in found]).mean()
    torch.testing.assert_close(mean, whole["loss"])
    for name, value in whole["metrics"].items():
        parts = torch.stack([each["metrics"][name] for each in found])
        torch.testing.assert_close(parts.mean(), value)
    gradients = zip(*(each["gradients"] for each in found), strict=True)
    for parts, alone in zip(gradients, whole["gradients"], strict=True):
        torch.testing.assert_close(torch.stack(parts).mean(0), alone, rtol=1e-4, atol=1e-6)
