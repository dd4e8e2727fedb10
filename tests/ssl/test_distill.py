"""A student of a frozen teacher: who learns, whose projectors, which crops, and going on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from dinov3_losses.configs import ProjectorConfig
from dinov3_losses.projector import PrototypeProjector
from distill_support import DISTILL, HEAD, TEACHER, distill, student
from run_support import export_bytes, losses, metrics, run, run_here
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from trainer_support import steps

from dinov3_framework import ExitCode, RecipeError, load_backbone
from dinov3_framework.checkpoints.store import CheckpointStore
from dinov3_framework.weights.sharded import open_newest


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of another backbone, with its projectors in checkpoints."""
    output = tmp_path_factory.mktemp("teacher") / "run"
    done = run_here(output, *TEACHER)
    assert done.returncode == 0, done.stderr
    return output


def copies(module: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def problems(*args: Any) -> dict[str, str]:
    with pytest.raises(RecipeError) as caught:
        distill(*args).check(1)
    return {problem.where: f"{problem.message} {problem.hint}" for problem in caught.value.problems}


def test_expected_checkpoints_hold_the_teachers_projectors(teacher: Path, tmp_path: Path) -> None:
    """And every other tensor of a run, but nothing of the teacher's backbone."""
    folder = tmp_path / "expected"
    folder.mkdir()
    assert distill(teacher, HEAD).write_expected_artifacts(folder)
    found = open_newest(folder / "checkpoints").shapes
    with student(teacher, tmp_path / "run", HEAD) as ours:
        assert found == {name: tuple(t.shape) for name, t in ours.tensors().items()}
    frozen = {name.split(".")[1] for name in found if name.startswith("frozen.")}
    assert frozen == {"dino_head", "ibot_head"}


def test_tensors_of_the_teachers_file_may_be_left_over(teacher: Path, tmp_path: Path) -> None:
    with safe_open(teacher / "exports/teacher_backbone.safetensors", "pt") as export:
        state = {name: export.get_tensor(name) for name in export.keys()}  # noqa: SIM118
        save_file(
            state | {"probe.bias": torch.ones(1)}, tmp_path / "x.safetensors", export.metadata()
        )
    path, hint = tmp_path / "x.safetensors", 'unused = ["probe.bias"]'
    assert hint in problems(path, 'teacher.projectors="new"')["teacher.weights"]
    with student(path, tmp_path / "run", 'teacher.projectors="new"', f"teacher.{hint}") as ours:
        assert ours.unit.objective.teaching.networks["backbone"].cls_token.equal(state["cls_token"])


# --------------------------------------------------------------------------- who learns
def test_the_student_moves_its_average_follows_the_teacher_stays(
    teacher: Path, tmp_path: Path
) -> None:
    with student(teacher, tmp_path / "run", HEAD) as ours:
        frozen = ours.unit.objective.teaching.networks
        before = copies(frozen)
        expected, _ = CheckpointStore(teacher / "checkpoints").read("teacher.")
        for name, value in before.items():
            if f"teacher.{name}" in expected:
                assert torch.equal(value, expected[f"teacher.{name}"]), name
        old = {n: p.clone() for n, p in ours.unit.placed.student.named_parameters()}
        average = {n: p.clone() for n, p in ours.unit.placed.teacher.named_parameters()}
        steps(ours, 2)
        assert all(torch.equal(value, before[name]) for name, value in copies(frozen).items())
        moved = [n for n, p in ours.unit.placed.student.named_parameters() if not p.equal(old[n])]
        assert len(moved) > len(old) / 2
        followed = [n for n, p in ours.unit.placed.teacher.named_parameters() if n in moved]
        assert any(
            not ours.unit.placed.teacher.get_parameter(n).equal(average[n]) for n in followed
        )
        assert not any(p.requires_grad or p.grad is not None for p in frozen.parameters())


def test_the_student_sees_what_is_only_compared(teacher: Path, tmp_path: Path) -> None:
    for key, hidden in (("false", False), ("true", True)):
        with student(teacher, tmp_path / key, HEAD, f"mask_student={key}") as ours:
            backbone = ours.unit.placed.student["backbone"]
            whole, seen = backbone.forward_features, []

            def record(images: Any, masks: Any, whole: Any = whole, seen: Any = seen) -> Any:
                seen.append(masks[0])
                return whole(images, masks)

            backbone.forward_features = record
            (figures,) = steps(ours, 1)
        assert figures["ibot"] > 0
        assert (seen[0] is not None) is hidden


def test_targets_are_the_teachers(teacher: Path, tmp_path: Path) -> None:
    """The DINO targets are those that the teacher's own networks give for its crops."""
    with student(teacher, tmp_path / "run", HEAD) as ours:
        batch, given = ours.unit.objective.teaching(ours.maker[0, 0], {"class"})
    loaded = load_backbone(teacher / "checkpoints")
    pixels = batch.crops["global"].float().sub(0.286 * 255).div(0.353 * 255).flatten(0, 1)
    with torch.no_grad():
        expected = loaded.backbone.eval()(pixels)
    torch.testing.assert_close(given["global"].cls.flatten(0, 1), expected)


# --------------------------------------------------------------------------- projectors
def test_projectors_of_another_shape_are_refused_with_a_remedy(teacher: Path) -> None:
    found = problems(teacher)
    assert found.keys() == {"losses.dino"}
    assert "mlp.0.weight: [20, 48] in the weights, [16, 48] here" in found["losses.dino"]
    assert "losses.dino.teacher_head" in found["losses.dino"]
    assert distill(teacher, HEAD).check(1).missing == []
    assert distill(teacher, "teacher.projectors=new").check(1).missing == []


def test_a_backbone_alone_gets_new_projectors_aloud(teacher: Path, tmp_path: Path) -> None:
    export = teacher / "exports" / "teacher_backbone.safetensors"
    report = distill(export).check(1)
    assert dict(report.sections["teacher"])["dino_head"].startswith("new: the weights hold none")
    assert "teacher.projectors" in problems(export, "teacher.projectors=weights")
    done = run_here(tmp_path / "run", f"teacher.weights={export}", recipe=DISTILL)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert "no projector of loss 'dino': it gets a new one" in said
    assert "prototypes are tokens of the first batches" in said


def test_new_prototypes_tell_tokens_apart_however_close_they_are() -> None:
    torch.manual_seed(0)
    center = torch.randn(48)
    config = ProjectorConfig(n_prototypes=512, bottleneck_dim=32, hidden_dim=64)
    for spread in (1.0, 0.1):
        tokens = center + spread * torch.randn(400, 48)
        projector = PrototypeProjector(config, 48)
        assert projector.fit(tokens)
        with torch.no_grad():
            logits = projector(tokens)
            logits -= logits.mean(dim=0)
        assert logits.isfinite().all()
        # Of 512 prototypes 400 are the tokens' own: each is among the nearest of its token.
        assert 0.5 < logits.max(dim=1).values.mean() < 2
        assert logits.softmax(dim=1).argmax(dim=1).unique().numel() > 250
    assert not PrototypeProjector(config, 48).fit(tokens[:1])
    assert not PrototypeProjector(config, 48).fit(tokens[:1].expand(8, -1))


# --------------------------------------------------------------------------- crops
CONVNEXT = (
    "backbone.use=convnext",
    "backbone.depths=[1, 1, 1, 1]",
    "backbone.dims=[8, 8, 16, 16]",
    "augmentation.global_size=224",
    "augmentation.local_size=32",
)


def test_crops_that_the_teacher_cannot_see_are_refused(teacher: Path) -> None:
    found = problems(teacher, HEAD, "augmentation.global_size=35", "augmentation.local_size=14")
    assert "teacher's crops of 35 px are no multiple of its patch size 14" in found["augmentation"]


@pytest.mark.parametrize(("scale", "size"), [(2.0, 56), (0.5, 14)])
def test_the_teacher_sees_crops_of_its_own_size(
    teacher: Path, tmp_path: Path, scale: float, size: int
) -> None:
    with student(teacher, tmp_path, HEAD, f"augmentation.teacher_scale={scale}") as ours:
        backbone = ours.unit.objective.teaching.networks["backbone"]
        whole, seen = backbone.forward_features, []

        def record(images: Tensor) -> Any:
            seen.append(tuple(images.shape))
            return whole(images)

        backbone.forward_features = record
        (figures,) = steps(ours, 1)
    assert seen == [(24, 1, size, size)]
    assert figures["ibot"] > 0, "its patches are brought to the student's grid"


def test_a_convnext_learns_with_masks_that_it_does_not_see(teacher: Path, tmp_path: Path) -> None:
    options = (HEAD, *CONVNEXT, "augmentation.teacher_scale=0.5")
    with student(teacher, tmp_path, *options) as ours:
        figures = steps(ours, 2)
    assert all(line["ibot"] > 0 and line["gradient_norm/ibot_head"] > 0 for line in figures)
    assert "losses.ibot" in problems(teacher, *options, "mask_student=true")


# --------------------------------------------------------------------------- files, going on
@pytest.mark.slow
def test_a_killed_distillation_ends_with_the_same_bits(teacher: Path, tmp_path: Path) -> None:
    export = tmp_path / "teacher.safetensors"
    shutil.copy(teacher / "exports" / "teacher_backbone.safetensors", export)
    start = (f"teacher.weights={export}", "checkpoint.every=1")
    whole = run_here(tmp_path / "whole", *start, recipe=DISTILL)
    assert whole.returncode == 0, whole.stderr
    killer = ("observers.killer.use=signal_at", "observers.killer.iteration=3")
    assert run(tmp_path / "killed", *start, *killer, recipe=DISTILL).returncode != 0
    moved = export.rename(tmp_path / "moved.safetensors")
    again = run_here(tmp_path / "killed", f"teacher.weights={moved}", *start[1:], recipe=DISTILL)
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert export_bytes(tmp_path / "killed") != b""
    ours, theirs = (
        CheckpointStore(tmp_path / name / "checkpoints").read()[0] for name in ("killed", "whole")
    )
    assert "frozen.dino_head.last_layer.weight" in ours
    assert not any(name.startswith("frozen.backbone") for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    loaded = load_backbone(tmp_path / "killed")
    assert loaded.provenance["distilled_from"].endswith("moved.safetensors")


@pytest.mark.slow
def test_another_teacher_is_noticed(teacher: Path, tmp_path: Path) -> None:
    killer = ("observers.killer.use=signal_at", "observers.killer.iteration=3")
    start = (f"teacher.weights={teacher}", HEAD)
    assert run(tmp_path / "run", *start, *killer, recipe=DISTILL).returncode != 0
    other = tmp_path / "other"
    assert run_here(other, *TEACHER, "seed=5", "iterations=2").returncode == 0
    again = run_here(tmp_path / "run", f"teacher.weights={other}", HEAD, recipe=DISTILL)
    assert again.returncode == ExitCode.WRONG_INPUT
    assert "is not the teacher that this run has learned from" in again.stderr


def test_a_teacher_that_is_not_there(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    (said,) = distill(nowhere).check(1).missing
    assert said.startswith(f"teacher.weights: there is no {nowhere}")
    done = run_here(tmp_path / "run", f"teacher.weights={nowhere}", recipe=DISTILL)
    assert done.returncode == ExitCode.WRONG_INPUT
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_learn_as_one(teacher: Path, tmp_path: Path) -> None:
    """But for what is drawn by process (drop path, RoPE) and what looks at one (KoLeo)."""
    start = (
        *(f"teacher.weights={teacher}", HEAD, "backbone.drop_path_rate=0.0"),
        *("backbone.pos_embed_rope_rescale_coords=none", "drop=losses.koleo"),
    )
    for name, processes in (("one", 1), ("two", 2)):
        count = ("launcher.use=local", f"launcher.processes={processes}")
        done = run(tmp_path / name, *start, *count, recipe=DISTILL)
        assert done.returncode == 0, done.stderr
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for key in ("dino", "ibot", "loss", "gradient_norm/backbone"):
            assert two[key] == pytest.approx(one[key], rel=1e-4), key
    state = tmp_path / "two" / "checkpoints" / "step_00000006" / "state.json"
    assert json.loads(state.read_text())["teacher"]["sum"] > 0
