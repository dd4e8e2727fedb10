"""What an estimate found, for a person to read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from attrs import frozen

from dinov3_estimate.ledger import KINDS
from dinov3_estimate.step import Estimate
from dinov3_estimate.suggestions import suggestions
from dinov3_estimate.tally import PER_MACHINE, Tally
from dinov3_estimate.timing import (
    ACCELERATORS,
    Accelerator,
    StepTime,
    assumptions,
    needed,
    step_time,
)
from dinov3_framework.contracts.running import Rows
from dinov3_framework.data.loader import Layout
from dinov3_framework.recipes.describe import rounded

ASSUMPTIONS = "assumptions (estimates; not calibrated on a GPU)"
_SHOWN = 2**20 / 20  # bytes, of a kind of memory


@frozen
class Times:
    """Times of a step of each sort, with the sort's share of the steps."""

    each: Sequence[tuple[float, StepTime]]

    @classmethod
    def of(cls, estimate: Estimate, accelerator: Accelerator) -> Times:
        return cls([(s.batch.share, step_time(s.tally, accelerator)) for s in estimate.steps])

    def mean(self, of: Callable[[StepTime], float]) -> float:
        return sum(share * of(one) for share, one in self.each)

    @property
    def step(self) -> float:
        return self.mean(lambda one: one.step)


def sections(
    config: Any, estimates: Mapping[str, Estimate], accelerator: Accelerator
) -> dict[str, Rows]:
    """The report on one training, or on several side by side, by their names.

    All wait for the slowest. What is the same for all of them is shown once.
    """
    times = {name: Times.of(estimate, accelerator) for name, estimate in estimates.items()}
    timed, alone = f"estimated on {accelerator.title}", len(estimates) == 1
    own: dict[str, dict[str, Rows]] = {}
    for name, each in estimates.items():
        step = [] if alone else [("step", seconds(times[name].step))]
        own[name] = {
            **each.sections,
            **_counted(each, times[name]),
            timed: [*_times(each, times[name]), *step],
            **_fitting(each, accelerator),
        }
    report = {"estimate": list(_job(config, estimates))}
    for name, of_one in own.items():
        for title, rows in of_one.items():
            shared = all(other.get(title) == rows for other in own.values())
            report[title if shared else f"{name}: {title}"] = rows
    slowest = max(times, key=lambda name: times[name].step)
    whole = _run(config, estimates.values(), times[slowest].step, accelerator)
    first = [] if alone else [("slowest", f"{slowest}: all wait for it")]
    report[timed] = [*report.get(timed, []), *first, *whole]
    return report | {ASSUMPTIONS: assumptions(accelerator)}


def _job(config: Any, estimates: Mapping[str, Estimate]) -> Iterator[tuple[str, str]]:
    """What all processes do together, and what is not simulated of it."""
    first = next(iter(estimates.values()))
    world, parallel = first.world_size, first.config.parallel
    yield "processes", f"{world:,}" + (f", {PER_MACHINE} to a machine" * (world > PER_MACHINE))
    if len(estimates) == 1:
        yield "images per step", f"{config.batch_size:,} = {_split(first.layout)}"
    else:
        yield "images per step", f"{config.batch_size:,}, all of which each of them sees"
        yield from ((f"of {name}", _split(each.layout)) for name, each in estimates.items())
    if parallel.compile:
        text = "not simulated: operations are counted one by one, as if nothing were fused"
        yield "compile", text
    elif parallel.fp8 != "off":
        yield "fp8", "rounding is counted as operations of its own, which compile = true would fuse"


# ------------------------------------------------------------------ what was counted
def _split(layout: Layout) -> str:
    count, images = layout.accumulation_steps, layout.per_micro_batch
    return f"{layout.world_size:,} x {count} micro-batches x {images}"


def _counted(estimate: Estimate, times: Times) -> dict[str, Rows]:
    """What the process holds, does and sends; by sort of steps where there are several."""
    return {
        "parameters": [
            (role, f"{whole:,}, of which a process holds {held:,}")
            for role, (whole, held) in estimate.parameters.items()
        ],
        "sorts of steps": _sorts(estimate, times),
        "memory of a process": _memory(estimate),
        "work of a step": _work(estimate),
        "messages of a process in a step": _messages(estimate.tally),
    }


def _sorts(estimate: Estimate, times: Times) -> Rows:
    if len(estimate.steps) == 1:
        return []
    rows = []
    for one, (share, time) in zip(estimate.steps, times.each, strict=True):
        text = f"{count(one.flops)} FLOPs, {seconds(time.step)}, peak {size(one.peak.total)}"
        rows.append((one.batch.name, f"{share:.1%} of steps: {text}"))
    text = "each was simulated; memory, work and messages below are of the one with the highest "
    return [*rows, ("of these", f"{text}peak, times are means by share")]


def _memory(estimate: Estimate) -> Rows:
    peak = estimate.peak
    kinds = [*(kind for kind in peak.bytes if kind not in KINDS), *KINDS]
    return [
        *((kind, size(peak.bytes[kind])) for kind in kinds if peak.bytes[kind] > _SHOWN),
        ("peak", f"{size(peak.total)}, in {peak.when}"),
        ("between steps", size(estimate.rest.total)),
    ]


def _work(estimate: Estimate) -> Rows:
    layout, flops = estimate.layout, estimate.tally.flops()
    total, processes = estimate.largest.flops, layout.world_size
    images = layout.per_micro_batch * layout.accumulation_steps
    by_type = ", ".join(f"{each / total:.1%} {dtype}" for dtype, each in flops.items())
    whose = "all" if processes == estimate.world_size else f"its {processes:,}"
    return [
        ("FLOPs of a process", f"{count(total)} ({by_type})"),
        (f"FLOPs of {whose} processes", count(total * processes)),
        ("FLOPs per image", count(total / images)),
        *estimate.largest.batch.rows,
    ]


def _messages(tally: Tally) -> Rows:
    """By collective and number of processes."""
    found: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0])
    for message, number in tally.messages.items():
        if message.processes > 1:
            of = found[f"{message.name} of {message.processes:,}"]
            of[0] += number
            of[1] += number * message.bytes
            of[2] += number * message.wire_bytes
    rows = [
        (name, f"{number:,.0f}, of {size(whole)} in all; a process sends {size(wire)}")
        for name, (number, whole, wire) in sorted(found.items())
    ]
    return rows or [("none", "there is one process")]


# ------------------------------------------------------------------ what is estimated
def _times(estimate: Estimate, times: Times) -> Rows:
    """What a mean step consists of, for one process."""
    products, memory = times.mean(lambda t: t.products), times.mean(lambda t: t.memory)
    host = times.mean(lambda t: t.host)
    rows = [("matrix products", seconds(products)), ("other operations", seconds(memory))]
    if host > products + memory:
        rows.append(("starting operations", f"{seconds(host)}, more than all of these take"))
    if estimate.world_size > 1:
        hideable, waiting = times.mean(lambda t: t.hideable), times.mean(lambda t: t.waiting)
        exposed = seconds(times.mean(lambda t: t.exposed))
        messages = f"{seconds(hideable)} beside computing, {seconds(waiting)} waited for"
        rows.append(("messages", f"{messages}: {exposed} more"))
    return rows


def _run(
    config: Any, estimates: Collection[Estimate], step: float, accelerator: Accelerator
) -> Rows:
    """The run as a whole, with so many seconds a step."""
    run, world = config.iterations * step, sum(each.layout.world_size for each in estimates)
    hours = world * run / 3600
    flops = sum(each.flops * each.layout.world_size for each in estimates)
    share = flops / world / step / accelerator.products["bf16"]
    rows = [
        ("step", f"{seconds(step)}, {config.batch_size / step:,.0f} images a second"),
        ("utilization", f"{share:.0%} of the bf16 rate"),
        ("run", f"{config.iterations:,} steps in {duration(run)}, {rounded(hours)} GPU hours"),
    ]
    if accelerator.price is not None:
        rows.append(("cost", f"{rounded(hours * accelerator.price)} US dollars"))
    return rows


def _fitting(estimate: Estimate, accelerator: Accelerator) -> dict[str, Rows]:
    """Where the process has room, and what helps if ``accelerator`` has too little."""
    wanted = needed(estimate.peak.total)
    verdicts = []
    for each in ACCELERATORS.values():
        room = each.memory - wanted
        verdict = f"fits, {room:.1f} GiB left" if room >= 0 else f"does NOT fit, {-room:.1f} short"
        verdicts.append((each.title, f"{wanted:.1f} of {each.memory:.1f} GiB: {verdict}"))
    advice = suggestions(estimate) if wanted > accelerator.memory else ()
    return {
        "memory needed": verdicts,
        "what would help": [(each.what, f"about {size(each.saves)} less") for each in advice],
    }


# ------------------------------------------------------------------ numbers
def size(bytes_: float) -> str:
    return _scaled(bytes_, ("GiB", 2**30), ("MiB", 2**20))


def count(number: float) -> str:
    return _scaled(number, ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6))


def duration(time: float) -> str:
    units = (("hours", 3600), ("minutes", 60), ("seconds", 1))
    unit, divisor = next((each for each in units if time >= each[1]), units[-1])
    return f"{rounded(time / divisor)} {unit}"


def seconds(time: float) -> str:
    return f"{time:.2f} s" if time >= 1 else f"{time * 1e3:.1f} ms"


def _scaled(number: float, *units: tuple[str, float]) -> str:
    """In the first unit of which it is one or more, else in the last."""
    unit, divisor = next((each for each in units if number >= each[1]), units[-1])
    return f"{number / divisor:,.1f} {unit}"
