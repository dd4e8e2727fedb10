"""Losses are calculated in float32, whatever precision the networks run in."""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(tensor: Tensor) -> torch.autocast:
    """A context without autocast, on the tensor's kind of device."""
    return torch.autocast(tensor.device.type, enabled=False)
