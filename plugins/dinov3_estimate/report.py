"""What a rehearsal found, for a person to read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

from attrs import frozen
from dinov3_ssl.configs import RunConfig, TrainingConfig

from dinov3_estimate.accelerators import ACCELERATORS, PER_MACHINE, Accelerator
from dinov3_estimate.assumptions import rows as assumptions
from dinov3_estimate.estimate import Estimate, estimate, needed
from dinov3_estimate.findings import Findings
from dinov3_estimate.knobs import helpful
from dinov3_estimate.tally import Tally
from dinov3_estimate.units import count, duration, seconds, size
from dinov3_framework.contracts.data import View
from dinov3_framework.data.loader import Layout

Rows = list[tuple[str, str]]
ASSUMPTIONS = "assumptions (estimates; not calibrated on a GPU)"
_SHOWN = 2**20 / 20  # bytes, of a kind of memory


@frozen
class Spent:
    """Times of a step of each resolution, with the resolution's share of the steps."""

    each: Sequence[tuple[float, Estimate]]

    @classmethod
    def of(cls, findings: Findings, accelerator: Accelerator) -> Spent:
        return cls([(r.share, estimate(r.tally, accelerator)) for r in findings.resolutions])

    def mean(self, of: Callable[[Estimate], float]) -> float:
        return sum(share * of(one) for share, one in self.each)

    @property
    def step(self) -> float:
        return self.mean(lambda one: one.step)


def sections(
    config: TrainingConfig, findings: Findings, accelerator: Accelerator, teacher: Rows
) -> dict[str, Rows]:
    """The report of a rehearsal; ``teacher`` are rows on one that is not the student's average."""
    spent, world = Spent.of(findings, accelerator), findings.world_size
    return {
        "rehearsal": [
            ("processes", processes(world)),
            ("images per step", f"{config.batch_size:,} = {split(findings.layout)}"),
            *what(config, findings),
        ],
        **({"teacher": teacher} if teacher else {}),
        **counted(config, findings, spent),
        f"estimated on {accelerator.title}": [
            *times(findings, spent),
            *whole(config, world, findings.flops * world, spent.step, accelerator),
        ],
        **fitting(config, findings, accelerator),
        ASSUMPTIONS: assumptions(accelerator),
    }


# ------------------------------------------------------------------ what was counted
def processes(world_size: int) -> str:
    said = f"{world_size:,}"
    return f"{said}, {PER_MACHINE} to a machine" if world_size > PER_MACHINE else said


def split(layout: Layout) -> str:
    return f"{layout.world_size:,} x {layout.accumulation_steps} passes x {layout.per_pass}"


def what(config: TrainingConfig, findings: Findings) -> Iterator[tuple[str, str]]:
    """What is special about the process and the step."""
    if findings.hidden is not None:
        masked = f"{findings.hidden.fullest:,} in the fullest pass of all processes, as here"
        yield "masked patches", f"{masked}; {findings.hidden.mean:,.0f} on average"
    if config.parallel.compile:
        yield (
            "compile",
            "not rehearsed: operations are counted one by one, as if nothing were fused",
        )
    elif config.parallel.fp8 != "off":
        yield "fp8", "rounding is counted as operations of its own, which compile = true would fuse"
    for loss, reason in findings.left_out.items():
        yield "left out", f"losses.{loss}: {reason}; what it takes is not in the figures"


def counted(config: TrainingConfig, findings: Findings, spent: Spent) -> dict[str, Rows]:
    """What the process holds, does and sends; by resolution where there are several."""
    return {
        "parameters": _parameters(findings),
        **_resolutions(findings, spent),
        "memory of a process": _memory(findings),
        "work of a step": _work(config, findings),
        "messages of a process in a step": _messages(findings.tally),
    }


def _parameters(findings: Findings) -> Rows:
    return [
        (findings.called(network), f"{whole:,}, of which a process holds {held:,}")
        for network, (whole, held) in findings.parameters.items()
    ]


def _resolutions(findings: Findings, spent: Spent) -> dict[str, Rows]:
    if len(findings.resolutions) == 1:
        return {}
    rows = []
    for one, (share, spends) in zip(findings.resolutions, spent.each, strict=True):
        flops = count(sum(one.tally.flops().values()))
        took = f"{flops} FLOPs, {seconds(spends.step)}, peak {size(one.peak.total)}"
        rows.append((_crops(one.views), f"{share:.1%} of steps: {took}"))
    said = "each was rehearsed; memory, work and messages below are of the one with the highest "
    rows.append(("of these", f"{said}peak, times are means by share"))
    return {"resolutions": rows}


def _crops(views: Mapping[str, View]) -> str:
    return ", ".join(f"{name} {view.size}" for name, view in views.items())


def _memory(findings: Findings) -> Rows:
    peak, called = findings.peak, findings.called
    rows = [(called(kind), size(taken)) for kind, taken in peak.bytes.items() if taken > _SHOWN]
    rows.append(("peak", f"{size(peak.total)}, in {peak.when}"))
    rows.append(("between steps", size(findings.rest.total)))
    return rows


def _work(config: TrainingConfig, findings: Findings) -> Rows:
    layout, tokens, flops = findings.layout, findings.tokens, findings.tally.flops()
    passes, count_of = layout.accumulation_steps, layout.world_size
    images, taught = layout.per_pass * passes, findings.taught * passes
    total = sum(flops.values())
    by_type = ", ".join(f"{each / total:.1%} {dtype}" for dtype, each in flops.items())
    seen = {
        "student": (tokens.student, images),
        "teacher": (tokens.teacher, taught),
        "anchors": (tokens.anchors, images),
    }
    whose = "all" if count_of == findings.world_size else f"its {count_of:,}"
    return [
        ("FLOPs of a process", f"{count(total)} ({by_type})"),
        (f"FLOPs of {whose} processes", count(total * count_of)),
        ("FLOPs per image", count(total / images)),
        *(
            (f"tokens of the {name}", f"{each * config.batch_size:,}, {each * own:,} a process")
            for name, (each, own) in seen.items()
            if each
        ),
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
def times(findings: Findings, spent: Spent) -> Rows:
    """What a mean step consists of, for one process."""
    products, memory = spent.mean(lambda e: e.products), spent.mean(lambda e: e.memory)
    host = spent.mean(lambda e: e.host)
    rows = [("matrix products", seconds(products)), ("other operations", seconds(memory))]
    if host > products + memory:
        rows.append(("starting operations", f"{seconds(host)}, more than all of these take"))
    if findings.world_size > 1:
        hideable, waiting = spent.mean(lambda e: e.hideable), spent.mean(lambda e: e.waiting)
        exposed = seconds(spent.mean(lambda e: e.exposed))
        messages = f"{seconds(hideable)} beside computing, {seconds(waiting)} waited for"
        rows.append(("messages", f"{messages}: {exposed} more"))
    return rows


def whole(
    config: RunConfig, world_size: int, flops: float, step: float, accelerator: Accelerator
) -> Rows:
    """The run as a whole: ``flops`` of all processes in a step of so many seconds."""
    run = config.iterations * step
    hours = world_size * run / 3600
    share = flops / world_size / step / accelerator.products["bf16"]
    return [
        ("step", f"{seconds(step)}, {config.batch_size / step:,.0f} images a second"),
        ("utilisation", f"{share:.0%} of the bf16 rate"),
        ("run", f"{config.iterations:,} steps in {duration(run)}, {hours:,.1f} GPU hours"),
        ("cost", f"{hours * accelerator.price:,.2f} US dollars"),
    ]


def fitting(
    config: TrainingConfig, findings: Findings, accelerator: Accelerator
) -> dict[str, Rows]:
    """Where the process has room, and what helps if ``accelerator`` has too little."""
    wanted = needed(findings.peak.total)
    verdicts = []
    for each in ACCELERATORS.values():
        room = each.memory - wanted
        verdict = f"fits, {room:.1f} GiB left" if room >= 0 else f"does NOT fit, {-room:.1f} short"
        verdicts.append((each.title, f"{wanted:.1f} of {each.memory:.1f} GiB: {verdict}"))
    advice = helpful(config, findings) if wanted > accelerator.memory else ()
    return {
        "memory needed": verdicts,
        "what would help": [(what, f"about {size(saved)} less") for what, saved in advice],
    }
