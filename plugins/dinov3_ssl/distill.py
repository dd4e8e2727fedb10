"""The ``distill`` task: a student learns from a frozen teacher of any backbone."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import nn

from dinov3_framework.errors import CheckpointError, Problem, UserError
from dinov3_framework.parallel import sharder as parallel
from dinov3_framework.parallel.sharder import Sharder
from dinov3_framework.randomness import keyed_seed
from dinov3_framework.registry import Registry
from dinov3_framework.runtime import collectives
from dinov3_framework.training.trainer import Trainer
from dinov3_ssl.configs import DistillConfig
from dinov3_ssl.fitting import fit_projectors
from dinov3_ssl.frozen import FrozenTeacher, FrozenWeights, described, fill_frozen, fingerprint
from dinov3_ssl.networks import Networks, head_name
from dinov3_ssl.preflight import Parts
from dinov3_ssl.task import TrainingTask
from dinov3_ssl.teacher_projectors import TeacherHeads
from dinov3_ssl.teaching import OwnTeaching, Teaching

if TYPE_CHECKING:
    from dinov3_estimate.stage import PretendingSharder

log = logging.getLogger(__name__)

_CLOSE = 1e-5  # relative difference of fingerprints that rounding explains


class Distill(TrainingTask):
    """Distils a frozen teacher into a student; the student's moving average is exported.

    Losses compare the student with the teacher exactly as in pretraining. The teacher's backbone is
    read anew at every start and no checkpoint holds it; its projectors are saved, since new ones
    are made from the data.
    """

    name = "distill"
    config: DistillConfig

    def __init__(self, config: DistillConfig, *, registry: Registry) -> None:
        super().__init__(config, registry=registry)

    # ------------------------------------------------------------------ checking
    @cached_property
    def _frozen(self) -> FrozenWeights:
        teacher = self.config.teacher
        return described(
            teacher.weights,
            teacher.network,
            "teacher.weights",
            self.registry,
            projectors=teacher.projectors != "new",
            remembered=self._known(teacher.weights),
        )

    def _heads(self, parts: Parts) -> TeacherHeads:
        return TeacherHeads.of(parts.losses, self._frozen, self.config.teacher.projectors)

    def _weights(self) -> dict[str, str]:
        return super()._weights() | {"teacher.weights": self.config.teacher.weights}

    def _weights_read(self) -> dict[str, str]:
        # The teacher is wanted at every start.
        return super()._weights_read() | {"teacher.weights": self.config.teacher.weights}

    def _problems(self, parts: Parts) -> list[Problem]:
        if not self._exists(self.config.teacher.weights):
            return []
        return [*self._crop_problems(parts), *self._heads(parts).problems]

    def _crop_problems(self, parts: Parts) -> list[Problem]:
        problems = []
        channels, patch = self.config.images.channels, self._frozen.backbone.patch_size
        if self._frozen.backbone.in_chans != channels:
            message = f"takes {self._frozen.backbone.in_chans} channels, images.channels is"
            problems.append(Problem("teacher.weights", f"{message} {channels}"))
        for variant in parts.augmentation.variants():
            view = variant.views.get("teacher", variant.views["global"])
            if view.size % patch:
                problems.append(
                    Problem(
                        "augmentation",
                        f"the teacher's crops of {view.size} px are no multiple of its patch size "
                        f"{patch}",
                        "change global_size, or teacher_scale, which sets the teacher's alone",
                    )
                )
        return problems

    def _told(self, parts: Parts) -> dict[str, list[tuple[str, str]]]:
        if not self._exists(self.config.teacher.weights):
            return {}
        view = parts.augmentation.views.get("teacher", parts.augmentation.views["global"])
        sees = ("sees", f"{view.crops} crops of {view.size} px")
        return {"teacher": [*self.teacher_rows(), sees, *self._heads(parts).rows()]}

    def teacher_rows(self) -> list[tuple[str, str]]:
        return self._frozen.rows()

    @property
    def _masks_student(self) -> bool:
        return self.config.mask_student

    # ------------------------------------------------------------------ running
    def _teaching(self, networks: Networks, parts: Parts, restored: bool) -> Teaching:
        with collectives.within(None):
            # Over all processes; of several students' runs, the rest is over each one's own.
            backbone = self._placed_teacher(Sharder(self.config.parallel, networks.device))
        networks.frozen = self._placed_heads(networks, parts, restored)
        return self._taught_by(backbone, networks.frozen, parts)

    def _taught_by(self, backbone: nn.Module, heads: nn.ModuleDict, parts: Parts) -> Teaching:
        return OwnTeaching(nn.ModuleDict({"backbone": backbone, **heads}), self._frozen.images)

    def _pretended_teacher(
        self, parts: Parts, networks: Networks, sharder: PretendingSharder
    ) -> FrozenTeacher:
        weights = self.config.teacher.weights
        if not self._exists(weights):
            raise UserError(
                f"a rehearsal wants to know what the teacher is, and there is no {weights} here\n"
                "    give teacher.weights a published name, which nobody fetches, or a file of the "
                "same backbone; its values are not read"
            )
        heads = self._heads(parts).projectors
        networks.frozen = nn.ModuleDict(
            {head_name(n): self._placed_frozen(sharder, head) for n, head in heads.items()}
        )
        backbone = self._placed_frozen(sharder.over_all(), self._frozen.backbone)
        teaching = self._taught_by(backbone, networks.frozen, parts)
        placed = nn.ModuleDict({"backbone": backbone, **networks.frozen})
        return FrozenTeacher(teaching, placed, self._frozen)

    @staticmethod
    def _placed_frozen(sharder: Sharder, blueprint: nn.Module) -> nn.Module:
        placed = sharder.place(copy.deepcopy(blueprint), trains=False)
        return placed.eval().requires_grad_(False)

    def _placed_teacher(self, sharder: Sharder) -> nn.Module:
        """The teacher's backbone, spread over the processes of ``sharder``."""
        backbone = self._placed_frozen(sharder, self._frozen.backbone)
        fill_frozen(self._frozen, backbone)
        self._fingerprint = fingerprint(backbone)
        return backbone

    def _placed_heads(self, networks: Networks, parts: Parts, restored: bool) -> nn.ModuleDict:
        """The teacher's projectors, on this run's processes; a checkpoint gives them values."""
        heads = self._heads(parts)
        sharder = Sharder(self.config.parallel, networks.device, collectives.current_group())
        placed = nn.ModuleDict(
            {
                head_name(name): self._placed_frozen(sharder, projector)
                for name, projector in heads.projectors.items()
            }
        )
        if not restored:
            read = {head_name(name): placed[head_name(name)] for name in heads.read}
            fill_frozen(self._frozen, None, read)
            for name in heads.new:
                drawn = heads.projectors[name]
                parallel.initialise(placed[head_name(name)], drawn, self._seed(name))
        return placed

    def _seed(self, loss: str) -> int:
        return keyed_seed(self.config.seed, f"init.teacher.{head_name(loss)}")

    def _begin(self, trainer: Trainer, parts: Parts) -> None:
        heads = self._heads(parts)
        if not self._anybody(bool(heads.new)):
            return
        whole = {name: heads.projectors[name] for name in heads.new}
        fitted = fit_projectors(trainer, whole, self._seed)
        for name in heads.new:
            how = "prototypes are tokens of the first batches" if name in fitted else "random"
            log.warning(
                "The teacher's weights hold no projector of loss %r: it gets a new one, %s. "
                "Weights of a training checkpoint have projectors.",
                name,
                how,
            )

    def _anybody(self, wants: bool) -> bool:
        """Whether this run, or one beside it, wants something that all take part in."""
        return wants

    def _own_state(self, parts: Parts) -> dict[str, Any]:
        return {"teacher": {"weights": self.config.teacher.weights, "sum": self._fingerprint}}

    def _accept(self, state: Mapping[str, Any]) -> None:
        before = state.get("teacher", {}).get("sum", self._fingerprint)
        if abs(before - self._fingerprint) > _CLOSE * abs(before):
            raise CheckpointError(
                f"{self.config.teacher.weights} is not the teacher that this run has learnt from: "
                "bring that one back, or start in another output folder"
            )

    def _provenance(self) -> dict[str, str]:
        return {"distilled_from": self.config.teacher.weights}
