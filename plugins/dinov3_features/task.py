"""The ``features`` task: a dataset's images in, files of features and an index out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dinov3_features.check import describe_sizes, feature_rows, problems, read_some
from dinov3_features.configs import FeaturesTaskConfig
from dinov3_features.extract import DTYPES, Extraction, log
from dinov3_features.parts import FOLDER, Partition, PartStore, merge, summarize, write_tables
from dinov3_framework.contracts.data import Dataset
from dinov3_framework.contracts.running import Plan, Task
from dinov3_framework.data.images import SQUARE, ImageFit
from dinov3_framework.data.tokens import TokenReader
from dinov3_framework.data.workers import memory_complaint
from dinov3_framework.errors import DataError, RecipeError
from dinov3_framework.parallel.sharder import Sharder
from dinov3_framework.parallel.state_dicts import full_tensors
from dinov3_framework.registry import Registry
from dinov3_framework.runtime import collectives
from dinov3_framework.runtime.agreement import OwnErrors, broadcast_from_rank0
from dinov3_framework.runtime.processes import pick_device
from dinov3_framework.runtime.results import write_results
from dinov3_framework.weights.loaded import LoadedBackbone
from dinov3_framework.weights.loading import describe_recipe_backbone, load_recipe_backbone
from dinov3_framework.weights.tensor_file import CODES


class FeaturesTask(Task):
    """Extracts features in parts, resumably, and merges them."""

    def __init__(self, config: FeaturesTaskConfig, *, registry: Registry) -> None:
        self.config, self.registry = config, registry

    # ------------------------------------------------------------------ checking
    def check(self, world_size: int) -> Plan:
        config = self.config
        subject = describe_recipe_backbone(config, self.registry)
        fit = self._fit(subject)
        found = list(problems(config, subject, fit, world_size))
        if found:
            raise RecipeError(found)
        pick_device(config.parallel.device)
        reader = self._reader(subject)
        dataset: Dataset | None = None
        missing: list[str] = []
        images: list[tuple[str, str]] = []
        features: list[tuple[str, str]] = []
        try:
            dataset = self._dataset(subject)
        except DataError as error:
            missing.append(str(error))
        else:
            some = read_some(dataset, fit)
            images = [("dataset", dataset.describe()), ("sizes", describe_sizes(some))]
            images += [("note", note) for note in dataset.notes()]
            if some.data is not None:
                batch = len(some.data.pixels) / len(some.data.shapes) * config.batch_size
                if lack := memory_complaint(batch, workers=config.workers, processes=world_size):
                    missing.append(lack)
            features = feature_rows(config, reader, fit, some, len(dataset))
        parameters = sum(parameter.numel() for parameter in subject.backbone.parameters())
        sharded = f"sharded over {world_size}" if config.sharded else "whole in each process"
        size = "each image's own size" if fit.size is None else f"{fit.size} px"
        return Plan(
            {
                "backbone": [*subject.origin, ("parameters", f"{parameters:,}, {sharded}")],
                "images": [*images, ("fit", f"{config.fit}, {size}")],
                "features": features,
            },
            missing,
            prepared=dataset,
        )

    # ------------------------------------------------------------------ running
    def run(self, output_dir: Path, plan: Plan | None = None) -> None:
        with OwnErrors():
            self._run(output_dir, plan)

    def _run(self, output_dir: Path, plan: Plan | None) -> None:
        config = self.config
        device = pick_device(config.parallel.device)
        subject = self._placed(device)
        dataset = (plan and plan.prepared) or self._dataset(subject)
        # Of every process: a sharded backbone gives its values only to all of them.
        tensors = full_tensors(subject.backbone)
        partition = Partition.of(dataset, config.rows_per_part, tensors)
        store = PartStore(output_dir, partition)
        broadcast_from_rank0(store.prepare)
        left = len(broadcast_from_rank0(store.missing))
        if left < partition.parts:
            done = partition.parts - left
            log.info("Going on: %d of %d parts are there.", done, partition.parts)
        if left:
            Extraction(
                reader=self._reader(subject),
                dataset=dataset,
                fit=self._fit(subject),
                store=store,
                dtype=DTYPES[config.dtype],
                batch_size=config.batch_size,
                workers=config.workers,
                device=device,
                sharded=config.sharded,
            ).run()
        # The others are done: to merge may take longer than a collective may wait.
        if collectives.is_main():
            self._conclude(subject, dataset, store, output_dir)

    def _placed(self, device: torch.device) -> LoadedBackbone:
        """The recipe's backbone with its values, in eval mode; to be called by every process.

        With ``sharded`` it is split over the processes, each of which reads its own shards;
        otherwise each has all of it, with parameters in ``param_dtype``.
        """
        config, registry = self.config, self.registry
        if config.sharded:
            sharder = Sharder(config.parallel, device)
            return load_recipe_backbone(config, registry, sharder=sharder)
        subject = load_recipe_backbone(config, registry, device.type)
        for parameter in subject.backbone.parameters():
            # Buffers keep their type: a table of RoPE is not to be rounded.
            parameter.data = parameter.data.to(device, DTYPES[config.parallel.param_dtype])
        return subject

    def _conclude(
        self, subject: LoadedBackbone, dataset: Dataset, store: PartStore, output_dir: Path
    ) -> None:
        config, fit = self.config, self._fit(subject)
        summary = summarize(store)
        described = {"backbone": dict(subject.origin), "fit": config.fit, "size": fit.size}
        if config.merge:
            read = {"layers": list(self._reader(subject).layers), "norm": config.norm}
            values = {key: json.dumps(value) for key, value in (described | read).items()}
            written = merge(store, summary, output_dir, config.format, {"format": "pt", **values})
            files = [path.name for path in written]
        else:
            files = [f"{FOLDER}/{store.path(part).name}" for part in range(store.partition.parts)]
        write_tables(store, output_dir, config.merge, dataset.classes)
        results: dict[str, Any] = {
            "task": "features",
            "backbone": described["backbone"],
            "dataset": dataset.describe(),
            "images": summary.rows,
            "skipped": summary.skipped,
            "fit": config.fit,
            "size": fit.size,
            "tensors": {
                name: {"dtype": CODES[dtype], "shape": list(shape)}
                for name, (dtype, shape) in sorted(summary.specs.items())
            },
            "files": files,
        }
        write_results(output_dir, results)
        if config.merge:
            store.remove()
        if summary.skipped:
            log.warning(
                "%d of %d images cannot be read and were left out: %s",
                summary.skipped,
                store.partition.images,
                output_dir / "skipped.csv",
            )
        log.info("Features of %d images: %s", summary.rows, output_dir)

    # ------------------------------------------------------------------ parts of it
    def _dataset(self, subject: LoadedBackbone) -> Dataset:
        dataset: Dataset = self.registry.build(
            self.config.dataset, channels=subject.images.channels
        )
        if len(dataset) == 0:
            raise DataError(f"{dataset.describe()}: holds no images")
        return dataset

    def _fit(self, subject: LoadedBackbone) -> ImageFit:
        size = self.config.size
        if size is None and self.config.fit in SQUARE:
            size = subject.size
        return ImageFit(subject.images, subject.backbone.patch_size, self.config.fit, size)

    def _reader(self, subject: LoadedBackbone) -> TokenReader:
        config = self.config
        return TokenReader(subject.backbone, config.outputs, config.layers, config.norm)
