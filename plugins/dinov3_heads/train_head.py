"""The ``train_head`` task: a head on a backbone that is frozen or trained with it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from attrs import frozen

from dinov3_framework import (
    Backbone,
    DataError,
    Dataset,
    Head,
    ImagesConfig,
    Model,
    Problem,
    RecipeError,
    StreamDataset,
    Target,
    Transform,
    UserError,
    keyed_seed,
)
from dinov3_framework.data.loader import LabelledBatch, Layout, TransformedBatches
from dinov3_framework.data.tokens import head_features, layers_complaint
from dinov3_framework.errors import problems_at
from dinov3_framework.parallel.sharder import Sharder, initialise
from dinov3_framework.parallel.state_dicts import fingerprint
from dinov3_framework.training.check import optimizer_rows
from dinov3_framework.training.simulation import SimulatedBatch, made_up_sample
from dinov3_framework.training.task import InitialState, TrainingMethod
from dinov3_framework.training.trainer import Trainer
from dinov3_framework.weights.export import export_gathered
from dinov3_framework.weights.info import BackboneInfo
from dinov3_framework.weights.loading import describe_recipe_backbone, load_recipe_backbone
from dinov3_heads import TrainHeadConfig
from dinov3_heads.unit import HeadUnit
from dinov3_heads.weights import BACKBONE, HEAD, head_info


@frozen
class HeadParts:
    """What a recipe's data pass through; the networks are on the meta device."""

    backbone: Backbone
    transform: Transform
    head: Head | None  # None where the data, which say what their targets are, are not here
    targets: Mapping[str, Target]


class TrainHead(TrainingMethod):
    """Trains any head on any backbone."""

    name = "train_head"
    config: TrainHeadConfig

    # ------------------------------------------------------------------ checking
    @cached_property
    def described(self) -> Any:
        """The backbone on the meta device, with all that is known of it."""
        return describe_recipe_backbone(self.config, self.registry, simulated=self.simulated)

    def images(self) -> ImagesConfig:
        return self.described.images  # type: ignore[no-any-return]

    def prepare(self, dataset: Dataset | StreamDataset | None = None) -> HeadParts:
        backbone = self.described.backbone
        targets = {} if dataset is None else dict(dataset.targets)
        problems: list[Problem] = []

        def build(key: str, **runtime: Any) -> Any:
            try:
                return self.registry.build(getattr(self.config, key), **runtime)
            except UserError as error:
                problems.extend(problems_at(key, error))

        transform = build("transform", images=self.images(), targets=targets)
        head = None
        if dataset is not None:
            with torch.device("meta"):
                head = build("head", features=backbone.feature_info, targets=targets)
        if problems:
            raise RecipeError(problems)
        return HeadParts(backbone, transform, head, targets)

    def shardable(self, prepared: HeadParts) -> Backbone:
        return prepared.backbone

    def problems(self, prepared: HeadParts, done: int) -> list[Problem]:
        backbone, head, size = prepared.backbone, prepared.head, prepared.transform.size
        patch, problems = backbone.patch_size, []
        if size is not None and (size[0] % patch or size[1] % patch):
            what = f"makes images of {size[0]} x {size[1]} px, no multiple of the backbone's patch"
            near = " or ".join(
                str(s) for s in (size[0] // patch * patch, -(-size[0] // patch) * patch) if s
            )
            problems.append(Problem("transform", f"{what} size {patch}", f"take {near}"))
        if head is None:
            return problems
        if complaint := layers_complaint(head.needs.layers, backbone.n_layers):
            problems.append(Problem("head", complaint))
        else:
            try:
                with torch.no_grad():
                    blank = torch.empty(1, backbone.in_chans, 2 * patch, 2 * patch, device="meta")
                    head_features(backbone, blank, head.needs)
            except UserError as error:
                problems += problems_at("head", error)
        return problems

    def model(self, prepared: HeadParts) -> Model | None:
        if prepared.head is None:
            return None
        return Model(prepared.backbone, self.images(), prepared.head, self._size(prepared))

    def sections(self, prepared: HeadParts, world_size: int, done: int) -> Mapping[str, Any]:
        described, config = self.described, self.config
        count = sum(p.numel() for p in prepared.backbone.parameters())
        fate = "trained with the head" if config.tune_backbone else "frozen"
        backbone = [("backbone", described.name), *described.provenance.items()]
        sections = {"backbone": [*backbone, ("parameters", f"{count:,}, {fate}")]}
        if prepared.head is not None:
            needs, head = prepared.head.needs, prepared.head
            sections["head"] = [
                ("head", self.registry.of_config(config.head).component.name),
                ("parameters", f"{sum(p.numel() for p in head.parameters()):,}"),
                (
                    "layers",
                    ", ".join(str(layer % prepared.backbone.n_layers) for layer in needs.layers),
                ),
                *((f"predicts {name}", str(target)) for name, target in head.targets.items()),
            ]
        size = prepared.transform.size
        images = "of several sizes" if size is None else f"{size[0]} x {size[1]} px"
        sections["batch"] = [("images per step", f"{config.batch_size:,}, {images}")]
        return {**sections, "schedule": optimizer_rows(config)}

    def _size(self, prepared: HeadParts) -> int | None:
        """Pixels of the images that it is trained on, as far as one number tells."""
        size = prepared.transform.size
        known: int | None = self.described.size
        return size[0] if size is not None and size[0] == size[1] else known

    # ------------------------------------------------------------------ running
    def unit(
        self, prepared: HeadParts, sharder: Sharder, state: InitialState, output_dir: Path | None
    ) -> HeadUnit:
        config, blueprint = self.config, self._head(prepared)
        absent = state is InitialState.ABSENT
        head: Any = sharder.place(copy.deepcopy(blueprint))
        if state is InitialState.INITIAL:
            initialise(head, blueprint, self._seed())
        if absent or (config.tune_backbone and state is InitialState.RESTORED):
            backbone: Any = sharder.place(
                copy.deepcopy(prepared.backbone), trains=config.tune_backbone
            )
        else:
            backbone = self._loaded(sharder, trains=config.tune_backbone)
        backbone.requires_grad_(config.tune_backbone)

        def initial() -> tuple[Backbone, Head]:
            again = self._loaded(sharder, trains=False) if config.tune_backbone else backbone
            untrained: Any = sharder.place(copy.deepcopy(blueprint), trains=False)
            initialise(untrained, blueprint, self._seed())
            return again, untrained

        infos = {"head": self._head_info(prepared, {}).to_metadata()}
        return HeadUnit(
            backbone.eval(),
            head,
            self.images(),
            size=self._size(prepared),
            tuned=config.tune_backbone,
            weights=self.described.name,
            fingerprint=None if absent or config.tune_backbone else fingerprint(backbone),
            notes=infos,
            initial=initial,
        )

    def _head_info(self, prepared: HeadParts, made: Mapping[str, str]) -> Any:
        component, values = self.registry.values_of(self.config.head)
        provenance = {**made, "backbone": self.described.component, "weights": self.described.name}
        return head_info(
            component,
            values,
            self.images(),
            self._size(prepared) or 0,
            self._head(prepared).targets,
            provenance,
        )

    def _backbone_info(self, prepared: HeadParts, made: Mapping[str, str]) -> Any:
        component, values = self.registry.values_of(self.described.config)
        return BackboneInfo(
            component,
            values,
            self.images(),
            self._size(prepared) or 224,
            {**made, "tuned_from": self.described.name},
        )

    def _head(self, prepared: HeadParts) -> Head:
        if prepared.head is None:
            raise DataError(
                "a head is made for the targets of its data, and there are no data here"
            )
        return prepared.head

    def _seed(self) -> int:
        return keyed_seed(self.config.seed, "init.head")

    def _loaded(self, sharder: Sharder, *, trains: bool) -> Any:
        return load_recipe_backbone(
            self.config, self.registry, sharder=sharder, trains=trains
        ).backbone

    def batches(
        self, prepared: HeadParts, dataset: Dataset | StreamDataset, layout: Layout
    ) -> TransformedBatches:
        config = self.config
        return TransformedBatches(
            dataset, prepared.transform, layout, config.seed, config.loader.workers
        )

    def simulated_batches(self, prepared: HeadParts, layout: Layout) -> Iterator[SimulatedBatch]:
        if prepared.transform.size is None:
            raise UserError(
                "images of several sizes cannot be estimated; let the transform crop them"
            )
        self._head(prepared)
        size, channels = prepared.transform.size, self.images().channels
        sample = prepared.transform(made_up_sample(prepared.targets, size, channels))
        count = layout.per_micro_batch
        batch = LabelledBatch(prepared.transform.collate([sample] * count))

        def empty() -> LabelledBatch:
            return batch.changed(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))

        yield SimulatedBatch(make=empty, rows=[("images of a micro-batch", f"{count:,}")])

    # ------------------------------------------------------------------ exporting
    def export(self, trainer: Trainer, prepared: HeadParts) -> Path:
        config, folder, unit = self.config, trainer.run.output_dir, trainer.unit
        made = {
            "iterations": str(config.iterations),
            "images_seen": str(config.iterations * config.batch_size),
        }
        export_gathered(folder / HEAD, unit.head, self._head_info(prepared, made))
        if config.tune_backbone:
            info = self._backbone_info(prepared, made)
            export_gathered(folder / BACKBONE, unit.backbone, info)
        return folder / HEAD

    def expected_exports(self, prepared: HeadParts) -> Mapping[str, tuple[Mapping[str, Any], Any]]:
        info = self._head_info(prepared, {}).to_metadata()
        found = {HEAD: (self._head(prepared).state_dict(), {"head": info})}
        if self.config.tune_backbone:
            state = prepared.backbone.state_dict()
            info = self._backbone_info(prepared, {}).to_metadata()
            found[BACKBONE] = (state, {"backbone": info})
        return found

    def usage(self, export: Path) -> str:
        weights = export.parents[1] if self.config.tune_backbone else self.config.weights
        return (
            "Evaluate the head on its backbone, with [evaluations.NAME] tables in a recipe:\n\n"
            f'  dinov3-run RECIPE task=evaluate weights="{weights}" head="{export}"\n'
        )
