"""Memory and time of DINO and iBOT over many prototypes: some at a time, beside in one piece.

A row of the table is one forward and backward pass of a loss with the projectors of student and
teacher, each way in fresh processes of one thread that take turns. ``rows`` are the student's:
class tokens of ten crops an image, two of them global, or masked patches. *Peak* is the most
anonymous memory that a process had at once, above what it had with its imports, networks and
tokens (see large_models.py); the gradient of the prototypes is in it either way, and listed for
comparison. *Seconds* are processor time, the least of several passes. Both ratios are plain over
chunked: above 1, chunks need less. Linux only.

    python benchmarks/objective.py
    python benchmarks/objective.py --losses ibot --rows 2048 --prototypes 98304 --bottlenecks 384
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing as mp
import os
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from dinov3_losses.configs import DinoConfig, IbotConfig, ProjectorConfig
from dinov3_losses.dino import DinoLoss
from dinov3_losses.ibot import IbotLoss
from large_models import ALLOCATOR, MIB, Peak
from torch import Tensor, nn

from dinov3_framework import Loss, StepOutputs, ViewFeatures

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LOSSES: dict[str, tuple[Any, Any]] = {
    "dino": (DinoLoss, DinoConfig),
    "ibot": (IbotLoss, IbotConfig),
}
GLOBAL, LOCAL = 2, 8  # crops of an image
WIDTH, HIDDEN = 64, 64  # of tokens and of the projectors' MLPs: small beside the prototypes
AGREE = 1e-4  # how far the two losses may lie apart, relative


class Row(NamedTuple):
    """What is measured: the columns of the table that say so."""

    loss: str
    dtype: str
    rows: int
    prototypes: int
    bottleneck: int


class Measured(NamedTuple):
    peak: int  # bytes
    seconds: float
    loss: float


# --------------------------------------------------------------------------- in a process
def features(crops: int, samples: int, patches: int, dtype: torch.dtype, seed: int) -> ViewFeatures:
    """Class tokens, and patches of which a loss looks at some."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(*shape: int) -> Tensor:
        return torch.randn(*shape, WIDTH, generator=generator).to(dtype)

    return ViewFeatures(
        cls=tokens(crops, samples).requires_grad_(),
        storage=tokens(crops, samples, 0),
        patches=tokens(crops, samples, patches).requires_grad_(),
        grid=(1, patches),
    )


def inputs(row: Row, student: nn.Module, teacher: nn.Module) -> StepOutputs:
    """A step whose features hold as many rows as ``row`` says, and nothing else of size."""
    dtype = DTYPES[row.dtype]
    samples, patches = (row.rows, 1) if row.loss == "ibot" else (row.rows // (GLOBAL + LOCAL), 0)
    n_global = 1 if row.loss == "ibot" else GLOBAL
    views = {"global": features(n_global, samples, patches, dtype, 0)}
    if row.loss == "dino":
        views["local"] = features(LOCAL, samples, 0, dtype, 1)
    return StepOutputs(
        iteration=0,
        total_iterations=1,
        student=views,
        teacher={"global": features(n_global, samples, patches, dtype, 2)},
        anchor=None,
        masks=torch.ones(n_global, samples, patches, dtype=torch.bool),
        project=student,
        project_teacher=torch.no_grad()(teacher),
    )


def prepare(row: Row, chunk: int | None) -> tuple[Loss, StepOutputs, nn.Module]:
    cls, config = LOSSES[row.loss]
    head = ProjectorConfig(
        n_prototypes=row.prototypes, bottleneck_dim=row.bottleneck, hidden_dim=HIDDEN
    )
    loss: Loss = cls(config(head=head, chunk=chunk))
    networks: list[Any] = []
    for seed in range(2):
        torch.manual_seed(seed)
        networks.append(loss.build_projector(WIDTH))
        networks[-1].to(DTYPES[row.dtype])
    return loss, inputs(row, networks[0], networks[1]), networks[0]


def once(loss: Loss, step: StepOutputs, student: nn.Module) -> float:
    student.zero_grad(set_to_none=True)
    result = loss(step).loss
    result.backward()  # type: ignore[no-untyped-call]
    return float(result.detach())


def work(row: Row, chunk: int | None, passes: int, answer: Connection) -> None:
    torch.set_num_threads(1)
    once(*prepare(row._replace(rows=20, prototypes=16), chunk))  # loads what is loaded once
    prepared = prepare(row, chunk)
    with Peak() as peak:
        value = once(*prepared)
    times = []
    for _ in range(passes):
        start = time.process_time()
        once(*prepared)
        times.append(time.process_time() - start)
    answer.send(Measured(peak.bytes, min(times), value))


# --------------------------------------------------------------------------- the table
def measure(
    row: Row, chunks: Sequence[int | None], rounds: int, passes: int
) -> dict[int | None, Measured]:
    """By chunk, the greatest peak and the least time of all rounds."""
    found: dict[int | None, list[Measured]] = {chunk: [] for chunk in chunks}
    context = mp.get_context("spawn")
    for chunk in [*chunks] * rounds:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(row, chunk, passes, theirs))
        process.start()
        theirs.close()
        try:
            found[chunk].append(ours.recv())
        except EOFError:
            raise SystemExit(f"{row}: a process gave no figures; too little memory?") from None
        process.join()
    return {
        chunk: Measured(max(m.peak for m in each), min(m.seconds for m in each), each[0].loss)
        for chunk, each in found.items()
    }


def lines(row: Row, chunks: Sequence[int], rounds: int, passes: int) -> Iterator[list[str]]:
    """One for each chunk, beside the loss in one piece."""
    found = measure(row, [None, *chunks], rounds, passes)
    plain = found[None]
    gradient = row.prototypes * row.bottleneck * DTYPES[row.dtype].itemsize
    for chunk in chunks:
        ours = found[chunk]
        if not math.isclose(plain.loss, ours.loss, rel_tol=AGREE):
            raise SystemExit(f"{row}: the losses differ: {plain.loss} and {ours.loss}")
        memory = [f"{size / MIB:,.0f}" for size in (gradient, plain.peak, ours.peak)]
        seconds = [f"{each.seconds:.2f}" for each in (plain, ours)]
        ratios = plain.peak / ours.peak, plain.seconds / ours.seconds
        yield [
            *(str(cell) for cell in (*row, chunk)),
            *(*memory, f"{ratios[0]:.2f}"),
            *(*seconds, f"{ratios[1]:.2f}"),
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure DINO and iBOT in chunks.")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[320], help="multiples of 10")
    parser.add_argument("--prototypes", nargs="+", type=int, default=[65_536, 262_144])
    parser.add_argument("--bottlenecks", nargs="+", type=int, default=[256])
    parser.add_argument("--chunks", nargs="+", type=int, default=[1024, 4096])
    parser.add_argument("--rounds", type=int, default=1, help="processes of each way")
    parser.add_argument("--passes", type=int, default=2, help="timed passes of a process")
    options = parser.parse_args()
    if any(rows < 10 or rows % 10 for rows in options.rows):
        parser.error("--rows: DINO has ten crops an image, so rows must be multiples of 10")
    os.environ.update(ALLOCATOR)
    print(f"torch {torch.__version__}, one thread; memory in MiB\n")
    columns = [*Row._fields, "chunk", "prototypes' gradient", "plain", "chunked", "ratio"]
    columns += ["plain, seconds", "chunked, seconds", "ratio"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for values in itertools.product(
        options.losses,
        options.dtypes,
        options.rows,
        options.prototypes,
        options.bottlenecks,
    ):
        for line in lines(Row(*values), options.chunks, options.rounds, options.passes):
            print("| " + " | ".join(line) + " |", flush=True)


if __name__ == "__main__":
    main()
