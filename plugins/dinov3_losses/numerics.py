"""Numbers of losses: float32 whatever networks run in, and sums of what comes in slices."""

from __future__ import annotations

from typing import Self

import torch
from attrs import define
from torch import Tensor


def full_precision(tensor: Tensor) -> torch.autocast:
    """A context without autocast, on the tensor's kind of device."""
    return torch.autocast(tensor.device.type, enabled=False)


@define
class RunningLogSumExp:
    """log sum exp of the columns so far, [n], in two summands: largest + log(total).

    Their sum would round off the second where values are large.
    """

    largest: Tensor
    total: Tensor

    @classmethod
    def of_nothing(cls, n_rows: int, device: torch.device) -> Self:
        return cls(
            torch.full((n_rows,), -torch.inf, device=device), torch.zeros(n_rows, device=device)
        )

    def add(self, values: Tensor) -> None:
        """More columns, float32 [n, k], which are written to."""
        now = torch.maximum(self.largest, values.amax(dim=1))
        self.total *= (self.largest - now).exp()
        self.total += values.sub_(now[:, None]).exp_().sum(dim=1)
        self.largest = now

    def log_softmax(self, values: Tensor) -> Tensor:
        """Columns [n, k] that were added, less the log sum exp of all; in place."""
        return values.sub_(self.largest[:, None]).sub_(self.total.log()[:, None])
