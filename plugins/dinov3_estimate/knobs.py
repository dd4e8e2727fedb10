"""What makes a step smaller: keys of a recipe, and how much each brings, roughly."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from attrs import frozen
from dinov3_ssl.configs import TrainingConfig

from dinov3_estimate.findings import Findings
from dinov3_estimate.memory import Kind

SHARDED = (Kind.STUDENT, Kind.TEACHER, Kind.ANCHORS, Kind.FROZEN, Kind.MOMENTS, Kind.GRADIENTS)
OF_IMAGES = (Kind.BATCH, Kind.ACTIVATIONS, Kind.TEMPORARY)


@frozen
class Knob:
    """A change to a recipe."""

    what: str
    saves: Callable[[TrainingConfig, Findings], float]  # bytes at the peak; 0: not to be had here


def helpful(config: TrainingConfig, findings: Findings) -> Iterator[tuple[str, float]]:
    """The changes that help here, with about how many bytes each saves."""
    for knob in KNOBS:
        if (saved := knob.saves(config, findings)) > 0:
            yield knob.what, saved


def _at_peak(findings: Findings, kinds: tuple[Kind, ...]) -> int:
    return sum(findings.peak.bytes[kind] for kind in kinds)


def _more_passes(config: TrainingConfig, findings: Findings) -> float:
    if findings.layout.per_pass == 1:
        return 0
    # Gradients of earlier passes are there too.
    parameters = findings.peak.bytes[Kind.STUDENT] - findings.peak.bytes[Kind.GRADIENTS]
    return _at_peak(findings, OF_IMAGES) / 2 - max(parameters, 0)


def _more_processes(config: TrainingConfig, findings: Findings) -> float:
    images = _at_peak(findings, OF_IMAGES) if findings.layout.per_pass > 1 else 0
    return (images + _at_peak(findings, SHARDED)) / 2


def _half_precision(config: TrainingConfig, findings: Findings) -> float:
    if config.parallel.param_dtype == "bf16":
        return 0
    return _at_peak(findings, (Kind.GATHERED, Kind.ACTIVATIONS)) / 2


def _recomputing(share: float) -> Callable[[TrainingConfig, Findings], float]:
    """Of the blocks' activations, ``share`` is no longer kept."""

    def saves(config: TrainingConfig, findings: Findings) -> float:
        if config.parallel.checkpointing != "none":
            return 0
        return share * findings.peak.bytes[Kind.ACTIVATIONS]

    return saves


def _fewer_replicas(config: TrainingConfig, findings: Findings) -> float:
    return _at_peak(findings, SHARDED) / 2 if config.parallel.replicas > 1 else 0


KNOBS = (
    Knob('parallel.checkpointing = "full"', _recomputing(0.8)),
    Knob('parallel.checkpointing = "selective"', _recomputing(0.4)),
    Knob("half of parallel.replicas", _fewer_replicas),
    Knob("twice the accumulation_steps", _more_passes),
    Knob('parallel.param_dtype = "bf16"', _half_precision),
    Knob("twice the processes, for the same batch_size", _more_processes),
)
