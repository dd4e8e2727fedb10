"""The ``train_step`` kind of golden case: two whole steps of the real trainer."""

from __future__ import annotations

from itertools import dropwhile
from pathlib import Path
from typing import Any

import torch
from dinov3_ssl.batches import CropBatch
from dinov3_ssl.configs import PretrainConfig
from dinov3_ssl.networks import Networks
from dinov3_ssl.unit import StudentUnit
from golden_support import (
    CannotExpress,
    Case,
    Noted,
    assert_close,
    assert_sums,
    fill,
    require,
    seeded,
)

from dinov3_framework.recipes.structure import structure_component
from dinov3_framework.registry import Registry
from dinov3_framework.runtime.processes import process_group
from dinov3_framework.training.trainer import Trainer

# Golden term -> metric of the trainer.
TERMS = {
    "dino_local_crops_loss": "dino/local",
    "dino_global_crops_loss": "dino/global",
    "koleo_loss": "koleo/mean",
    "ibot_loss": "ibot",
    "gram_loss": "gram",
    "gram_loss_weight": "gram/weight",
    "stats_only/masked_gram_loss": "gram/masked",
    "stats_only/unmasked_gram_loss": "gram/unmasked",
}


def gram_options(gram: Noted) -> dict[str, Any] | None:
    """A case's Gram anchoring as the options of the ``gram`` loss, or None if it has none."""
    # Every value is read, as some have no meaning beside others.
    given = dict(gram)
    require("gram.loss_weight_schedule", given.pop("loss_weight_schedule"), None)
    require(
        "gram.global_teacher_resize_method", given.pop("global_teacher_resize_method"), "bicubic"
    )
    updates, start = given.pop("rep_update"), given.pop("it_load_ema_teacher")
    period, first = given.pop("update_frequency"), given.pop("it_first_update")
    limit, weights = given.pop("max_updates"), given.pop("ckpt")
    anchor: dict[str, Any] = {}
    if weights is None or start >= 0:
        anchor["start"] = start
    if updates:
        anchor |= {"period": period, "first_refresh": first}
        anchor |= {} if limit is None else {"max_refreshes": limit}
    options = {
        "use": "gram",
        "weight": given.pop("loss_weight"),
        "normalized": given.pop("normalized"),
        "image_level": given.pop("img_level"),
        "remove_negative": given.pop("remove_neg"),
        "remove_only_teacher_negative": given.pop("remove_only_teacher_neg"),
        "tokens": given.pop("tokens_used"),
        "resize_antialias": given.pop("global_teacher_resize_antialias"),
        "compute_stats": given.pop("compute_stats"),
        "anchor": "none" if given.pop("ema_teacher") else anchor,
    }
    used = given.pop("use_loss")
    if given:
        raise CannotExpress(f"gram.{', gram.'.join(given)}: unknown")
    return options if used else None


def local_weight(steps: list[Noted]) -> float:
    weights = {step["terms"]["dino_local_loss_weight"] for step in steps}
    if len(weights) > 1:
        raise CannotExpress(f"dino_local_loss_weight changes: {sorted(weights)}")
    return float(weights.pop())


def recipe(case: Noted, chunk: int | None = None) -> dict[str, Any]:
    """The case as the values of a ``pretrain`` recipe; ``chunk`` is that of DINO and iBOT."""

    def head(name: str) -> dict[str, Any]:
        given = case["heads"][name]
        return {
            "n_prototypes": given["head_n_prototypes"],
            "bottleneck_dim": given["head_bottleneck_dim"],
            "hidden_dim": given["head_hidden_dim"],
            "n_layers": given["head_nlayers"],
        }

    weights, temperature = case["loss_weights"], case["teacher_temp"]
    losses: dict[str, Any] = {
        name: {
            "use": name,
            "weight": weights[name],
            "teacher_temp": temperature,
            "head": head(name),
            "chunk": "none" if chunk is None else chunk,
        }
        for name in ("dino", "ibot")
    }
    losses["koleo"] = {
        "use": "koleo",
        "weight": weights["koleo"],
        "distributed": case["koleo_distributed"],
    }
    losses["dino"]["local_weight"] = local_weight(case["steps"])
    if case["gram"] is not None and (gram := gram_options(case["gram"])) is not None:
        losses["gram"] = gram
    # The last layer stands still, and then learns as the others do.
    trained = list(dropwhile(lambda lr: lr == 0, case["last_layer_lr"]))
    # img_size only names a nominal size, which nothing reads.
    vit = {key: value for key, value in case["vit"].items() if key != "img_size"}
    return {
        "iterations": len(case["steps"]),
        "batch_size": case["batch_per_rank"],
        "dataset": {"use": "fashion_mnist"},
        "augmentation": {"use": "multi_crop"},
        "backbone": {"use": "vit", **vit},
        "losses": losses,
        "teacher": {"momentum": case["momentum"]},
        "optimizer": {
            "use": "adamw",
            "lr": case["lr"],
            "weight_decay": case["weight_decay"],
            "freeze_last_layer": len(case["last_layer_lr"]) - len(trained),
            "betas": case["adamw_betas"],
            "clip_grad": case["clip_grad"],
            "layerwise_decay": case["layerwise_decay"],
            "patch_embed_lr_mult": case["patch_embed_lr_mult"],
        },
    }


def build_trainer(case: Noted, chunk: int | None = None) -> Trainer:
    registry = Registry.load()
    config = structure_component(registry, "task", "pretrain", recipe(case, chunk))
    assert isinstance(config, PretrainConfig)
    task = registry.build(config, registry=registry)
    dataset = registry.build(config.dataset, channels=config.images.channels)
    trainer: Trainer = task.trainer(task.method.prepare(), dataset, Path("unused"))
    networks = networks_of(trainer)
    seeds = case["fill_seeds"]
    fill(networks.student, seeds["student"])
    fill(networks.teacher, seeds["teacher"])
    anchor_seed = seeds["gram_teacher"]  # given even where there is no anchor
    if case["gram"] is not None and case["gram"]["ckpt"] is not None:
        for anchor in networks.anchors.values():
            fill(anchor, anchor_seed, prefix="backbone.")
    return trainer


def networks_of(trainer: Trainer) -> Networks:
    unit = trainer.unit
    assert isinstance(unit, StudentUnit)
    return unit.placed


def batch_of(case: Noted, masks: torch.Tensor, step: int) -> CropBatch:
    size = case["batch_per_rank"]

    def crops(key: str, count: int, pixels: int) -> torch.Tensor:
        values = seeded(f"{key}{step}", case["seed"], (count * size, 3, pixels, pixels))
        return values.unflatten(0, (count, size))

    views = {
        "global": crops("global", 2, case["global_size"]),
        "local": crops("local", case["n_local_crops"], case["local_size"]),
    }
    if case["gram_teacher_crop_size"] is not None:
        views["anchor"] = crops("gram", 2, case["gram_teacher_crop_size"])
    return CropBatch(views, masks.unflatten(0, (2, size)))


def one_step(trainer: Trainer, batch: CropBatch) -> dict[str, float]:
    """Train on a batch; its metrics."""
    metrics = trainer.step(iter([batch])).check.metrics
    trainer.done += 1
    return metrics


def check_train_step(golden: Case, chunk: int | None = None) -> None:
    case, tensors = golden.spec, golden.tensors
    with process_group(torch.device("cpu"), timeout=60):
        trainer = build_trainer(case, chunk)
        optimizer_step = trainer.optimizer.step
        clipped: dict[str, float] = {}

        def record_and_step() -> None:
            for name, parameter in networks_of(trainer).student.named_parameters():
                if parameter.grad is not None:
                    clipped[name] = float(parameter.grad.norm())
            optimizer_step()

        trainer.optimizer.step = record_and_step  # type: ignore[method-assign]
        for step, expected in enumerate(case["steps"]):
            batch = batch_of(case, tensors[f"masks{step}"], step)
            metrics = one_step(trainer, batch)
            compare_step(metrics, clipped, expected)
            assert_close(metrics["last_layer_lr"], case["last_layer_lr"][step], "last_layer_lr")
        for role in ("student", "teacher"):
            network = getattr(networks_of(trainer), role)
            expected_sums = case[f"{role}_after_sum_abssum"]
            values = dict(network.named_parameters())
            assert values.keys() == expected_sums.keys()
            for name, sums in expected_sums.items():
                assert_sums(values[name], sums, f"{role} {name}")


def compare_step(metrics: dict[str, float], clipped: dict[str, float], expected: Noted) -> None:
    assert_close(metrics["loss"], expected["total_loss"], "total loss")
    for term, value in expected["terms"].items():
        if term != "dino_local_loss_weight":  # an option, and inside dino/local's share
            if term not in TERMS:
                raise CannotExpress(f"no metric is the term {term}")
            assert_close(metrics[TERMS[term]], value, term)
    for network, value in expected["grad_norm_before_clip"].items():
        name = network.removeprefix("student.")
        assert_close(metrics[f"gradient_norm/{name}"], value, f"gradient norm of {name}")
    after = expected["grad_norm_after_clip_per_parameter"]
    assert clipped.keys() == after.keys()
    for name, value in after.items():
        assert_close(clipped[name], value, f"clipped gradient of {name}")
