"""What a check says of memory, beside the rehearsal, which counts every tensor of a step."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from dinov3_estimate.simulated import SimulatedRank
from dinov3_estimate.step import simulate

from dinov3_framework import Plan, Registry
from dinov3_framework.cli import main
from dinov3_framework.recipes.compose import compose
from dinov3_framework.recipes.structure import structure_recipe

SMALL = ("quickstart",)
SINGLE = ("vits_pretrain", "1gpu", "batch_size=64", "parallel.compile=false")


def task(*words: str) -> Any:
    registry = Registry.load()
    recipes = [word for word in words if "=" not in word]
    config = structure_recipe(registry, compose(recipes, [w for w in words if "=" in w]))
    return registry.build(config, registry=registry)


def memory(plan: Plan) -> dict[str, str]:
    return dict(plan.sections["memory"])


@pytest.mark.parametrize(
    "words",
    [
        SMALL,
        (*SMALL, "parallel.checkpointing=full"),
        pytest.param(SINGLE, marks=pytest.mark.slow),
        pytest.param((*SINGLE, "parallel.param_dtype=fp32"), marks=pytest.mark.slow),
        pytest.param((*SINGLE, "parallel.checkpointing=selective"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_it_is_near_what_a_rehearsal_counts(words: tuple[str, ...]) -> None:
    text = memory(task(*words).check(1))["of a process"]
    coarse = float(re.match(r"about ([\d.]+) GiB", text)[1])
    counted = simulate(task(*words), SimulatedRank(1)).peak.total / 2**30
    assert 0.7 < coarse / counted < 1.4


def test_what_a_device_cannot_hold_is_said_with_a_remedy() -> None:
    words = ("vitl_im1k", "parallel.device=cpu", "parallel.compile=false")
    note = memory(task(*words).check(1))["note"]
    (remedy,) = re.findall(r"accumulation_steps = \d+", note)
    assert "note" not in memory(task(*words, remedy.replace(" ", "")).check(1))


def test_the_devices_of_another_machine_are_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["vitl_im1k", "--launcher", "slurm", "--check"]) == 0, "the data may be there, too"
    shown = capsys.readouterr().out
    assert "about" in shown
    assert "this device" not in shown
