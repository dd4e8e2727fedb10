"""The projection head of DINO and iBOT."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3_framework import Projector
from dinov3_losses.configs import ProjectorConfig


class PrototypeProjector(Projector):
    """Tokens [n, D] to logits over prototypes [n, K]: an MLP, a unit sphere, K prototypes.

    The prototypes are the rows of ``last_layer.weight``, which are not normalised. (Caron et al.
    2021, "Emerging Properties in Self-Supervised Vision Transformers", appendix C.)
    """

    def __init__(self, config: ProjectorConfig, embed_dim: int) -> None:
        super().__init__()
        widths = [embed_dim, *[config.hidden_dim] * (config.n_layers - 1), config.bottleneck_dim]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.GELU()]
        layers.pop()
        # One layer is called mlp.weight, several mlp.0.weight ..., as in published checkpoints.
        self.mlp = layers[0] if len(layers) == 1 else nn.Sequential(*layers)
        self.last_layer = nn.Linear(config.bottleneck_dim, config.n_prototypes, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Truncated normal weights of standard deviation 0.02, biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self, tokens: Tensor, reduce: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> Tensor:
        """Logits [n, K] of tokens [n, D].

        Or else, so that nobody needs to hold as many logits, what ``reduce`` makes of the unit
        embeddings [n, d] and the prototypes [K, d], of one dtype: it is called in here, because
        sharded prototypes are whole only as long as this module runs.
        """
        embedding = self.mlp(tokens)
        # In float32: the smallest length that is told from 0 would itself be 0 in float16.
        unit = F.normalize(embedding.float(), dim=-1).to(embedding.dtype)
        if reduce is not None:
            return reduce(unit, self.last_layer.weight.to(unit.dtype))
        return self.last_layer(unit)  # type: ignore[no-any-return]
