"""Evaluations on their own: of a backbone, or of a head on it."""

from __future__ import annotations

import logging
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
from dinov3_framework.parallel.state_dicts import fingerprint, is_same
from dinov3_framework.runtime import collectives
from dinov3_framework.runtime.results import Record, print_results, write_results
from dinov3_framework.weights.heads import LoadedHead, describe_head, load_head
from dinov3_heads import FINGERPRINT, EvaluateConfig
from dinov3_heads.details import write_details
from dinov3_heads.evaluations import Evaluations, label_of

# Below the framework's logger, whose handlers write run.log.
log = logging.getLogger("dinov3_framework.heads")


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
        missing = evaluations.prepare(loaded.images)
        model = _model(loaded, head)
        try:
            evaluations.check(model)
        except DataError as error:
            missing.append(str(error))
        parameters = sum(parameter.numel() for parameter in loaded.backbone.parameters())
        sections = {"backbone": [*loaded.origin, ("parameters", f"{parameters:,}")]}
        if head is not None:
            sections["head"] = _rows(head)
        measured = evaluations.described(model)
        sections["evaluations"] = [*measured, ("processes", str(world_size))]
        return Plan(sections, missing, None if missing else evaluations)

    def run(self, output_dir: Path, plan: Plan | None = None) -> None:
        config = self.config
        loaded, head = load_recipe_backbone(config, self.registry), None
        if config.head is not None:
            device = next(loaded.backbone.parameters()).device
            head = load_head(config.head, loaded.backbone, device=device, registry=self.registry)
            _warn_of_another_backbone(head, loaded)
        model = _model(loaded, head)
        evaluations = plan.prepared if plan is not None else None
        if evaluations is None:
            evaluations = Evaluations(config.evaluations, self.registry.build)
            if missing := evaluations.prepare(loaded.images):
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
            results["head"] = dict(_rows(head))
        results |= {"evaluations": tables, "records": records}
        write_results(output_dir, results | {"files": files})
        for name, rows in tables.items():
            print_results(name, rows)


def _model(loaded: LoadedBackbone, head: LoadedHead | None) -> Model:
    if head is None:
        return Model(loaded.backbone, loaded.images, size=loaded.size, name=loaded.name)
    size = head.size or loaded.size
    return Model(loaded.backbone, loaded.images, head.head, size, head.name)


def _rows(head: LoadedHead) -> list[tuple[str, str]]:
    known = [(key, value) for key, value in head.provenance.items() if key != FINGERPRINT]
    return [("head", head.name), *known]


def _warn_of_another_backbone(head: LoadedHead, loaded: LoadedBackbone) -> None:
    before, now = head.provenance.get(FINGERPRINT), fingerprint(loaded.backbone)
    if before is not None and not is_same(float(before), now) and collectives.is_main():
        trained_on = head.provenance.get("trained on", "unknown")
        log.warning("%s was trained on %s, not on %s", head.name, trained_on, loaded.name)
