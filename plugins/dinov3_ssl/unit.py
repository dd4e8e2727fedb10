"""The train unit of self-supervision: a student, its teacher, its anchors, its objective."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.contracts.running import Model, Rows
from dinov3_framework.contracts.training import Step, StepResult, TrainUnit
from dinov3_framework.parallel.sharder import tensors_of
from dinov3_framework.registry import Registry
from dinov3_framework.schedules import Schedule
from dinov3_framework.weights.loading import load_backbone
from dinov3_ssl.batches import CropBatch
from dinov3_ssl.networks import Networks
from dinov3_ssl.objective import Objective

log = logging.getLogger("dinov3_framework.ssl")

_FROM_WEIGHTS = "anchors_from_weights"  # in a checkpoint: those that were not refreshed yet


class StudentUnit(TrainUnit):
    """Trains a student; its moving average, the momentum teacher, is evaluated and exported.

    ``initial`` is the file of the first backbone, where that was not drawn from the seed.
    """

    def __init__(
        self,
        networks: Networks,
        objective: Objective,
        momentum: Schedule,
        images: ImagesConfig,
        registry: Registry,
        *,
        size: int,
        notes: Mapping[str, Any],
        initial: Path | None,
    ) -> None:
        self.placed, self.objective = networks, objective
        self.networks = dict(networks.student.items())
        self.schedules = {"momentum": momentum}
        self.images, self.registry, self.size = images, registry, size
        self._notes, self._initial = notes, initial

    def before_step(self, step: Step) -> None:
        for name in self.placed.start_anchors(step.iteration):
            log.info("Anchor of loss %r begins after iteration %d", name, step.iteration)

    def forward(self, batch: CropBatch, step: Step) -> StepResult:
        return self.objective(batch, step)

    def after_step(self, step: Step, applied: bool) -> None:
        if applied:
            self.placed.update_teacher(step.values["momentum"])
        for name in self.placed.refresh_anchors(step.iteration + 1):
            log.info("Anchor of loss %r refreshed after iteration %d", name, step.iteration + 1)

    # ------------------------------------------------------------------ state
    def state(self) -> dict[str, Tensor]:
        return self.placed.named_state() | self.objective.named_state()

    def changed_by_forward(self) -> Iterator[Tensor]:
        yield from self.objective.named_state().values()
        yield from self.placed.student.buffers()

    def notes(self) -> Mapping[str, Any]:
        if not self.placed.blueprint.anchor_weights:
            return self._notes
        return {**self._notes, _FROM_WEIGHTS: sorted(self.placed.anchors_from_weights)}

    def accept(self, notes: Mapping[str, Any]) -> None:
        if _FROM_WEIGHTS in notes:
            self.placed.anchors_from_weights = set(notes[_FROM_WEIGHTS])

    # ------------------------------------------------------------------ what is evaluated
    def model(self) -> Model:
        backbone = cast(Backbone, self.placed.teacher["backbone"])
        return Model(backbone, self.images, size=self.size, name="trained teacher")

    def initial_model(self) -> Model:
        if self._initial is None:
            backbone = self.placed.initial_backbone().to(self.placed.device)
        else:
            loaded = load_backbone(self._initial, device=self.placed.device, registry=self.registry)
            backbone = loaded.backbone.requires_grad_(False)
        return Model(backbone, self.images, size=self.size, name="backbone before training")

    # ------------------------------------------------------------------ estimates
    def memory_roles(self) -> Mapping[str, Iterable[Tensor]]:
        placed, teacher = self.placed, self.objective.teaching.networks
        is_own = teacher is placed.teacher
        networks = {
            "student": placed.student,
            "teacher" if is_own else "average": placed.teacher,
            "anchors": placed.anchors,
            **({} if is_own else {"frozen teacher": teacher}),
        }
        roles = {role: [t for _, t in tensors_of(each)] for role, each in networks.items()}
        return {**roles, "losses' buffers": list(self.objective.named_state().values())}

    def simulation_sections(self) -> Mapping[str, Rows]:
        rows = [
            (f"losses.{name}", f"{why}; what it takes is not in the estimate")
            for name, why in self.objective.left_out.items()
        ]
        return {"left out": rows} if rows else {}

    def memory_hints(self) -> list[str]:
        chunked = [
            f"losses.{name}.chunk"
            for name, loss in self.objective.configs.items()
            if getattr(loss, "chunk", 0) is None
        ]
        return [*chunked, "smaller crops", "fewer prototypes"]
