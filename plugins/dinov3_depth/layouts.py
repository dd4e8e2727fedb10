"""Files of depth heads that say nothing of themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from dinov3_depth.configs_heads import CHMV2, SYNTHMIX, DptDepthConfig, LinearDepthConfig
from dinov3_framework import CheckpointError, Layout, Renamed, Rule
from dinov3_framework.contracts.layouts import Content, Shape

if TYPE_CHECKING:
    from dinov3_framework import Target


class _DepthLayout(Layout):
    def targets(self, content: Content) -> Mapping[str, Target]:
        from dinov3_framework import Target  # takes torch

        return {"depth": Target("map", unit="m")}


class DptLayout(_DepthLayout):
    """The decoder's own names, as published."""

    format = "meta"
    config = DptDepthConfig
    unsaid = "which layers it looks at and what its bins are"

    def recognize(self, content: Content) -> DptDepthConfig | None:
        shapes = content.shapes
        if "reassemble_blocks.projects.0.conv.weight" not in shapes:
            return None
        if "conv_depth.head.4.weight" not in shapes:
            return None
        found = DptDepthConfig(
            bins=shapes["conv_depth.head.4.weight"][0],
            hidden=shapes["conv_depth.head.2.weight"][0],
            channels=shapes["convs.0.conv.weight"][0],
            widths=tuple(
                shapes[f"reassemble_blocks.projects.{index}.conv.weight"][0] for index in range(4)
            ),
            batch_norm="reassemble_blocks.batchnorm_layers.0.weight" in shapes,
            readout=_readout("reassemble_blocks.readout_projects.0.0.weight", shapes),
            bias="fusion_blocks.0.res_conv_unit2.conv1.conv.bias" in shapes,
            projection="project.conv.weight" in shapes,
        )
        return _as_published(found)

    def rules(self, config: DptDepthConfig, names: Sequence[str]) -> Sequence[Rule]:
        return [Renamed(name, name) for name in names]


class ChmV2Layout(_DepthLayout):
    """Canopy height in transformers' names: ``model_type`` "chmv2", whose head this is."""

    format = "huggingface"
    config = DptDepthConfig

    def recognize(self, content: Content) -> DptDepthConfig | None:
        shapes, settings = content.shapes, content.settings
        if "reassemble_stage.layers.0.projection.weight" not in shapes:
            return None
        if settings.get("model_type") != "chmv2":
            return None
        _check_factors(settings)
        backbone = settings.get("backbone_config") or {}
        indices = backbone.get("out_indices") or (6, 12, 18, 24)
        return DptDepthConfig(
            # Hidden states, of which the first are the embedded patches.
            layers=tuple(int(index) - 1 for index in indices),
            norm=bool(backbone.get("apply_layernorm", True)),
            batch_norm=False,
            readout=_readout("reassemble_stage.readout_projects.0.0.weight", shapes)
            if settings.get("readout_type", "project") != "add"
            else "add",
            widths=tuple(
                shapes[f"reassemble_stage.layers.{index}.projection.weight"][0]
                for index in range(4)
            ),
            channels=shapes["convs.0.weight"][0],
            hidden=shapes["conv_depth.head.2.weight"][0],
            bins=shapes["conv_depth.head.4.weight"][0],
            bias=True,
            projection=False,
            min_depth=float(settings.get("min_depth", 0.001)),
            max_depth=float(settings.get("max_depth", 96.0)),
            spacing=_strategy(settings, "bins_strategy"),
            weighting=_strategy(settings, "norm_strategy"),
        )

    def rules(self, config: DptDepthConfig, names: Sequence[str]) -> Sequence[Rule]:
        return [Renamed(name, _chmv2_name(name)) for name in names]


class LinearLayout(_DepthLayout):
    """A batch norm and one linear layer, as the reference's training saves them."""

    format = "meta"
    config = LinearDepthConfig
    unsaid = "which layers it looks at and what its bins are"
    alone = True

    def recognize(self, content: Content) -> LinearDepthConfig | None:
        shapes = content.shapes
        if len(shapes.get("conv_depth.weight", ())) != 4:
            return None
        return LinearDepthConfig(
            bins=shapes["conv_depth.weight"][0],
            batch_norm="batchnorm_layer.weight" in shapes,
        )

    def rules(self, config: LinearDepthConfig, names: Sequence[str]) -> Sequence[Rule]:
        return [Renamed(name, name) for name in names]


# --------------------------------------------------------------------------- parts
def _readout(name: str, shapes: Mapping[str, Shape]) -> Any:
    return "project" if name in shapes else "ignore"


def _as_published(found: DptDepthConfig) -> DptDepthConfig:
    """The published head with these shapes, which know nothing of layers and ranges."""
    for published in (SYNTHMIX, CHMV2):
        unknown = ("layers", "min_depth", "max_depth", "spacing", "weighting")
        known = {name: getattr(published, name) for name in unknown}
        if attrs.evolve(found, **known) == published:
            return published
    return found


def _strategy(settings: Mapping[str, Any], key: str) -> Any:
    value = settings.get(key, "chmv2_mixlog")
    known = {"chmv2_mixlog": "mixed_log", "linear": "linear", "log": "log"}
    if key == "norm_strategy":
        known |= {"softmax": "softmax", "sigmoid": "sigmoid"}
        known.pop("log")
    if value not in known:
        raise CheckpointError(f"its config.json has {key} {value!r}; known are {', '.join(known)}")
    return known[value]


def _check_factors(settings: Mapping[str, Any]) -> None:
    factors = settings.get("reassemble_factors") or [4, 2, 1, 0.5]
    if list(factors) != [4, 2, 1, 0.5]:
        raise CheckpointError(
            f"its config.json has reassemble_factors {factors}; known are [4, 2, 1, 0.5]"
        )


def _chmv2_name(name: str) -> str:
    """transformers' name of a tensor."""
    parts = name.split(".")
    if parts[0] == "reassemble_blocks":
        kind, index, *rest = parts[1:]
        if kind == "projects":
            return f"reassemble_stage.layers.{index}.projection.{rest[-1]}"
        if kind == "resize_layers":
            return f"reassemble_stage.layers.{index}.resize.{rest[-1]}"
        return ".".join(["reassemble_stage", kind, index, *rest])
    if parts[0] == "convs":
        return f"convs.{parts[1]}.{parts[-1]}"
    if parts[0] == "fusion_blocks":
        index, part, *rest = parts[1:]
        if part == "project":
            return f"fusion_layers.{index}.projection.{rest[-1]}"
        unit, conv = part[-1], rest[0][-1]
        return f"fusion_layers.{index}.residual_layer{unit}.convolution{conv}.{rest[-1]}"
    return name


LAYOUTS: list[Layout] = [DptLayout(), ChmV2Layout(), LinearLayout()]
