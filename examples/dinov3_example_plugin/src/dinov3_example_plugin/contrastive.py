"""SimCLR (Chen et al. 2020, arXiv:2002.05709): a whole training of its own, in one file.

Two random views of each image are to be told apart from those of all other images. The framework's
trainer does the rest: batches, schedules, precision, sharding, checkpoints, metrics, observers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from dinov3_example_plugin import ContrastiveConfig, VicRegConfig
from dinov3_example_plugin.vicreg import Expander
from dinov3_framework import (
    Backbone,
    Dataset,
    Model,
    Sample,
    SampleBatch,
    Step,
    StepResult,
    StreamDataset,
    TrainUnit,
    keyed_seed,
    normalize,
)
from dinov3_framework.data.loader import BatchMaker, LabeledBatch, Layout
from dinov3_framework.parallel.sharder import Sharder, initialize, state_of
from dinov3_framework.runtime import collectives
from dinov3_framework.training.task import InitialState, TrainingMethod
from dinov3_framework.training.trainer import Trainer
from dinov3_framework.weights.export import export_gathered
from dinov3_framework.weights.info import ComponentInfo

EXPORT = "exports/backbone.safetensors"


class TwoViews(BatchMaker[Tensor, LabeledBatch]):
    """Batches [B, 2, C, S, S] of two random views of each image."""

    def __init__(self, config: ContrastiveConfig, dataset: Any, layout: Layout) -> None:
        super().__init__(dataset, layout, config.seed, config.loader.workers)
        crop = v2.RandomResizedCrop(config.size, (config.smallest, 1))
        self.images, self.view = config.images, v2.Compose([crop, v2.RandomHorizontalFlip()])

    def prepare(self, sample: Sample, place: int, step: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_seed(self.seed, "views", place))
            views = torch.stack([self.view(sample.image), self.view(sample.image)])
        return normalize(views, self.images)

    def collate(
        self, items: Sequence[Tensor], step: int, micro: int, corrupt: tuple[str, ...]
    ) -> LabeledBatch:
        return LabeledBatch(SampleBatch(torch.stack(list(items)), {}), corrupt)


def contrastive_loss(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Equation 1 of the paper, over embeddings [B, E] of the two views on all processes."""
    views = [collectives.all_gather(F.normalize(v.float(), dim=-1)) for v in (first, second)]
    both = torch.cat(views)
    itself = torch.eye(len(both), dtype=torch.bool, device=both.device)
    similarity = (both @ both.T / temperature).masked_fill(itself, -torch.inf)
    partner = torch.arange(len(both), device=both.device).roll(len(views[0]))
    return F.cross_entropy(similarity, partner)


class ContrastiveUnit(TrainUnit):
    """A backbone and an expander of its class tokens."""

    def __init__(self, config: ContrastiveConfig, backbone: Any, expander: Any, first: Any) -> None:
        self.config, self.backbone, self.expander, self._first = config, backbone, expander, first
        self.networks = {"backbone": backbone, "expander": expander}

    def before_step(self, step: Step) -> None:
        self.backbone.train()  # an evaluation left it in eval mode

    def forward(self, batch: LabeledBatch, step: Step) -> StepResult:
        views = batch.samples.images.flatten(0, 1)  # type: ignore[union-attr]
        first, second = self.expander(self.backbone(views)).unflatten(0, (-1, 2)).unbind(1)
        loss = contrastive_loss(first, second, self.config.temperature)
        return StepResult(loss, {"contrastive": loss.detach()})

    def state(self) -> dict[str, Tensor]:
        return state_of(self.networks)

    def model(self) -> Model:
        return self._model(self.backbone, "trained backbone")

    def initial_model(self) -> Model:
        return self._model(self._first(), "backbone before training")

    def _model(self, backbone: Backbone, name: str) -> Model:
        return Model(backbone.eval(), self.config.images, size=self.config.size, name=name)


class Parts(NamedTuple):
    """Both networks, on the meta device."""

    backbone: Backbone
    expander: Expander


class Contrastive(TrainingMethod):
    """The task ``contrastive``."""

    name = "contrastive"
    config: ContrastiveConfig

    def prepare(self, dataset: Dataset | StreamDataset | None = None) -> Parts:
        with torch.device("meta"):
            backbone = self.registry.build(self._backbone())
            expander = VicRegConfig(output_dim=self.config.output_dim)
            return Parts(backbone, Expander(expander, backbone.embed_dim))

    def shardable(self, prepared: Parts) -> Backbone:
        return prepared.backbone

    def unit(
        self, prepared: Parts, sharder: Sharder, state: InitialState, output_dir: Path | None
    ) -> ContrastiveUnit:
        def placed(part: str, draw: bool, trains: bool) -> Any:
            blueprint = getattr(prepared, part)
            network = sharder.place(copy.deepcopy(blueprint), trains=trains)
            if draw:
                initialize(network, blueprint, keyed_seed(self.config.seed, f"init.{part}"))
            return network

        new = state is InitialState.INITIAL
        networks = [placed(part, new, trains=True) for part in Parts._fields]
        first = partial(placed, "backbone", True, trains=False)
        return ContrastiveUnit(self.config, *networks, first)

    def batches(self, prepared: Parts, dataset: Any, layout: Layout) -> TwoViews:
        return TwoViews(self.config, dataset, layout)

    def export(self, trainer: Trainer, prepared: Parts) -> Path:
        path = trainer.run.output_dir / EXPORT
        export_gathered(path, trainer.unit.networks["backbone"], self._info())
        return path

    def expected_exports(self, prepared: Parts) -> Mapping[str, Any]:
        return {EXPORT: (prepared.backbone.state_dict(), {"backbone": self._info().to_metadata()})}

    def _backbone(self) -> Any:
        return attrs.evolve(self.config.backbone, in_chans=self.config.images.channels)

    def _info(self) -> ComponentInfo:
        component, values = self.registry.values_of(self._backbone())
        made = {"task": self.name, "iterations": str(self.config.iterations)}
        return ComponentInfo(component, values, self.config.images, self.config.size, made)
