"""What a golden case of each kind is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from dinov3_convnext.configs import ConvNextConfig
from dinov3_convnext.network import ConvNeXt
from dinov3_losses.configs import DinoConfig, GramConfig, IbotConfig, KoLeoConfig, ProjectorConfig
from dinov3_losses.dino import DinoLoss
from dinov3_losses.gram import GramLoss
from dinov3_losses.ibot import IbotLoss
from dinov3_losses.koleo import KoLeoLoss
from dinov3_losses.projector import PrototypeProjector
from dinov3_losses.sinkhorn import sinkhorn_knopp
from dinov3_optimizers import AdamWConfig
from dinov3_vit.configs import VitConfig
from dinov3_vit.transformer import VisionTransformer
from golden_depth import check_depth_bins, check_depth_head, check_depth_numbers
from golden_segment import check_mask2former, check_segmentation_linear
from golden_support import (
    PUBLISHED,
    Case,
    Noted,
    assert_close,
    assert_figure,
    fill,
    require,
    seeded,
    textbook_cross_entropy,
    textbook_sinkhorn,
)
from golden_train_step import check_train_step
from torch import Tensor

from dinov3_framework import Constant, StepOutputs, ViewFeatures

# Kinds of cases whose networks this project does not have.
NOT_IMPLEMENTED = {
    "detection",
    "dinotxt",
}


def build_vit(options: Mapping[str, Any]) -> VisionTransformer:
    # img_size is the reference's nominal size; nothing here depends on it.
    return VisionTransformer(VitConfig(**{k: v for k, v in options.items() if k != "img_size"}))


# --------------------------------------------------------------------------- networks
@torch.no_grad()
def check_vit(case: Case) -> None:
    spec, expected = case.spec, case.tensors
    model = build_vit(spec["config"]).eval()
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert shapes == spec["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == spec["n_params"]

    fill(model, spec["seed"])
    images = seeded("images", spec["seed"], tuple(spec["image_shape"]))
    plain = model.forward_features(images)
    assert_close(model(images), expected["cls"], "forward")
    assert_close(plain["x_norm_clstoken"], expected["cls"], "class token")
    assert_close(plain["x_storage_tokens"], expected["storage"], "storage tokens")
    assert_close(plain["x_norm_patchtokens"], expected["patch"], "patch tokens")

    masked = model.forward_features(images, expected["mask"])
    assert_close(masked["x_norm_clstoken"], expected["masked_cls"], "class token, masked")
    assert_close(masked["x_norm_patchtokens"], expected["masked_patch"], "patch tokens, masked")

    layers = model.get_intermediate_layers(
        images, n=spec["layers"], reshape=True, return_class_token=True
    )
    for index, (patches, cls) in zip(spec["layers"], layers, strict=True):
        assert_close(patches, expected[f"layer{index}_patch"], f"patches of block {index}")
        assert_close(cls, expected[f"layer{index}_cls"], f"class token of block {index}")


@torch.no_grad()
def check_convnext(case: Case) -> None:
    spec, expected = case.spec, case.tensors
    options = {name: tuple(v) if isinstance(v, list) else v for name, v in spec["config"].items()}
    model = ConvNeXt(ConvNextConfig(**options)).eval()
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert shapes == spec["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == spec["n_params"]

    fill(model, spec["seed"])
    images = seeded("images", spec["seed"], tuple(spec["image_shape"]))
    features = model.forward_features(images)
    assert_close(model(images), expected["cls"], "forward")
    assert_close(features["x_norm_clstoken"], expected["cls"], "class token")
    assert_close(features["x_norm_patchtokens"], expected["patch"], "patch tokens")

    count = sum(name.endswith("_cls") for name in expected)  # of the last stages
    layers = model.get_intermediate_layers(images, n=count, reshape=True, return_class_token=True)
    assert len(layers) == count > 0
    for index, (patches, cls) in enumerate(layers):
        assert_close(patches, expected[f"inter{index}_patch"], f"patches of layer {index}")
        assert_close(cls, expected[f"inter{index}_cls"], f"class token of layer {index}")


# --------------------------------------------------------------------------- losses
def view(*, cls: Tensor | None = None, patches: Tensor | None = None) -> ViewFeatures:
    """Features of a view; what a case does not give is empty."""
    given = patches if patches is not None else cls
    crops, samples, dim = given.shape[0], given.shape[1], given.shape[-1]
    patches = torch.empty(crops, samples, 0, dim) if patches is None else patches
    return ViewFeatures(
        cls=torch.empty(crops, samples, dim) if cls is None else cls,
        storage=torch.empty(crops, samples, 0, dim),
        patches=patches,
        grid=(1, patches.shape[2]),
    )


def step(
    student: dict[str, ViewFeatures],
    teacher: ViewFeatures | None = None,
    *,
    anchor: ViewFeatures | None = None,
    masks: Tensor | None = None,
) -> StepOutputs:
    """A step whose features are logits already: both projectors give back what they get."""
    return StepOutputs(
        iteration=0,
        total_iterations=1,
        student=student,
        teacher={} if teacher is None else {"global": teacher},
        anchor=anchor,
        masks=masks,
        project=lambda tokens: tokens,
        project_teacher=lambda tokens: tokens,
    )


def check_losses(case: Case) -> None:
    spec, t = case.spec, case.tensors
    inputs = {f"{token}_{who}": 3 for token in ("cls", "patch") for who in "st"}
    for name, scale in (inputs | {"cls_l": 3, "gram_s": 1, "gram_t": 1, "koleo_in": 1}).items():
        key = name.removesuffix("_in")
        assert_close(t[name], scale * seeded(key, spec["seed"], t[name].shape), f"input {name}")
    check_dino(spec, t)
    check_ibot(spec, t)
    check_koleo(t)
    check_gram(t)


def check_dino(spec: Noted, t: Noted) -> None:
    temperature, iterations = spec["teacher_temp"]["dino"], spec["sinkhorn_iterations"]
    crops, samples, width = t["cls_s"].shape
    targets = textbook_sinkhorn(t["cls_t"], temperature, iterations).view(crops, samples, width)
    probabilities = sinkhorn_knopp(t["cls_t"], temperature, iterations).view_as(targets)
    assert_figure(probabilities, t["cls_probs"], targets, "class targets")

    loss = DinoLoss(
        DinoConfig(
            teacher_temp=Constant(value=temperature),
            student_temp=spec["student_temp"],
            sinkhorn_iterations=iterations,
        )
    )
    student = {"global": view(cls=t["cls_s"]), "local": view(cls=t["cls_l"])}
    result = loss(step(student, view(cls=t["cls_t"].view(crops, samples, width))))
    pairs = {
        "global": [
            (s, p) for i, s in enumerate(t["cls_s"]) for j, p in enumerate(targets) if i != j
        ],
        "local": [(s, p) for s in t["cls_l"] for p in targets],
    }
    terms = {
        kind: torch.stack([textbook_cross_entropy(*pair, spec["student_temp"]) for pair in some])
        for kind, some in pairs.items()
    }
    for kind, term in terms.items():
        golden = t[f"dino_{kind}"]
        assert_figure(result.metrics[kind], golden, term.mean(), f"dino, {kind} crops")
    assert_close(result.loss, torch.cat(list(terms.values())).mean(), "dino")


def check_ibot(spec: Noted, t: Noted) -> None:
    temperature, iterations = spec["teacher_temp"]["ibot"], spec["sinkhorn_iterations"]
    targets = textbook_sinkhorn(t["patch_t"], temperature, iterations)
    probabilities = sinkhorn_knopp(t["patch_t"], temperature, iterations)
    assert_figure(probabilities, t["patch_probs"], targets, "patch targets")

    loss = IbotLoss(
        IbotConfig(
            teacher_temp=Constant(value=temperature),
            student_temp=spec["student_temp"],
            sinkhorn_iterations=iterations,
        )
    )
    masks = t["masks"].view(2, -1, t["masks"].shape[-1])
    views = []
    for logits in (t["patch_s"], t["patch_t"]):
        patches = torch.full((*masks.shape, logits.shape[-1]), float("nan"))
        patches[masks] = logits
        views.append(view(patches=patches))
    result = loss(step({"global": views[0]}, views[1], masks=masks))
    losses = torch.zeros(t["masks"].shape, dtype=torch.float64)
    losses[t["masks"]] = textbook_cross_entropy(t["patch_s"], targets, spec["student_temp"])
    mean = (losses.sum(dim=1) / t["masks"].sum(dim=1).clamp(min=1)).mean()
    assert_figure(result.loss, t["ibot"], mean, "ibot")


def check_koleo(t: Noted) -> None:
    tokens = {"global": view(cls=t["koleo_in"][None])}
    for name, config in {
        "koleo": KoLeoConfig(),
        "koleo_top1": KoLeoConfig(distributed=True),
        "koleo_top2": KoLeoConfig(distributed=True, topk=2),
    }.items():
        assert_close(KoLeoLoss(config)(step(tokens)).loss, t[name], name)


def check_gram(t: Noted) -> None:
    student, anchor = view(patches=t["gram_s"][None]), view(patches=t["gram_t"][None])
    for name, options in {
        "gram_img": {},
        "gram_batch": {"image_level": False},
        "gram_noneg": {"remove_negative": True},
        "gram_tneg": {"remove_only_teacher_negative": True},
        "gram_raw": {"normalized": False},
    }.items():
        result = GramLoss(GramConfig(**options))(step({"global": student}, anchor=anchor))
        assert_close(result.loss, t[name], name)


# --------------------------------------------------------------------------- optimization
def check_schedules(case: Case) -> None:
    expected = case.tensors
    for recipe, run in case.spec["recipes"].items():
        schedules = PUBLISHED[recipe].schedules(run["world_size"])
        assert schedules.iterations == run["total_iterations"], recipe
        for place, iteration in enumerate(expected[f"{recipe}.index"].tolist()):
            for name, value in schedules.at(iteration).items():
                # A learning rate of 1e-9 would pass any absolute tolerance made for features.
                assert value == pytest.approx(
                    expected[f"{recipe}.{name}"][place].item(), rel=1e-6, abs=1e-16
                ), f"{recipe}: {name} at iteration {iteration}"


def check_param_groups(case: Case) -> None:
    from dinov3_framework.training.optimizer import parameter_settings

    spec = case.spec
    require("dino_head_wd_multiplier", spec["dino_head_wd_multiplier"], 1)
    projector = PrototypeProjector(
        ProjectorConfig(n_prototypes=8, bottleneck_dim=4, hidden_dim=6), embed_dim=5
    )
    config = AdamWConfig(
        lr=Constant(value=1.0),
        weight_decay=Constant(value=1.0),
        layerwise_decay=spec["layerwise_decay"],
        patch_embed_lr_mult=spec["patch_embed_lr_mult"],
    )
    for name, module in {"backbone": build_vit(spec["config"]), "dino_head": projector}.items():
        settings = parameter_settings(module, config)
        assert settings.keys() == spec[name].keys()
        for parameter, (lr_mult, wd_mult, is_last_layer) in spec[name].items():
            setting = settings[parameter]
            assert setting.lr_mult == pytest.approx(lr_mult, rel=1e-9), f"{name}.{parameter}"
            assert setting.wd_mult == wd_mult, f"{name}.{parameter}"
            assert setting.is_last_layer is is_last_layer, f"{name}.{parameter}"


CHECKS: dict[str, Callable[[Case], None]] = {
    "vit": check_vit,
    "convnext": check_convnext,
    "losses": check_losses,
    "schedules": check_schedules,
    "param_groups": check_param_groups,
    "train_step": check_train_step,
    "depth_head": check_depth_head,
    "depth_bins": check_depth_bins,
    "depth_numbers": check_depth_numbers,
    "segmentation_linear": check_segmentation_linear,
    "segmentation_m2f": check_mask2former,
}


def check_case(case: Case, check: Callable[[Case], None] | None = None) -> None:
    """Check a case, by its kind unless ``check`` is given; every value and array must be read."""
    if case.kind in NOT_IMPLEMENTED:
        pytest.skip(f"kind not implemented: {case.kind}")
    assert case.kind in CHECKS, f"{case.name}: no check for cases of kind {case.kind!r}"
    (check or CHECKS[case.kind])(case)
    unread = [*case.spec.unread(), *(f"tensors.npz: {name}" for name in case.tensors.unread())]
    assert not unread, f"{case.name}: nothing used {', '.join(unread)}"
