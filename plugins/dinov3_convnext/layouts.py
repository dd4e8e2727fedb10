"""How files name a ConvNeXt's tensors: Meta's own, transformers' and timm's."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from itertools import count, takewhile
from typing import Any, ClassVar

from attrs import frozen

from dinov3_convnext.configs import PRESETS, STAGES, STRIDE, ConvNextConfig
from dinov3_framework import (
    BackboneConfig,
    CheckpointError,
    Content,
    ImagesConfig,
    Layout,
    Renamed,
    Rule,
)


class _ConvNextLayout(Layout):
    """Every tensor has one name in the file; the final norm's two official names share it."""

    config: ClassVar[type[BackboneConfig]] = ConvNextConfig

    @abc.abstractmethod
    def stored(self, name: str) -> str:
        """The name in the file of the tensor with this official name."""

    def rules(self, config: BackboneConfig, names: Sequence[str]) -> Sequence[Rule]:
        return [Renamed(name, self.stored(name)) for name in names]

    def recognize(self, content: Content) -> ConvNextConfig | None:
        """By the shapes of the convolutions between stages and the number of blocks in each."""
        shapes = [content.shapes.get(self.stored(name), ()) for name in _DOWNSAMPLING]
        if [shape[2:] for shape in shapes] != _KERNELS:
            return None
        in_chans, dims = shapes[0][1], tuple(shape[0] for shape in shapes)
        depths = tuple(self._depth(content, stage) for stage in range(STAGES))
        if 0 in (in_chans, *dims, *depths) or self.stored("norm.weight") not in content.shapes:
            return None
        self._check(content)
        fields: dict[str, Any] = {} if in_chans == 3 else {"in_chans": in_chans}
        if self.stored("stages.0.0.gamma") not in content.shapes:
            fields["layer_scale_init_value"] = 0.0
        preset = _PRESET_OF.get((depths, dims))
        if preset is not None:
            return PRESETS[preset](**fields)
        return ConvNextConfig(depths=depths, dims=dims, **fields)

    def _depth(self, content: Content, stage: int) -> int:
        names = (self.stored(f"stages.{stage}.{block}.dwconv.weight") for block in count())
        return sum(1 for _ in takewhile(lambda name: name in content.shapes, names))

    def _check(self, content: Content) -> None:
        """Raise ``CheckpointError`` if the file's settings ask for what this network is not."""


class MetaLayout(_ConvNextLayout):
    """Official names."""

    format: ClassVar[str] = "meta"

    def stored(self, name: str) -> str:
        return name


@frozen
class HuggingFaceLayout(_ConvNextLayout):
    """``DINOv3ConvNextModel`` of transformers, with its ``config.json``.

    Files name the stages ``stages.0``; the module itself, in recent versions, ``model.stages.0``,
    and so does a state dict that somebody saved by hand.
    """

    stages: str = "stages"

    format: ClassVar[str] = "huggingface"
    _PARTS: ClassVar[Mapping[str, str]] = {
        "dwconv": "depthwise_conv",
        "norm": "layer_norm",
        "pwconv1": "pointwise_conv1",
        "pwconv2": "pointwise_conv2",
        "gamma": "gamma",
    }

    def stored(self, name: str) -> str:
        match name.split("."):
            case ["downsample_layers", stage, *rest]:
                names = [self.stages, stage, "downsample_layers", *rest]
            case ["stages", stage, block, part, *rest]:
                names = [self.stages, stage, "layers", block, self._PARTS[part], *rest]
            case _:
                names = ["layer_norm", name.rpartition(".")[2]]
        return ".".join(names)

    def _check(self, content: Content) -> None:
        for key, ours in {"hidden_act": "gelu", "layer_norm_eps": 1e-6}.items():
            theirs = content.settings.get(key, ours)
            if theirs != ours:
                raise CheckpointError(
                    f"config.json says {key} = {theirs!r}; these backbones have {ours!r}"
                )

    def refusal(self, config: BackboneConfig) -> str | None:
        if isinstance(config, ConvNextConfig) and not config.layer_scale_init_value:
            return (
                "it always scales residual branches, and this backbone has "
                "layer_scale_init_value = 0"
            )
        return None

    def settings(
        self, config: BackboneConfig, images: ImagesConfig, size: int
    ) -> Mapping[str, Mapping[str, Any]]:
        config = _ours(config)
        return {
            "config.json": {
                "architectures": ["DINOv3ConvNextModel"],
                "model_type": "dinov3_convnext",
                "dtype": "float32",
                "depths": list(config.depths),
                "hidden_sizes": list(config.dims),
                "num_channels": images.channels,
                "image_size": size,
                "hidden_act": "gelu",
                "layer_norm_eps": 1e-6,
                "layer_scale_init_value": config.layer_scale_init_value,
                "drop_path_rate": config.drop_path_rate,
                "initializer_range": 0.02,
            },
            "preprocessor_config.json": {
                # The name in published folders, which old and new versions know.
                "image_processor_type": "DINOv3ViTImageProcessorFast",
                "do_resize": True,
                "size": {"height": size, "width": size},
                "resample": 2,  # bilinear
                "do_rescale": True,
                "rescale_factor": 1 / 255,
                "do_normalize": True,
                "image_mean": list(images.mean),
                "image_std": list(images.std),
            },
        }


class TimmLayout(_ConvNextLayout):
    """``timm.models.ConvNeXt`` without a classifier, such as ``convnext_tiny.dinov3_lvd1689m``."""

    format: ClassVar[str] = "timm"
    _PARTS: ClassVar[Mapping[str, str]] = {
        "dwconv": "conv_dw",
        "norm": "norm",
        "pwconv1": "mlp.fc1",
        "pwconv2": "mlp.fc2",
        "gamma": "gamma",
    }

    def stored(self, name: str) -> str:
        match name.split("."):
            case ["downsample_layers", "0", *rest]:
                names = ["stem", *rest]
            case ["downsample_layers", stage, *rest]:
                names = ["stages", stage, "downsample", *rest]
            case ["stages", stage, block, part, *rest]:
                names = ["stages", stage, "blocks", block, self._PARTS[part], *rest]
            case _:
                names = ["head.norm", name.rpartition(".")[2]]
        return ".".join(names)

    def _check(self, content: Content) -> None:
        architecture = content.settings.get("architecture", "convnext_tiny")
        if architecture not in _TIMM_ARCHITECTURES:
            raise CheckpointError(
                f"config.json says architecture = {architecture!r}; of timm's ConvNeXts, "
                f"{', '.join(_TIMM_ARCHITECTURES)} compute what these backbones do"
            )

    def settings(
        self, config: BackboneConfig, images: ImagesConfig, size: int
    ) -> Mapping[str, Mapping[str, Any]]:
        config = _ours(config)
        preset = _PRESET_OF.get((config.depths, config.dims))
        arguments: dict[str, Any] = {}
        if preset is None:
            arguments |= {"depths": list(config.depths), "dims": list(config.dims)}
        if images.channels != 3:
            arguments["in_chans"] = images.channels
        if not config.layer_scale_init_value:
            arguments["ls_init_value"] = None
        settings: dict[str, Any] = {
            "architecture": preset or "convnext_tiny",
            "num_classes": 0,
            "num_features": config.dims[-1],
            "global_pool": "avg",
            "pretrained_cfg": {
                "custom_load": False,
                "input_size": [images.channels, size, size],
                "pool_size": [size // STRIDE] * 2,
                "fixed_input_size": False,
                "interpolation": "bicubic",
                "crop_pct": 1.0,
                "crop_mode": "center",
                "mean": list(images.mean),
                "std": list(images.std),
                "num_classes": 0,
                # timm turns the weights of RGB into those of other channels where it is told
                # which layer they come in by; these have their own already.
                "first_conv": "stem.0" if images.channels == 3 else None,
                "classifier": "head.fc",
            },
        }
        return {"config.json": settings | ({"model_args": arguments} if arguments else {})}


# The convolutions that change a map's size, by official names, and their kernels.
_DOWNSAMPLING = [f"downsample_layers.{stage}.{min(stage, 1)}.weight" for stage in range(STAGES)]
_KERNELS = [(4, 4), *[(2, 2)] * (STAGES - 1)]
_PRESET_OF = {(preset().depths, preset().dims): name for name, preset in PRESETS.items()}
# timm's others have another activation, another epsilon, or convolutions for linear layers.
_TIMM_ARCHITECTURES = (*PRESETS, "convnext_xlarge")

# Of two layouts of one format, the first is the one that files are written in.
LAYOUTS: list[Layout] = [
    MetaLayout(),
    HuggingFaceLayout(),
    HuggingFaceLayout(stages="model.stages"),
    TimmLayout(),
]


def _ours(config: BackboneConfig) -> ConvNextConfig:
    if not isinstance(config, ConvNextConfig):
        raise TypeError(f"a layout of ConvNeXts was given a {type(config).__name__}")
    return config
