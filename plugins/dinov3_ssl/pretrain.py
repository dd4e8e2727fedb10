"""The ``pretrain`` task: a student learns from its own moving average, the momentum teacher."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from dinov3_framework.contracts.running import Rows
from dinov3_framework.errors import Problem
from dinov3_framework.parallel.sharder import Sharder
from dinov3_framework.training.task import InitialState
from dinov3_framework.training.trainer import Trainer
from dinov3_ssl import continuing
from dinov3_ssl.configs import PretrainConfig
from dinov3_ssl.method import INITIAL, StudentMethod
from dinov3_ssl.networks import Networks
from dinov3_ssl.preflight import Parts

log = logging.getLogger("dinov3_framework.ssl")


class Pretrain(StudentMethod):
    """Pretrains a backbone with any losses under a momentum teacher."""

    name = "pretrain"
    config: PretrainConfig

    def teaching(
        self, networks: Networks, parts: Parts, sharder: Sharder, state: InitialState
    ) -> None:
        return None

    # ------------------------------------------------------------------ continue_from
    def problems(self, prepared: Parts, done: int) -> list[Problem]:
        origin = self.config.continue_from
        found = super().problems(prepared, done)
        if origin is None or done or not self.seen(origin.run):
            return found
        return found + continuing.problems(origin, prepared, self.config)

    def sections_after(self, prepared: Parts, done: int) -> Mapping[str, Rows]:
        origin, after = self.config.continue_from, super().sections_after(prepared, done)
        if origin is None:
            return after
        if done:
            text = f"{origin.run}, not read: the run goes on after iteration {done:,}"
            return {"continue_from": [("run", text)], **after}
        return {"continue_from": continuing.rows(origin), **after}

    def first_iteration(self) -> int:
        origin = self.config.continue_from
        return 0 if origin is None else continuing.iteration_of(origin)

    def weights(self) -> dict[str, str]:
        origin = self.config.continue_from
        return super().weights() | ({} if origin is None else {"continue_from.run": origin.run})

    @property
    def starts_from_weights(self) -> bool:
        return self.config.continue_from is not None or super().starts_from_weights

    def networks(
        self, parts: Parts, sharder: Sharder, state: InitialState, output_dir: Path | None
    ) -> Networks:
        origin = self.config.continue_from
        if state is InitialState.INITIAL and origin is not None and not origin.new:
            # What the other run gives to every tensor need not be drawn before.
            state = InitialState.RESTORED
        return super().networks(parts, sharder, state, output_dir)

    def begin(self, trainer: Trainer, prepared: Parts) -> None:
        origin = self.config.continue_from
        if origin is None:
            return
        trainer.done, trainer.origin = continuing.take_over(origin, trainer)
        networks = trainer.unit.placed  # type: ignore[attr-defined]
        networks.begin_anchors()
        log.info("Going on with %s after iteration %s", origin.run, f"{trainer.done:,}")
        path = trainer.run.output_dir / INITIAL
        self.export_average(path, networks, prepared, trainer.origin)
