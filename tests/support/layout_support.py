"""Tiny networks with no value left at its default, and rules applied to plain dicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from attrs import field, frozen
from dinov3_vit.configs import VitConfig
from dinov3_vit.transformer import VisionTransformer
from torch import Tensor

from dinov3_framework import Layout, Rule

Tensors = dict[str, Tensor]


@frozen
class Held:
    """A ``Content`` in memory; notes what was read."""

    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any] = field(factory=dict)
    was_read: list[str] = field(factory=list)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        self.was_read.append(name)
        return self.tensors[name]


def tiny(**options: Any) -> VitConfig:
    dims = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "n_storage_tokens": 3}
    return VitConfig(**{**dims, **options})


def label(config: VitConfig) -> str:
    """What is not as it is by default, for the name of a test."""
    defaults = VitConfig()
    values = attrs.asdict(config).items()
    named = [f"{name}={value}" for name, value in values if value != getattr(defaults, name)]
    return " ".join([type(config).__name__, *named])


def random_vit(config: VitConfig) -> VisionTransformer:
    """A network whose every parameter matters to what it puts out."""
    vit = VisionTransformer(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            parameter.normal_(0, 0.4, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
            if name.endswith("qkv.bias") and config.mask_k_bias:
                parameter.chunk(3)[1].zero_()
    return vit


def rules_of(layout: Layout, vit: VisionTransformer) -> list[Rule]:
    names = list(vit.state_dict())
    rules = list(layout.rules(vit.config, names))
    assert [rule.official for rule in rules] == names
    return rules


def stored(layout: Layout, vit: VisionTransformer) -> Tensors:
    """The tensors of a file that holds ``vit``."""
    official, initial = vit.state_dict(), VisionTransformer(vit.config).state_dict()
    tensors: Tensors = {}
    for rule in rules_of(layout, vit):
        name = rule.official
        written = rule.write(official[name], lambda name=name: initial[name])
        shapes = {new: tuple(tensor.shape) for new, tensor in written.items()}
        assert shapes == rule.stored(tuple(official[name].shape))
        assert not tensors.keys() & written.keys()
        tensors |= written
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def restored(layout: Layout, config: VitConfig, tensors: Tensors) -> VisionTransformer:
    """The network that a file's tensors are read into; every one of them, and none else."""
    vit = VisionTransformer(config).eval()
    state, wanted = vit.state_dict(), {}
    for rule in rules_of(layout, vit):
        shape = tuple(state[rule.official].shape)
        wanted |= rule.stored(shape)
        tensor = rule.read(shape, tensors.__getitem__)
        if tensor is not None:
            assert tensor.shape == shape
            state[rule.official] = tensor
    assert wanted == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    vit.load_state_dict(state, strict=True)
    return vit


def tokens_of(vit: VisionTransformer, images: Tensor) -> Tensor:
    """Class, storage and patch tokens after the final norm [B, 1 + R + P, D]."""
    features = vit.forward_features(images)
    parts = (features["x_storage_tokens"], features["x_norm_patchtokens"])
    return torch.cat([features["x_norm_clstoken"][:, None], *parts], dim=1)


def images_of(height: int, width: int, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))
