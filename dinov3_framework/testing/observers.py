"""Promises of an observer."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from attrs import Factory, field, frozen
from torch import Tensor

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.contracts.running import Model, Observer, StepRecord
from dinov3_framework.errors import first_few
from dinov3_framework.kinds import DatasetConfig, OptimizerConfig
from dinov3_framework.runtime.results import write_results
from dinov3_framework.schedules import Constant
from dinov3_framework.testing.suite import Suite
from dinov3_framework.testing.toy_backbone import PATCH_SIZE, ToyBackbone
from dinov3_framework.training import TrainingConfig

_ITERATIONS = 4
_SIZES = {"global": (2, 7 * PATCH_SIZE), "local": (3, 3 * PATCH_SIZE)}


class ObserverSuite(Suite):
    """Promises of an observer, which watches a made-up run of four steps.

    The run's backbone has patches of 4 pixels, its global crops 28, of ``images.channels``.
    """

    kind = "observer"
    contract = Observer
    images: ImagesConfig = ImagesConfig()

    def watch(self, run: _MadeUpRun) -> None:
        observer: Observer = self.build()
        backbone = run.model().backbone
        before = copy.deepcopy(backbone.state_dict())
        observer.check(run.build, run.images)
        _expect_numbers("on_start()", observer.on_start(run, 0))
        for iteration in range(1, _ITERATIONS + 1):
            record = StepRecord(iteration, _metrics(iteration))
            _expect_numbers("on_step()", observer.on_step(run, record))
        observer.on_checkpoint(run, _ITERATIONS, run.output_dir / "checkpoints")
        results = observer.on_end(run)
        named = results is None or isinstance(results, Mapping)
        assert named, f"on_end() must give None or a mapping, gave {results!r}"
        with tempfile.TemporaryDirectory() as folder:
            write_results(Path(folder), results or {})  # raises for what JSON cannot hold
        observer.on_close(run, None)
        now = backbone.state_dict()
        changed = [name for name, tensor in now.items() if not torch.equal(tensor, before[name])]
        assert not changed, f"changes the model that it watches: {first_few(changed)}"
        assert not backbone.training, "leaves the model in training mode"

    # ------------------------------------------------------------------ promises
    def test_run(self, tmp_path: Path) -> None:
        """Methods give numbers or nothing, the end JSON; the model is left as it was."""
        lines = [{"iteration": i, **_metrics(i)} for i in range(1, _ITERATIONS + 1)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "metrics.jsonl").write_text(text, "utf-8")
        self.watch(_MadeUpRun(tmp_path, self.images, True, self.known))

    def test_other_processes(self, tmp_path: Path) -> None:
        """A process that is not the main one writes nothing."""
        self.watch(_MadeUpRun(tmp_path, self.images, False, self.known))
        written = [path.name for path in tmp_path.iterdir()]
        assert not written, f"writes {written} in a process whose run.is_main is false"

    def test_failed_run(self, tmp_path: Path) -> None:
        """It can be closed before it saw anything."""
        observer: Observer = self.build()
        run = _MadeUpRun(tmp_path, self.images, True, self.known)
        observer.on_close(run, RuntimeError("out of memory"))


def _expect_numbers(method: str, given: Any) -> None:
    named = given is None or (
        isinstance(given, Mapping)
        and all(isinstance(k, str) and isinstance(v, Real) for k, v in given.items())
    )
    assert named, f"{method} must give None or numbers by name, gave {given!r}"


def _metrics(iteration: int) -> dict[str, float]:
    return {"loss": 2.0 / iteration, "lr": 1e-3, "images_per_second": 100.0, "data_wait": 0.0}


def _model(run: _MadeUpRun, seed: int = 1) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = ToyBackbone(run.images.channels)
    return Model(backbone.eval().requires_grad_(False), run.images, size=_SIZES["global"][1])


@frozen
class _MadeUpRun:
    """Implements ``contracts.running.Run`` without any training."""

    output_dir: Path
    images: ImagesConfig
    is_main: bool
    registry: Any
    total_iterations: int = _ITERATIONS
    device: torch.device = field(factory=lambda: torch.device("cpu"))
    trained: Model = field(default=Factory(_model, takes_self=True))

    @property
    def config(self) -> TrainingConfig:
        constant = Constant(value=1e-3)
        return TrainingConfig(
            iterations=_ITERATIONS,
            batch_size=8,
            dataset=DatasetConfig(),
            images=self.images,
            optimizer=OptimizerConfig(lr=constant, weight_decay=constant),
            output_dir=str(self.output_dir),
        )

    def build(self, config: Any, **runtime: Any) -> Any:
        return self.registry.build(config, **runtime)

    def model(self) -> Model:
        return self.trained

    def initial_model(self) -> Model:
        return _model(self, seed=2)

    def sample_batch(self, count: int) -> Mapping[str, Tensor]:
        generator, channels = torch.Generator().manual_seed(9), self.images.channels
        batch = {}
        for view, (crops, size) in _SIZES.items():
            shape = (crops, count, channels, size, size)
            batch[view] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        crops, size = _SIZES["global"]
        patches = (size // PATCH_SIZE) ** 2
        batch["masks"] = torch.rand(crops, count, patches, generator=generator) < 0.3
        return batch
