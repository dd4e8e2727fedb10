"""Evaluations on their own: of a backbone, or of a head on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attrs import evolve

from dinov3_framework import (
    DataError,
    LoadedBackbone,
    Model,
    Plan,
    Registry,
    Task,
    describe_recipe_backbone,
    load_recipe_backbone,
)
from dinov3_framework.data.feature_cache import FeatureCache
from dinov3_framework.runtime import collectives
from dinov3_framework.runtime.results import Record, print_results, write_results
from dinov3_framework.weights.heads import (
    LoadedHead,
    describe_head,
    load_head,
    warn_of_another_backbone,
)
from dinov3_heads import EvaluateConfig
from dinov3_heads.details import write_details
from dinov3_heads.evaluations import Evaluations, label_of


class Evaluate(Task):
    """Measures one model, beside what it has to beat, and writes results.json and results.csv."""

    def __init__(self, config: EvaluateConfig, *, registry: Registry) -> None:
        self.config, self.registry = config, registry

    def check(self, world_size: int) -> Plan:
        config = self.config
        loaded = describe_recipe_backbone(config, self.registry)
        head = None
        if config.head is not None:
            head = describe_head(config.head, loaded.backbone, registry=self.registry)
        evaluations = Evaluations(config.evaluations, self.registry.build)
        model = self._model(loaded, head)
        missing = evaluations.prepare(model.images)
        try:
            evaluations.check(model)
        except DataError as error:
            missing.append(str(error))
        parameters = sum(parameter.numel() for parameter in loaded.backbone.parameters())
        sections = {"backbone": [*loaded.origin, ("parameters", f"{parameters:,}")]}
        if head is not None:
            sections["head"] = head.rows
        measured = evaluations.described(model)
        sections["evaluations"] = [*measured, ("processes", str(world_size))]
        return Plan(sections, missing, None if missing else evaluations)

    def run(self, output_dir: Path, plan: Plan | None = None) -> None:
        config = self.config
        loaded, head = load_recipe_backbone(config, self.registry), None
        if config.head is not None:
            device = next(loaded.backbone.parameters()).device
            head = load_head(config.head, loaded.backbone, device=device, registry=self.registry)
            warn_of_another_backbone(head, loaded)
        model = self._model(loaded, head)
        evaluations = plan.prepared if plan is not None else None
        if evaluations is None:
            evaluations = Evaluations(config.evaluations, self.registry.build)
            if missing := evaluations.prepare(model.images):
                raise DataError("\n".join(missing))
            evaluations.check(model)
        folder = config.feature_cache
        model = evolve(model, cache=FeatureCache(None if folder is None else Path(folder)))
        baselines = evaluations.baselines(model)
        found = evaluations.run(model, output_dir)
        records: list[Record] = []
        for name, metrics in baselines.items():
            records += evaluations.records(model, name, metrics, config.seed)
        records += evaluations.records(model, model.name, found, config.seed)
        measured = {**baselines, model.name: found.metrics}
        files = write_details(output_dir, found.details, model, writes=collectives.is_main())
        if not collectives.is_main():
            return
        tables = evaluations.rows(measured, label_of(model))
        results: dict[str, Any] = {"task": "evaluate", "backbone": dict(loaded.origin)}
        if head is not None:
            results["head"] = dict(head.rows)
        results |= {"evaluations": tables, "records": records}
        write_results(output_dir, results | {"files": files})
        for name, rows in tables.items():
            print_results(name, rows)

    def _model(self, loaded: LoadedBackbone, head: LoadedHead | None) -> Model:
        if head is None:
            return Model(loaded.backbone, loaded.images, size=loaded.size, name=loaded.name)
        # A published head may want other means than its backbone was given.
        published = self.config.head in self.registry.published
        images = head.images if published else loaded.images
        return Model(loaded.backbone, images, head.head, head.size or loaded.size, head.name)
