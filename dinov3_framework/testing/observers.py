"""Promises of an observer."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from attrs import field, frozen
from torch import Tensor

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.contracts.running import Observer, StepRecord
from dinov3_framework.kinds import ObserverConfig
from dinov3_framework.registry import Registry
from dinov3_framework.testing.subject import Subject
from dinov3_framework.testing.toy_backbone import PATCH_SIZE, ToyBackbone

_ITERATIONS = 4
_SIZES = {"global": (2, 7 * PATCH_SIZE), "local": (3, 3 * PATCH_SIZE)}


def check_observer(
    config: ObserverConfig,
    output_dir: Path,
    *,
    registry: Registry | None = None,
    factory: Callable[..., Any] | None = None,
    images: ImagesConfig | None = None,
) -> None:
    """Let an observer watch a made-up run of four steps, whose ``output_dir`` is an empty folder.

    The run's backbone has patches of 4 pixels, its global crops 28, of ``images.channels`` channels
    (left out, RGB).

    Promises: each method gives None or figures by name, ``on_end`` what JSON can hold; the teacher
    is left as it was, in eval mode; where the process is not the one that writes, no file appears.
    """
    known = registry if registry is not None else Registry.load()
    subject = Subject.of("observer", config, known, factory)
    spec = images if images is not None else ImagesConfig()
    for name, is_main in (("main", True), ("other", False)):
        folder = output_dir / name
        folder.mkdir(parents=True)
        run = _MadeUpRun(folder, spec, is_main, known)
        if is_main:
            _write_metrics(folder)
        _watch(subject, run)
        subject.require(
            is_main or not any(folder.iterdir()),
            f"writes {[path.name for path in folder.iterdir()]} in a process whose run.is_main is "
            "false",
        )


def _watch(subject: Subject, run: _MadeUpRun) -> None:
    with subject.doing("building it"):
        observer: Observer = subject.build()
    before = copy.deepcopy(run.teacher.state_dict())
    with subject.doing("on_start()"):
        _check_figures(subject, "on_start()", observer.on_start(run, 0))
    for iteration in range(1, _ITERATIONS + 1):
        record = StepRecord(iteration, _figures(iteration))
        with subject.doing("on_step()"):
            _check_figures(subject, "on_step()", observer.on_step(run, record))
    with subject.doing("on_end()"):
        results = observer.on_end(run)
    subject.require(
        results is None or isinstance(results, Mapping),
        f"on_end() must give None or a mapping, gave {results!r}",
    )
    with subject.doing("writing what on_end() gave as JSON"):
        json.dumps(results)
    changed = [n for n, t in run.teacher.state_dict().items() if not torch.equal(t, before[n])]
    subject.require(not changed, f"changes the teacher that it watches: {', '.join(changed)}")
    subject.require(not run.teacher.training, "leaves the teacher in training mode")


def _check_figures(subject: Subject, method: str, figures: Any) -> None:
    subject.require(
        figures is None
        or (
            isinstance(figures, Mapping)
            and all(isinstance(k, str) and isinstance(v, Real) for k, v in figures.items())
        ),
        f"{method} must give None or numbers by name, gave {figures!r}",
    )


def _figures(iteration: int) -> dict[str, float]:
    return {"loss": 2.0 / iteration, "lr": 1e-3, "images_per_second": 100.0, "data_wait": 0.0}


def _write_metrics(folder: Path) -> None:
    lines = [json.dumps({"iteration": i, **_figures(i)}) for i in range(1, _ITERATIONS + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


@frozen
class _MadeUpRun:
    """Implements ``contracts.Run`` without any training."""

    output_dir: Path
    images: ImagesConfig
    is_main: bool
    registry: Registry
    total_iterations: int = _ITERATIONS
    device: torch.device = field(factory=lambda: torch.device("cpu"))
    patch_size: int = PATCH_SIZE
    teacher: Backbone = field(init=False)

    @teacher.default
    def _made_up_teacher(self) -> Backbone:
        return self._backbone(seed=1)

    def _backbone(self, seed: int) -> Backbone:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            backbone = ToyBackbone(self.images.channels)
        return backbone.eval().requires_grad_(False)

    def build(self, config: Any, **runtime: Any) -> Any:
        return self.registry.build(config, **runtime)

    def teacher_backbone(self) -> Backbone:
        return self.teacher

    def initial_backbone(self) -> Backbone:
        return self._backbone(seed=2)

    def sample_batch(self, count: int) -> Mapping[str, Tensor]:
        generator = torch.Generator().manual_seed(9)
        channels = self.images.channels
        batch = {
            view: torch.randint(
                0, 256, (crops, count, channels, size, size), dtype=torch.uint8, generator=generator
            )
            for view, (crops, size) in _SIZES.items()
        }
        crops, size = _SIZES["global"]
        patches = math.prod([size // PATCH_SIZE] * 2)
        batch["masks"] = torch.rand(crops, count, patches, generator=generator) < 0.3
        return batch
