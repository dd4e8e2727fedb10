"""Runs that start from weights: what their networks hold before the first iteration."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from init_from_support import (
    HEADS,
    KINDS,
    assert_same,
    features,
    heads,
    own_checkpoint,
    own_export,
    reference_checkpoint,
    start,
    vit,
    whole,
)
from process_groups import run_processes
from torch.distributed.tensor import DTensor
from trainer_support import pretrain, steps, trainer, trainer_of

from dinov3_framework import CheckpointError, load_backbone
from dinov3_framework.errors import PeerError
from dinov3_framework.parallel import ParallelConfig
from dinov3_framework.parallel.sharder import Sharder
from dinov3_framework.runtime import collectives
from dinov3_framework.runtime.processes import process_group
from dinov3_framework.weights.loading import load_sharded

GRAM = ("losses.gram.use=gram", "augmentation.anchor_size=28")


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_begins_with_the_features_of_its_source(kind: str, tmp_path: Path) -> None:
    path = KINDS[kind](tmp_path, vit())
    expected = features(load_backbone(path).backbone)
    torch.testing.assert_close(expected, features(vit()), rtol=0, atol=1e-6)
    with trainer(tmp_path / "new", *start(path), *GRAM) as ours:
        networks = ours.unit.placed
        assert torch.equal(features(networks.teacher["backbone"]), expected)
        assert torch.equal(features(networks.student["backbone"]), expected)
        assert torch.equal(features(networks.anchors["gram"]), expected)
        initial = ours.run.initial_model().backbone
        assert torch.equal(features(initial), expected)
        assert not initial.training
        assert not any(parameter.requires_grad for parameter in initial.parameters())
        assert networks.student.training
        assert not networks.teacher.training
        steps(ours, 2)
        assert not torch.equal(features(networks.teacher["backbone"]), expected)
        assert torch.equal(features(ours.run.initial_model().backbone), expected)


def test_a_run_without_it_still_begins_at_random(tmp_path: Path) -> None:
    with trainer(tmp_path) as ours:
        drawn = ours.unit.placed.initial_backbone().state_dict()
        assert_same(ours.run.initial_model().backbone.state_dict(), drawn)
        assert_same(dict(ours.unit.placed.teacher["backbone"].state_dict()), drawn)
        assert not (tmp_path / "exports").exists()


@pytest.mark.parametrize("into", ["student", "teacher"])
def test_into_one_network_alone(into: str, tmp_path: Path) -> None:
    path = own_export(tmp_path, vit())
    with trainer(tmp_path / "new", *start(path, into=into)) as ours:
        networks = {"student": ours.unit.placed.student, "teacher": ours.unit.placed.teacher}
        drawn = ours.unit.placed.initial_backbone().state_dict()
        other = networks.pop("teacher" if into == "student" else "student")
        assert_same(whole(networks[into]["backbone"]), vit().state_dict())
        assert_same(whole(other["backbone"]), drawn)
        assert_same(whole(other["dino_head"]), whole(networks[into]["dino_head"]))
        initial = ours.run.initial_model().backbone.state_dict()
        assert_same(initial, drawn if into == "student" else vit().state_dict())


def test_the_student_of_a_training_checkpoint(tmp_path: Path) -> None:
    path = reference_checkpoint(tmp_path, vit())
    with trainer(tmp_path / "new", *start(path, network="student")) as ours:
        assert_same(whole(ours.unit.placed.teacher["backbone"]), vit(seed=7).state_dict())


# --------------------------------------------------------------------------- projectors
@pytest.mark.parametrize("kind", [own_checkpoint, reference_checkpoint])
def test_projectors_too(kind: Any, tmp_path: Path) -> None:
    path = kind(tmp_path, vit())
    keys = {"projectors": True, "new": ["ibot_head.*"]}
    with trainer(tmp_path / "plain") as ours:
        drawn = whole(ours.unit.placed.student["ibot_head"])
    with trainer(tmp_path / "new", *start(path, **keys)) as ours:
        for network in (ours.unit.placed.student, ours.unit.placed.teacher):
            assert_same(whole(network["backbone"]), vit().state_dict())
            assert_same(
                {f"dino_head.{n}": t for n, t in whole(network["dino_head"]).items()}, heads()
            )
            assert_same(whole(network["ibot_head"]), drawn)


def test_projectors_are_left_alone_by_default(tmp_path: Path) -> None:
    path = reference_checkpoint(tmp_path, vit())
    with trainer(tmp_path / "new", *start(path)) as ours:
        found = whole(ours.unit.placed.teacher["dino_head"])
    assert {f"dino_head.{name}" for name in found} == set(HEADS)
    assert not torch.equal(found["last_layer.weight"], heads()["dino_head.last_layer.weight"])


# --------------------------------------------------------------------------- what differs by name
def test_new_tensors_are_drawn_and_the_rest_is_loaded(tmp_path: Path) -> None:
    path = own_export(tmp_path, vit(n_storage_tokens=0))
    new = ["backbone.storage_tokens"]
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        overrides = [*start(path, new=new), f"seed={seed}"]
        with trainer(tmp_path / name, *overrides) as ours:
            found.append(whole(ours.unit.placed.teacher["backbone"]))
            assert_same(whole(ours.unit.placed.student["backbone"]), found[-1])
            assert_same(ours.run.initial_model().backbone.state_dict(), found[-1])
    tokens = [state.pop("storage_tokens") for state in found]
    assert tokens[0].std() == pytest.approx(0.02, rel=0.5)
    assert torch.equal(tokens[0], tokens[1])
    assert not torch.equal(tokens[0], tokens[2])
    for state in found:
        assert_same(state, vit(n_storage_tokens=0).state_dict())


def test_unused_tensors_are_left_out(tmp_path: Path) -> None:
    state = vit().state_dict() | {"head.weight": torch.zeros(10, 32), "head.bias": torch.zeros(10)}
    torch.save(state, tmp_path / "classifier.pth")
    overrides = start(tmp_path / "classifier.pth", unused=["backbone.head.*"])
    with trainer(tmp_path / "new", *overrides) as ours:
        assert_same(whole(ours.unit.placed.teacher["backbone"]), vit().state_dict())


def test_a_tensor_that_is_new_and_unused_begins_anew(tmp_path: Path) -> None:
    path, both = own_export(tmp_path, vit(patch_size=14)), ["backbone.patch_embed.proj.weight"]
    with trainer(tmp_path / "new", *start(path, new=both, unused=both)) as ours:
        found, expected = (
            whole(ours.unit.placed.teacher["backbone"]),
            vit(patch_size=14).state_dict(),
        )
    assert found.pop("patch_embed.proj.weight").shape == (32, 3, 7, 7)
    del expected["patch_embed.proj.weight"]
    assert_same(found, expected)


def test_training_only_settings_may_differ(tmp_path: Path) -> None:
    path = own_export(tmp_path, vit(drop_path_rate=0.1, pos_embed_rope_shift_coords=0.5))
    with trainer(tmp_path / "new", *start(path)) as ours:
        assert_same(whole(ours.unit.placed.teacher["backbone"]), vit().state_dict())


def test_gray_images_whose_scale_the_weights_do_not_say(tmp_path: Path) -> None:
    torch.save(vit(in_chans=1).state_dict(), tmp_path / "gray.pth")
    weights = f"init_from.weights={tmp_path / 'gray.pth'}"
    with trainer(tmp_path / "new", weights, 'init_from.differing=["images"]') as ours:
        assert_same(whole(ours.unit.placed.teacher["backbone"]), vit(in_chans=1).state_dict())


# --------------------------------------------------------------------------- precision, processes
def test_sharded_in_bfloat16(tmp_path: Path) -> None:
    path = own_export(tmp_path, vit())
    with trainer(tmp_path / "new", *start(path), "parallel.param_dtype=bf16") as ours:
        networks = ours.unit.placed
        parameters = list(networks.teacher.parameters())
        assert all(isinstance(parameter, DTensor) for parameter in parameters)
        assert_same(whole(networks.teacher["backbone"]), vit().state_dict())
        assert_same(whole(networks.student["backbone"]), vit().state_dict())
        assert_same(ours.run.initial_model().backbone.state_dict(), vit().state_dict())


def test_weights_in_bfloat16_become_float32(tmp_path: Path) -> None:
    torch.save(vit().bfloat16().state_dict(), tmp_path / "bf16.pth")
    with trainer(tmp_path / "new", *start(tmp_path / "bf16.pth")) as ours:
        found = whole(ours.unit.placed.teacher["backbone"])
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert_same(found, {n: t.float() for n, t in vit().bfloat16().state_dict().items()})


def begin(output: Path, overrides: list[str], path: Path) -> tuple[Any, ...]:
    """A process's first student and teacher, gathered, and whether they were sharded; then the
    source's backbone, loaded into its place alone, and what comes of a file that is not there for
    one process."""
    ours = trainer_of(pretrain(*overrides), output)
    sharded = isinstance(next(ours.unit.placed.student.parameters()), DTensor)
    alone = load_sharded(path, sharder=Sharder(ours.config.parallel, torch.device("cpu")))
    there = path if collectives.is_main() else path.with_name("nowhere")
    with pytest.raises((CheckpointError, PeerError), match="there is no file"):
        load_sharded(there, sharder=Sharder(ours.config.parallel, torch.device("cpu")))
    return (
        whole(ours.unit.placed.student),
        whole(ours.unit.placed.teacher),
        sharded,
        whole(alone.backbone),
    )


def test_two_processes_begin_as_one(tmp_path: Path) -> None:
    path = reference_checkpoint(tmp_path, vit(n_storage_tokens=0))
    keys = {"projectors": True, "new": ["ibot_head.*", "backbone.storage_tokens"]}
    overrides = start(path, **keys)
    with trainer(tmp_path / "one", *overrides) as ours:
        expected = whole(ours.unit.placed.teacher)
        backbone = features(ours.unit.placed.teacher["backbone"])
    (tmp_path / "two").mkdir()
    results = run_processes(2, tmp_path / "processes", begin, tmp_path / "two", overrides, path)
    for student, teacher, sharded, alone in results:
        assert sharded
        assert_same(student, expected)
        assert_same(teacher, expected)
        assert_same(alone, vit(n_storage_tokens=0).state_dict())
    written = load_backbone(tmp_path / "two" / "exports" / "initial_backbone.safetensors")
    assert torch.equal(features(written.backbone), backbone)


@pytest.mark.parametrize("param_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_backbone_loaded_into_its_place(kind: str, param_dtype: Any, tmp_path: Path) -> None:
    path, device = KINDS[kind](tmp_path, vit()), torch.device("cpu")
    with process_group(device, timeout=60):
        sharder = Sharder(ParallelConfig(param_dtype=param_dtype), device)
        loaded = load_sharded(path, sharder=sharder)
        placed = [isinstance(parameter, DTensor) for parameter in loaded.backbone.parameters()]
        assert set(placed) == {param_dtype == "bf16"}
        assert_same(whole(loaded.backbone), vit().state_dict())
        found = features(loaded.backbone).float()
    assert not loaded.backbone.training
    assert loaded.images == load_backbone(path).images
    tolerance = 0.0 if param_dtype == "fp32" else 0.1
    torch.testing.assert_close(found, features(vit()), rtol=0, atol=tolerance)


# --------------------------------------------------------------------------- what a person sees
def test_counts_are_logged_and_reported(tmp_path: Path, caplog: Any) -> None:
    path = reference_checkpoint(tmp_path, vit(n_storage_tokens=0))
    keys = {"projectors": True, "into": "teacher"}
    overrides = start(path, new=["ibot_head.*", "backbone.storage_tokens"], **keys)
    report = dict(pretrain(*overrides).check(1).sections["init_from"])
    count = len(vit(n_storage_tokens=0).state_dict())
    assert report["weights"] == str(path)
    assert report["what they are"] == "Vit, meta format"
    assert report["student"] == "at random"
    assert report["teacher"] == (
        f"backbone: {count} loaded, 1 new, 0 unused; dino_head: 7 loaded, 0 new, 0 unused; "
        "ibot_head: at random"
    )
    assert report["new"] == "backbone.storage_tokens, ibot_head.*"
    with caplog.at_level(logging.INFO, "dinov3_framework"), trainer(tmp_path / "n", *overrides):
        pass
    for label, value in report.items():
        assert f"init_from: {label}: {value}" in caplog.messages
    assert "init_from" not in pretrain().check(1).sections


def test_a_check_reads_no_values_and_writes_nothing(tmp_path: Path) -> None:
    state = vit().state_dict()
    state["norm.weight"] = torch.full_like(state["norm.weight"], float("nan"))
    torch.save(state, tmp_path / "nan.pth")
    before = sorted(tmp_path.rglob("*"))
    pretrain(*start(tmp_path / "nan.pth")).check(1)
    assert sorted(tmp_path.rglob("*")) == before
