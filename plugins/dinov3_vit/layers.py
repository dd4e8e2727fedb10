"""The parts of a block, and the patch embedding."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3_vit.configs import VitConfig
from dinov3_vit.rope import RotaryTable

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layernorm": functools.partial(nn.LayerNorm, eps=1e-6),
    "layernormbf16": functools.partial(nn.LayerNorm, eps=1e-5),
    "rmsnorm": functools.partial(nn.RMSNorm, eps=1e-5),
}


def concatenate(tensors: Sequence[Tensor]) -> Tensor:
    """``torch.cat`` that does not copy a single tensor."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def separate(packed: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """``torch.split`` along the first axis, whose gradient does not copy a single part's."""
    return (packed,) if len(sizes) == 1 else torch.split(packed, list(sizes))


class PatchProjection(nn.Conv2d):
    """Images [B, C, H, W] to one vector per patch [B, P, D], row by row.

    A convolution whose stride is its kernel's size is a matrix product over the pixels of each
    patch: as such it is faster in bf16, and the tokens come out in a row.
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int) -> None:
        super().__init__(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        samples, channels, height, width = images.shape
        side = self.kernel_size[0]
        rows, columns = height // side, width // side
        cells = images.reshape(samples, channels, rows, side, columns, side)
        pixels = cells.permute(0, 2, 4, 1, 3, 5).reshape(samples, rows * columns, -1)
        return F.linear(pixels, self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Images [B, C, H, W] to patch tokens [B, P, D]; H and W are multiples of the patch size."""

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = PatchProjection(in_chans, embed_dim, patch_size)

    def init_weights(self) -> None:
        bound = 1 / math.sqrt(self.proj.weight[0].numel())
        nn.init.uniform_(self.proj.weight, -bound, bound)
        if self.proj.bias is not None:
            nn.init.uniform_(self.proj.bias, -bound, bound)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images)  # type: ignore[no-any-return]


class LayerScale(nn.Module):
    """A learned factor per channel: Touvron et al. 2021, "Going deeper with Image Transformers"."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def init_weights(self) -> None:
        nn.init.constant_(self.gamma, self.initial)

    def forward(self, gain: Tensor, onto: Tensor | None = None) -> Tensor:
        """The gain scaled, and added to ``onto``, if given, in the same pass over memory."""
        return gain * self.gamma if onto is None else torch.addcmul(onto, gain, self.gamma)


class MaskedKeyBiasLinear(nn.Linear):
    """The fused query, key and value projection with the keys' bias held at zero.

    A bias on the keys adds the same to all of a query's logits, so the softmax does not see it.
    The buffer ``bias_mask``, ones and zeros, is in the published checkpoints.
    """

    bias_mask: Tensor
    product = staticmethod(F.linear)  # which an engine may replace by one in another precision

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 3 * dim)
        self.register_buffer("bias_mask", torch.empty(3 * dim))
        self.init_mask()

    @torch.no_grad()
    def init_mask(self) -> None:
        queries, keys, values = self.bias_mask.chunk(3)
        queries.fill_(1)
        keys.fill_(0)
        values.fill_(1)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        # The mask follows from the shape alone: one saved before it was ever set (NaN) is no loss.
        if not self.bias_mask.is_meta and not self.bias_mask.isfinite().all():
            self.bias_mask = torch.empty_like(self.bias_mask)  # not the checkpoint's own tensor
            self.init_mask()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.product(tokens, self.weight, self.bias * self.bias_mask.to(self.bias.dtype))


class Attention(nn.Module):
    """Self-attention within each crop; the projections see all crop batches at once."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.num_heads = config.num_heads
        masked = config.mask_k_bias and config.qkv_bias
        self.qkv = MaskedKeyBiasLinear(dim) if masked else nn.Linear(dim, 3 * dim, config.qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=config.proj_bias)

    def forward(
        self, tokens: Tensor, shapes: Sequence[tuple[int, int]], tables: Sequence[RotaryTable]
    ) -> Tensor:
        """Packed tokens [sum of B * N, D] of crop batches of ``shapes`` (B, N); the same back."""
        sizes = [samples * length for samples, length in shapes]
        packed = separate(self.qkv(tokens), sizes)
        attended = [
            self._attend(qkv, shape, table)
            for qkv, shape, table in zip(packed, shapes, tables, strict=True)
        ]
        return self.proj(concatenate(attended))  # type: ignore[no-any-return]

    def _attend(self, qkv: Tensor, shape: tuple[int, int], table: RotaryTable) -> Tensor:
        query, key, value = table.rotate(qkv.view(*shape, 3, self.num_heads, -1))
        attended = F.scaled_dot_product_attention(query, key, value)  # [B, heads, N, head_dim]
        return attended.transpose(1, 2).reshape(shape[0] * shape[1], -1)


class Mlp(nn.Module):
    """Two layers with a GELU between."""

    def __init__(self, dim: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens)))  # type: ignore[no-any-return]


class SwiGlu(nn.Module):
    """A gated FFN (Shazeer 2020, "GLU Variants Improve Transformer")."""

    def __init__(self, dim: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=bias)
        self.w2 = nn.Linear(dim, hidden, bias=bias)
        self.w3 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(tokens)) * self.w2(tokens))  # type: ignore[no-any-return]


def build_ffn(config: VitConfig) -> nn.Module:
    """The FFN that the config asks for."""
    kind = Mlp if config.ffn_layer == "mlp" else SwiGlu
    return kind(config.embed_dim, config.ffn_hidden, config.ffn_bias)
