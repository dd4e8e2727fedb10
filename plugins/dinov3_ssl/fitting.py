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
from dinov3_framework.data.loader import Batch
from dinov3_framework.parallel import sharder as parallel
from dinov3_framework.randomness import keyed_rng
from dinov3_framework.runtime import collectives
from dinov3_framework.training.trainer import Trainer
from dinov3_ssl.networks import head_name
from dinov3_ssl.teaching import Teaching

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
        self, batch: Batch, outputs: Collection[str]
    ) -> tuple[Batch, dict[str, ViewFeatures]]:
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
    trainer: Trainer, projectors: Mapping[str, nn.Module], seed: Callable[[str], int]
) -> list[str]:
    """Fit the teacher's ``projectors`` (by loss, whole, on the meta device); those that were.

    To be called by every process of the run, before the first step. The stream of batches is not
    moved, and nothing else of the run is changed.
    """
    seen = _tokens(trainer, list(projectors))
    done = []
    for name, blueprint in projectors.items():
        whole, fitted = blueprint, False
        if collectives.is_main():
            whole = parallel.initial_values(blueprint, seed(name))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed(name))
                fitted = cast(Projector, whole).fit(seen[name])
        parallel.fill_from_main(trainer.networks.frozen[head_name(name)], whole)
        if collectives.all_gather_object(fitted)[0]:
            done.append(name)
    return done


def _tokens(trainer: Trainer, losses: list[str]) -> dict[str, Tensor]:
    """Tokens [n, D] that each loss has the teacher project, of all processes, n <= TOKENS."""
    objective = trainer.objective
    recording = _Recording(objective.teaching)
    before = [(tensor, tensor.clone()) for tensor in trainer.buffers()]
    objective.teaching = recording
    try:
        for step in range(min(STEPS, trainer.config.iterations)):
            torch.manual_seed(step)  # what the student draws has no part in the result
            objective(trainer.maker[step, 0].to(trainer.device), 0)
    finally:
        objective.teaching = recording._inner
        for tensor, value in before:
            tensor.copy_(value)
    share = TOKENS // collectives.world_size()
    chosen = {}
    for name in losses:
        tokens = torch.cat(recording.tokens[head_name(name)])
        rng = keyed_rng(trainer.config.seed, "fit", collectives.rank())
        rows = rng.permutation(len(tokens))[: max(share, 1)]
        parts = collectives.all_gather_object(tokens[torch.from_numpy(np.sort(rows))])
        chosen[name] = torch.cat(cast("list[Tensor]", parts))
    return chosen
