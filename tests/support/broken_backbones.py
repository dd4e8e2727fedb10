"""Backbones that each break one promise, and the words by which the checks say so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dinov3_framework import (
    BackboneConfig,
    config,
)
from dinov3_framework.testing.toy_backbone import ToyBackbone


@config
class ToyBackboneConfig(BackboneConfig):
    """Config of the backbones below."""


class SoundBackbone(ToyBackbone):
    def __init__(self, config: ToyBackboneConfig) -> None:
        super().__init__(config.in_chans or 3)


class NoBackbone(nn.Linear):
    def __init__(self, config: ToyBackboneConfig) -> None:
        super().__init__(3, 8)


class RealMemory(SoundBackbone):
    def __init__(self, config: ToyBackboneConfig) -> None:
        super().__init__(config)
        self.register_buffer("table", torch.from_numpy(np.zeros(3)))


class ForgottenBuffer(SoundBackbone):
    def __init__(self, config: ToyBackboneConfig) -> None:
        super().__init__(config)
        self.register_buffer("offset", torch.zeros(8), persistent=False)


class OtherRandomness(SoundBackbone):
    def init_weights(self) -> None:
        super().init_weights()
        noise = np.random.default_rng().random(8, np.float32)
        self.mask_token.data.copy_(torch.from_numpy(noise))


class RunningStatistics(SoundBackbone):
    def __init__(self, config: ToyBackboneConfig) -> None:
        super().__init__(config)
        self.batch_norm = nn.BatchNorm2d(3, affine=False)

    def init_weights(self) -> None:
        super().init_weights()
        if hasattr(self, "batch_norm"):
            self.batch_norm.reset_parameters()

    def forward_features(self, images: Any, masks: Any = None) -> Any:
        if isinstance(images, Tensor):
            images = self.batch_norm(images)
        return super().forward_features(images, masks)


class OtherShapes(SoundBackbone):
    built = 0

    def __init__(self, config: ToyBackboneConfig) -> None:
        super().__init__(config)
        type(self).built += 1
        self.extra = nn.Parameter(torch.zeros(type(self).built))

    def init_weights(self) -> None:
        super().init_weights()
        if hasattr(self, "extra"):
            nn.init.zeros_(self.extra)


class HiddenState(SoundBackbone):
    """A part of the weights that no state dict holds."""

    def init_weights(self) -> None:
        super().init_weights()
        self.offset = torch.randn(())

    def forward_features(self, images: Any, masks: Any = None) -> Any:
        output = super().forward_features(images, masks)
        if isinstance(output, dict):
            output["x_prenorm"] = output["x_prenorm"] + self.offset
        return output


class WrongChannels(SoundBackbone):
    def __init__(self, config: ToyBackboneConfig) -> None:
        ToyBackbone.__init__(self, 5)


class Changed(SoundBackbone):
    """Base of those that change what one batch gives."""

    def forward_features(
        self,
        images: Tensor | Sequence[Tensor],
        masks: Tensor | Sequence[Tensor | None] | None = None,
    ) -> Any:
        output = super().forward_features(images, masks)
        return self.change(output, images) if isinstance(output, dict) else output

    def change(self, output: dict[str, Any], images: Any) -> Any:
        return output


class MissingKey(Changed):
    def change(self, output: dict[str, Any], images: Any) -> Any:
        del output["x_prenorm"]
        return output


class TooFewPatches(Changed):
    def change(self, output: dict[str, Any], images: Any) -> Any:
        return output | {"x_norm_patchtokens": output["x_norm_patchtokens"][:, 1:]}


class NotFinite(Changed):
    def change(self, output: dict[str, Any], images: Any) -> Any:
        return output | {"x_norm_clstoken": output["x_norm_clstoken"] / 0}


class DropsMasks(Changed):
    def change(self, output: dict[str, Any], images: Any) -> Any:
        return output | {"masks": None}


class FullPrecisionOnly(Changed):
    def change(self, output: dict[str, Any], images: Any) -> Any:
        weight = torch.eye(8)
        return output | {"x_norm_clstoken": output["x_norm_clstoken"] @ weight}


class OwnRandomness(Changed):
    def change(self, output: dict[str, Any], images: Any) -> Any:
        noise = np.random.default_rng().random() if self.training else 0.0
        return output | {"x_norm_clstoken": output["x_norm_clstoken"] + noise}


class Detached(Changed):
    def change(self, output: dict[str, Any], images: Any) -> Any:
        return output | {name: t.detach() if t is not None else t for name, t in output.items()}


class ForwardDiffers(SoundBackbone):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * 2


class IgnoresMasks(SoundBackbone):
    def forward_features(self, images: Any, masks: Any = None) -> Any:
        output = super().forward_features(images, None if isinstance(masks, Tensor) else masks)
        return output | {"masks": masks} if isinstance(output, dict) else output


class ColumnsFirst(SoundBackbone):
    """Takes masks for columns of patches rather than rows."""

    def forward_features(self, images: Any, masks: Any = None) -> Any:
        if not isinstance(masks, Tensor):
            return super().forward_features(images, masks)
        height, width = (side // self.patch_size for side in images.shape[-2:])
        turned = masks.view(-1, width, height).transpose(1, 2).reshape(masks.shape)
        return super().forward_features(images, turned) | {"masks": masks}


class BatchesMeet(SoundBackbone):
    def forward_features(self, images: Any, masks: Any = None) -> Any:
        output = super().forward_features(images, masks)
        if isinstance(output, list):
            output[1]["x_norm_clstoken"] += output[0]["x_norm_clstoken"]
        return output


class OneBatchOnly(SoundBackbone):
    def forward_features(self, images: Any, masks: Any = None) -> Any:
        return super().forward_features(images, masks) if isinstance(images, Tensor) else {}


class WrongLayer(SoundBackbone):
    def layer_of(self, name: str) -> tuple[int, int]:
        return (3, 2) if name == "mask_token" else (0, 2)


class StrangeBlock(SoundBackbone):
    def blocks_to_shard(self) -> list[nn.Module]:
        return [nn.Linear(2, 2)]


class IdleBlock(SoundBackbone):
    """Reads a block's parameters without calling it, which sharding cannot see."""

    def __init__(self, config: ToyBackboneConfig) -> None:
        super().__init__(config)
        self.block = nn.Linear(8, 8)

    def init_weights(self) -> None:
        super().init_weights()
        if hasattr(self, "block"):
            nn.init.eye_(self.block.weight)
            nn.init.zeros_(self.block.bias)

    def forward_features(self, images: Any, masks: Any = None) -> Any:
        output = super().forward_features(images, masks)
        if isinstance(output, dict):
            output["x_norm_clstoken"] = nn.functional.linear(
                output["x_norm_clstoken"], self.block.weight, self.block.bias
            )
            tokens = output["x_norm_clstoken"]
            output["x_prenorm"] = torch.cat([tokens[:, None], output["x_prenorm"][:, 1:]], 1)
        return output

    def blocks_to_shard(self) -> list[nn.Module]:
        return [self.block]


class FlatLayers(SoundBackbone):
    def get_intermediate_layers(self, images: Any, **options: Any) -> Any:
        return super().get_intermediate_layers(images, **options | {"reshape": False})


class OtherLastLayer(SoundBackbone):
    def get_intermediate_layers(self, images: Any, **options: Any) -> Any:
        ((patches, cls),) = super().get_intermediate_layers(images, **options)
        return ((patches, cls + 1),)


BACKBONES: dict[str, tuple[Callable[..., Any], str]] = {
    "no backbone": (NoBackbone, "gave a NoBackbone, no Backbone"),
    "raises": (lambda config: 1 / 0, "test_meta_device: raised ZeroDivisionError"),
    "real memory": (RealMemory, "these take memory: table"),
    "forgotten buffer": (ForgottenBuffer, "left 'offset' without a finite value"),
    "other randomness": (OtherRandomness, "other values for the same seed.*mask_token"),
    "other shapes": (OtherShapes, "two builds of one config differ.*extra"),
    "hidden state": (HiddenState, "after load_state_dict, its features differ"),
    "wrong channels": (WrongChannels, "in_chans is 5"),
    "missing key": (MissingKey, "leaves out x_prenorm"),
    "too few patches": (TooFewPatches, r"x_norm_patchtokens is \[2, 15, 8\]"),
    "not finite": (NotFinite, "x_norm_clstoken is not finite"),
    "forward differs": (ForwardDiffers, "calling it gives something else"),
    "drops masks": (DropsMasks, "masks are not handed back"),
    "ignores masks": (IgnoresMasks, "masked patches are seen"),
    "columns first": (ColumnsFirst, "masked patches are seen"),
    "batches meet": (BatchesMeet, "several batches in one pass change"),
    "one batch only": (OneBatchOnly, "must give a list of two dicts"),
    "full precision only": (FullPrecisionOnly, "test_bfloat16: raised RuntimeError"),
    "own randomness": (OwnRandomness, "in training, the same seed"),
    "running statistics": (RunningStatistics, "changes its state in training.*batch_norm"),
    "detached": (Detached, "test_gradient: raised RuntimeError"),
    "wrong layer": (WrongLayer, r"layer_of\('mask_token'\) is \(3, 2\)"),
    "strange block": (StrangeBlock, "no submodule of the backbone"),
    "flat layers": (FlatLayers, r"gives a grid \[2, 16, 8\]"),
    "other last layer": (OtherLastLayer, "has another class token"),
    "idle block": (IdleBlock, "does not call: block"),
}
