"""What a rehearsal found, for a person to read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from dinov3_framework.engine.rehearsal import estimate as assumed
from dinov3_framework.engine.rehearsal.accelerators import (
    ACCELERATORS,
    PER_MACHINE,
    TERA,
    Accelerator,
)
from dinov3_framework.engine.rehearsal.estimate import Estimate, estimate, needed
from dinov3_framework.engine.rehearsal.knobs import helpful
from dinov3_framework.engine.rehearsal.memory import Moment
from dinov3_framework.engine.rehearsal.step import Findings
from dinov3_framework.engine.rehearsal.tally import Tally
from dinov3_framework.engine.settings import TrainingConfig

Rows = list[tuple[str, str]]
_SHOWN = 2**20 / 20  # bytes, of a kind of memory


def sections(
    config: TrainingConfig, findings: Findings, accelerator: Accelerator
) -> dict[str, Rows]:
    """The report of a rehearsal."""
    spent = estimate(findings.tally, accelerator)
    return {
        "rehearsal": _what(config, findings),
        "parameters": _parameters(findings),
        "memory of a process": _memory(findings.peak, findings.rest),
        "work of a step": _work(config, findings),
        "messages of a process in a step": _messages(findings.tally),
        f"estimated on {accelerator.title}": _estimated(config, findings, accelerator, spent),
        "memory needed": list(_fits(findings)),
        "what would help": list(_help(config, findings, accelerator)),
        "assumptions (estimates; not calibrated on a GPU)": _assumptions(accelerator),
    }


# ------------------------------------------------------------------ what was counted
def _what(config: TrainingConfig, findings: Findings) -> Rows:
    layout = findings.layout
    processes = f"{layout.world_size:,}"
    if layout.world_size > PER_MACHINE:
        processes += f", {PER_MACHINE} to a machine"
    split = f"{layout.world_size} x {layout.accumulation_steps} passes x {layout.per_pass}"
    rows = [
        ("processes", processes),
        ("images per step", f"{config.batch_size:,} = {split}"),
    ]
    if findings.hidden is not None:
        masked = f"{findings.hidden.fullest:,} in the fullest pass of all processes, as here"
        rows.append(("masked patches", f"{masked}; {findings.hidden.mean:,.0f} on average"))
    for loss, reason in findings.left_out.items():
        rows.append(("left out", f"losses.{loss}: {reason}; what it takes is not in the figures"))
    return rows


def _parameters(findings: Findings) -> Rows:
    return [
        (network, f"{whole:,}, of which a process holds {held:,}")
        for network, (whole, held) in findings.parameters.items()
    ]


def _memory(peak: Moment, rest: Moment) -> Rows:
    rows = [(kind.value, size(taken)) for kind, taken in peak.bytes.items() if taken > _SHOWN]
    rows.append(("peak", f"{size(peak.total)}, in {peak.when}"))
    rows.append(("between steps", size(rest.total)))
    return rows


def _work(config: TrainingConfig, findings: Findings) -> Rows:
    layout, tokens, flops = findings.layout, findings.tokens, findings.tally.flops()
    images = layout.per_pass * layout.accumulation_steps
    total = sum(flops.values())
    by_type = ", ".join(f"{each / total:.1%} {dtype}" for dtype, each in flops.items())
    seen = {"student": tokens.student, "teacher": tokens.teacher, "anchors": tokens.anchors}
    return [
        ("FLOPs of a process", f"{count(total)} ({by_type})"),
        ("FLOPs of all processes", count(total * layout.world_size)),
        ("FLOPs per image", count(total / images)),
        *(
            (f"tokens of the {name}", f"{each * config.batch_size:,}, {each * images:,} a process")
            for name, each in seen.items()
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
def _estimated(
    config: TrainingConfig, findings: Findings, accelerator: Accelerator, spent: Estimate
) -> Rows:
    world = findings.layout.world_size
    run = config.iterations * spent.step
    hours = world * run / 3600
    flops = sum(findings.tally.flops().values())
    share = flops / spent.step / accelerator.products["bf16"]
    rows = [
        ("matrix products", seconds(spent.products)),
        ("other operations", seconds(spent.memory)),
    ]
    if spent.host > spent.products + spent.memory:
        rows.append(("starting operations", f"{seconds(spent.host)}, more than all of these take"))
    if world > 1:
        messages = f"{seconds(spent.hideable)} beside computing, {seconds(spent.waiting)} waited"
        rows.append(("messages", f"{messages} for: {seconds(spent.exposed)} more"))
    images = config.batch_size / spent.step
    rows += [
        ("step", f"{seconds(spent.step)}, {images:,.0f} images a second"),
        ("utilisation", f"{share:.0%} of the bf16 rate"),
        ("run", f"{config.iterations:,} steps in {duration(run)}, {hours:,.1f} GPU hours"),
        ("cost", f"{hours * accelerator.price:,.2f} US dollars"),
    ]
    return rows


def _fits(findings: Findings) -> Iterator[tuple[str, str]]:
    wanted = needed(findings.peak.total)
    for each in ACCELERATORS.values():
        room = each.memory - wanted
        verdict = f"fits, {room:.1f} GiB left" if room >= 0 else f"does NOT fit, {-room:.1f} short"
        yield each.title, f"{wanted:.1f} of {each.memory:.1f} GiB: {verdict}"


def _help(
    config: TrainingConfig, findings: Findings, accelerator: Accelerator
) -> Iterator[tuple[str, str]]:
    if needed(findings.peak.total) > accelerator.memory:
        for what, saved in helpful(config, findings):
            yield what, f"about {size(saved)} less"


def _assumptions(accelerator: Accelerator) -> Rows:
    rates = accelerator.products
    return [
        (
            "matrix products",
            f"{assumed.PRODUCTS:.0%} of {rates['bf16'] / TERA:,.0f} (bf16), "
            f"{rates['fp32'] / TERA:,.0f} (fp32), {rates['fp8'] / TERA:,.0f} (fp8) TFLOP/s",
        ),
        (
            "other operations",
            f"{assumed.BANDWIDTH:.0%} of {accelerator.bandwidth / TERA:.2f} TB/s, nothing fused; "
            f"{assumed.KERNEL * 1e6:.0f} us to start each",
        ),
        (
            "messages",
            f"rings at {assumed.LINKS:.0%} of {accelerator.link / 1e9:.0f} GB/s in a machine, "
            f"{accelerator.network / 1e9:.0f} GB/s an accelerator between machines; "
            f"{assumed.MESSAGE * 1e6:.0f} us each and {assumed.HOP * 1e6:.0f} us a process",
        ),
        (
            "overlap",
            "messages of sharding and of the backward pass run beside up to "
            f"{assumed.HIDDEN:.0%} of the computing; others are waited for",
        ),
        (
            "memory",
            f"{assumed.FRAGMENTS:.0%} on top for fragments, {assumed.CONTEXT:g} GiB for CUDA, "
            "NCCL and cuBLAS; kernels' own scratch space is not seen",
        ),
        ("left aside", "reading images, observers, checkpoints, evaluation"),
        ("price", f"{accelerator.price:.2f} US dollars an hour and accelerator"),
    ]


# ------------------------------------------------------------------ units
def size(bytes_: float) -> str:
    unit, divisor = ("GiB", 2**30) if bytes_ >= 2**30 else ("MiB", 2**20)
    return f"{bytes_ / divisor:,.1f} {unit}"


def count(number: float) -> str:
    for unit, divisor in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if number >= divisor:
            return f"{number / divisor:,.1f} {unit}"
    return f"{number / 1e6:,.1f} M"


def duration(time: float) -> str:
    for unit, divisor in (("hours", 3600), ("minutes", 60)):
        if time >= divisor:
            return f"{time / divisor:,.1f} {unit}"
    return f"{time:.1f} seconds"


def seconds(time: float) -> str:
    return f"{time:.2f} s" if time >= 1 else f"{time * 1e3:.1f} ms"
