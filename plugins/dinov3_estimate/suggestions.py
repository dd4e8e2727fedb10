"""What makes a step smaller: keys of a recipe, and how much each brings, roughly."""

from __future__ import annotations

from collections.abc import Iterator

from attrs import frozen

from dinov3_estimate.ledger import ACTIVATIONS, BATCH, GATHERED, GRADIENTS, OPTIMIZER, TEMPORARY
from dinov3_estimate.step import Estimate


@frozen
class Suggestion:
    """A change to a recipe, with about how many bytes of the peak it saves."""

    what: str
    saves: float


def suggestions(estimate: Estimate) -> list[Suggestion]:
    """The changes that help here."""
    return [each for each in _possible(estimate) if each.saves > 0]


def _possible(estimate: Estimate) -> Iterator[Suggestion]:
    parallel, held = estimate.config.parallel, estimate.peak.bytes
    sharded = sum(held[kind] for kind in (*estimate.parameters, OPTIMIZER, GRADIENTS))
    of_images = held[BATCH] + held[ACTIVATIONS] + held[TEMPORARY]
    can_split = estimate.layout.per_micro_batch > 1
    if parallel.checkpointing == "none":
        # Of the blocks' activations, so much is no longer kept.
        yield Suggestion('parallel.checkpointing = "full"', 0.8 * held[ACTIVATIONS])
        yield Suggestion('parallel.checkpointing = "selective"', 0.4 * held[ACTIVATIONS])
    if parallel.replicas > 1:
        yield Suggestion("half of parallel.replicas", sharded / 2)
    if can_split:
        # Gradients of earlier micro-batches are there too.
        gradients = max(estimate.trained_bytes - held[GRADIENTS], 0)
        yield Suggestion("twice the accumulation_steps", of_images / 2 - gradients)
    if parallel.param_dtype != "bf16":
        half = (held[GATHERED] + held[ACTIVATIONS]) / 2
        yield Suggestion('parallel.param_dtype = "bf16"', half)
    saved = (sharded + (of_images if can_split else 0)) / 2
    yield Suggestion("twice the processes, for the same batch_size", saved)
