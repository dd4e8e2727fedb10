"""Projectors for a teacher that came without: made from what it says of the first batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from dinov3_framework.contracts.losses import ViewFeatures
from dinov3_framework.contracts.networks import Projector
from dinov3_framework.contracts.training import Step
from dinov3_framework.parallel import sharder as parallel
from dinov3_framework.randomness import keyed_rng
from dinov3_framework.runtime import collectives
from dinov3_ssl.batches import CropBatch, CropBatches
from dinov3_ssl.configs import StudentTrainingConfig
from dinov3_ssl.networks import projector_key
from dinov3_ssl.teaching import Teaching
from dinov3_ssl.unit import StudentUnit

STEPS = 8  # whose first pass is looked at
TOKENS = 4096  # of each loss, over all processes


class _Recording:
    """A teaching that notes what is projected."""

    def __init__(self, inner: Teaching) -> None:
        self._inner = inner
        self.tokens: dict[str, list[Tensor]] = defaultdict(list)
        self.networks = nn.ModuleDict(
            {
                name: module if name == "backbone" else _Noting(module, self.tokens[name])
                for name, module in inner.networks.items()
            }
        )

    def __call__(
        self, batch: CropBatch, outputs: Collection[str]
    ) -> tuple[CropBatch, dict[str, ViewFeatures]]:
        return self._inner(batch, outputs)


class _Noting(nn.Module):
    def __init__(self, module: nn.Module, tokens: list[Tensor]) -> None:
        super().__init__()
        self._module, self._tokens = module, tokens

    def forward(self, tokens: Tensor, *others: Any) -> Any:
        self._tokens.append(tokens.detach().float().cpu())
        return self._module(tokens, *others)


@torch.no_grad()
def fit_projectors(
    unit: StudentUnit,
    maker: CropBatches,
    config: StudentTrainingConfig,
    projectors: Mapping[str, nn.Module],
    seed: Callable[[str], int],
) -> list[str]:
    """Fit the teacher's ``projectors`` (by loss, whole, on the meta device); those that were.

    To be called by every process of the run, before the first step. The stream of batches is not
    moved, and nothing else of the run is changed.
    """
    seen = _tokens(unit, maker, config, list(projectors))
    done = []
    for name, blueprint in projectors.items():
        whole, fitted = blueprint, False
        if collectives.is_main():
            whole = parallel.initial_values(blueprint, seed(name))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed(name))
                fitted = cast(Projector, whole).fit(seen[name])
        parallel.fill_from_main(unit.placed.frozen[projector_key(name)], whole)
        if collectives.all_gather_object(fitted)[0]:
            done.append(name)
    return done


def _tokens(
    unit: StudentUnit, maker: CropBatches, config: StudentTrainingConfig, losses: list[str]
) -> dict[str, Tensor]:
    """Tokens [n, D] that each loss has the teacher project, of all processes, n <= TOKENS."""
    objective = unit.objective
    recording = _Recording(objective.teaching)
    before = [(tensor, tensor.clone()) for tensor in unit.changed_by_forward()]
    objective.teaching = recording
    try:
        for step in range(min(STEPS, config.iterations)):
            torch.manual_seed(step)  # what the student draws has no part in the result
            batch = maker[step, 0].to(unit.placed.device)
            objective(batch, Step(0, config.iterations))
    finally:
        objective.teaching = recording._inner
        for tensor, value in before:
            tensor.copy_(value)
    share = TOKENS // collectives.world_size()
    chosen = {}
    for name in losses:
        tokens = torch.cat(recording.tokens[projector_key(name)])
        rng = keyed_rng(config.seed, "fit", collectives.rank())
        rows = rng.permutation(len(tokens))[: max(share, 1)]
        parts = collectives.all_gather_object(tokens[torch.from_numpy(np.sort(rows))])
        chosen[name] = torch.cat(cast("list[Tensor]", parts))
    return chosen
