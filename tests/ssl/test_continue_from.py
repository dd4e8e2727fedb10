"""A run that goes on with another's training: networks, optimizer and count of iterations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from run_support import export_bytes, losses, run, run_here
from trainer_support import pretrain

from dinov3_framework import ExitCode, RecipeError
from dinov3_framework.checkpoints.store import CheckpointStore

FROM = "continue_from"


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("earlier") / "run"
    done = run_here(output)
    assert done.returncode == 0, done.stderr
    return output


def problems(*overrides: str) -> dict[str, str]:
    with pytest.raises(RecipeError) as caught:
        pretrain(*overrides).check(1)
    return {problem.where: f"{problem.message} {problem.hint}" for problem in caught.value.problems}


@pytest.mark.slow
@pytest.mark.parametrize("what", ["run", "checkpoints", "one"])
def test_it_goes_on_with_the_bits_of_the_other(earlier: Path, tmp_path: Path, what: str) -> None:
    place = {
        "run": earlier,
        "checkpoints": earlier / "checkpoints",
        "one": earlier / "checkpoints" / "step_00000004",
    }[what]
    wanted = () if what == "one" else (f"{FROM}.iteration=4",)
    done = run_here(tmp_path / "run", f"{FROM}.run={place}", *wanted)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == losses(earlier)[4:]
    last = "checkpoints"
    (ours, _), (theirs, _) = (
        CheckpointStore(output / last).read() for output in (tmp_path / "run", earlier)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    provenance = json.loads((tmp_path / "run" / last / "step_00000006" / "state.json").read_text())
    assert provenance["init_from"]["continue_from.iteration"] == "4"


@pytest.mark.slow
def test_killed_it_goes_on_from_its_own_checkpoint(earlier: Path, tmp_path: Path) -> None:
    start = (f"{FROM}.run={earlier}", "iterations=10", "checkpoint.every=1")
    gram = ("losses.gram.use=gram", "augmentation.anchor_size=28")
    whole = run_here(tmp_path / "whole", *start, *gram)
    assert whole.returncode == 0, whole.stderr
    assert [iteration for iteration, _ in losses(tmp_path / "whole")] == [7, 8, 9, 10]
    assert (tmp_path / "whole" / "exports" / "initial_backbone.safetensors").is_file()
    killer = ("observers.killer.use=signal_at", "observers.killer.iteration=8")
    assert run(tmp_path / "killed", *start, *gram, *killer).returncode != 0
    again = run_here(tmp_path / "killed", *start, *gram)
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert export_bytes(tmp_path / "killed") == export_bytes(tmp_path / "whole")


def test_what_does_not_fit_is_known_before_anything_is_written(
    earlier: Path, tmp_path: Path
) -> None:
    start = f"{FROM}.run={earlier}"
    assert "nothing would be left to do" in problems(start)["iterations"]
    more = (start, "iterations=9")
    assert "there are those of 4, 6" in problems(*more, f"{FROM}.iteration=5")[f"{FROM}.iteration"]
    assert "backbone.blocks.0" in problems(*more, "backbone.embed_dim=48")[FROM]
    both = problems(*more, "drop=losses.ibot")
    assert 'unused = ["' in both[FROM]
    assert "ibot_head." in both[FROM]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no checkpoint in" in problems(f"{FROM}.run={empty}")[f"{FROM}.run"]
    (said,) = pretrain(f"{FROM}.run={tmp_path / 'nowhere'}").check(1).missing
    assert said.startswith(f"{FROM}.run: there is no ")


def test_both_beginnings_contradict_each_other(earlier: Path) -> None:
    with pytest.raises(RecipeError, match="both say what the networks start from"):
        pretrain(f"{FROM}.run={earlier}", f"init_from.weights={earlier}")


@pytest.mark.slow
def test_a_loss_that_is_new_keeps_its_first_values(earlier: Path, tmp_path: Path) -> None:
    start = (f"{FROM}.run={earlier}", "iterations=7", "losses.more.use=dino")
    head = "losses.more.head={n_prototypes=16, bottleneck_dim=8, hidden_dim=16}"
    assert "more_head." in problems(*start, head)[FROM]
    done = run_here(tmp_path / "run", *start, head, f'{FROM}.new=["more_head.*"]')
    assert done.returncode == 0, done.stderr
    ((_, figures),) = losses(tmp_path / "run")
    assert "more" in json.loads(figures)


@pytest.mark.slow
def test_one_of_two_processes(earlier: Path, tmp_path: Path) -> None:
    two = ("launcher.use=local", "launcher.processes=2")
    done = run(tmp_path / "run", f"{FROM}.run={earlier}", "iterations=8", *two)
    assert done.returncode == ExitCode.OK, done.stderr
    assert [iteration for iteration, _ in losses(tmp_path / "run")] == [7, 8]
