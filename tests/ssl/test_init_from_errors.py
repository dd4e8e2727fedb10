"""Weights that do not fit a run are refused by a check, with what to write where they may."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from dinov3_convnext.configs import ConvNextConfig
from dinov3_vit.configs import VitConfig, VitSmallConfig
from init_from_support import (
    RGB,
    heads,
    hugging_face,
    meta,
    own_export,
    reference_checkpoint,
    start,
    under,
    vit,
)
from trainer_support import pretrain, trainer

from dinov3_framework import BackboneConfig, CheckpointError, RecipeError, config, option
from dinov3_framework.weights.matching import match, patterns_for

Found = dict[str, str]


def problems(*overrides: str) -> dict[str, tuple[str, str]]:
    """(message, hint) by key of what a check of the tiny recipe finds."""
    with pytest.raises(RecipeError) as caught:
        pretrain(*overrides).check(1)
    return {problem.where: (problem.message, problem.hint) for problem in caught.value.problems}


def advised(hint: str) -> dict[str, list[str]]:
    """The keys that a hint proposes."""
    lines = re.findall(r"^ +(new|unused) = (\[.*\])$", hint, re.MULTILINE)
    return {key: json.loads(value) for key, value in lines}


# --------------------------------------------------------------------------- the source
def test_weights_that_are_not_there(tmp_path: Path) -> None:
    (said,) = pretrain(*start(tmp_path / "nowhere.pth")).check(1).missing
    assert said.startswith("init_from.weights: there is no ")
    assert "nowhere.pth" in said
    assert "dinov3_vits16" in said


def test_a_file_that_is_no_weights(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_text("<html>404</html>")
    message, _ = problems(*start(tmp_path / "weights.pth"))["init_from.weights"]
    assert "web page" in message


def test_a_network_that_is_not_in_it(tmp_path: Path) -> None:
    torch.save({"teacher": under("backbone.", vit().state_dict())}, tmp_path / "teacher.pth")
    message, _ = problems(*start(tmp_path / "teacher.pth", network="student"))["init_from.weights"]
    assert "holds no student" in message


def test_nan_in_the_weights_ends_the_start(tmp_path: Path) -> None:
    state = vit().state_dict()
    state["blocks.1.mlp.fc1.weight"][0, :3] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    with (
        pytest.raises(CheckpointError, match=r"1 with NaN or inf:\n *blocks\.1\.mlp"),
        trainer(tmp_path / "new", *start(tmp_path / "nan.pth")),
    ):
        pass


def test_a_file_that_contradicts_itself(tmp_path: Path) -> None:
    state = vit().state_dict() | {"blocks.1.norm1.weight": torch.ones(31)}
    torch.save(state, tmp_path / "odd.pth")
    message, _ = problems(*start(tmp_path / "odd.pth"))["init_from.weights"]
    assert "blocks.1.norm1.weight: [31], where the others of its backbone want [32]" in message


# --------------------------------------------------------------------------- names and shapes
def test_a_smaller_backbone(tmp_path: Path) -> None:
    path = own_export(tmp_path, vit(depth=1, n_storage_tokens=0))
    message, hint = problems(*start(path))["init_from"]
    assert "16 of this run that the weights do not have:\n    backbone.blocks.1." in message
    assert advised(hint) == {"new": ["backbone.blocks.1.*", "backbone.storage_tokens"]}
    pretrain(*start(path, **advised(hint))).check(1)


def test_a_larger_backbone(tmp_path: Path) -> None:
    path = own_export(tmp_path, vit(depth=3, untie_cls_and_patch_norms=True))
    message, hint = problems(*start(path))["init_from"]
    assert "of the weights that this run has no place for" in message
    assert advised(hint) == {"unused": ["backbone.blocks.2.*", "backbone.cls_norm.*"]}
    pretrain(*start(path, **advised(hint))).check(1)


def test_other_shapes(tmp_path: Path) -> None:
    path = own_export(tmp_path, vit(patch_size=14, depth=1))
    message, hint = problems(*start(path))["init_from"]
    weight = "backbone.patch_embed.proj.weight"
    assert f"{weight}: [32, 3, 14, 14] in the weights, [32, 3, 7, 7] here" in message
    assert message.count(weight) == 1
    assert advised(hint) == {"new": ["backbone.blocks.1.*", weight], "unused": [weight]}
    pretrain(*start(path, **advised(hint))).check(1)


def test_a_proposal_keeps_what_is_allowed_already(tmp_path: Path) -> None:
    path = own_export(tmp_path, vit(depth=1, n_storage_tokens=0))
    _, hint = problems(*start(path, new=["backbone.storage*"]))["init_from"]
    assert advised(hint) == {"new": ["backbone.storage*", "backbone.blocks.1.*"]}


def test_what_a_format_drops_is_missing(tmp_path: Path) -> None:
    path = hugging_face(tmp_path, vit(untie_global_and_local_cls_norm=True))
    untied = "backbone.untie_global_and_local_cls_norm=true"
    _, hint = problems(*start(path), untied)["init_from"]
    assert advised(hint) == {"new": ["backbone.local_cls_norm.*"]}


@pytest.mark.parametrize("key", ["new", "unused"])
def test_patterns_that_match_nothing(key: str, tmp_path: Path) -> None:
    path = own_export(tmp_path, vit())
    message, hint = problems(*start(path, **{key: ["backbone.bloks.*"]}))[f"init_from.{key}"]
    assert message.startswith("'backbone.bloks.*' matches no tensor of ")
    assert "backbone.blocks" in hint


def test_patterns_of_tensors_that_both_have_are_no_mistake(tmp_path: Path) -> None:
    path = own_export(tmp_path, vit())
    report = pretrain(*start(path, new=["backbone.cls_token"])).check(1)
    count = len(vit().state_dict())
    student = dict(report.sections["init_from"])["student"]
    assert student.startswith(f"backbone: {count} loaded, 0 new, 0 unused")


# --------------------------------------------------------------------------- projectors
def test_projectors_of_a_file_without_any(tmp_path: Path) -> None:
    found = problems(*start(meta(tmp_path, vit()), projectors=True))
    assert "holds a backbone alone" in found["init_from.projectors"][0]


def test_projectors_that_do_not_fit(tmp_path: Path) -> None:
    path = reference_checkpoint(tmp_path, vit())
    overrides = [*start(path, projectors=True), "losses.dino.head.n_prototypes=40"]
    message, hint = problems(*overrides)["init_from"]
    weight = "dino_head.last_layer.weight"
    assert f"{weight}: [32, 8] in the weights, [40, 8] here" in message
    assert advised(hint) == {"new": [weight, "ibot_head.*"], "unused": [weight]}


def test_projectors_that_this_run_does_not_have(tmp_path: Path) -> None:
    path = reference_checkpoint(tmp_path, vit())
    drop = 'drop=["losses.dino"]'
    _, hint = problems(*start(path, projectors=True), drop)["init_from"]
    assert advised(hint) == {"new": ["ibot_head.*"], "unused": ["dino_head.*"]}


# --------------------------------------------------------------------------- settings
@pytest.mark.parametrize(
    ("options", "name", "words"),
    [
        ({"norm_layer": "layernorm"}, "norm_layer", 'is "layernormbf16", and that of the weights'),
        ({"pos_embed_rope_base": 50.0}, "pos_embed_rope_base", "is 100.0, and that of the weights"),
        ({"num_heads": 4}, "num_heads", "is 2, and that of the weights is 4"),
        (
            {"pos_embed_rope_normalize_coords": "max"},
            "pos_embed_rope_normalize_coords",
            'is "separate", and that of the weights is "max"',
        ),
    ],
)
def test_settings_that_shapes_do_not_show(
    options: dict[str, Any], name: str, words: str, tmp_path: Path
) -> None:
    path = own_export(tmp_path, vit(**options))
    message, hint = problems(*start(path))[f"backbone.{name}"]
    assert words in message
    assert f'init_from.differing = ["{name}"]' in hint
    if name != "num_heads":  # which the shape of RoPE's periods shows too
        pretrain(*start(path, differing=[name])).check(1)


def test_a_default_written_out_is_no_difference(tmp_path: Path) -> None:
    path = own_export(tmp_path, vit())
    pretrain(*start(path), "backbone.pos_embed_rope_base=100.0").check(1)


def test_what_a_foreign_file_does_not_say_is_called_assumed(tmp_path: Path) -> None:
    path = meta(tmp_path, vit())
    found = problems(*start(path), "backbone.norm_layer=layernorm")
    assert 'is, or is taken to be, "layernormbf16"' in found["backbone.norm_layer"][0]


def test_a_setting_that_is_misspelt(tmp_path: Path) -> None:
    found = problems(*start(own_export(tmp_path, vit()), differing=["norm_layr"]))
    message, hint = found["init_from.differing"]
    assert "no setting 'norm_layr'" in message
    assert "norm_layer" in hint


# --------------------------------------------------------------------------- images
def test_other_images(tmp_path: Path) -> None:
    path = own_export(tmp_path, vit())
    overrides = [*start(path), "images.mean=[0.43, 0.411, 0.296]"]
    message, hint = problems(*overrides)["images"]
    assert "mean = [0.43, 0.411, 0.296]" in message
    wanted = "channels = 3, mean = [0.485, 0.456, 0.406], std = [0.229, 0.224, 0.225]"
    assert f"take images = {{ {wanted} }}" in hint
    pretrain(*overrides, 'init_from.differing=["images"]').check(1)


def test_colour_for_gray(tmp_path: Path) -> None:
    found = problems(f"init_from.weights={own_export(tmp_path, vit())}")
    assert found.keys() == {"images", "init_from"}
    assert "patch_embed.proj.weight: [32, 3, 7, 7] in the weights" in found["init_from"][0]


def test_gray_weights_that_do_not_say_their_scale(tmp_path: Path) -> None:
    torch.save(vit(in_chans=1).state_dict(), tmp_path / "gray.pth")
    message, hint = problems(f"init_from.weights={tmp_path / 'gray.pth'}")["init_from.weights"]
    assert "nothing says how their values are scaled" in message
    assert 'init_from.differing = ["images"]' in hint


# --------------------------------------------------------------------------- everything at once
def test_all_mistakes_come_together(tmp_path: Path) -> None:
    path = own_export(tmp_path, vit(depth=1, norm_layer="layernorm"))
    overrides = [*start(path, unused=["x"]), "images.mean=[0, 0, 0]", "augmentation.local_crops=0"]
    expected = {"losses.dino", "backbone.norm_layer", "images", "init_from", "init_from.unused"}
    assert problems(*overrides).keys() == expected


def test_a_run_refuses_what_a_check_does(tmp_path: Path) -> None:
    path = own_export(tmp_path, vit(depth=1))
    with (
        pytest.raises(RecipeError, match=r"backbone\.blocks\.1\.\*"),
        trainer(tmp_path / "new", *start(path)),
    ):
        pass
    assert list((tmp_path / "new").iterdir()) == []


# --------------------------------------------------------------------------- parts of it
def test_patterns_are_as_few_as_will_do() -> None:
    names = ["a.x.1", "a.x.2", "a.y", "b.x.1", "c"]
    assert patterns_for(["a.x.1", "a.x.2"], names) == ["a.x.*"]
    assert patterns_for(["a.x.1", "a.x.2", "a.y"], names) == ["a.*"]
    assert patterns_for(["a.x.1", "b.x.1", "c"], names) == ["a.x.1", "b.x.1", "c"]


def test_the_order_is_the_owners() -> None:
    shapes = {f"backbone.{name}": (1,) for name in "cab"}
    found, complaints = match(shapes, dict(sorted(shapes.items())), new=(), unused=())
    assert found.loaded == list(shapes)
    assert complaints == []


@config
class StrangeConfig(BackboneConfig):
    """A backbone of somebody else."""

    width: int = option("its width", default=1)
    dropout: float = option("acts in training alone", default=0.0)


def test_evaluation_settings() -> None:
    assert StrangeConfig(in_chans=4).evaluation_settings() == {"width": 1, "dropout": 0.0}
    trained = VitSmallConfig(drop_path_rate=0.3, pos_embed_rope_jitter_coords=2.0)
    plain = VitConfig(embed_dim=384, depth=12, num_heads=6, pos_embed_rope_base=100.0)
    assert trained.evaluation_settings() == plain.evaluation_settings()
    periods = {"pos_embed_rope_min_period": 1.0, "pos_embed_rope_max_period": 9.0}
    changed = evolve(plain, pos_embed_rope_base=None, **periods).evaluation_settings()
    assert changed != plain.evaluation_settings()
    assert ConvNextConfig(drop_path_rate=0.1).evaluation_settings() == {"patch_size": None}


def test_the_support_is_as_the_recipe(tmp_path: Path) -> None:
    student = pretrain(*RGB).method.prepare().blueprint.student()
    assert {n: t.shape for n, t in student["backbone"].state_dict().items()} == {
        n: t.shape for n, t in vit().state_dict().items()
    }
    assert {f"dino_head.{n}": t.shape for n, t in student["dino_head"].state_dict().items()} == {
        n: t.shape for n, t in heads().items()
    }
