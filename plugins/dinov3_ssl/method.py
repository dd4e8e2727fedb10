"""What pretraining and distillation share: one student, its objective, its checks, its export."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn

from dinov3_framework.checkpoints.store import CheckpointStore
from dinov3_framework.contracts.data import Dataset, StreamDataset
from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.contracts.running import Model, Rows
from dinov3_framework.data.loader import Layout
from dinov3_framework.errors import Problem, RecipeError
from dinov3_framework.parallel.sharder import Sharder
from dinov3_framework.runtime.agreement import OwnErrors, run_on_all_ranks
from dinov3_framework.runtime.environment import made_with
from dinov3_framework.training.simulation import SimulatedBatch
from dinov3_framework.training.task import (
    CHECKPOINTS,
    InitialState,
    TrainingMethod,
)
from dinov3_framework.training.trainer import Trainer
from dinov3_framework.weights.export import export_gathered
from dinov3_framework.weights.info import ComponentInfo
from dinov3_framework.weights.locations import EXPORT, exists, missing_hint
from dinov3_ssl.batches import CropBatches
from dinov3_ssl.configs import StudentTrainingConfig, momentum, resolved_backbone
from dinov3_ssl.frozen import memory_of, published_as
from dinov3_ssl.init_from import open_weights
from dinov3_ssl.memory import memory_rows
from dinov3_ssl.networks import Blueprint, Networks
from dinov3_ssl.objective import Objective
from dinov3_ssl.preflight import Parts, config_problems, parts_problems, sections
from dinov3_ssl.simulation import simulated_batches
from dinov3_ssl.teaching import Teaching
from dinov3_ssl.unit import StudentUnit

log = logging.getLogger("dinov3_framework.ssl")

INITIAL = "exports/initial_backbone.safetensors"  # the teacher's before the first iteration


class StudentMethod(TrainingMethod):
    """Trains a student with any losses; its moving average is what is exported."""

    config: StudentTrainingConfig
    unit_class: type[StudentUnit] = StudentUnit
    masks_student = True  # whether masked patches are hidden from the student
    _origin: Mapping[str, str] = {}

    # ------------------------------------------------------------------ checking
    def config_problems(self, world_size: int) -> list[Problem]:
        return config_problems(self.config)

    def missing(self, done: int) -> list[str]:
        return [
            self._no_such_weights(key, path)
            for key, path in self.weights_read(done).items()
            if not exists(path, self.registry)
        ]

    def _no_such_weights(self, key: str, path: str) -> str:
        if key == "continue_from.run":
            return f"{key}: there is no {path}\n    give the folder of the run to go on with"
        return f"{key}: there is no {path}\n    {missing_hint(path, self.registry)}"

    def prepare(self, dataset: Dataset | StreamDataset | None = None) -> Parts:
        return self._parts(self._unseen(self.done()))

    def shardable(self, prepared: Parts) -> Backbone:
        return prepared.blueprint.backbone

    def problems(self, prepared: Parts, done: int) -> list[Problem]:
        found = parts_problems(self.config, prepared, self.masks_student)
        try:
            self._initial_rows(prepared, done)
        except RecipeError as error:
            found += error.problems
        return found

    def model(self, prepared: Parts) -> Model:
        size = prepared.augmentation.views["global"].size
        return Model(prepared.blueprint.backbone, self.config.images, size=size)

    def sections(self, prepared: Parts, world_size: int, done: int) -> Mapping[str, Rows]:
        config, launcher = self.config, self.config.launcher
        elsewhere = launcher is not None and self.registry.build(launcher).elsewhere
        rows = sections(config, prepared, world_size)
        if not self.simulated:
            frozen = self.frozen_networks()
            memory = memory_rows(config, prepared, world_size, elsewhere, frozen)
            rows["memory"] = list(memory)
        return rows

    def frozen_networks(self) -> Sequence[nn.Module]:
        """What a step holds beside student, moving average and anchors; on the meta device."""
        return ()

    def sections_after(self, prepared: Parts, done: int) -> Mapping[str, Rows]:
        rows = self._initial_rows(prepared, done)
        return {"init_from": rows} if rows else {}

    def _initial_rows(self, parts: Parts, done: int) -> Rows:
        """What a check shows of ``[init_from]``; raises ``RecipeError`` if it does not fit."""
        init = self.config.init_from
        if init is None or "init_from.weights" in self._unseen(done):
            return []
        if done:
            return [
                ("weights", f"{init.weights}, not read: the run goes on after iteration {done:,}")
            ]
        if self.simulated and not Path(init.weights).exists():
            return [("weights", f"{init.weights}, not looked at")]
        with open_weights(self.config, parts.blueprint, self.registry) as weights:
            return weights.rows(parts.blueprint)

    # ------------------------------------------------------------------ weights
    def weights(self) -> dict[str, str]:
        """Everything that a new run reads before its first step, by key of the recipe."""
        init = self.config.init_from
        found = {} if init is None else {"init_from.weights": init.weights}
        for name, loss in self.config.losses.items():
            anchor = self.registry.build(loss).anchor()
            if anchor is not None and anchor.config.weights is not None:
                found[f"losses.{name}.anchor.weights"] = anchor.config.weights
        return found

    def weights_read(self, done: int) -> dict[str, str]:
        """Those of :meth:`weights` that this run reads; a run that is on needs none again."""
        return {} if done else self.weights()

    def _unseen(self, done: int) -> dict[str, str]:
        """Those of which nothing can be told here."""
        return {key: path for key, path in self.weights_read(done).items() if not self.seen(path)}

    def seen(self, source: str) -> bool:
        """Whether it can be told what weights are."""
        if self.simulated:
            return Path(source).exists() or self.known(source) is not None
        return exists(source, self.registry)

    def known(self, source: str) -> Mapping[str, str] | None:
        """What is known of weights that an estimate does not read."""
        here = not self.simulated or Path(source).exists()
        return None if here else published_as(source, self.registry)

    # ------------------------------------------------------------------ parts
    def _parts(self, unseen: Collection[str]) -> Parts:
        """``unseen`` are keys of weights that are not to be looked at."""
        config = self.config
        losses = {name: self.registry.build(loss) for name, loss in config.losses.items()}
        blueprint = Blueprint.draw(
            self.registry,
            resolved_backbone(config),
            losses,
            self._known_anchors() | self._memory().get("anchors", {}),
            [name for name in losses if f"losses.{name}.anchor.weights" in unseen],
        )
        augmentation = self.registry.build(
            config.augmentation,
            channels=config.images.channels,
            patch_size=blueprint.backbone.patch_size,
        )
        return Parts(augmentation, losses, blueprint)

    def _known_anchors(self) -> dict[str, Mapping[str, str]]:
        """By loss."""
        read = self.weights()
        keys = {name: f"losses.{name}.anchor.weights" for name in self.config.losses}
        known = {name: self.known(read[key]) for name, key in keys.items() if key in read}
        return {name: memory for name, memory in known.items() if memory is not None}

    def _memory(self) -> dict[str, Any]:
        """What this run's newest checkpoint remembers besides tensors; empty if there is none."""
        if self.config.output_dir is None:
            return {}
        return CheckpointStore(Path(self.config.output_dir) / CHECKPOINTS).peek()

    def done(self) -> int:
        """After which iteration this run would go on; 0 if it would begin."""
        if self.config.output_dir is None:
            return 0
        steps = CheckpointStore(Path(self.config.output_dir) / CHECKPOINTS).steps()
        return steps[-1] if steps else 0

    # ------------------------------------------------------------------ running
    @abstractmethod
    def teaching(
        self, networks: Networks, parts: Parts, sharder: Sharder, state: InitialState
    ) -> Teaching | None:
        """Whom the student learns from; None: its moving average."""

    def own_notes(self) -> Mapping[str, Any]:
        """JSON values that checkpoints keep for this method."""
        return {}

    @property
    def starts_from_weights(self) -> bool:
        """Whether the moving average has values of its own before the first iteration."""
        init = self.config.init_from
        return init is not None and init.into != "student"

    def unit(
        self, prepared: Parts, sharder: Sharder, state: InitialState, output_dir: Path | None
    ) -> StudentUnit:
        config = self.config
        networks = self.networks(prepared, sharder, state, output_dir)
        teaching = self.teaching(networks, prepared, sharder, state)
        losses = {name: loss.to(sharder.device) for name, loss in prepared.losses.items()}
        objective = Objective(
            losses,
            config.losses,
            networks,
            config.images,
            teaching=teaching,
            masking=self.masks_student,
            simulated=self.simulated,
        )
        weights = prepared.blueprint.anchor_weights
        anchors = {name: memory_of(each) for name, each in weights.items()}
        initial = self.starts_from_weights and output_dir is not None
        return self.unit_class(
            networks,
            objective,
            momentum(config),
            config.images,
            self.registry,
            size=prepared.augmentation.views["global"].size,
            notes=({"anchors": anchors} if anchors else {}) | dict(self.own_notes()),
            initial=output_dir / INITIAL if initial and output_dir is not None else None,
        )

    def networks(
        self, parts: Parts, sharder: Sharder, state: InitialState, output_dir: Path | None
    ) -> Networks:
        """The networks, with their first values unless ``state`` says otherwise.

        A checkpoint gives them where there is one: the weights may be gone by then.
        """
        config, blueprint = self.config, parts.blueprint
        if state is not InitialState.INITIAL:
            return Networks(blueprint, sharder, config.seed, restored=True)
        if config.init_from is None:
            return Networks(blueprint, sharder, config.seed)
        with ExitStack() as stack:
            opened = open_weights(config, blueprint, self.registry)
            with OwnErrors():
                weights = run_on_all_ranks(stack.enter_context, opened)
            for label, value in weights.rows(blueprint):
                log.info("init_from: %s: %s", label, value)
            networks = Networks(blueprint, sharder, config.seed, first=weights)
            self._origin = weights.origin()
        if self.starts_from_weights and output_dir is not None:
            self.export_average(output_dir / INITIAL, networks, parts, self._origin)
        return networks

    def origin(self, unit: Any) -> Mapping[str, str]:
        return self._origin

    def batches(
        self, prepared: Parts, dataset: Dataset | StreamDataset, layout: Layout
    ) -> CropBatches:
        config = self.config
        return CropBatches(
            dataset, prepared.augmentation, layout, config.seed, config.loader.workers
        )

    def image_bytes(self, prepared: Parts) -> int:
        views = prepared.augmentation.views.values()
        return self.config.images.channels * sum(view.crops * view.size**2 for view in views)

    def simulated_batches(self, prepared: Parts, layout: Layout) -> Iterator[SimulatedBatch]:
        teacher = self.simulated_teacher(prepared)
        return simulated_batches(self.config, prepared, layout, layout.per_micro_batch, teacher)

    def simulated_teacher(self, prepared: Parts) -> Backbone:
        """The backbone that the student learns from, on the meta device."""
        return prepared.blueprint.backbone

    # ------------------------------------------------------------------ exporting
    def export(self, trainer: Trainer, prepared: Parts) -> Path:
        config, path = self.config, trainer.run.output_dir / EXPORT
        provenance = {
            "network": "teacher",
            **made_with(self.registry),
            "iterations": str(config.iterations),
            "images_seen": str(config.iterations * config.batch_size),
            **trainer.origin,
            **self.provenance(),
        }
        self.export_average(path, trainer.unit.placed, prepared, provenance)  # type: ignore[attr-defined]
        return path

    def provenance(self) -> Mapping[str, str]:
        """What the export records of its making besides."""
        return {}

    def export_average(
        self, path: Path, networks: Networks, parts: Parts, provenance: Mapping[str, str]
    ) -> None:
        """Write the moving average's backbone as a file of its own; by every process."""
        export_gathered(path, networks.teacher["backbone"], self._info(parts, provenance))

    def _info(self, parts: Parts, provenance: Mapping[str, str]) -> ComponentInfo:
        component, values = self.registry.values_of(resolved_backbone(self.config))
        size = parts.augmentation.views["global"].size
        return ComponentInfo(component, values, self.config.images, size, provenance)

    def expected_exports(self, prepared: Parts) -> Mapping[str, tuple[Mapping[str, Any], Any]]:
        info = self._info(prepared, {"network": "teacher"})
        # Whole files are mapped into memory when they are opened, and this one may be larger.
        state = prepared.blueprint.backbone.state_dict()
        return {EXPORT: (state, {"backbone": info.to_metadata()})}
