"""Axial rotary position embedding (RoPE) of image patches.

A patch at row y and column x, in coordinates of [-1, 1] over the image, turns pairs of channels of
its queries and keys by angles 2 pi y / period and 2 pi x / period, for head_dim / 4 periods. Rotary
embedding: Su et al. 2021, "RoFormer"; axial over two dimensions: Heo et al. 2024, "Rotary Position
Embedding for Vision Transformer"; on normalised coordinates: the DINOv3 paper, section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dinov3_vit.configs import DEFAULT_ROPE_BASE, VitConfig

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_MAX_CACHED = 16


class RotaryTable:
    """Cosines and sines [P, head_dim] of the P patches of a crop.

    Neither a tuple nor a dataclass: mixed precision looks into those among a block's arguments and
    casts what it finds to the parameters' precision, and the table must keep its own.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos, self.sin = cos, sin

    def rotate(self, tokens: Tensor) -> Tensor:
        """Turn [B, N, ..., heads, head_dim]; the last P of the N tokens are the patches.

        Calculates in the table's precision; tokens before the patches pass unchanged.
        """
        patches = self.cos.shape[0]
        others, turned = torch.split(tokens, [tokens.shape[1] - patches, patches], dim=1)
        shape = (patches, *[1] * (tokens.ndim - 3), tokens.shape[-1])
        turned = turned.to(self.cos.dtype)
        first, second = turned.chunk(2, dim=-1)
        quarter = torch.cat((-second, first), dim=-1)  # a quarter turn of each pair
        turned = turned * self.cos.view(shape) + quarter * self.sin.view(shape)
        return torch.cat((others, turned.to(tokens.dtype)), dim=1)


class RotaryPositions(nn.Module):
    """Makes the tables; holds the periods, which checkpoints carry.

    The buffer ``periods`` [head_dim / 4] is float32 for good: moving a model to another precision
    leaves it alone, so that a bf16 model's tables are as accurate as a float32 one's. Values that
    a checkpoint brings count, whatever precision they were rounded to.
    """

    periods: Tensor

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.normalize = config.pos_embed_rope_normalize_coords
        self.shift = config.pos_embed_rope_shift_coords or 0.0
        self.jitter = config.pos_embed_rope_jitter_coords or 1.0
        self.rescale = config.pos_embed_rope_rescale_coords or 1.0
        self.dtype = DTYPES[config.pos_embed_rope_dtype]
        low, high = config.pos_embed_rope_min_period, config.pos_embed_rope_max_period
        quarter = config.head_dim // 4
        if low is not None and high is not None:
            # From low to high, both included.
            self._exponents = [i / max(quarter - 1, 1) for i in range(quarter)]
            self._scale, self._ratio = low, high / low
        else:
            # From 1 to base, base excluded.
            self._exponents = [i / quarter for i in range(quarter)]
            self._scale, self._ratio = 1.0, config.pos_embed_rope_base or DEFAULT_ROPE_BASE
        self.register_buffer("periods", torch.empty(quarter, dtype=torch.float32))
        self._cache: dict[tuple[int, int, bool], RotaryTable] = {}
        self._cached_for: tuple[Tensor, int | None] | None = None
        self.init_weights()

    def init_weights(self) -> None:
        """Set the periods."""
        values = [self._scale * self._ratio**exponent for exponent in self._exponents]
        with torch.no_grad():
            self.periods.copy_(self.periods.new_tensor(values))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryPositions:
        before = self.periods
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.periods.dtype != before.dtype:
            self.periods = before.to(device=self.periods.device)
        return self

    @property
    def is_random(self) -> bool:
        """Whether each table is drawn anew."""
        return self.training and (self.shift, self.jitter, self.rescale) != (0.0, 1.0, 1.0)

    @torch.no_grad()
    def forward(self, height: int, width: int) -> RotaryTable:
        """The table of a crop of ``height`` by ``width`` patches.

        In training, shift, jitter and rescaling are drawn at each call. Otherwise a table is made
        once for each size and kept as long as the periods stay the same tensor, unchanged.
        """
        if self.is_random or torch.compiler.is_compiling():
            return self._table(height, width)
        version = None if self.periods.is_inference() else self.periods._version
        known = self._cached_for
        if known is None or known[0] is not self.periods or known[1] != version:
            self._cache.clear()
            self._cached_for = (self.periods, version)
        # A table made in inference mode cannot be used where gradients are wanted.
        key = (height, width, torch.is_inference_mode_enabled())
        if key not in self._cache:
            if len(self._cache) >= _MAX_CACHED:
                self._cache.clear()
            self._cache[key] = self._table(height, width)
        return self._cache[key]

    def _table(self, height: int, width: int) -> RotaryTable:
        coordinates = self._coordinates(height, width)
        if self.is_random:
            coordinates = self._augment(coordinates)
        angles = 2 * math.pi * coordinates[:, :, None] / self.periods.float()  # [P, 2, head_dim/4]
        angles = angles.flatten(1).repeat(1, 2)  # [P, head_dim]: pairs lie half a head apart
        return RotaryTable(angles.cos().to(self.dtype), angles.sin().to(self.dtype))

    def _coordinates(self, height: int, width: int) -> Tensor:
        """Rows and columns of patch centres, float32 [P, 2], in [-1, 1] along a whole side."""
        lengths = {
            "min": (min(height, width),) * 2,
            "max": (max(height, width),) * 2,
            "separate": (height, width),
        }[self.normalize]
        rows, columns = (
            2 * (torch.arange(count, device=self.periods.device) + 0.5) / length - 1
            for count, length in zip((height, width), lengths, strict=True)
        )
        return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)

    def _augment(self, coordinates: Tensor) -> Tensor:
        if self.shift:
            coordinates = coordinates + coordinates.new_empty(2).uniform_(-self.shift, self.shift)
        for numbers, largest in ((2, self.jitter), (1, self.rescale)):
            if largest != 1:
                limit = math.log(largest)
                factor = coordinates.new_empty(numbers).uniform_(-limit, limit).exp()
                coordinates = coordinates * factor
        return coordinates
