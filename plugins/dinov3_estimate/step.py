"""One step, as the trainer takes it, of networks that are placed as the trainer's are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from attrs import field, frozen
from dinov3_ssl.configs import TrainingConfig, momentum
from dinov3_ssl.frozen import FrozenTeacher
from dinov3_ssl.networks import Networks
from dinov3_ssl.objective import Objective
from dinov3_ssl.preflight import Parts
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from torch.distributed.tensor import DTensor

from dinov3_estimate.batch import hidden_patches, pretended_batch
from dinov3_estimate.findings import Findings, Resolution, tokens
from dinov3_estimate.memory import Kind, Ledger, local
from dinov3_estimate.stage import PretendingSharder, Seat, pretended
from dinov3_estimate.tally import Tally
from dinov3_estimate.watch import Watch
from dinov3_framework.contracts.data import Augmentation
from dinov3_framework.contracts.losses import Loss, LossResult, StepOutputs
from dinov3_framework.data.loader import Batch, Layout
from dinov3_framework.errors import UserError
from dinov3_framework.parallel.sharder import tensors_of
from dinov3_framework.runtime import collectives
from dinov3_framework.training.optimizer import Optimizer

# CUDA's allocator gives memory in blocks of so many bytes.
GRANULARITY = 512
_NEEDS_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)


@frozen
class Cast:
    """The objects that take part in a step; the same that a trainer has."""

    config: TrainingConfig
    networks: Networks
    objective: Objective
    optimizer: Optimizer
    frozen: nn.Module = field(factory=nn.ModuleDict)  # those of a teacher that does not learn


def rehearse(
    config: TrainingConfig,
    parts: Parts,
    seat: Seat,
    granularity: int = GRANULARITY,
    *,
    teaching: Callable[[Networks, PretendingSharder], FrozenTeacher | None] = lambda *_: None,
    masking: bool = True,
) -> Findings:
    """Take a step of each resolution as one of many processes; raises ``UserError`` if it cannot.

    ``parts`` are used up. Sizes are rounded up to ``granularity`` bytes. ``teaching`` and
    ``masking`` as of an ``Objective``.
    """
    size, passes, span = config.batch_size, config.accumulation_steps, seat.span
    layout = Layout(len(span), seat.rank - span.start, passes, size)
    taught = len(Layout(seat.world_size, seat.rank, passes, size).places(0, 0))
    patch_size = parts.blueprint.backbone.patch_size
    left_out: dict[str, str] = {}
    for name, loss in parts.losses.items():
        _guard(loss, partial(left_out.__setitem__, name))
    watch = Watch(granularity)
    with pretended(seat) as tensors:
        sharder = PretendingSharder(config.parallel, tensors, collectives.current_group())
        networks = Networks(parts.blueprint, sharder, config.seed, restored=True)
        teacher = teaching(networks, sharder)
        with tensors:
            cast = assemble(config, parts.losses, networks, teacher, masking)
            warm_up(cast)
            tell(watch.ledger, cast)

        def step(augmentation: Augmentation) -> Resolution:
            hidden = hidden_patches(augmentation, layout, config.seed)
            fullest = None if hidden is None else hidden.fullest

            def batch() -> Batch:
                channels, seen = config.images.channels, layout.per_pass
                made = pretended_batch(augmentation, taught, seen, channels, patch_size, fullest)
                others = [tensor for tensor in (made.masks, made.masked) if tensor is not None]
                watch.ledger.call([*made.crops.values(), *others], Kind.BATCH)
                return made

            watch.ledger.forget_peak()
            with tensors:
                tally = take_step(cast, watch, batch)
            backbone = parts.blueprint.backbone if teacher is None else teacher.weights.backbone
            return Resolution(
                views=augmentation.views,
                share=augmentation.share,
                peak=watch.ledger.peak(),
                tally=tally,
                tokens=tokens(parts, augmentation, backbone),
                hidden=hidden,
            )

        try:
            resolutions = [step(variant) for variant in parts.augmentation.variants()]
        except _NEEDS_VALUES as error:
            raise UserError(
                f"this recipe cannot be rehearsed: outside the losses, {_reason(error)}"
            ) from error
        return Findings(
            world_size=seat.world_size,
            layout=layout,
            taught=taught,
            resolutions=resolutions,
            rest=watch.ledger.now(),
            parameters=_parameters(cast),
            left_out=left_out,
        )


def assemble(
    config: TrainingConfig,
    losses: Mapping[str, Loss],
    networks: Networks,
    teacher: FrozenTeacher | None = None,
    masking: bool = True,
) -> Cast:
    """Objective and optimizer over placed networks, as a task makes them for a trainer."""
    return Cast(
        config=config,
        networks=networks,
        objective=Objective(
            losses,
            config.losses,
            networks,
            config.iterations,
            config.images,
            teaching=None if teacher is None else teacher.teaching,
            masking=masking,
        ),
        optimizer=Optimizer(dict(networks.student.items()), config.optimizer, config.batch_size),
        frozen=nn.ModuleDict() if teacher is None else teacher.networks,
    )


def tell(ledger: Ledger, cast: Cast) -> None:
    """What there is before the step."""
    networks, optimizer = cast.networks, cast.optimizer
    roles: dict[Kind, nn.Module] = {Kind.STUDENT: networks.student, Kind.TEACHER: networks.teacher}
    roles |= {Kind.ANCHORS: networks.anchors, Kind.FROZEN: cast.frozen}
    for kind, network in roles.items():
        ledger.call((tensor for _, tensor in tensors_of(network)), kind)
    ledger.call(cast.objective.named_state().values(), Kind.LOSSES)
    ledger.call(optimizer.named_state().values(), Kind.MOMENTS)
    for parameter in networks.student.parameters():
        if not isinstance(parameter, DTensor):  # gradients of shards are known by how they come
            parameter.register_post_accumulate_grad_hook(
                lambda found: ledger.call(_gradients([found]), Kind.GRADIENTS)
            )
    ledger.forget_peak()


# --------------------------------------------------------------------------- the step
def warm_up(cast: Cast) -> None:
    """Let sharded tensors see each operation of the optimizer once, off the record.

    They learn what an operation gives by trying it on whole tensors without memory, and remember
    it. A watch cannot tell those from the step's own: it would find whole networks in a process.
    """
    optimizer = cast.optimizer
    optimizer.set_values(optimizer.values(0, cast.config.iterations))
    for parameter in cast.networks.student.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer.clip(optimizer.gradient_norms())
    optimizer.step()
    optimizer.zero_grad()


def take_step(cast: Cast, watch: Watch, batch: Callable[[], Batch]) -> Tally:
    """``Trainer._step`` without what asks for values; what it did.

    From the second pass on all passes are alike (gradients are there to be added to): two are
    taken, and the second counts for the rest.
    """
    config, optimizer = cast.config, cast.optimizer
    passes = config.accumulation_steps
    total = Tally()
    with watch:
        optimizer.set_values(optimizer.values(0, config.iterations))
        kept = [tensor.clone() for tensor in _buffers(cast)]
        for index in range(min(passes, 2)):
            of_pass = Tally()
            with watch.counting(of_pass):
                _pass(cast, watch, batch())
            total.add(of_pass, passes - 1 if index else 1)
        watch.phase = "optimizer"
        with watch.counting(total):
            norms = optimizer.gradient_norms()
            optimizer.clip(norms)
            optimizer.step()
            cast.networks.update_teacher(momentum(config).at(0, config.iterations))
            cast.networks.refresh_anchors(1)
            optimizer.zero_grad()
        del kept, norms
    return total


def _pass(cast: Cast, watch: Watch, batch: Batch) -> None:
    config, student = cast.config, cast.networks.student
    watch.phase = "forward"
    outcome = cast.objective(batch, _iteration(cast))
    watch.phase = "backward"
    (outcome.total / config.accumulation_steps).backward()
    watch.ledger.call(_gradients(student.parameters()), Kind.GRADIENTS)


def _iteration(cast: Cast) -> int:
    """The first at which every anchor has begun."""
    begins = [anchor.config.start or 0 for anchor in cast.networks.blueprint.anchors.values()]
    return min(max(begins, default=0), cast.config.iterations - 1)


def _gradients(parameters: Any) -> Iterator[Tensor]:
    for parameter in parameters:
        if parameter.grad is not None:
            yield parameter.grad


def _buffers(cast: Cast) -> Iterator[Tensor]:
    yield from cast.objective.named_state().values()
    yield from cast.networks.student.buffers()


# --------------------------------------------------------------------------- losses
def _guard(loss: Loss, leave_out: Callable[[str], None]) -> None:
    """Let a loss that asks for values count as 0 from then on, instead of ending the rehearsal."""
    forward = loss.forward

    def guarded(step: StepOutputs) -> LossResult:
        try:
            return forward(step)
        except _NEEDS_VALUES as error:
            leave_out(_reason(error))
        some = next(iter(step.student.values())).cls
        return LossResult((some * 0).sum())

    loss.forward = guarded  # type: ignore[method-assign]


def _reason(error: Exception) -> str:
    func = getattr(error, "func", None)
    return f"{func or error} needs the values of tensors"


# --------------------------------------------------------------------------- counting
def _parameters(cast: Cast) -> dict[Kind, tuple[int, int]]:
    """All parameters of each network, and those that this process holds."""
    networks = cast.networks
    named: dict[Kind, nn.Module] = {
        Kind.STUDENT: networks.student,
        Kind.TEACHER: networks.teacher,
        Kind.ANCHORS: networks.anchors,
        Kind.FROZEN: cast.frozen,
    }
    return {
        name: (
            sum(parameter.numel() for parameter in network.parameters()),
            sum(local(parameter).numel() for parameter in network.parameters()),
        )
        for name, network in named.items()
        if len(list(network.children()))
    }
