"""The config of a Vision Transformer from the shapes of its tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from attrs import frozen

from dinov3_framework import CheckpointError, InvalidOption
from dinov3_vit.configs import DEFAULT_ROPE_BASE, PRESETS, SWIGLU_MULTIPLE, VitConfig

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]

# What every Vision Transformer of this package has, under its official name.
REQUIRED = frozenset(
    {
        "cls_token",
        "patch_embed.proj.weight",
        "blocks.0.norm1.weight",
        "blocks.0.attn.proj.weight",
        "norm.weight",
    }
)
_SWIGLU_STEP = SWIGLU_MULTIPLE["swiglu"]
# Relative errors of periods that were rounded to a lower precision, and of those that were not.
_ROUNDED = {"bfloat16": 2**-8, "half": 2**-10}
_EXACT = 2e-6


@frozen
class Structure:
    """What shapes say: dimensions, and by name the config's fields that hold the rest.

    Heads are not among them: the projections of 6 heads of 64 and of 12 of 32 look alike.
    """

    patch_size: int
    embed_dim: int
    depth: int
    gated: bool
    ffn_hidden: int
    options: Mapping[str, Any]

    @classmethod
    def of(cls, shapes: Mapping[str, Shape]) -> Structure:
        """Read off shapes under official names, ``REQUIRED`` among them.

        Raises ``CheckpointError`` where they are not those of a Vision Transformer of this kind.
        """
        patches = _of_axes(4, shapes, "patch_embed.proj.weight")
        embed_dim, in_chans, patch_size, patch_width = patches
        if patch_size != patch_width:
            raise CheckpointError(
                f"its patches are {patch_size} x {patch_width} pixels; these backbones' are square"
            )
        gated = "blocks.0.mlp.w1.weight" in shapes
        first_layer = "blocks.0.mlp.w1" if gated else "blocks.0.mlp.fc1"
        if f"{first_layer}.weight" not in shapes:
            raise CheckpointError("the first block has no FFN that is known (fc1, or w1 and w2)")
        storage_tokens = 0
        if "storage_tokens" in shapes:
            _, storage_tokens, _ = _of_axes(3, shapes, "storage_tokens")
        parts = (name.split(".") for name in shapes)
        blocks = {int(p[1]) for p in parts if p[0] == "blocks" and p[1:2] and p[1].isdecimal()}
        if max(blocks) > len(shapes):  # each of them has several tensors
            raise CheckpointError(f"there is a block {max(blocks):,}, and few before it")
        return cls(
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=max(blocks) + 1,
            gated=gated,
            ffn_hidden=_of_axes(2, shapes, f"{first_layer}.weight")[0],
            options={
                "in_chans": None if in_chans == 3 else in_chans,
                "ffn_bias": f"{first_layer}.bias" in shapes,
                "proj_bias": "blocks.0.attn.proj.bias" in shapes,
                # Only whether there is a scale counts: its first value is gone.
                **({} if "blocks.0.ls1.gamma" in shapes else {"layerscale_init": 0.0}),
                # LayerNorms differ by an epsilon that shapes do not show; published models have
                # the one of "layernormbf16".
                "norm_layer": "layernormbf16" if "norm.bias" in shapes else "rmsnorm",
                "n_storage_tokens": storage_tokens,
                "untie_cls_and_patch_norms": "cls_norm.weight" in shapes,
                "untie_global_and_local_cls_norm": "local_cls_norm.weight" in shapes,
            },
        )

    def config(self, num_heads: int, options: Mapping[str, Any]) -> VitConfig:
        """The config of such a backbone; ``options`` are known from elsewhere and go first.

        The config of a published size where the dimensions are its own, with those options that
        differ. Raises ``CheckpointError`` for what no config describes.
        """
        options = {**self.options, **options}
        try:
            for preset in PRESETS.values():
                published = preset()
                if self._is(published, num_heads):
                    return preset(**_differing(published, options))
            return VitConfig(
                patch_size=self.patch_size,
                embed_dim=self.embed_dim,
                depth=self.depth,
                num_heads=num_heads,
                ffn_layer=self._ffn_layer,
                ffn_ratio=self._ffn_ratio,
                **_differing(VitConfig(), options),
            )
        except InvalidOption as error:
            raise CheckpointError(f"no Vision Transformer of this kind: {error}") from error

    def _is(self, config: VitConfig, num_heads: int) -> bool:
        return (
            self.patch_size == config.patch_size
            and self.embed_dim == config.embed_dim
            and self.depth == config.depth
            and num_heads == config.num_heads
            and self.gated == (config.ffn_layer != "mlp")
            and self.ffn_hidden == config.ffn_hidden
        )

    @property
    def _ffn_layer(self) -> Literal["mlp", "swiglu"]:
        if not self.gated:
            return "mlp"
        if self.ffn_hidden % _SWIGLU_STEP:
            raise CheckpointError(
                f"its SwiGLU is {self.ffn_hidden} wide; these backbones' are a multiple of "
                f"{_SWIGLU_STEP}"
            )
        return "swiglu"

    @property
    def _ffn_ratio(self) -> float:
        # Of the width that counts as the whole: a SwiGLU has 2/3 of it.
        whole = self.ffn_hidden // 2 * 3 if self.gated else self.ffn_hidden
        return ratio_of(whole, self.embed_dim)


def ratio_of(hidden: int, width: int) -> float:
    """A number whose product with ``width``, rounded down, is ``hidden``."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _differing(config: VitConfig, options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if getattr(config, name) != value}


def _of_axes(count: int, shapes: Mapping[str, Shape], name: str) -> Shape:
    """The shape of a tensor, which must have ``count`` axes."""
    if len(shapes[name]) != count:
        raise CheckpointError(
            f"{name} is of shape {list(shapes[name])}; in these backbones it has {count} axes"
        )
    return shapes[name]


# --------------------------------------------------------------------------- heads and RoPE
def published_heads(embed_dim: int) -> int:
    """Heads of the published size that is ``embed_dim`` wide, where nothing else tells."""
    heads = {config.embed_dim: config.num_heads for config in (p() for p in PRESETS.values())}
    if embed_dim not in heads:
        raise CheckpointError(
            f"nothing here says how many heads its attention has, and no published backbone is "
            f"{embed_dim} wide; keep RoPE's periods (rope_embed.periods) or the model's "
            "config.json beside the weights"
        )
    return heads[embed_dim]


def heads_of(embed_dim: int, periods: Shape) -> int:
    """Heads of a backbone with RoPE's periods of this shape, [head_dim / 4]."""
    head_dim = 4 * math.prod(periods)
    if len(periods) != 1 or head_dim == 0 or embed_dim % head_dim:
        raise CheckpointError(
            f"RoPE's periods are of shape {list(periods)}, which does not fit tokens {embed_dim} "
            "wide: there must be a fourth as many as a head has channels"
        )
    return embed_dim // head_dim


def rope_options(periods: Tensor) -> dict[str, Any]:
    """The config's fields that give such periods [head_dim / 4], with as few digits as will do.

    Nothing for periods that were saved before they were ever set (NaN, inf). Raises
    ``CheckpointError`` for values that are not a geometric series.
    """
    if not periods.isfinite().all():
        return {}
    values: list[float] = periods.float().tolist()
    count, low, high = len(values), values[0], values[-1]
    tolerance = _tolerance(periods)
    if min(values) <= 0 or any(
        not math.isclose(value, low * (high / low) ** (i / max(count - 1, 1)), rel_tol=1e-2)
        for i, value in enumerate(values)
    ):
        raise CheckpointError(
            "RoPE's periods (rope_embed.periods) are not evenly spaced on a logarithmic scale; no "
            "config gives them"
        )

    def near(exact: float) -> Callable[[float], bool]:
        return lambda value: math.isclose(value, exact, rel_tol=tolerance)

    if low != 1:
        return {
            "pos_embed_rope_min_period": _shortest(low, near(low)),
            "pos_embed_rope_max_period": _shortest(high, near(high)),
        }
    # The slope of log(period) over the exponent i / count, by least squares.
    exponents = [i / count for i in range(count)]
    squares = sum(exponent**2 for exponent in exponents)
    if squares == 0:
        return {}
    products = zip(exponents, values, strict=True)
    base = math.exp(sum(exponent * math.log(value) for exponent, value in products) / squares)

    def gives(candidate: float) -> bool:
        pairs = zip(exponents, values, strict=True)
        return all(math.isclose(candidate**e, v, rel_tol=tolerance) for e, v in pairs)

    return {"pos_embed_rope_base": base_option(_shortest(base, gives))}


def base_option(base: float) -> float | None:
    """RoPE's base as the config has it: None for the default."""
    return None if base == DEFAULT_ROPE_BASE else base


def _tolerance(periods: Tensor) -> float:
    """How exact the values can be: published files hold them as bfloat16 left them."""
    for dtype, error in _ROUNDED.items():
        if bool((getattr(periods, dtype)().float() == periods.float()).all()):
            return error
    return _EXACT


def _shortest(value: float, good: Callable[[float], bool]) -> float:
    """The number with the fewest digits around ``value`` that is good; itself if none is."""
    rounded = (float(f"{value:.{digits}g}") for digits in range(1, 9))
    return next((candidate for candidate in rounded if good(candidate)), value)
