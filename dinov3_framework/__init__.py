"""A plugin-based framework for DINOv3; this module is the public API, and all of it.

Names are imported when first used: a plugin that registers configs does not import torch. Type
checkers read ``__init__.pyi`` instead, so that to them no name is ``Any`` and none is made up.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "hookspecs": ["hookimpl"],
    "components": ["Component"],
    "registry": ["Registry"],
    "configs": [
        "AnchorConfig",
        "AugmentationConfig",
        "BackboneConfig",
        "DatasetConfig",
        "HeadConfig",
        "ImagesConfig",
        "InvalidOption",
        "LauncherConfig",
        "LossConfig",
        "ObserverConfig",
        "SATELLITE_IMAGES",
        "SubjectConfig",
        "TaskConfig",
        "WEB_IMAGES",
        "config",
        "fraction",
        "interval",
        "not_negative",
        "one_of",
        "option",
        "positive",
        "preset",
    ],
    "schedules": ["Constant", "Cosine", "Schedule", "WarmupCosine"],
    "errors": [
        "CheckpointError",
        "CorruptSampleError",
        "DataError",
        "ExitCode",
        "OutputError",
        "PluginError",
        "Problem",
        "RecipeError",
        "UserError",
    ],
    "contracts": [
        "Anchor",
        "Augmentation",
        "Backbone",
        "Dataset",
        "Head",
        "Job",
        "Launcher",
        "Loss",
        "LossResult",
        "Observer",
        "Projector",
        "Report",
        "Run",
        "Sample",
        "StepOutputs",
        "StepRecord",
        "Task",
        "View",
        "ViewFeatures",
    ],
    "randomness": ["keyed_rng", "keyed_seed"],
    "engine.features": ["Features", "extract_features", "raw_pixels"],
    "engine.loading": ["describe_backbone", "load_backbone"],
    "engine.subject": ["Subject"],
    "images": ["evaluation_image", "normalize"],
    "weights.layouts": [
        "Chunks",
        "Content",
        "Dropped",
        "Implied",
        "Layout",
        "Published",
        "PublishedFile",
        "Renamed",
        "Rule",
    ],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", "collectives", *sorted(_HOME_OF)]


def __getattr__(name: str) -> Any:
    if name == "collectives":
        return importlib.import_module("dinov3_framework.collectives")
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
