"""The ``pretrain`` task: a student learns from its own moving average, the momentum teacher."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from dinov3_framework.errors import Problem
from dinov3_framework.registry import Registry
from dinov3_framework.training.trainer import Trainer
from dinov3_ssl import continuing
from dinov3_ssl.configs import PretrainConfig
from dinov3_ssl.networks import Networks
from dinov3_ssl.preflight import Parts
from dinov3_ssl.task import INITIAL, TrainingTask

log = logging.getLogger(__name__)


class Pretrain(TrainingTask):
    """Pretrains a backbone with any losses under a momentum teacher."""

    name = "pretrain"
    config: PretrainConfig

    def __init__(self, config: PretrainConfig, *, registry: Registry) -> None:
        super().__init__(config, registry=registry)

    def _problems(self, parts: Parts) -> list[Problem]:
        origin = self.config.continue_from
        if origin is None or self._done() or not self._exists(origin.run):
            return []
        return continuing.problems(origin, parts, self.config)

    def _told(self, parts: Parts) -> dict[str, list[tuple[str, str]]]:
        origin = self.config.continue_from
        if origin is None:
            return {}
        if done := self._done():
            after = f"not read: the run goes on after iteration {done:,}"
            return {"continue_from": [("run", f"{origin.run}, {after}")]}
        return {"continue_from": continuing.rows(origin)}

    def _begun(self) -> int:
        origin = self.config.continue_from
        return 0 if origin is None else continuing.iteration_of(origin)

    def _weights(self) -> dict[str, str]:
        origin = self.config.continue_from
        return super()._weights() | ({} if origin is None else {"continue_from.run": origin.run})

    @property
    def _starts_from_weights(self) -> bool:
        return self.config.continue_from is not None or super()._starts_from_weights

    def _networks(
        self, parts: Parts, restored: bool, output_dir: Path, device: torch.device
    ) -> tuple[Networks, dict[str, str]]:
        origin = self.config.continue_from
        # What the other run gives to every tensor need not be drawn before.
        given = origin is not None and not origin.new
        return super()._networks(parts, restored or given, output_dir, device)

    def _begin(self, trainer: Trainer, parts: Parts) -> None:
        origin = self.config.continue_from
        if origin is None:
            return
        trainer.done, told = continuing.take_over(origin, trainer.tensors())
        trainer.networks.begin_anchors()
        trainer.origin = told
        log.info("Going on with %s after iteration %s", origin.run, f"{trainer.done:,}")
        path = trainer.run.output_dir / INITIAL
        self._export(path, trainer.networks, trainer.maker.augmentation, told)
