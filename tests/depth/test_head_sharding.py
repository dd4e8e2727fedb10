"""Depth heads spread over two processes against one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from depth_processes import HEADS, work
from process_groups import run_processes

from dinov3_framework.runtime.processes import process_group

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of one process, of two, and of two in bfloat16."""
    folder = tmp_path_factory.mktemp("processes")
    with process_group(torch.device("cpu"), timeout=60):
        one = work()
    two = run_processes(2, folder / "fp32", work)[0]
    return [one, two, run_processes(2, folder / "bf16", work, "bf16")[0]]


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_two_processes_learn_as_one(name: str, results: list[dict[str, Any]]) -> None:
    one, two, bf16 = (each[name] for each in results)
    assert (one["sharded"], two["sharded"], bf16["sharded"]) == (False, True, True)
    torch.testing.assert_close(two["loss"], one["loss"], **CLOSE)
    for key, value in one["gradients"].items():
        torch.testing.assert_close(two["gradients"][key], value, rtol=1e-3, atol=1e-5, msg=key)
    assert one["buffers"]
    torch.testing.assert_close(two["buffers"], one["buffers"], **CLOSE)
    torch.testing.assert_close(bf16["loss"], one["loss"], rtol=0.05, atol=0.02)
    for key, value in bf16["gradients"].items():
        assert value.isfinite().all(), key
