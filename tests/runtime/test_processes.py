"""The process group of a run."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from dinov3_framework import UserError
from dinov3_framework.runtime.processes import process_group


def test_one_process_of_a_job_needs_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Slurm and others leave the environment for what they start once."""
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with process_group(torch.device("cpu"), timeout=5):
        assert dist.get_world_size() == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(UserError, match="MASTER_ADDR is not"),
        process_group(torch.device("cpu"), timeout=5),
    ):
        pass
