"""Time the exact search for neighbors beside faiss's IndexFlatIP, with the same threads.

Both get unit vectors, random ones, of which no order and no cluster helps; ours centers them as
well, which is in its time. Neighbors are compared: where they differ, the similarities are equal to
rounding.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import faiss
import torch
from dinov3_classify.search import nearest
from torch.nn import functional as F


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    found = run()
    return found, time.perf_counter() - wall, time.process_time() - processor


def peak() -> float:
    """GB of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the search for neighbors beside faiss.")
    parser.add_argument("--train", type=int, default=1_281_167)
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--k", type=int, nargs="+", default=[20, 200])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    train = torch.empty(options.train, options.width)
    for part in train.split(1 << 16):
        part.copy_(F.normalize(torch.randn(part.shape, generator=generator), dim=1))
    queries = F.normalize(torch.randn(options.queries, options.width, generator=generator), dim=1)
    print(f"{options.train:,} x {options.width}, {options.queries:,} queries, ", end="")
    print(f"{options.threads} thread(s); vectors take {train.numel() * 4 / 2**30:.2f} GB")
    print(
        "| k | ours, wall | processor | faiss, wall | processor | ratio, wall | processor | "
        "same neighbors | beyond the vectors, GB |\n" + "|---" * 9 + "|"
    )
    before = peak()
    found = {}
    for k in options.k:
        found[k] = timed(lambda k=k: nearest(queries, train, k))  # type: ignore[misc]
    memory = peak() - before
    index = faiss.IndexFlatIP(options.width)
    index.add(train.numpy())
    for k in options.k:
        (_, mine), wall, processor = found[k]
        (_, other), their_wall, their_processor = timed(
            lambda k=k: index.search(queries.numpy(), k)  # type: ignore[misc]
        )
        same = float((mine == torch.from_numpy(other)).double().mean())
        cells = [wall, processor, their_wall, their_processor, their_wall / wall]
        cells.append(their_processor / processor)
        shown = " | ".join(f"{cell:.2f}" for cell in cells)
        print(f"| {k} | {shown} | {same:.5f} | {memory:.2f} |", flush=True)


if __name__ == "__main__":
    main()
