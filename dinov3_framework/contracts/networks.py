"""Backbones and what stands on them.

The letters in shapes: B samples, C channels, H and W pixels, P patches, R storage tokens, D width.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.contracts.data import Target
from dinov3_framework.errors import UserError


@attrs.frozen
class FeatureInfo:
    """The features of one layer of a backbone."""

    channels: int
    stride: int  # pixels along the side of what one position stands for


class Shardable(nn.Module, abc.ABC):
    """A network that is placed on processes: allocated, sharded, recomputed and compiled.

    It is built on the meta device.
    """

    # Methods besides ``forward`` that compute with the network's own parameters.
    forward_methods: tuple[str, ...] = ()

    @abc.abstractmethod
    def init_weights(self) -> None:
        """Give every parameter *and buffer* its initial value (they come from the meta device)."""

    def blocks_to_shard(self) -> Iterable[nn.Module]:
        """The submodules that are sharded, recomputed and compiled as units; by default none."""
        return ()

    def layer_of(self, name: str) -> tuple[int, int]:
        """(layer, layers) of a parameter, for layer-wise learning-rate decay.

        0 is the embedding, ``layers`` what comes after the last block. By default no decay.
        """
        return 0, 0

    def lr_mult(self, name: str) -> float:
        """A factor of the learning rate of a parameter, on top of all other; by default none."""
        return 1.0

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay acts on a parameter: by default not on biases, norms and scales."""
        return parameter.ndim > 1

    def role_of(self, name: str) -> str | None:
        """What a parameter is for, where an optimizer treats it in its own way.

        ``patch_embed`` (an own factor of the learning rate), ``prototypes`` (frozen at first).
        """
        return None


class Backbone(Shardable):
    """A network from images to tokens."""

    embed_dim: int
    patch_size: int  # pixels along the side of a patch token's cell
    in_chans: int
    n_layers: int = 1  # what get_intermediate_layers counts
    takes_masks: bool = True  # whether masked patches can be replaced; if not, masks are refused
    images: ImagesConfig | None = None  # what its weights were trained on, where that is known
    forward_methods = ("forward_features", "get_intermediate_layers")

    @property
    def feature_info(self) -> tuple[FeatureInfo, ...]:
        """Channels and stride of each of the ``n_layers`` layers; by default all are alike."""
        return (FeatureInfo(self.embed_dim, self.patch_size),) * self.n_layers

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


class Projector(Shardable):
    """A loss's own network on top of tokens; the engine makes its momentum twin."""

    def fit(self, tokens: Tensor) -> bool:
        """Make the projector of a frozen teacher that came without one say something of its tokens.

        Called once in a distillation, after ``init_weights``, on the CPU, with tokens [n, D] of
        training images as the loss projects them. Whatever is random comes from torch's global
        generator. False if nothing was changed.
        """
        return False


@attrs.frozen
class FeatureNeeds:
    """What a head wants of a backbone."""

    layers: tuple[int, ...] = (-1,)  # indices, from 0 or from -1 for the last backwards
    class_token: bool = False
    norm: bool = True  # whether the final norm is applied
    image: bool = False  # whether it looks at the normalized image, too
    storage: bool = False  # whether it wants storage tokens, too


@attrs.frozen
class HeadFeatures:
    """A backbone's features of a batch, a tensor for each of the layers that a head needs."""

    maps: Sequence[Tensor]  # [B, D, h, w]
    cls: Sequence[Tensor]  # [B, D]; empty unless needed
    image_size: tuple[int, int]  # pixels, height and width
    image: Tensor | None = None  # [B, C, H, W], normalized; None unless needed
    storage: Sequence[Tensor] = ()  # [B, R, D], R may be 0; empty unless needed


def _again(parts: Iterable[Any], image_size: Any) -> HeadFeatures:
    maps, cls, image, storage = parts
    return HeadFeatures(maps, cls, image_size, image[0] if image else None, storage)


# Sharding casts the tensors in what a network is called with, and follows their gradients.
register_pytree_node(
    HeadFeatures,
    lambda features: (
        [
            list(features.maps),
            list(features.cls),
            [] if features.image is None else [features.image],
            list(features.storage),
        ],
        features.image_size,
    ),
    _again,
)


class Head(Shardable):
    """A network on a backbone's features, with the loss that trains it and what it predicts.

    Built as ``factory(config, features=backbone.feature_info, targets=schema)`` on the meta device;
    ``schema`` has the targets of the data, of which it keeps in ``targets`` those that it predicts
    (see ``choose_target``). Raises ``UserError`` where they or the features do not fit it. Its
    state-dict names are those of its official files, where there are any.
    """

    needs: FeatureNeeds
    targets: Mapping[str, Target]
    # Whether it is several in one, each to be trained as it would be alone: gradients must not be
    # clipped by their common norm, nor reach a backbone that all of them share.
    independent_parts: bool = False
    # Whether predict_rows can be called: a head of masks or maps without it is predicted with all
    # its scores in memory at once.
    predicts_rows: bool = False

    def before_step(self, iteration: int, total: int) -> None:
        """Called before each iteration, from 0, of a training of ``total``.

        What it changes in the head depends on these alone, so that a resumed run has the same.
        """

    @abc.abstractmethod
    def forward(self, features: HeadFeatures) -> Any:
        """Outputs in the form that ``loss`` and ``predict`` take: tensors, or dicts, lists and
        tuples of them. They may be in bfloat16, where features or parameters are.
        """

    @abc.abstractmethod
    def loss(self, outputs: Any, targets: Mapping[str, Any]) -> LossResult:
        """What training minimizes; ``targets`` are those of the batch, on the device."""

    @abc.abstractmethod
    def predict(self, outputs: Any, size: tuple[int, int]) -> Mapping[str, Any]:
        """Predictions by the names of the targets they stand for, for images of ``size`` pixels.

        Of a ``class``: scores [B, classes]; of a ``mask``: scores [B, classes, H, W]; of a ``map``:
        values [B, H, W]; of ``boxes``: for each image a dict of boxes, scores and labels.
        """

    def predict_rows(
        self, outputs: Any, size: tuple[int, int], start: int, stop: int
    ) -> Mapping[str, Tensor]:
        """Rows ``start`` .. ``stop`` of what ``predict`` gives of masks and maps, at their cost.

        [B, classes, stop - start, W] and [B, stop - start, W]; see ``data.bilinear``. To be written
        by heads that set ``predicts_rows``.
        """
        raise TypeError(f"{type(self).__name__} does not predict some rows alone")


@attrs.frozen
class LossResult:
    """A scalar to minimize, before its weight, and metrics to log by name."""

    loss: Tensor
    metrics: Mapping[str, Tensor | float] = attrs.field(factory=dict)
