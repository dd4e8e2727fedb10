"""Evaluations on their own: of a backbone, or of a head on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dinov3_framework import (
    DataError,
    Model,
    Plan,
    Registry,
    Task,
    describe_recipe_backbone,
    load_recipe_backbone,
)
from dinov3_framework.runtime import collectives
from dinov3_framework.runtime.results import Record, print_results, write_results
from dinov3_heads import EvaluateConfig
from dinov3_heads.evaluations import Evaluations, label_of
from dinov3_heads.weights import LoadedHead, describe_head, load_head


class Evaluate(Task):
    """Measures one model, beside what it has to beat, and writes results.json and results.csv."""

    def __init__(self, config: EvaluateConfig, *, registry: Registry) -> None:
        self.config, self.registry = config, registry

    def check(self, world_size: int) -> Plan:
        config = self.config
        loaded = describe_recipe_backbone(config, self.registry)
        head = None
        if config.head is not None:
            head = describe_head(config.head, loaded.backbone, self.registry)
        evaluations = Evaluations(config.evaluations, self.registry.build)
        missing = evaluations.prepare(loaded.images)
        evaluations.check(_model(loaded, head))
        parameters = sum(parameter.numel() for parameter in loaded.backbone.parameters())
        rows = [*loaded.provenance.items(), ("parameters", f"{parameters:,}")]
        sections = {"backbone": [("backbone", loaded.name), *rows]}
        if head is not None:
            sections["head"] = [("head", str(config.head)), *head.rows()]
        measured = [(name, each.data()) for name, each in evaluations.prepared.items()]
        sections["evaluations"] = [*measured, ("processes", str(world_size))]
        return Plan(sections, missing, None if missing else evaluations)

    def run(self, output_dir: Path, plan: Plan | None = None) -> None:
        config = self.config
        loaded = load_recipe_backbone(config, self.registry)
        head = None
        if config.head is not None:
            device = next(loaded.backbone.parameters()).device
            head = load_head(config.head, loaded.backbone, self.registry, device=device)
        model = _model(loaded, head)
        evaluations = plan.prepared if plan is not None else None
        if evaluations is None:
            evaluations = Evaluations(config.evaluations, self.registry.build)
            if missing := evaluations.prepare(loaded.images):
                raise DataError("\n".join(missing))
            evaluations.check(model)
        measured = evaluations.baselines(model) | {model.name: evaluations.run(model)}
        records: list[Record] = []
        for name, metrics in measured.items():
            records += evaluations.records(model, name, metrics, config.seed)
        if not collectives.is_main():
            return
        tables = evaluations.rows(measured, label_of(model))
        results: dict[str, Any] = {"task": "evaluate", "backbone": dict(loaded.provenance)}
        if head is not None:
            results["head"] = dict(head.provenance)
        write_results(output_dir, results | {"evaluations": tables, "records": records})
        for name, rows in tables.items():
            print_results(name, rows)


def _model(loaded: Any, head: LoadedHead | None) -> Model:
    return Model(
        loaded.backbone,
        loaded.images,
        head=None if head is None else head.head,
        size=loaded.size if head is None else head.size or loaded.size,
        name=loaded.name if head is None else head.name,
    )
