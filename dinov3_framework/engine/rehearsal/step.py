"""One step, as the trainer takes it, of networks that are placed as the trainer's are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from torch.distributed.tensor import DTensor

from dinov3_framework.contracts import Loss, LossResult, StepOutputs
from dinov3_framework.engine.loader import Batch, Layout
from dinov3_framework.engine.networks import Networks
from dinov3_framework.engine.objective import Objective
from dinov3_framework.engine.optimizer import Optimizer
from dinov3_framework.engine.parallel import Sharder, tensors_of
from dinov3_framework.engine.preflight import Parts
from dinov3_framework.engine.rehearsal.batch import Hidden, hidden_patches, largest, pretended_batch
from dinov3_framework.engine.rehearsal.memory import Kind, Ledger, Moment, local
from dinov3_framework.engine.rehearsal.stage import PretendingSharder, pretended
from dinov3_framework.engine.rehearsal.tally import Tally
from dinov3_framework.engine.rehearsal.watch import Watch
from dinov3_framework.engine.settings import TrainingConfig, momentum
from dinov3_framework.engine.teaching import Teaching
from dinov3_framework.errors import UserError

# CUDA's allocator gives memory in blocks of so many bytes.
GRANULARITY = 512
_NEEDS_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)


@frozen
class Tokens:
    """What the backbones put out for one image, over all crops."""

    student: int
    teacher: int
    anchors: int


@frozen
class Findings:
    """What one process has to do in a step, and what it takes."""

    layout: Layout
    peak: Moment
    rest: Moment  # between two steps
    tally: Tally
    parameters: Mapping[str, tuple[int, int]]  # of each network: all, and those of this process
    tokens: Tokens
    hidden: Hidden | None
    left_out: Mapping[str, str]  # loss -> why it could not take part


@frozen
class Cast:
    """The objects that take part in a step; the same that a trainer has."""

    config: TrainingConfig
    networks: Networks
    objective: Objective
    optimizer: Optimizer


def rehearse(
    config: TrainingConfig,
    parts: Parts,
    world_size: int,
    granularity: int = GRANULARITY,
    *,
    teaching: Callable[[Networks, Sharder], Teaching | None] = lambda *_: None,
    masking: bool = True,
) -> Findings:
    """Take a step as the first of ``world_size`` processes; raises ``UserError`` if it cannot.

    ``parts`` are used up. Sizes are rounded up to ``granularity`` bytes. ``teaching`` and
    ``masking`` as of an ``Objective``. Of several resolutions it is a step of the largest.
    """
    parts = evolve(parts, augmentation=largest(parts.augmentation))
    layout = Layout(
        world_size=world_size,
        rank=0,
        accumulation_steps=config.accumulation_steps,
        batch_size=config.batch_size,
    )
    hidden = hidden_patches(parts.augmentation, layout, config.seed)
    left_out: dict[str, str] = {}
    for name, loss in parts.losses.items():
        _guard(loss, partial(left_out.__setitem__, name))
    watch = Watch(granularity)
    with pretended(world_size) as tensors:
        sharder = PretendingSharder(config.parallel, tensors)
        networks = Networks(parts.blueprint, sharder, config.seed, restored=True)
        taught = teaching(networks, sharder)
        with tensors:
            cast = assemble(config, parts.losses, networks, taught, masking)
            warm_up(cast)
            tell(watch.ledger, cast)

            def batch() -> Batch:
                made = pretended_batch(
                    parts.augmentation,
                    layout,
                    config.images.channels,
                    parts.blueprint.backbone.patch_size,
                    None if hidden is None else hidden.fullest,
                )
                others = [tensor for tensor in (made.masks, made.masked) if tensor is not None]
                watch.ledger.call([*made.crops.values(), *others], Kind.BATCH)
                return made

            try:
                tally = take_step(cast, watch, batch)
            except _NEEDS_VALUES as error:
                raise UserError(
                    f"this recipe cannot be rehearsed: outside the losses, {_reason(error)}"
                ) from error
        return Findings(
            layout=layout,
            peak=watch.ledger.peak(),
            rest=watch.ledger.now(),
            tally=tally,
            parameters=_parameters(cast),
            tokens=_tokens(parts),
            hidden=hidden,
            left_out=left_out,
        )


def assemble(
    config: TrainingConfig,
    losses: Mapping[str, Loss],
    networks: Networks,
    teaching: Teaching | None = None,
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
            teaching=teaching,
            masking=masking,
        ),
        optimizer=Optimizer(dict(networks.student.items()), config.optimizer, config.batch_size),
    )


def tell(ledger: Ledger, cast: Cast) -> None:
    """What there is before the step."""
    networks, optimizer = cast.networks, cast.optimizer
    roles: dict[Kind, nn.Module] = {Kind.STUDENT: networks.student, Kind.TEACHER: networks.teacher}
    roles |= {Kind.ANCHORS: networks.anchors, Kind.FROZEN: _frozen(cast)}
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
    outcome = cast.objective(batch, 0)
    watch.phase = "backward"
    (outcome.total / config.accumulation_steps).backward()
    watch.ledger.call(_gradients(student.parameters()), Kind.GRADIENTS)


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
def _frozen(cast: Cast) -> nn.Module:
    """The networks of a teacher that is not the student's average."""
    taught = cast.objective.teaching.networks
    return nn.ModuleDict() if taught is cast.networks.teacher else taught


def _parameters(cast: Cast) -> dict[str, tuple[int, int]]:
    """All parameters of each network, and those that this process holds."""
    networks = cast.networks
    named: dict[str, nn.Module] = {
        "student": networks.student,
        "teacher": networks.teacher,
        "anchors": networks.anchors,
    }
    named["frozen teacher"] = _frozen(cast)
    return {
        name: (
            sum(parameter.numel() for parameter in network.parameters()),
            sum(local(parameter).numel() for parameter in network.parameters()),
        )
        for name, network in named.items()
        if len(list(network.children()))
    }


def _tokens(parts: Parts) -> Tokens:
    backbone, views = parts.blueprint.backbone, parts.augmentation.views

    def of_view(name: str) -> int:
        view = views[name]
        image = torch.empty(1, backbone.in_chans, view.size, view.size, device="meta")
        return int(view.crops * backbone.forward_features(image)["x_prenorm"].shape[1])

    def seen_by(network: str) -> int:
        needs = set().union(*(loss.needs for loss in parts.losses.values()))
        parted = [need.split(".") for need in needs]
        return sum(map(of_view, {need[1] for need in parted if need[0] == network}))

    with torch.no_grad():
        return Tokens(
            student=seen_by("student"),
            teacher=seen_by("teacher"),
            anchors=sum(of_view(anchor.view) for anchor in parts.blueprint.anchors.values()),
        )
