"""Promises of an optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dinov3_framework.contracts.training import OptimizerFactory
from dinov3_framework.testing.suite import Suite

_STEPS = 3
_SHAPES = ((3, 4), (5,), ())


class OptimizerSuite(Suite):
    """Promises of an optimizer's factory, on three parameters in two groups."""

    kind = "optimizer"
    contract = OptimizerFactory

    def optimizer(
        self, device: str = "cpu", *, filled: bool = True
    ) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
        """An optimizer as the trainer makes it, its state there from the start; or torch's own."""
        generator, factory = torch.Generator().manual_seed(1), self.build()
        drawn = [torch.randn(shape, generator=generator) for shape in _SHAPES]
        parameters = [nn.Parameter(values.to(device)) for values in drawn]
        optimizer = factory.build([{"params": parameters[:1]}, {"params": parameters[1:]}])
        assert isinstance(optimizer, torch.optim.Optimizer) and len(optimizer.param_groups) == 2, (
            f"build() of two groups must give an optimizer of two, gave {optimizer!r}"
        )
        for parameter in parameters if filled else ():
            optimizer.state[parameter] = factory.initial_state(parameter)
        return optimizer, parameters

    def steps(
        self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], *rates: float
    ) -> None:
        """Three steps with the same gradients each time; settings of groups change between them."""
        generator = torch.Generator().manual_seed(2)
        for step in range(_STEPS):
            for rate, group in zip(rates, optimizer.param_groups, strict=True):
                group["lr"], group["weight_decay"] = rate / (1 + step), rate / 10
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    # ------------------------------------------------------------------ promises
    def test_learning_rate(self) -> None:
        """Groups take the learning rate that is set before a step."""
        optimizer, parameters = self.optimizer()
        before = [parameter.detach().clone() for parameter in parameters]
        self.steps(optimizer, parameters, 0.0, 0.1)
        moved = [not torch.equal(*pair) for pair in zip(before, parameters, strict=True)]
        assert moved == [False, True, True], (
            "a group with learning rate 0 must stay, one with 0.1 must move"
        )

    def test_state_is_complete(self) -> None:
        """``initial_state`` has all that steps keep: a checkpoint is loaded into it."""
        optimizer, parameters = self.optimizer()
        first = [_shapes(optimizer.state[parameter]) for parameter in parameters]
        self.steps(optimizer, parameters, 0.1, 0.2)
        for parameter, before in zip(parameters, first, strict=True):
            after = _shapes(optimizer.state[parameter])
            assert before == after, f"keeps {after}, where initial_state() gave {before}"

    def test_first_steps(self) -> None:
        """Steps from ``initial_state`` equal those of torch's own first state, bit for bit."""
        results = []
        for filled in (True, False):
            optimizer, parameters = self.optimizer(filled=filled)
            self.steps(optimizer, parameters, 0.1, 0.2)
            results.append(parameters)
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True)), (
            "steps from initial_state() differ from those of a new optimizer"
        )

    def test_meta_device(self) -> None:
        """It is built of parameters on the meta device, and keeps its state there."""
        optimizer, parameters = self.optimizer("meta")
        for parameter in parameters:
            for name, value in optimizer.state[parameter].items():
                on_meta = isinstance(value, Tensor) and value.is_meta
                assert on_meta, f"initial_state() on the meta device takes memory for {name}"


def _shapes(state: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v.shape) if isinstance(v, Tensor) else type(v) for k, v in state.items()}
