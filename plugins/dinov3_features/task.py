"""The ``features`` task: a dataset's images in, files of features and an index out."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from dinov3_features.check import Estimate, Look, mib, output_shapes, problems
from dinov3_features.configs import FeaturesTaskConfig
from dinov3_features.loop import DTYPES, Extraction, extract_parts
from dinov3_features.merge import Summary, merge, summarise, write_tables
from dinov3_features.parts import FOLDER, PartStore, Plan, digest
from dinov3_features.placing import placed_subject
from dinov3_framework.contracts.data import Dataset
from dinov3_framework.contracts.running import Plan, Task
from dinov3_framework.data.fit import ImageFit
from dinov3_framework.data.tokens import TokenReader
from dinov3_framework.errors import DataError, RecipeError
from dinov3_framework.parallel.state_dicts import full_tensors
from dinov3_framework.registry import Registry
from dinov3_framework.runtime import collectives
from dinov3_framework.runtime.agreement import RankFailure, from_main
from dinov3_framework.runtime.output import write_results
from dinov3_framework.runtime.processes import pick_device
from dinov3_framework.weights.loaded import LoadedBackbone
from dinov3_framework.weights.loading import describe_recipe_backbone

log = logging.getLogger(__name__)


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
        missing: list[str] = []
        images: list[tuple[str, str]] = []
        features: list[tuple[str, str]] = []
        try:
            dataset = self._dataset(subject)
        except DataError as error:
            missing.append(str(error))
        else:
            look = Look.at(dataset, fit)
            images = [("dataset", dataset.describe()), ("sizes", look.describe())]
            features = self._feature_rows(reader, fit, look, len(dataset))
        parameters = sum(parameter.numel() for parameter in subject.backbone.parameters())
        sharded = f"sharded over {world_size}" if config.sharded else "whole in each process"
        return Plan(
            {
                "backbone": [*subject.origin, ("parameters", f"{parameters:,}, {sharded}")],
                "images": [*images, ("fit", f"{config.fit}, {_size_text(fit)}")],
                "features": features,
            },
            missing,
        )

    def _feature_rows(
        self, reader: TokenReader, fit: ImageFit, look: Look, total: int
    ) -> list[tuple[str, str]]:
        channels = fit.images.channels
        found = {
            shape: output_shapes(reader, channels, *shape) for shape in sorted(set(look.shapes))
        }
        if not found or None in found.values():
            return [("disk", "the shapes of the features are known when they are there")]
        shapes = cast("dict[tuple[int, int], dict[str, tuple[int, ...]]]", found)
        rows = []
        for name in next(iter(shapes.values())):
            different = {each[name]: None for each in shapes.values()}
            low, high = min(different), max(different)
            text = str(list(low)) if low == high else f"{list(low)} to {list(high)}"
            rows.append((name, f"{text} {self.config.dtype}"))
        output_dir = self._output_dir()
        seen = [shapes[shape] for shape in look.shapes]
        estimate = Estimate.of(self.config, total, seen, output_dir)
        estimate.require_room(output_dir)
        about = "about " if fit.ragged else ""
        more = ", twice that while parts are merged" if self.config.merge else ""
        return [
            *rows,
            ("size", f"{about}{mib(estimate.features)}{more}"),
            ("free", f"{mib(estimate.free)} at {output_dir}"),
            ("part", f"{about}{mib(estimate.part)} in each process's memory"),
        ]

    # ------------------------------------------------------------------ running
    def run(self, output_dir: Path, plan: Plan | None = None) -> None:
        try:
            self._run(output_dir)
        except RankFailure as failure:
            raise failure.for_process() from failure.own

    def _run(self, output_dir: Path) -> None:
        device = pick_device(self.config.parallel.device)
        subject = placed_subject(self.config, self.registry, device)
        dataset = self._dataset(subject)
        weights = digest(full_tensors(subject.backbone))
        store = from_main(self._prepared, output_dir, dataset, weights)
        left = len(from_main(store.missing))
        if left < store.plan.parts:
            log.info(
                "Going on: %d of %d parts are there.", store.plan.parts - left, store.plan.parts
            )
        if left:
            self._extract(subject, dataset, store)
        # The others are done: to merge may take longer than a collective may wait.
        if collectives.is_main():
            self._conclude(subject, dataset, store, output_dir)

    def _extract(self, subject: LoadedBackbone, dataset: Dataset, store: PartStore) -> None:
        config = self.config
        extraction = Extraction(
            reader=self._reader(subject),
            dataset=dataset,
            fit=self._fit(subject),
            dtype=DTYPES[config.dtype],
            batch_size=config.batch_size,
            workers=config.workers,
            device=pick_device(config.parallel.device),
            sharded=config.sharded,
        )
        extract_parts(extraction, store)

    def _conclude(
        self, subject: LoadedBackbone, dataset: Dataset, store: PartStore, output_dir: Path
    ) -> None:
        config = self.config
        summary = summarise(store)
        if config.merge:
            described = self._metadata(subject)
            written = merge(store, summary, output_dir, config.format, described)
            files = [path.name for path in written]
        else:
            files = [f"{FOLDER}/{store.path(part).name}" for part in range(store.plan.parts)]
        write_tables(store, output_dir, config.merge)
        write_results(output_dir, self._results(subject, dataset, summary, files))
        if config.merge:
            store.remove()
        if summary.skipped:
            log.warning(
                "%d of %d images cannot be read and were left out: %s",
                summary.skipped,
                store.plan.images,
                output_dir / "skipped.csv",
            )
        log.info("Features of %d images: %s", summary.rows, output_dir)

    def _results(
        self, subject: LoadedBackbone, dataset: Dataset, summary: Summary, files: Sequence[str]
    ) -> dict[str, Any]:
        return {
            "task": "features",
            "backbone": dict(subject.origin),
            "dataset": dataset.describe(),
            "images": summary.rows,
            "skipped": summary.skipped,
            "fit": self.config.fit,
            "size": self._fit(subject).size,
            "tensors": {
                name: {"dtype": spec.dtype, "shape": list(spec.shape)}
                for name, spec in sorted(summary.specs.items())
            },
            "files": list(files),
        }

    def _metadata(self, subject: LoadedBackbone) -> dict[str, str]:
        config = self.config
        values = {
            "backbone": dict(subject.origin),
            "fit": config.fit,
            "size": self._fit(subject).size,
            "layers": list(self._reader(subject).layers),
            "norm": config.norm,
        }
        return {"format": "pt", **{key: json.dumps(value) for key, value in values.items()}}

    # ------------------------------------------------------------------ parts of it
    def _prepared(self, output_dir: Path, dataset: Dataset, weights: str) -> PartStore:
        plan = Plan.of(dataset, self.config.rows_per_part, weights)
        store = PartStore(output_dir, plan)
        store.prepare()
        return store

    def _dataset(self, subject: LoadedBackbone) -> Dataset:
        dataset: Dataset = self.registry.build(
            self.config.dataset, channels=subject.images.channels
        )
        if len(dataset) == 0:
            raise DataError(f"{dataset.describe()}: holds no images")
        return dataset

    def _fit(self, subject: LoadedBackbone) -> ImageFit:
        size = self.config.size
        if size is None and self.config.fit in ("crop", "squash"):
            size = subject.size
        return ImageFit(subject.images, subject.backbone.patch_size, self.config.fit, size)

    def _reader(self, subject: LoadedBackbone) -> TokenReader:
        config = self.config
        return TokenReader(subject.backbone, config.outputs, config.layers, config.norm)

    def _output_dir(self) -> Path:
        return Path(self.config.output_dir or "runs")


def _size_text(fit: ImageFit) -> str:
    return "each image's own size" if fit.size is None else f"{fit.size} px"
