"""Promises of an evaluation."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from functools import cached_property
from numbers import Real
from typing import Any

import torch

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.contracts.networks import Head
from dinov3_framework.contracts.running import Evaluation, Model
from dinov3_framework.errors import first_few
from dinov3_framework.testing.suite import Suite
from dinov3_framework.testing.toy_backbone import PATCH_SIZE, ToyBackbone


class EvaluationSuite(Suite):
    """Promises of an evaluation, which measures a toy backbone with patches of 4 pixels.

    ``head`` is on it if it is given; for another model, override ``model``.
    """

    kind = "evaluation"
    contract = Evaluation
    images: ImagesConfig = ImagesConfig()
    head: Head | None = None
    size: int | None = 8 * PATCH_SIZE

    @cached_property
    def model(self) -> Model:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            backbone = ToyBackbone(self.images.channels).eval()
        return Model(backbone, self.images, self.head, self.size)

    @cached_property
    def evaluation(self) -> Evaluation:
        evaluation: Evaluation = self.build()
        evaluation.prepare(self.known.build, self.images)
        problems = list(evaluation.problems(self.model))
        assert not problems, f"cannot measure the model: {first_few(map(str, problems))}"
        return evaluation

    # ------------------------------------------------------------------ promises
    def test_metrics(self) -> None:
        """Metrics are finite numbers by name, the same when measured again."""
        metrics = _numbers("run()", self.evaluation.run(self.model))
        assert metrics, "run() gives no metric"
        assert metrics == _numbers("run()", self.evaluation.run(self.model)), (
            "run() gives other numbers when called again"
        )

    def test_model_is_left_alone(self) -> None:
        """The model has its values and is in eval mode afterwards."""
        networks = [each for each in (self.model.backbone, self.model.head) if each is not None]
        before = [copy.deepcopy(network.state_dict()) for network in networks]
        self.evaluation.run(self.model)
        for network, state in zip(networks, before, strict=True):
            now = network.state_dict()
            changed = [name for name, value in state.items() if not torch.equal(value, now[name])]
            assert not changed, f"changes the model: {first_few(changed)}"
            assert not network.training, "leaves the model in training mode"

    def test_record(self) -> None:
        """What the metrics mean can be written as JSON; the data are one line."""
        self.evaluation.run(self.model)
        json.dumps(dict(self.evaluation.protocol(self.model)))
        text = self.evaluation.data()
        is_line = isinstance(text, str) and bool(text.strip()) and "\n" not in text
        assert is_line, f"data() must give one line of text, gave {text!r}"

    def test_baselines(self) -> None:
        """Baselines have metrics of the same names."""
        names = self.evaluation.run(self.model).keys()
        for what, metrics in self.evaluation.baselines(self.model).items():
            other = _numbers(f"the baseline {what!r}", metrics).keys() - names
            assert not other, f"the baseline {what!r} has metrics of its own: {first_few(other)}"


def _numbers(what: str, given: Any) -> Mapping[str, float]:
    named = isinstance(given, Mapping) and all(
        isinstance(name, str) and isinstance(value, Real) and math.isfinite(value)
        for name, value in given.items()
    )
    assert named, f"{what} must give finite numbers by name, gave {given!r}"
    return given  # type: ignore[no-any-return]
