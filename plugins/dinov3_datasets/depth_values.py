"""From stored numbers to depth in its unit, NaN where it is not known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from dinov3_framework.data.masks import read_map
from dinov3_framework.errors import WrongTargetError


@frozen
class DepthReader:
    """Reads maps of depth as float32."""

    max_pixels: int
    scale: float | None = None  # None: 1, and integers are refused
    invalid: tuple[float, ...] = (0.0,)
    negative: bool = False

    def __call__(self, path: Path) -> Tensor:
        """Depth [H, W]; raises ``CorruptSampleError``."""
        stored = read_map(path, self.max_pixels)
        if self.scale is None and stored.dtype.kind != "f":
            raise WrongTargetError(str(path), f"holds {stored.dtype}; {SCALE_IS_NEEDED}")
        return self.of(stored)

    def of(self, stored: np.ndarray) -> Tensor:
        """From stored values of any type."""
        values = stored.astype(np.float64) * (1.0 if self.scale is None else self.scale)
        unknown = ~np.isfinite(values)
        if not self.negative:
            unknown |= values < 0
        for value in self.invalid:
            unknown |= stored == value
        values[unknown] = np.nan
        return torch.from_numpy(values.astype(np.float32))


SCALE_IS_NEEDED = "state what a stored 1 is (scale), such as 0.001 for millimeters in meters"
