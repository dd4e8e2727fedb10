"""The objective of a step: networks run once, every loss looks at what they said.

Nothing here knows a loss: what a loss needs, it says (``contracts.Loss``).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.contracts.losses import (
    OUTPUTS,
    STUDENT_VIEWS,
    Loss,
    LossResult,
    StepOutputs,
    ViewFeatures,
)
from dinov3_framework.contracts.training import Step, StepResult
from dinov3_framework.data.images import normalize
from dinov3_framework.kinds import LossConfig
from dinov3_framework.training.simulation import NEEDS_VALUES, reason
from dinov3_ssl.batches import CropBatch
from dinov3_ssl.networks import Networks, is_there, projector_key
from dinov3_ssl.teaching import OwnTeaching, Teaching
from dinov3_ssl.views import features_of, on_grid, unflattened


class Objective:
    """Runs the networks on a batch and sums up the weighted losses.

    ``teaching`` is whom the student learns from, by default its moving average; ``masking`` says
    whether the student is kept from seeing masked patches.
    """

    def __init__(
        self,
        losses: Mapping[str, Loss],
        configs: Mapping[str, LossConfig],
        networks: Networks,
        images: ImagesConfig,
        *,
        teaching: Teaching | None = None,
        masking: bool = True,
        simulated: bool = False,
    ) -> None:
        self.losses, self.configs, self.networks = losses, configs, networks
        self.images, self.simulated = images, simulated
        self.left_out: dict[str, str] = {}  # of an estimate: loss -> why it cannot take part
        self.teaching = teaching or OwnTeaching(networks.teacher, images)
        needs: set[str] = set().union(*(loss.needs for loss in losses.values()))
        self._student_views = [v for v in STUDENT_VIEWS if _wanted(needs, "student", v)]
        self._taught = frozenset(o for o in OUTPUTS if f"teacher.global.{o}" in needs)
        self._masks, self._masking = "masks" in needs, masking

    def __call__(self, batch: CropBatch, step: Step) -> StepResult:
        """Evaluate the objective; call ``backward()`` on the result's total."""
        with step.phase("teacher"):
            batch, teacher = self.teaching(batch, self._taught)
            anchors = self._anchors(batch, step.iteration)
        masks = batch.masks if self._masks else None
        with step.phase("student"):
            student = self._student(batch, masks if self._masking else None)
        if "patches" in self._taught and "global" in student:
            teacher = {"global": on_grid(teacher["global"], student["global"].grid)}
        total: Tensor = torch.zeros((), device=next(iter(batch.crops.values())).device)
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor | float] = {}
        for name, loss in self.losses.items():
            if name in self.networks.anchors and name not in anchors:
                continue  # not begun yet
            outputs = StepOutputs(
                iteration=step.iteration,
                total_iterations=step.total,
                student=student,
                teacher=teacher,
                anchor=anchors.get(name),
                masks=masks,
                masked=batch.masked if self._masks else None,
                project=partial(_project, self.networks.student, name),
                project_teacher=torch.no_grad()(partial(_project, self.teaching.networks, name)),
            )
            with step.phase("loss"):
                result = self._evaluate(name, loss, outputs)
            weight = outputs.value(self.configs[name].weight)
            total = total + weight * result.loss
            losses[name] = result.loss.detach()
            metrics[f"{name}/weight"] = weight
            metrics |= {f"{name}/{key}": value for key, value in result.metrics.items()}
        return StepResult(total, losses, metrics)

    def _evaluate(self, name: str, loss: Loss, outputs: StepOutputs) -> LossResult:
        if not self.simulated:
            result: LossResult = loss(outputs)
            return result
        if name not in self.left_out:
            try:
                return loss(outputs)  # type: ignore[no-any-return]
            except NEEDS_VALUES as error:
                self.left_out[name] = reason(error)
        some = next(iter(outputs.student.values())).cls
        return LossResult((some * 0).sum())

    def _student(self, batch: CropBatch, masks: Tensor | None) -> dict[str, ViewFeatures]:
        """All views in one pass, so that sharded parameters are gathered once."""
        backbone: Any = self.networks.student["backbone"]
        views = self._student_views
        crops = [normalize(batch.crops[view], self.images) for view in views]
        hidden = [
            masks.flatten(0, 1) if masks is not None and v == "global" else None for v in views
        ]
        outputs = backbone.forward_features([each.flatten(0, 1) for each in crops], hidden)
        return {
            view: unflattened(output, of_view, backbone.patch_size)
            for view, output, of_view in zip(views, outputs, crops, strict=True)
        }

    @torch.no_grad()
    def _anchors(self, batch: CropBatch, iteration: int) -> dict[str, ViewFeatures]:
        """What the anchors that have begun say, by loss."""
        features = {}
        blueprint = self.networks.blueprint
        for name, anchor in blueprint.anchors.items():
            if is_there(anchor.config, iteration):
                images = self.images
                if name in self.networks.anchors_from_weights:
                    images = blueprint.anchor_weights[name].images
                crops = normalize(batch.crops[anchor.view], images)
                features[name] = features_of(self.networks.anchors[name], crops)
        return features

    def named_state(self) -> dict[str, Tensor]:
        """The losses' buffers by name, to save or to load in place."""
        return {
            f"losses.{name}.{buffer}": tensor
            for name, loss in self.losses.items()
            for buffer, tensor in loss.named_buffers()
        }


def _wanted(needs: set[str], network: str, view: str) -> bool:
    return any(need.startswith(f"{network}.{view}.") for need in needs)


def _project(networks: nn.ModuleDict, loss: str, tokens: Tensor, *others: Any) -> Tensor:
    name = projector_key(loss)
    if name not in networks:
        raise KeyError(f"loss {loss!r} projects tokens and built no projector")
    projected: Tensor = networks[name](tokens, *others)
    return projected
