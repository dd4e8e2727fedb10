"""Metrics of a run: averaged over processes, one JSON object a line."""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from attrs import frozen
from torch import Tensor

from dinov3_framework.runtime import collectives
from dinov3_framework.runtime.durable import open_file, parse_json, unwritable


class MetricsFile:
    """``metrics.jsonl``: one line per logged iteration, in order, each iteration once."""

    def __init__(self, path: Path, done: int) -> None:
        """Open for the iterations after ``done``; lines of later ones, left by a run that died
        after its last checkpoint, are taken away. Raises ``OutputError`` where that fails."""
        self.path = path
        try:
            # A run that starts anew also measures anew what there was before its first iteration.
            with path.open("ab+") as file:
                end = _end_of(file, done) if done > 0 else 0
                file.truncate(end)
                file.seek(max(end - 1, 0))
                if file.read(1) not in (b"", b"\n"):
                    file.write(b"\n")
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise unwritable(error, path) from error

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        # JSON knows no NaN; a reader of null sees that the number was not finite.
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        try:
            self._file.write(json.dumps({"iteration": iteration, **finite}) + "\n")
            self._file.flush()
        except OSError as error:
            raise unwritable(error, self.path) from error

    def close(self) -> None:
        # Each line is on its way already; what a full disk refused, it would refuse again.
        with suppress(OSError):
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; what was damaged or cut off is left out."""
    if not path.exists():
        return []
    with open_file(path) as file:
        return [line for text in file if (line := _line_of(text)) is not None]


def _line_of(text: bytes) -> dict[str, Any] | None:
    try:
        line = parse_json(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("iteration"), int) else None


def _end_of(file: BinaryIO, done: int) -> int:
    """The bytes up to the last line of iteration ``done`` or one before, looked for from behind."""
    end = os.fstat(file.fileno()).st_size
    if not end:
        return 0
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        while end:
            start = text.rfind(b"\n", 0, end - 1) + 1
            line = _line_of(text[start:end])
            if line is not None and line["iteration"] <= done:
                return end
            end = start
    return 0


@frozen
class FiniteCheck:
    """What all processes know after a step."""

    metrics: dict[str, float]  # averaged
    nonfinite: dict[str, list[int]]  # name -> ranks on which it was NaN or inf
    stop: bool  # whether anybody was asked to stop


def reduce_step_metrics(
    metrics: Mapping[str, Tensor | float],
    must_be_finite: Mapping[str, Tensor],
    stop: bool,
    device: torch.device,
) -> FiniteCheck:
    """Average metrics over processes and check what must be finite, with one collective."""
    names, guarded = sorted(metrics), sorted(must_be_finite)
    numbers = [_number(metrics[name], device) for name in names]
    flags = [(~must_be_finite[name].isfinite()).any().to(device) for name in guarded]
    flags.append(torch.as_tensor(stop, device=device))
    vector = torch.stack([value.to(torch.float64) for value in (*numbers, *flags)])
    total = collectives.all_reduce_sum(vector.clone()).tolist()
    world = collectives.world_size()
    averages = {name: value / world for name, value in zip(names, total, strict=False)}
    nonfinite: dict[str, list[int]] = {}
    if any(total[len(names) : -1]):
        nonfinite = _by_rank(guarded, vector.tolist()[len(names) : -1])
    return FiniteCheck(averages, nonfinite, total[-1] > 0)


def _number(value: Tensor | float, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(device, torch.float64)
    return torch.tensor(value, dtype=torch.float64, device=device)


def _by_rank(guarded: Sequence[str], flags: Sequence[float]) -> dict[str, list[int]]:
    everyone = collectives.all_gather_object(list(flags))
    return {
        name: ranks
        for index, name in enumerate(guarded)
        if (ranks := [collectives.place_of(r) for r, own in enumerate(everyone) if own[index]])  # type: ignore[index]
    }


def format_metrics(values: Mapping[str, float]) -> str:
    """Metrics on one line."""
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())
