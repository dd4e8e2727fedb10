"""The ``distill`` task: a student learns from a frozen teacher of any backbone."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import nn

from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.contracts.running import Rows
from dinov3_framework.errors import Problem, UserError
from dinov3_framework.parallel import sharder as parallel
from dinov3_framework.parallel.sharder import Sharder
from dinov3_framework.parallel.state_dicts import fingerprint, require_same
from dinov3_framework.randomness import keyed_seed
from dinov3_framework.runtime import collectives
from dinov3_framework.training.task import InitialState
from dinov3_framework.training.trainer import Trainer
from dinov3_ssl.configs import DistillConfig
from dinov3_ssl.fitting import fit_projectors
from dinov3_ssl.frozen import FrozenWeights, described, fill_frozen
from dinov3_ssl.method import StudentMethod
from dinov3_ssl.networks import Networks, projector_key
from dinov3_ssl.preflight import Parts
from dinov3_ssl.teacher_projectors import TeacherProjectors
from dinov3_ssl.teaching import OwnTeaching, Teaching
from dinov3_ssl.unit import StudentUnit

log = logging.getLogger("dinov3_framework.ssl")


class DistilledUnit(StudentUnit):
    """A student of a frozen teacher, which a resumed run knows again by its fingerprint."""

    teacher: str  # the weights
    teacher_rows: Rows  # what they are
    fingerprint: float | None

    def accept(self, notes: Mapping[str, Any]) -> None:
        super().accept(notes)
        before = notes.get("teacher", {}).get("sum")
        if before is not None and self.fingerprint is not None:
            require_same(before, self.fingerprint, self.teacher, "teacher")

    def notes(self) -> Mapping[str, Any]:
        return {**super().notes(), "teacher": {"weights": self.teacher, "sum": self.fingerprint}}

    def simulation_sections(self) -> Mapping[str, Rows]:
        return {"teacher": self.teacher_rows, **super().simulation_sections()}


class Distill(StudentMethod):
    """Distills a frozen teacher into a student; the student's moving average is exported.

    Losses compare the student with the teacher exactly as in pretraining. The teacher's backbone is
    read anew at every start and no checkpoint holds it; its projectors are saved, since new ones
    are made from the data.
    """

    name = "distill"
    config: DistillConfig
    unit_class = DistilledUnit
    _fingerprint: float | None = None

    # ------------------------------------------------------------------ checking
    @cached_property
    def frozen(self) -> FrozenWeights:
        """What the teacher's weights are; nothing is read of their values."""
        teacher = self.config.teacher
        return described(
            teacher.weights,
            teacher.network,
            "teacher.weights",
            self.registry,
            projectors=teacher.projectors != "new",
            unused=teacher.unused or (),
            remembered=self.known(teacher.weights),
        )

    @property
    def masks_student(self) -> bool:
        return self.config.mask_student

    def projectors(self, parts: Parts) -> TeacherProjectors:
        return TeacherProjectors.of(parts.losses, self.frozen, self.config.teacher.projectors)

    def weights(self) -> dict[str, str]:
        return super().weights() | {"teacher.weights": self.config.teacher.weights}

    def weights_read(self, done: int) -> dict[str, str]:
        # The teacher is wanted at every start.
        return super().weights_read(done) | {"teacher.weights": self.config.teacher.weights}

    def problems(self, prepared: Parts, done: int) -> list[Problem]:
        found = super().problems(prepared, done)
        if not self.seen(self.config.teacher.weights):
            return found
        return [*found, *self._crop_problems(prepared), *self.projectors(prepared).problems]

    def _crop_problems(self, parts: Parts) -> list[Problem]:
        problems = []
        channels, backbone = self.config.images.channels, self.frozen.backbone
        if backbone.in_chans != channels:
            message = f"takes {backbone.in_chans} channels, images.channels is {channels}"
            problems.append(Problem("teacher.weights", message))
        for variant in parts.augmentation.variants():
            view = variant.views.get("teacher", variant.views["global"])
            if view.size % backbone.patch_size:
                problems.append(
                    Problem(
                        "augmentation",
                        f"the teacher's crops of {view.size} px are no multiple of its patch size "
                        f"{backbone.patch_size}",
                        "change global_size, or teacher_scale, which sets the teacher's alone",
                    )
                )
        return problems

    def sections_after(self, prepared: Parts, done: int) -> Mapping[str, Rows]:
        after = super().sections_after(prepared, done)
        if not self.seen(self.config.teacher.weights):
            return after
        view = prepared.augmentation.views.get("teacher", prepared.augmentation.views["global"])
        sees = ("sees", f"{view.crops} crops of {view.size} px")
        rows = [*self.frozen.rows(), sees, *self.projectors(prepared).rows()]
        return {"teacher": rows, **after}

    # ------------------------------------------------------------------ running
    def teaching(
        self, networks: Networks, parts: Parts, sharder: Sharder, state: InitialState
    ) -> Teaching:
        if not self.seen(self.config.teacher.weights):
            raise UserError(
                "an estimate has to know what the teacher is, and there is no "
                f"{self.config.teacher.weights} here\n"
                "    give teacher.weights a published name, which nobody fetches, or a file of the "
                "same backbone; its values are not read"
            )
        with collectives.within(None):
            # Over all processes; of several students' runs, the rest is over each one's own.
            backbone = _placed_frozen(sharder.over_all(), self.frozen.backbone)
            if state is not InitialState.ABSENT:
                fill_frozen(self.frozen, backbone)
                self._fingerprint = fingerprint(backbone)
        networks.frozen = self._placed_projectors(networks, parts, sharder, state)
        whole = nn.ModuleDict({"backbone": backbone, **networks.frozen})
        return self.taught_by(whole, parts)

    def taught_by(self, teacher: nn.ModuleDict, parts: Parts) -> Teaching:
        return OwnTeaching(teacher, self.frozen.images)

    def unit(self, *args: Any, **kwargs: Any) -> DistilledUnit:
        unit = super().unit(*args, **kwargs)
        assert isinstance(unit, DistilledUnit)
        unit.teacher, unit.fingerprint = self.config.teacher.weights, self._fingerprint
        unit.teacher_rows = self.frozen.rows()
        return unit

    def _placed_projectors(
        self, networks: Networks, parts: Parts, sharder: Sharder, state: InitialState
    ) -> nn.ModuleDict:
        """The teacher's projectors, on this run's processes; a checkpoint gives them values."""
        heads = self.projectors(parts)
        placed = nn.ModuleDict(
            {
                projector_key(name): _placed_frozen(sharder, projector)
                for name, projector in heads.projectors.items()
            }
        )
        if state is InitialState.INITIAL:
            read = {projector_key(name): placed[projector_key(name)] for name in heads.read}
            fill_frozen(self.frozen, None, read)
            for name in heads.new:
                drawn = heads.projectors[name]
                parallel.initialize(placed[projector_key(name)], drawn, self._seed(name))
        return placed

    def _seed(self, loss: str) -> int:
        return keyed_seed(self.config.seed, f"init.teacher.{projector_key(loss)}")

    def begin(self, trainer: Trainer, prepared: Parts) -> None:
        heads = self.projectors(prepared)
        if not self.any_run(bool(heads.new)):
            return
        whole = {name: heads.projectors[name] for name in heads.new}
        unit: Any = trainer.unit
        fitted = fit_projectors(unit, trainer.maker, self.config, whole, self._seed)  # type: ignore[arg-type]
        for name in heads.new:
            how = "prototypes are tokens of the first batches" if name in fitted else "random"
            log.warning(
                "The teacher's weights hold no projector of loss %r: it gets a new one, %s. "
                "Weights of a training checkpoint have projectors.",
                name,
                how,
            )

    def any_run(self, wants: bool) -> bool:
        """Whether this run, or one beside it, wants something that all take part in."""
        return wants

    def provenance(self) -> Mapping[str, str]:
        return {"distilled_from": self.config.teacher.weights}

    def frozen_networks(self) -> Sequence[nn.Module]:
        return [self.frozen.backbone] if self.seen(self.config.teacher.weights) else []

    def simulated_teacher(self, prepared: Parts) -> Backbone:
        return self.frozen.backbone


def _placed_frozen(sharder: Sharder, blueprint: nn.Module) -> nn.Module:
    placed = sharder.place(copy.deepcopy(blueprint), trains=False)
    return placed.eval().requires_grad_(False)
