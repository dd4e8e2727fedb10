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
        known = {name for name in shapes if name.startswith("reassemble_blocks.projects.")}
        if not known or "conv_depth.head.4.weight" not in shapes:
            return None
        _check_has(
            shapes,
            "convs.0.conv.weight",
            "conv_depth.head.2.weight",
            *(f"reassemble_blocks.projects.{index}.conv.weight" for index in range(4)),
        )
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
        _check_has(
            shapes,
            "convs.0.weight",
            "conv_depth.head.2.weight",
            "conv_depth.head.4.weight",
            *(f"reassemble_stage.layers.{index}.projection.weight" for index in range(4)),
        )
        _check_settings(settings)
        return DptDepthConfig(
            layers=_layers(settings),
            norm=True,
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


def _check_has(shapes: Mapping[str, Shape], *names: str) -> None:
    missing = [name for name in names if name not in shapes]
    if missing:
        raise CheckpointError(f"looks like a DPT depth head, but lacks {', '.join(missing)}")


def _strategy(settings: Mapping[str, Any], key: str) -> Any:
    value = settings.get(key, "chmv2_mixlog")
    known = {"chmv2_mixlog": "mixed_log", "linear": "linear"}
    known |= {"log": "log"} if key == "bins_strategy" else {}
    known |= {"softmax": "softmax", "sigmoid": "sigmoid"} if key == "norm_strategy" else {}
    if value not in known:
        raise _odd(key, value, ", ".join(known))
    return known[value]


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Raise ``CheckpointError`` for what no option here stands for."""
    factors = settings.get("reassemble_factors") or [4, 2, 1, 0.5]
    if list(factors) != [4, 2, 1, 0.5]:
        raise _odd("reassemble_factors", factors, "[4, 2, 1, 0.5]")
    # There each of the two has a factor of 8: with one alone, depths are an eighth or 8 times.
    spacing, weighting = (_strategy(settings, f"{each}_strategy") for each in ("bins", "norm"))
    if (spacing == "mixed_log") != (weighting == "mixed_log"):
        raise CheckpointError(
            "its config.json has chmv2_mixlog as bins_strategy or norm_strategy alone; they go "
            "together"
        )
    backbone = settings.get("backbone_config") or {}
    if backbone.get("apply_layernorm", True) is not True:
        # The last layer would be normalized all the same, and the others would not.
        raise _odd("backbone_config.apply_layernorm", backbone["apply_layernorm"], "true")
    for key, default in (("min_depth", 0.001), ("max_depth", 96.0)):
        value = settings.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise _odd(key, value, "numbers above 0")


def _layers(settings: Mapping[str, Any]) -> tuple[int, ...]:
    """Layers from 0; there they are counted from 1, for the embedded patches come first."""
    indices = (settings.get("backbone_config") or {}).get("out_indices") or [6, 12, 18, 24]
    whole = all(isinstance(index, int) and index != 0 for index in indices)
    if not whole or len(indices) != 4:
        raise _odd("backbone_config.out_indices", list(indices), "four layers, from 1")
    return tuple(index - 1 if index > 0 else index for index in indices)


def _odd(key: str, value: Any, known: str) -> CheckpointError:
    return CheckpointError(f"its config.json has {key} = {value!r}; known are {known}")


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
