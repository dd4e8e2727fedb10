"""What a check of a ``pretrain`` recipe finds: mistakes, and the report of a sound one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import attrs
from torch import nn

from dinov3_framework.contracts.data import Augmentation, View
from dinov3_framework.contracts.losses import STUDENT_VIEWS, Loss, check_needs
from dinov3_framework.errors import Problem, first_few
from dinov3_framework.training.check import course, optimizer_rows, schedules
from dinov3_ssl.configs import StudentTrainingConfig, momentum
from dinov3_ssl.init_check import differing_settings
from dinov3_ssl.networks import Blueprint, projector_key

# Figures that metrics.jsonl has of every run; a loss is logged by its name.
_FIGURES = {"iteration", "loss", "images_per_second", "data_wait", "time"} | {
    "lr",
    "last_layer_lr",
    "weight_decay",
    "momentum",
}


@attrs.frozen
class Parts:
    """What a recipe's data pass through; cheap to build."""

    augmentation: Augmentation
    losses: Mapping[str, Loss]
    blueprint: Blueprint


def config_problems(config: StudentTrainingConfig) -> list[Problem]:
    """What can be told without building anything."""
    return [*_channel_problems(config), *_loss_problems(config)]


def parts_problems(
    config: StudentTrainingConfig, parts: Parts, masks_student: bool = True
) -> list[Problem]:
    """What does not fit together; ``masks_student``: whether the student's patches are hidden."""
    variants = parts.augmentation.variants()
    needs = [each for variant in variants for each in check_needs(parts.losses, variant)]
    masks = _mask_problems(parts) if masks_student else ()
    # What is wrong with all variants is said once.
    backbone = _statistics_problems(parts.blueprint.backbone)
    found = [*needs, *_view_problems(parts), *masks, *backbone, *_anchor_problems(config, parts)]
    return list(dict.fromkeys(found))


def sections(
    config: StudentTrainingConfig, parts: Parts, world_size: int
) -> dict[str, list[tuple[str, str]]]:
    """The sections of a check's report that are about the student and its objective."""
    return {
        "parameters": _parameter_rows(parts.blueprint),
        "batch": _batch_rows(config, parts, world_size),
        **_resolution_rows(parts),
        "schedule": _schedule_rows(config),
    }


# ---------------------------------------------------------------------- what can be wrong
def _channel_problems(config: StudentTrainingConfig) -> Iterator[Problem]:
    given, wanted = config.backbone.in_chans, config.images.channels
    if given is not None and given != wanted:
        yield Problem(
            "backbone.in_chans",
            f"is {given}, but images.channels is {wanted}",
            "set images.channels alone (with mean and std) and leave in_chans out",
        )


def _loss_problems(config: StudentTrainingConfig) -> Iterator[Problem]:
    if not config.losses:
        yield Problem("losses", "no loss: nothing would be learnt")
    for name in config.losses:
        if not re.fullmatch(r"[\w-]+", name):
            yield Problem(f"losses.{name}", "a name is made of letters, digits, - and _")
        elif name in _FIGURES or hasattr(nn.ModuleDict, name):
            yield Problem(f"losses.{name}", "the engine has this name for itself", "choose another")


def _view_problems(parts: Parts) -> Iterator[Problem]:
    patch = parts.blueprint.backbone.patch_size
    views = [each for one in parts.augmentation.variants() for each in one.views.items()]
    for name, view in views:
        # The teacher's own crops are cut into its own patches.
        if name != "teacher" and view.crops and view.size % patch:
            yield Problem(
                "augmentation",
                f"{name} crops of {view.size} px are no multiple of the patch size {patch}",
                f"take {view.size // patch * patch} or {(view.size // patch + 1) * patch}",
            )
    if not any(
        need.startswith("student.") for loss in parts.losses.values() for need in loss.needs
    ):
        yield Problem("losses", "no loss reads the student: nothing would be learnt")


def _mask_problems(parts: Parts) -> Iterator[Problem]:
    backbone = parts.blueprint.backbone
    for name, loss in parts.losses.items():
        if "masks" in loss.needs and not backbone.takes_masks:
            yield Problem(
                f"losses.{name}",
                f"needs masked patches, which a {type(backbone).__name__} cannot replace",
                f'leave it out (drop = ["losses.{name}"]), or take a backbone with a mask token',
            )


def _statistics_problems(backbone: nn.Module) -> Iterator[Problem]:
    """Running statistics are each process's own, and the teacher's would never be updated."""
    names = [
        name
        for name, each in backbone.named_modules()
        if getattr(each, "running_mean", None) is not None
    ]
    if names:
        yield Problem(
            "backbone",
            f"has norms with running statistics, which a moving average does not have: "
            f"{first_few(names)}",
            "take a backbone with norms of single samples (LayerNorm, GroupNorm, RMSNorm)",
        )


def _anchor_problems(config: StudentTrainingConfig, parts: Parts) -> Iterator[Problem]:
    blueprint = parts.blueprint
    ours = _shapes(blueprint.backbone)
    for name, weights in blueprint.anchor_weights.items():
        where = f"losses.{name}.anchor"
        views = [v.views.get(blueprint.anchors[name].view) for v in parts.augmentation.variants()]
        patch = weights.backbone.patch_size
        if weights.backbone.in_chans != blueprint.backbone.in_chans:
            message = f"has {weights.backbone.in_chans} input channels, the student"
            yield Problem(f"{where}.weights", f"{message} {blueprint.backbone.in_chans}")
        for size in {view.size for view in views if view is not None and view.size % patch}:
            message = f"crops of {size} px are no multiple of the anchor's patch size {patch}"
            yield Problem(f"{where}.weights", message)
        differing = "" if _shapes(weights.backbone) == ours else "another backbone"
        if not differing:
            # Equal shapes do not show all: the norms' epsilon, RoPE.
            names = differing_settings(config.backbone, weights.config)
            differing = f"a backbone with another {', '.join(names)}" if names else ""
        if differing and blueprint.anchors[name].config.follows:
            yield Problem(
                where,
                "is to be refreshed from the momentum teacher, but its weights are of "
                f"{differing} than the student's",
                "leave start and period out, or begin with weights of the student's backbone",
            )


def _shapes(backbone: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items()}


# ---------------------------------------------------------------------- what a check shows
def _parameter_rows(blueprint: Blueprint) -> list[tuple[str, str]]:
    rows = [("backbone", _count(blueprint.backbone))]
    rows += [(projector_key(n), _count(projector)) for n, projector in blueprint.projectors.items()]
    for name in blueprint.anchors:
        rows.append((f"anchor of {name}", _anchor_text(blueprint, name)))
    return rows


def _anchor_text(blueprint: Blueprint, name: str) -> str:
    config = blueprint.anchors[name].config
    start = "the momentum teacher" if config.weights is None else config.weights
    if config.start is not None:
        start += f", from iteration {config.start:,}: the momentum teacher of then"
    if config.period is None:
        return f"{start}; never refreshed"
    often = "" if config.max_refreshes is None else f", {config.max_refreshes} times"
    first = f" from {config.first_refresh:,} on" if config.first_refresh else ""
    return f"{start}; refreshed every {config.period:,} iterations{first}{often}"


def _count(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()):,}"


def _batch_rows(config: StudentTrainingConfig, parts: Parts, world: int) -> list[tuple[str, str]]:
    per_pass = config.batch_size // (world * config.accumulation_steps)
    variants = len(parts.augmentation.variants())
    which = f" in the largest of {variants} resolutions" if variants > 1 else ""
    rows = [
        ("images per step", f"{config.batch_size:,}"),
        ("split", f"{world} x {config.accumulation_steps} micro-batches x {per_pass} images"),
        ("crops per image", _crops(parts.augmentation.views) + which),
    ]
    if config.accumulation_steps > 1:
        seeing = [name for name, loss in parts.losses.items() if loss.sees_batch]
        if seeing:
            rows.append(("see one pass at a time", ", ".join(seeing)))
    return rows


def _crops(views: Mapping[str, View]) -> str:
    return ", ".join(f"{view.crops} {name} of {view.size} px" for name, view in views.items())


def _resolution_rows(parts: Parts) -> dict[str, list[tuple[str, str]]]:
    """A section of its own where steps have crops of different sizes."""
    variants, patch = parts.augmentation.variants(), parts.blueprint.backbone.patch_size
    if len(variants) == 1:
        return {}
    rows = []
    for index, variant in enumerate(variants, start=1):
        seen = [variant.views[name] for name in STUDENT_VIEWS if name in variant.views]
        patches = sum(view.crops * (view.size // patch) ** 2 for view in seen)
        what = f"{_crops(variant.views)}; {patches:,} patches per image for the student"
        rows.append((f"{index}", f"{variant.share:.4g} of steps: {what}"))
    return {"resolutions": rows}


def _schedule_rows(config: StudentTrainingConfig) -> list[tuple[str, str]]:
    total = config.iterations
    return [
        *optimizer_rows(config),
        ("momentum", course(momentum(config), total)),
        *(
            (f"losses.{where}", course(schedule, total))
            for where, schedule in schedules(config.losses)
        ),
    ]
