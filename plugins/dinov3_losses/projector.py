"""The projection head of DINO and iBOT."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3_framework import Projector
from dinov3_losses.configs import ProjectorConfig

_NO_SPREAD = 1e-10  # what rounding leaves of points of the unit sphere that are all one


class PrototypeProjector(Projector):
    """Tokens [n, D] to logits over prototypes [n, K]: an MLP, a unit sphere, K prototypes.

    The prototypes are the rows of ``last_layer.weight``, which are not normalized. (Caron et al.
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

    def role_of(self, name: str) -> str | None:
        return "prototypes" if name.startswith("last_layer.") else None

    @torch.no_grad()
    def init_weights(self) -> None:
        """Truncated normal weights of standard deviation 0.02, biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.no_grad()
    def fit(self, tokens: Tensor) -> bool:
        """Take embeddings of tokens [n, D], and mixtures of two, for prototypes.

        The MLP stays random, which keeps distances roughly (Johnson and Lindenstrauss 1984).
        Prototypes are differences from the mean embedding, scaled such that a token's logit with
        its own prototype is 1 on average, whatever the spread of the embeddings: the targets are
        then as sharp as those of a teacher that was trained with its projector.
        """
        if len(tokens) < 2:
            return False
        offsets = self._embed(tokens.float())
        offsets -= offsets.mean(dim=0)
        spread = offsets.square().sum(dim=1).mean()
        if spread < _NO_SPREAD:
            return False
        count = self.last_layer.weight.shape[0]
        first, second = torch.randint(len(tokens), (2, count))
        places = torch.randperm(len(tokens))[:count]
        share = torch.rand(count, 1)
        first[: len(places)], share[: len(places)] = places, 1.0
        mixed = share * offsets[first] + (1 - share) * offsets[second]
        length = mixed.norm(dim=1, keepdim=True).clamp(min=1e-12)
        self.last_layer.weight.copy_(mixed / length / spread.sqrt())
        return True

    def _embed(self, tokens: Tensor) -> Tensor:
        """Tokens [n, D] to points of the unit sphere [n, bottleneck]."""
        embedding = self.mlp(tokens)
        # In float32: the smallest length that is told from 0 would itself be 0 in float16.
        return F.normalize(embedding.float(), dim=-1).to(embedding.dtype)

    def forward(
        self, tokens: Tensor, reduce: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> Tensor:
        """Logits [n, K] of tokens [n, D].

        Or else, so that nobody needs to hold as many logits, what ``reduce`` makes of the unit
        embeddings [n, d] and the prototypes [K, d], of one dtype: it is called in here, because
        sharded prototypes are whole only as long as this module runs.
        """
        unit = self._embed(tokens)
        if reduce is not None:
            return reduce(unit, self.last_layer.weight.to(unit.dtype))
        return self.last_layer(unit)  # type: ignore[no-any-return]
