"""The ``train_head`` task: a head on a backbone that is frozen or trained with it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import nn

from dinov3_framework import (
    Backbone,
    DataError,
    Dataset,
    Head,
    ImagesConfig,
    LoadedBackbone,
    Model,
    Problem,
    RecipeError,
    StreamDataset,
    Target,
    Transform,
    UserError,
    describe_recipe_backbone,
    keyed_seed,
    load_recipe_backbone,
)
from dinov3_framework.data.loader import LabeledBatch, Layout, TransformedBatches
from dinov3_framework.data.samples import SampleCheck, check_sample
from dinov3_framework.data.tokens import head_features, layers_complaint
from dinov3_framework.errors import problems_at
from dinov3_framework.parallel.sharder import Sharder, initialize
from dinov3_framework.parallel.state_dicts import fingerprint
from dinov3_framework.runtime.environment import made_with
from dinov3_framework.training.check import optimizer_rows
from dinov3_framework.training.simulation import SimulatedBatch, made_up_sample
from dinov3_framework.training.task import InitialState, TrainingMethod
from dinov3_framework.training.trainer import Trainer
from dinov3_framework.weights.export import export_gathered
from dinov3_framework.weights.heads import FINGERPRINT, TRAINED_ON, head_info
from dinov3_framework.weights.info import ComponentInfo
from dinov3_framework.weights.locations import HEAD, TUNED
from dinov3_heads import TrainHeadConfig
from dinov3_heads.feature_chunks import DTYPES
from dinov3_heads.reuse import Reuse, open_store, plan_reuse, reuse_problem
from dinov3_heads.reused_batches import FeatureBatch, ReusedBatches, blank_batch, fill
from dinov3_heads.unit import HeadUnit

_SIZE = 224  # pixels that an exported backbone is taken for, where nothing tells


@frozen
class HeadParts:
    """What a recipe's data pass through; the networks are on the meta device."""

    backbone: Backbone
    transform: Transform
    head: Head | None  # None where the data, which say what their targets are, are not here
    targets: Mapping[str, Target]
    dataset: Dataset | StreamDataset | None
    reuse: Reuse

    @cached_property
    def sample(self) -> SampleCheck:
        """What a first sample shows of the targets that the head learns."""
        wanted = () if self.head is None else self.head.targets
        return check_sample(self.dataset, wanted)


class TrainHead(TrainingMethod):
    """Trains any head on any backbone."""

    name = "train_head"
    config: TrainHeadConfig

    # ------------------------------------------------------------------ checking
    @cached_property
    def described(self) -> LoadedBackbone:
        """The backbone on the meta device, with all that is known of it."""
        return describe_recipe_backbone(self.config, self.registry, simulated=self.simulated)

    def images(self) -> ImagesConfig:
        return self.described.images

    def prepare(self, dataset: Dataset | StreamDataset | None = None) -> HeadParts:
        backbone = self.described.backbone
        targets = {} if dataset is None else dict(dataset.targets)
        problems: list[Problem] = []

        def build(key: str, part: Any, **runtime: Any) -> Any:
            try:
                return self.registry.build(part, **runtime)
            except UserError as error:
                problems.extend(problems_at(key, error))
            except IndexError:
                known = f"this backbone has 0 to {backbone.n_layers - 1}"
                problems.append(Problem(key, f"asks for a layer that is not there; {known}"))

        transform = build("transform", self.config.transform, images=self.images(), targets=targets)
        head = None
        if dataset is not None:
            with torch.device("meta"):
                head = build(
                    "head", self.config.head, features=backbone.feature_info, targets=targets
                )
        if problems:
            raise RecipeError(problems)
        reuse = plan_reuse(self.config, backbone, head, transform, dataset)
        return HeadParts(backbone, transform, head, targets, dataset, reuse)

    def shardable(self, prepared: HeadParts) -> Backbone:
        return prepared.backbone

    def problems(self, prepared: HeadParts, done: int) -> list[Problem]:
        backbone, head, size = prepared.backbone, prepared.head, prepared.transform.size
        patch, problems = backbone.patch_size, []
        if size is not None and any(side % patch for side in size):
            whole = size[0] // patch * patch
            message = f"makes images of {size[0]} x {size[1]} px, no multiple of the patch size"
            hint = f"take {whole} or {whole + patch}" if whole else f"take {patch}"
            problems.append(Problem("transform", f"{message} {patch} of the backbone", hint))
        if head is None:
            return problems
        problems += reuse_problem(self.config, prepared.reuse, prepared.dataset)
        problems += self._coupled(head)
        if complaint := layers_complaint(head.needs.layers, backbone.n_layers):
            problems.append(Problem("head", complaint))
        else:
            try:
                with torch.no_grad():
                    blank = torch.empty(1, backbone.in_chans, 2 * patch, 2 * patch, device="meta")
                    head_features(backbone, blank, head.needs)
            except UserError as error:
                problems += problems_at("head", error)
        if not self.simulated:
            problems += [Problem("dataset", text) for text in prepared.sample.complaints]
        return problems

    def _coupled(self, head: Head) -> Iterator[Problem]:
        """What would let parts of a head that are independent of each other touch."""
        if not head.independent_parts:
            return
        parts = "several heads at once, each as it would be trained alone"
        if self.config.optimizer.clip_grad is not None:
            message = f"clips by the gradient of all, and the head is {parts}"
            yield Problem("optimizer.clip_grad", message, 'set clip_grad = "none"')
        if self.config.tune_backbone:
            message = f"tunes the backbone by the losses of all, and the head is {parts}"
            yield Problem("tune_backbone", message, "leave it out, or train a single head")

    def model(self, prepared: HeadParts) -> Model | None:
        if prepared.head is None:
            return None
        return Model(prepared.backbone, self.images(), prepared.head, self._size(prepared))

    def sections(self, prepared: HeadParts, world_size: int, done: int) -> Mapping[str, Any]:
        config, head, backbone = self.config, prepared.head, prepared.backbone
        fate = "trained with the head" if config.tune_backbone else "frozen"
        rows = [*self.described.origin, ("parameters", f"{_count(backbone)}, {fate}")]
        sections = {"backbone": rows}
        if head is not None:
            layers = ", ".join(str(layer % backbone.n_layers) for layer in head.needs.layers)
            sections["head"] = [
                ("head", self.registry.of_config(config.head).component.name),
                ("parameters", _count(head)),
                ("layers", layers),
                *((f"predicts {name}", str(target)) for name, target in head.targets.items()),
            ]
        if not self.simulated and prepared.sample.rows:
            sections["first sample"] = list(prepared.sample.rows)
        size = prepared.transform.size
        images = "of several sizes" if size is None else f"{size[0]} x {size[1]} px"
        sections["batch"] = [
            ("images per step", f"{config.batch_size:,}, {images}"),
            *prepared.reuse.rows(world_size),
        ]
        return {**sections, "schedule": optimizer_rows(config)}

    def _size(self, prepared: HeadParts) -> int | None:
        """Pixels of the images that it is trained on, as far as one number tells."""
        size = prepared.transform.size
        return size[0] if size is not None and size[0] == size[1] else self.described.size

    # ------------------------------------------------------------------ running
    def unit(
        self, prepared: HeadParts, sharder: Sharder, state: InitialState, output_dir: Path | None
    ) -> HeadUnit:
        config, blueprint = self.config, self._head(prepared)
        absent = state is InitialState.ABSENT
        head: Any = sharder.place(copy.deepcopy(blueprint))
        if state is InitialState.INITIAL:
            initialize(head, blueprint, self._seed())
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
            initialize(untrained, blueprint, self._seed())
            return again, untrained

        infos = [self._head_info(prepared, {})]
        if config.tune_backbone:
            infos.append(self._backbone_info(prepared, {}))
        return HeadUnit(
            backbone.eval(),
            head,
            self.images(),
            size=self._size(prepared),
            tuned=config.tune_backbone,
            weights=self.described.name,
            fingerprint=None if absent or config.tune_backbone else fingerprint(backbone),
            notes={info.kind: info.to_metadata() for info in infos},
            initial=initial,
            feature_cache=None if config.feature_cache is None else Path(config.feature_cache),
        )

    def _head_info(self, prepared: HeadParts, made: Mapping[str, str]) -> ComponentInfo:
        component, values = self.registry.values_of(self.config.head)
        known = {**made, TRAINED_ON: self.described.name}
        size, targets = self._size(prepared), self._head(prepared).targets
        return head_info(component, values, self.images(), size, targets, known)

    def _backbone_info(self, prepared: HeadParts, made: Mapping[str, str]) -> ComponentInfo:
        component, values = self.registry.values_of(self.described.config)
        known = {**made, "tuned from": self.described.name}
        size = self._size(prepared) or _SIZE
        return ComponentInfo(component, values, self.images(), size, known)

    def _head(self, prepared: HeadParts) -> Head:
        if prepared.head is None:
            raise DataError(
                "a head is made for the targets of its data, and there are no data here"
            )
        return prepared.head

    def _seed(self) -> int:
        return keyed_seed(self.config.seed, "init.head")

    def _loaded(self, sharder: Sharder, *, trains: bool) -> Any:
        loaded = load_recipe_backbone(self.config, self.registry, sharder=sharder, trains=trains)
        return loaded.backbone

    def batches(
        self, prepared: HeadParts, dataset: Dataset | StreamDataset, layout: Layout
    ) -> TransformedBatches | ReusedBatches:
        config, reuse, workers = self.config, prepared.reuse, self.config.loader.workers
        batches = TransformedBatches(dataset, prepared.transform, layout, config.seed, workers)
        return ReusedBatches(batches, workers) if reuse.is_on else batches

    def before_training(self, trainer: Trainer, prepared: HeadParts) -> None:
        """Extract what is to be reused, or find it in the folder."""
        batches, unit, config = trainer.maker, trainer.unit, self.config
        if not isinstance(batches, ReusedBatches) or trainer.done >= config.iterations:
            return
        batches.store = open_store(
            prepared.reuse,
            unit.backbone,
            batches.dataset,
            self._head(prepared).needs,
            transform=self.registry.values_of(config.transform),
            images=self.images(),
            dtypes=(config.parallel.param_dtype, config.feature_dtype),
        )
        fill(
            batches.store,
            unit.backbone,
            self._head(prepared).needs,
            batches.transformed,
            shape=prepared.reuse.shape,
            dtype=DTYPES.get(config.feature_dtype),
            device=trainer.device,
            workers=config.loader.workers,
        )

    def image_bytes(self, prepared: HeadParts) -> int:
        if prepared.reuse.is_on:
            return prepared.reuse.sample_bytes
        height, width = prepared.transform.size or (0, 0)
        return 4 * self.images().channels * height * width

    def simulated_batches(self, prepared: HeadParts, layout: Layout) -> Iterator[SimulatedBatch]:
        size, count = prepared.transform.size, layout.per_micro_batch
        if size is None:
            raise UserError(
                "images of several sizes cannot be estimated; let the transform crop them to one"
            )
        self._head(prepared)
        reuse = prepared.reuse
        sample = prepared.transform(made_up_sample(prepared.targets, size, self.images().channels))
        images = LabeledBatch(prepared.transform.collate([sample] * count))
        if reuse.blank is None:
            yield _simulated(images, "", 1.0)
            return
        dtype = DTYPES.get(self.config.feature_dtype)
        yield _simulated(blank_batch(reuse.blank, images.samples.targets, count, dtype), "steps", 1)
        # Beside the steps: it takes the most memory, and has its time.
        calls = -(-reuse.count // (reuse.chunk_size * layout.world_size))
        share = calls / (self.config.iterations * layout.accumulation_steps)
        chunk = LabeledBatch(prepared.transform.collate([sample] * reuse.chunk_size))
        yield _simulated(chunk, "extraction, once", share)

    # ------------------------------------------------------------------ exporting
    def export(self, trainer: Trainer, prepared: HeadParts) -> Path:
        config, folder, unit = self.config, trainer.run.output_dir, trainer.unit
        made = {
            **made_with(self.registry),
            "iterations": str(config.iterations),
            "images_seen": str(config.iterations * config.batch_size),
        }
        known = {**made, FINGERPRINT: repr(fingerprint(unit.backbone))}
        export_gathered(folder / HEAD, unit.head, self._head_info(prepared, known))
        if config.tune_backbone:
            export_gathered(folder / TUNED, unit.backbone, self._backbone_info(prepared, made))
        return folder / HEAD

    def expected_exports(self, prepared: HeadParts) -> Mapping[str, tuple[Mapping[str, Any], Any]]:
        info = self._head_info(prepared, {}).to_metadata()
        found = {HEAD: (self._head(prepared).state_dict(), {"head": info})}
        if self.config.tune_backbone:
            info = self._backbone_info(prepared, {}).to_metadata()
            found[TUNED] = (prepared.backbone.state_dict(), {"backbone": info})
        return found

    def usage(self, export: Path) -> str:
        run = export.parents[1]
        weights = run if self.config.tune_backbone else self.config.weights
        # A backbone without weights is drawn again, from the same table and seed.
        source = f'weights = "{weights}"\n  head = "{run}"'
        if weights is None:
            source = f'seed = {self.config.seed}\n  head = "{run}"\n\n  [backbone]'
            source += "  # and [images], as in this recipe"
        return (
            "Evaluate the head, with a table [evaluations.NAME] for each evaluation in a recipe:\n"
            f'\n  task = "evaluate"\n  {source}\n'
        )


def _count(network: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in network.parameters()):,}"


def _simulated(batch: LabeledBatch | FeatureBatch, name: str, share: float) -> SimulatedBatch:
    def empty() -> LabeledBatch | FeatureBatch:
        return batch.changed(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))

    rows = [("images of a micro-batch", f"{len(batch):,}")]
    return SimulatedBatch(make=empty, name=name, share=share, rows=rows)
