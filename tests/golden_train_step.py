"""The ``train_step`` kind of golden case: two whole steps of the real trainer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from dinov3_ssl.batches import CropBatch
from dinov3_ssl.configs import PretrainConfig, momentum
from dinov3_ssl.networks import Blueprint, Networks
from dinov3_ssl.objective import Objective
from dinov3_ssl.unit import StudentUnit
from golden_support import Case, assert_close, fill, seeded

from dinov3_framework.data.loader import Layout
from dinov3_framework.parallel.sharder import Sharder
from dinov3_framework.recipes.structure import structure_component
from dinov3_framework.registry import Registry
from dinov3_framework.runtime.processes import process_group
from dinov3_framework.training.clock import StepClock
from dinov3_framework.training.optimizer import Optimizer
from dinov3_framework.training.trainer import Trainer

# Golden term -> metric of the trainer.
TERMS = {
    "dino_local_crops_loss": "dino/local",
    "dino_global_crops_loss": "dino/global",
    "koleo_loss": "koleo/mean",
    "ibot_loss": "ibot",
    "gram_loss": "gram",
    "gram_loss_weight": "gram/weight",
}


def recipe(case: dict[str, Any], chunk: int | None = None) -> dict[str, Any]:
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
    if case["gram"] is not None:
        losses["gram"] = {
            "use": "gram",
            "weight": case["gram"]["loss_weight"],
            "image_level": case["gram"]["img_level"],
            "normalized": case["gram"]["normalized"],
        }
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
            "freeze_last_layer": case["last_layer_lr"].count(0.0),
            "betas": case["adamw_betas"],
            "clip_grad": case["clip_grad"],
            "layerwise_decay": case["layerwise_decay"],
            "patch_embed_lr_mult": case["patch_embed_lr_mult"],
        },
    }


def build_trainer(case: dict[str, Any], chunk: int | None = None) -> Trainer:
    registry = Registry.load()
    config = structure_component(registry, "task", "pretrain", recipe(case, chunk))
    assert isinstance(config, PretrainConfig)
    losses = {name: registry.build(loss) for name, loss in config.losses.items()}
    blueprint = Blueprint.draw(registry, config.backbone, losses)
    device = torch.device("cpu")
    networks = Networks(blueprint, Sharder(config.parallel, device), seed=0)
    seeds = case["fill_seeds"]
    fill(networks.student, seeds["student"])
    fill(networks.teacher, seeds["teacher"])
    for anchor in networks.anchors.values():
        fill(anchor, seeds["gram_teacher"], prefix="backbone.")
    layout = Layout(1, 0, 1, config.batch_size)
    unit = StudentUnit(
        networks,
        Objective(losses, config.losses, networks, config.images),
        momentum(config),
        config.images,
        registry,
        size=case["global_size"],
        notes={},
        initial=None,
    )
    factory = registry.build(config.optimizer)
    return Trainer(
        config=config,
        unit=unit,
        optimizer=Optimizer(unit.networks, config.optimizer, factory, config.batch_size),
        clock=StepClock(device),
        maker=SimpleNamespace(layout=layout),  # type: ignore[arg-type]
        store=None,  # type: ignore[arg-type]
        observers={},
        run=SimpleNamespace(device=device),  # type: ignore[arg-type]
    )


def batch_of(case: dict[str, Any], masks: torch.Tensor, step: int) -> CropBatch:
    size = case["batch_per_rank"]

    def crops(key: str, count: int, pixels: int) -> torch.Tensor:
        values = seeded(f"{key}{step}", case["seed"], (count * size, 3, pixels, pixels))
        return values.unflatten(0, (count, size))

    views = {
        "global": crops("global", 2, case["global_size"]),
        "local": crops("local", case["n_local_crops"], case["local_size"]),
    }
    if case["gram"] is not None:
        views["anchor"] = crops("gram", 2, case["gram_teacher_crop_size"])
    return CropBatch(views, masks.unflatten(0, (2, size)))


def check_train_step(golden: Case, chunk: int | None = None) -> None:
    case, tensors = golden.spec, golden.tensors()
    with process_group(torch.device("cpu"), timeout=60):
        trainer = build_trainer(case, chunk)
        optimizer_step = trainer.optimizer.step
        clipped: dict[str, float] = {}

        def record_and_step() -> None:
            for name, parameter in trainer.unit.placed.student.named_parameters():
                if parameter.grad is not None:
                    clipped[name] = float(parameter.grad.norm())
            optimizer_step()

        trainer.optimizer.step = record_and_step  # type: ignore[method-assign]
        for step, expected in enumerate(case["steps"]):
            batch = batch_of(case, tensors[f"masks{step}"], step)
            check = trainer.step(iter([batch])).check
            trainer.done += 1
            compare_step(check.metrics, clipped, expected)
        for role in ("student", "teacher"):
            network = getattr(trainer.unit.placed, role)
            expected_sums = case[f"{role}_after_sum_abssum"]
            values = dict(network.named_parameters())
            assert values.keys() == expected_sums.keys()
            for name, sums in expected_sums.items():
                value = values[name].detach().double()
                assert_close([float(value.sum()), float(value.abs().sum())], sums, f"{role} {name}")


def compare_step(
    metrics: dict[str, float], clipped: dict[str, float], expected: dict[str, Any]
) -> None:
    assert_close(metrics["loss"], expected["total_loss"], "total loss")
    for term, value in expected["terms"].items():
        if term != "dino_local_loss_weight":  # 1, and inside dino/local's share of the total
            assert_close(metrics[TERMS[term]], value, term)
    for network, value in expected["grad_norm_before_clip"].items():
        name = network.removeprefix("student.")
        assert_close(metrics[f"gradient_norm/{name}"], value, f"gradient norm of {name}")
    after = expected["grad_norm_after_clip_per_parameter"]
    assert clipped.keys() == after.keys()
    for name, value in after.items():
        assert_close(clipped[name], value, f"clipped gradient of {name}")
