"""Backbones and what stands on them.

The letters in shapes: B samples, C channels, H and W pixels, P patches, R storage tokens, D width.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.errors import UserError


class Backbone(nn.Module, abc.ABC):
    """A network from images to tokens."""

    embed_dim: int
    patch_size: int  # pixels along the side of a patch token's cell
    in_chans: int
    n_layers: int = 1  # what get_intermediate_layers counts
    takes_masks: bool = True  # whether masked patches can be replaced; if not, masks are refused
    images: ImagesConfig | None = None  # what its weights were trained on, where that is known

    @abc.abstractmethod
    def init_weights(self) -> None:
        """Give every parameter *and buffer* its initial value (they come from the meta device)."""

    @abc.abstractmethod
    def forward_features(
        self,
        images: Tensor | Sequence[Tensor],
        masks: Tensor | Sequence[Tensor | None] | None = None,
    ) -> Any:
        """Tokens of a batch [B, C, H, W], or of several batches of other sizes in one pass.

        Each batch gives a dict: ``x_norm_clstoken`` [B, D], ``x_storage_tokens`` [B, R, D],
        ``x_norm_patchtokens`` [B, P, D], ``x_prenorm`` [B, 1 + R + P, D], ``masks``. ``masks`` is
        bool [B, P]: those patches are replaced by the mask token. Several batches are a list; the
        first holds global crops, those after it local crops.
        """

    def forward(self, images: Tensor) -> Tensor:
        """Class tokens [B, D]."""
        tokens: Tensor = self.forward_features(images)["x_norm_clstoken"]
        return tokens

    def get_intermediate_layers(
        self,
        images: Tensor,
        *,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        return_extra_tokens: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """What some of the ``n_layers`` layers put out, in the network's order.

        ``n`` is a number of last layers, or their indices from 0. Each gives its patches
        [B, P, D], or a grid [B, D, h, w] with ``reshape``; with ``return_class_token`` and
        ``return_extra_tokens`` a tuple of patches, class token [B, D] and storage tokens
        [B, R, D]. ``norm`` applies the final norm. The width D may differ from layer to layer.

        A backbone that does not say more gives its last layer, after the norm, alone; anything
        else is a ``UserError``.
        """
        last = self.n_layers - 1
        if n not in (1, [last], (last,)) or not norm:
            raise UserError(
                f"{type(self).__name__} gives its last layer after the norm alone, not n = {n}"
                + ("" if norm else " without the norm")
            )
        tokens = self.forward_features(images)
        patches = tokens["x_norm_patchtokens"]
        if reshape:
            height, width = (side // self.patch_size for side in images.shape[-2:])
            patches = patches.transpose(1, 2).reshape(len(patches), -1, height, width)
        parts = [patches]
        if return_class_token:
            parts.append(tokens["x_norm_clstoken"])
        if return_extra_tokens:
            parts.append(tokens["x_storage_tokens"])
        return (tuple(parts) if len(parts) > 1 else patches,)

    def layer_of(self, name: str) -> tuple[int, int]:
        """(layer, layers) of a parameter, for layer-wise learning-rate decay.

        0 is the embedding, ``layers`` what comes after the last block. By default no decay.
        """
        return 0, 0

    def blocks_to_shard(self) -> Iterable[nn.Module]:
        """The submodules that are sharded (and recomputed, and compiled) as units."""
        return ()


class Projector(nn.Module, abc.ABC):
    """A loss's own network on top of tokens; the engine makes its momentum twin."""

    @abc.abstractmethod
    def init_weights(self) -> None: ...

    def fit(self, tokens: Tensor) -> bool:
        """Make the projector of a frozen teacher that came without one say something of its tokens.

        Called once in a distillation, after ``init_weights``, on the CPU, with tokens [n, D] of
        training images as the loss projects them. Whatever is random comes from torch's global
        generator. False if nothing was changed.
        """
        return False


class Head(nn.Module, abc.ABC):
    """An evaluation head on top of a backbone's features."""

    @abc.abstractmethod
    def init_weights(self) -> None: ...
