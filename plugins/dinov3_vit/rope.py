"""Axial rotary position embedding (RoPE) of image patches.

A patch at row y and column x, in coordinates of [-1, 1] over the image, turns pairs of channels of
its queries and keys by angles 2 pi y / period and 2 pi x / period, for head_dim / 4 periods. Rotary
embedding: Su et al. 2021, "RoFormer"; axial over two dimensions: Heo et al. 2024, "Rotary Position
Embedding for Vision Transformer"; on normalized coordinates: the DINOv3 paper, section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dinov3_vit.configs import DEFAULT_ROPE_BASE, VitConfig

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_MAX_CACHED = 16


class RotaryTable:
    """Cosines and sines [N, head_dim] of the N tokens of a crop, the same for all blocks.

    Tokens that are no patches come first and have cosine 1 and sine 0: they pass unchanged.

    Neither a tuple nor a dataclass: mixed precision looks into those among a block's arguments and
    casts what it finds to the parameters' precision, and the table must keep its own.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos, self.sin = cos, sin

    def rotate(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys turned and values as they are, from what projects all three.

        [B, N, 3, heads, head_dim] gives three of [B, heads, N, head_dim]. Calculates in the
        table's precision and gives back that of ``qkv``. In memory, keys and values lie in this
        order, in which attention is fastest; queries by token, as attention then puts out what
        the next layer reads.
        """
        # Compilers and the transforms of torch.func (vmap, jvp, ...) want to see the formula.
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            key, value = qkv[:, :, 1:].permute(2, 0, 3, 1, 4).contiguous()
            query = _turned(qkv[:, :, 0], self.cos[:, None], self.sin[:, None]).transpose(1, 2)
            return query, _turned(key, self.cos, self.sin), value
        return _Rotation.apply(qkv, self.cos, self.sin)  # type: ignore[no-any-return]


def _turned(tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation as a formula; the shapes are any that broadcast to [..., head_dim]."""
    (a, b), (cos, _), (sin, _) = (part.chunk(2, dim=-1) for part in (tokens, cos, sin))
    halves = (a * cos - b * sin, b * cos + a * sin)
    return torch.cat([half.to(tokens.dtype) for half in halves], dim=-1)


class _Rotation(torch.autograd.Function):
    """The rotation in as few passes over memory as PyTorch's operators allow.

    Values are copied too: as nothing refers to ``qkv`` any more, its memory is free before the
    backward pass. That turns gradients back by the same angles and needs no activations.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        source = qkv.permute(2, 0, 3, 1, 4)  # [3, B, heads, N, head_dim]
        samples, length, _, heads, channels = qkv.shape
        query = qkv.new_empty(samples, length, heads, channels).transpose(1, 2)
        key, value = (qkv.new_empty(samples, heads, length, channels) for _ in range(2))
        _turn(source[0], cos, sin, query)
        _turn(source[1], cos, sin, key)
        value.copy_(source[2])
        return query, key, value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Any, ...]:
        cos, sin = ctx.saved_tensors
        samples, heads, length, channels = query.shape
        packed = query.new_empty(samples, length, 3, heads, channels)
        target = packed.permute(2, 0, 3, 1, 4)
        _turn(query, cos, sin, target[0], back=True)
        _turn(key, cos, sin, target[1], back=True)
        target[2].copy_(value)
        return packed, None, None


def _turn(tokens: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, back: bool = False) -> None:
    """Turn tokens [B, heads, N, head_dim] into ``out``, or turn them back."""
    if tokens.dtype == cos.dtype:
        exact, turned = tokens, torch.mul(tokens, cos, out=out)
    else:
        exact = tokens.to(cos.dtype)
        turned = exact * cos
    # Pairs of channels lie half a head apart.
    half, sign = tokens.shape[-1] // 2, -1 if back else 1
    turned[..., :half].addcmul_(exact[..., half:], sin[:, :half], value=-sign)
    turned[..., half:].addcmul_(exact[..., :half], sin[:, half:], value=sign)
    if turned is not out:
        out.copy_(turned)


def _table(coordinates: Tensor, periods: Tensor, n_unturned: int) -> Tensor:
    """Cosines and sines [2, N, head_dim] of patches at ``coordinates`` [P, 2]."""
    angles = 2 * math.pi * coordinates[:, :, None] / periods.float()  # [P, 2, head_dim / 4]
    angles = F.pad(angles.flatten(1), (0, 0, n_unturned, 0))  # [N, head_dim / 2]
    # Twice, as pairs of channels lie half a head apart.
    return torch.stack((angles.cos(), angles.sin())).repeat(1, 1, 2)


# Left to itself, a compiler fuses the table into the rotation and repeats it in each block.
_opaque_table = torch.library.custom_op("dinov3_vit::rotary_table", _table, mutates_args=())


@_opaque_table.register_fake
def _(coordinates: Tensor, periods: Tensor, n_unturned: int) -> Tensor:
    length, channels = n_unturned + coordinates.shape[0], 4 * periods.shape[0]
    return coordinates.new_empty(2, length, channels)


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
        self.n_unturned = 1 + config.n_storage_tokens
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
        """The table of a crop of ``height`` by ``width`` patches, and of the tokens before them.

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
        opaque = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        make = _opaque_table if opaque else _table
        cos, sin = make(coordinates, self.periods, self.n_unturned).to(self.dtype)
        return RotaryTable(cos, sin)

    def _coordinates(self, height: int, width: int) -> Tensor:
        """Rows and columns of patch centers, float32 [P, 2], in [-1, 1] along a whole side."""
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
