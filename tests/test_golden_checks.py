"""The checks of golden cases: a value that they do not use, or cannot, is a failure."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_checks import NOT_IMPLEMENTED, check_case
from golden_support import Case, Noted, assert_close, read_case
from golden_train_step import CannotExpress, batch_of, build_trainer, networks_of, one_step
from torch import Tensor

from dinov3_framework.errors import UserError
from dinov3_framework.runtime.processes import process_group

STORED = Path(__file__).parent / "golden"
Variant = Callable[..., Case]


@pytest.fixture
def variant(tmp_path: Path) -> Variant:
    """``variant("losses", {"teacher_temp.dino": 1})``: a stored case with values set by place."""

    def make(name: str, values: dict[str, Any]) -> Case:
        folder = tmp_path / name
        shutil.copytree(STORED / name, folder)
        spec = json.loads((folder / "case.json").read_text())
        for place, value in values.items():
            inside: Any = spec
            *way, last = place.split(".")
            for part in way:
                inside = inside[int(part) if isinstance(inside, list) else part]
            inside[last] = value
        (folder / "case.json").write_text(json.dumps(spec))
        return read_case(folder)

    return make


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("vit_mlp_registers", "extra"),
        ("vit_mlp_registers", "config.extra"),
        ("convnext_small_dims", "config.extra"),
        ("losses", "teacher_temp.extra"),
        ("schedules", "recipes.vitl_im1k_lin834.extra"),
        ("param_groups", "extra"),
        ("step_pretrain", "extra"),
        ("step_pretrain", "vit.extra"),
        ("step_pretrain", "heads.dino.extra"),
        ("step_pretrain", "loss_weights.extra"),
        ("step_pretrain", "steps.1.extra"),
        ("step_pretrain", "steps.1.terms.extra"),
        ("step_gram", "gram.extra"),
    ],
)
def test_a_value_that_nothing_uses_fails(name: str, place: str, variant: Variant) -> None:
    case = variant(name, {place: 7})
    with pytest.raises((AssertionError, CannotExpress, UserError, TypeError), match="extra"):
        check_case(case)


def test_an_array_that_nothing_uses_fails(variant: Variant) -> None:
    case = variant("vit_mlp_registers", {})
    case = Case(case.name, case.spec, Noted({**case.tensors, "layer1_cls": torch.zeros(1)}))
    with pytest.raises(AssertionError, match="layer1_cls"):
        check_case(case)


def test_unread_values_are_named_where_they_stand() -> None:
    values = Noted({"a": {"b": 1, "c": [{"d": 2, "e": 3}, 4]}, "f": {"g": 5}, "h": [6]})
    assert values["a"]["c"][0]["d"] == 2
    assert "f" in values
    assert values.unread() == ["a.b", "a.c.0.e", "f", "h"]


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("step_gram", "gram.global_teacher_resize_method", "bilinear"),
        ("step_gram", "gram.loss_weight_schedule", {"start": 0, "peak": 1, "end": 1}),
        ("step_gram", "steps.0.terms.dino_local_loss_weight", 0.5),
        ("param_groups", "dino_head_wd_multiplier", 0.5),
    ],
)
def test_a_value_that_no_option_stands_for_fails(
    name: str, place: str, value: Any, variant: Variant
) -> None:
    case = variant(name, {place: value})
    with pytest.raises(CannotExpress, match=place.rpartition(".")[2]):
        check_case(case)


def test_an_unknown_kind_fails(variant: Variant) -> None:
    with pytest.raises(AssertionError, match="surprise"):
        check_case(variant("losses", {"kind": "surprise"}))


@pytest.mark.parametrize("kind", sorted(NOT_IMPLEMENTED))
def test_a_kind_that_is_not_implemented_is_skipped(kind: str, variant: Variant) -> None:
    with pytest.raises(pytest.skip.Exception, match=f"kind not implemented: {kind}"):
        check_case(variant("losses", {"kind": kind}))


# --------------------------------------------------------------------------- Gram anchoring
def textbook_gram(student: Tensor, anchor: Tensor, masks: Tensor, gram: Noted) -> Tensor:
    """The mean squared difference of patch similarities [N, P, D], step by step, in float64."""
    student, anchor = student.double(), anchor.double()
    if gram["tokens_used"] != "all":
        rows = masks if gram["tokens_used"] == "masked" else ~masks
        student, anchor = student[rows], anchor[rows]
    if not gram["img_level"]:
        student, anchor = (
            student.reshape(-1, student.shape[-1]),
            anchor.reshape(-1, anchor.shape[-1]),
        )
    if gram["normalized"]:
        student, anchor = F.normalize(student, dim=-1), F.normalize(anchor, dim=-1)
    ours, theirs = student @ student.mT, anchor @ anchor.mT
    if gram["remove_neg"]:
        ours = ours.clamp(min=0)
    if gram["remove_neg"] or gram["remove_only_teacher_neg"]:
        theirs = theirs.clamp(min=0)
    return (ours - theirs).square().mean()


@pytest.mark.parametrize(
    "values",
    [
        {"img_level": False, "remove_only_teacher_neg": True, "tokens_used": "masked"},
        {"img_level": False, "remove_neg": True, "tokens_used": "unmasked", "compute_stats": True},
        {"img_level": False, "global_teacher_resize_antialias": True},
        {"normalized": False, "loss_weight": 0.5},
        {"ema_teacher": True, "ckpt": None, "rep_update": False},
        {"ckpt": None, "it_load_ema_teacher": 0, "update_frequency": 1, "max_updates": 1},
    ],
    ids=lambda values: "-".join(values),
)
def test_gram_options_of_a_case(values: dict[str, Any], variant: Variant) -> None:
    """Each option of Gram anchoring reaches the loss: its term is that of a plain calculation."""
    changes = {f"gram.{name}": value for name, value in values.items()}
    if values.get("ema_teacher"):
        changes["gram_teacher_crop_size"] = None
    case = variant("step_gram", changes)
    spec, gram = case.spec, case.spec["gram"]
    with process_group(torch.device("cpu"), timeout=60):
        trainer = build_trainer(spec)
        batch = batch_of(spec, case.tensors["masks0"], 0)
        masks = case.tensors["masks0"]
        networks = networks_of(trainer)
        from_teacher = gram["ema_teacher"] or gram["ckpt"] is None
        anchor = networks.teacher["backbone"] if from_teacher else networks.anchors["gram"]
        crops = batch.crops["global"].flatten(0, 1)
        seen = crops if gram["ema_teacher"] else batch.crops["anchor"].flatten(0, 1)
        with torch.no_grad():
            student = networks.student["backbone"].forward_features(crops, masks)
            patches = anchor.forward_features(seen)["x_norm_patchtokens"]
        if not gram["ema_teacher"]:
            maps = patches.mT.unflatten(-1, (8, 8))
            patches = F.interpolate(
                maps, (4, 4), mode="bicubic", antialias=gram["global_teacher_resize_antialias"]
            )
            patches = patches.flatten(-2).mT
        metrics = one_step(trainer, batch)
    arguments = (student["x_norm_patchtokens"], patches, masks)
    assert_close(metrics["gram"], textbook_gram(*arguments, gram), "gram")
    assert_close(metrics["gram/weight"], gram["loss_weight"], "gram/weight")
    assert ("gram/masked" in metrics) == gram["compute_stats"]
    for name in ("masked", "unmasked") if gram["compute_stats"] else ():
        alone = Noted({**gram, "tokens_used": name})
        assert_close(metrics[f"gram/{name}"], textbook_gram(*arguments, alone), name)
