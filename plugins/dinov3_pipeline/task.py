"""The ``pipeline`` task: stages one after the other, each a whole run in a folder of its own."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from dinov3_framework.contracts.running import Plan, Task
from dinov3_framework.errors import DataError
from dinov3_framework.kinds import InnerRun
from dinov3_framework.registry import Registry
from dinov3_framework.runtime import collectives
from dinov3_framework.runtime.agreement import OwnErrors, broadcast_from_rank0
from dinov3_framework.runtime.inner_runs import naming_stage
from dinov3_framework.runtime.output import RESULTS, RunComplete, is_complete
from dinov3_framework.runtime.processes import wait_for_all
from dinov3_framework.runtime.results import write_results
from dinov3_framework.runtime.session import run_here
from dinov3_pipeline.check import check_pipeline
from dinov3_pipeline.configs import PipelineConfig

log = logging.getLogger("dinov3_framework.pipeline")

# Seconds that the others may wait at the end of a stage for the main process, which alone merges
# and writes.
_PATIENCE = 24 * 3600.0


class Pipeline(Task):
    """Runs the stages that are not complete, and goes on with the one that was interrupted."""

    def __init__(self, config: PipelineConfig, *, registry: Registry) -> None:
        self.config, self.registry = config, registry

    def check(self, world_size: int) -> Plan:
        output_dir = Path(self.config.output_dir or "runs")
        return check_pipeline(self.config, self.registry, output_dir, world_size)

    def run(self, output_dir: Path, plan: Plan | None = None) -> None:
        runs = self.config.inner_runs(output_dir)
        plans: dict[str, Plan] = {} if plan is None else dict(plan.prepared)
        for number, run in enumerate(runs, 1):
            where = f"Stage {run.name} ({number} of {len(runs)})"
            with naming_stage(run.name):
                self._stage(run, output_dir / run.name, where, plans.pop(run.name, None))
        if collectives.is_main():
            results: Mapping[str, object] = {
                run.name: json.loads((output_dir / run.name / RESULTS).read_text("utf-8"))
                for run in runs
            }
            write_results(output_dir, {"task": "pipeline", "stages": results})
            print(f"\nDone: {', '.join(run.name for run in runs)}, in {output_dir}.")

    def _stage(self, run: InnerRun, folder: Path, where: str, plan: Plan | None) -> None:
        task: Task = self.registry.build(run.config, registry=self.registry)
        if run.inherited:
            with OwnErrors():
                broadcast_from_rank0(self._check_again, task, folder)
        if not is_complete(folder):
            log.info("%s: %s", where, folder)
        try:
            run_here(task, run.config, self.registry, folder, run.inherited, plan)
        except RunComplete:
            log.info("%s is complete and is skipped.", where)
            return
        wait_for_all(_PATIENCE)
        del task, plan
        # What a stage had on the device is the next one's; modules are full of circles.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _check_again(self, task: Task, folder: Path) -> None:
        """Against what the earlier stages have left, where the first check had expectations."""
        if not is_complete(folder):
            missing = task.check(collectives.world_size()).missing
            if missing:
                raise DataError("\n".join(missing))
