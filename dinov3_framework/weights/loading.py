"""A backbone from weights of any kind, ready for use."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.registry import Registry
from dinov3_framework.runtime.agreement import RankFailure, together
from dinov3_framework.weights.filling import check_fit, fill, fill_placed
from dinov3_framework.weights.loaded import LoadedBackbone
from dinov3_framework.weights.opening import open_backbone
from dinov3_framework.weights.recognition import Recognised, built

if TYPE_CHECKING:
    from dinov3_framework.parallel.sharder import Sharder


def load_backbone(
    source: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    network: str = "teacher",
    images: ImagesConfig | None = None,
    registry: Registry | None = None,
) -> LoadedBackbone:
    """Load a backbone: recognised, built through the registry, strictly filled, in eval mode.

    ``source`` is a path to weights of any known format (this framework's exports and checkpoints,
    Meta's ``.pth``, training checkpoints of the reference, folders of Hugging Face and timm, ONNX
    files that this framework wrote), a run's output folder, a URL, or a published name such as
    ``dinov3_vits16`` or ``dinov3_vitl16@SAT493M``.

    ``device`` is where its tensors go, the CPU if left out; ``dtype`` what its parameters become,
    the file's if left out. ``network`` is ``teacher`` or ``student``, of training checkpoints.
    ``images`` overrules what the weights say of their images; ``registry`` is that of the
    installed plugins if left out.

    Raises ``CheckpointError`` where the source is missing, of an unknown kind or damaged, where no
    plugin offers its backbone, where names or shapes are not exactly the backbone's, and where a
    parameter is not finite.
    """
    registry = registry if registry is not None else Registry.load()
    with open_backbone(source, registry, network=network, images=images) as found:
        backbone = fill(built(found, registry), found, device=device or "cpu", dtype=dtype)
        return _loaded(found, backbone.eval(), registry)


def describe_backbone(
    source: str | Path,
    *,
    network: str = "teacher",
    images: ImagesConfig | None = None,
    registry: Registry | None = None,
) -> LoadedBackbone:
    """As :func:`load_backbone`, with the backbone on the meta device: names and shapes are
    checked, values are not read and take no memory."""
    registry = registry if registry is not None else Registry.load()
    with open_backbone(source, registry, network=network, images=images) as found:
        backbone = built(found, registry)
        check_fit(found, backbone)
        return _loaded(found, backbone.eval(), registry)


def load_placed(
    source: str | Path,
    *,
    sharder: Sharder,
    network: str = "teacher",
    images: ImagesConfig | None = None,
    registry: Registry | None = None,
) -> LoadedBackbone:
    """As :func:`load_backbone`, spread over the processes by ``sharder``; in eval mode.

    To be called by every process, each of which must see ``source``. Each reads it for itself, one
    tensor at a time, and keeps its shards: none ever holds the whole backbone. Parameters are in
    float32; ``sharder`` says what they are gathered in. What any process raises ends all of them.
    """
    registry = registry if registry is not None else Registry.load()

    def load() -> LoadedBackbone:
        with open_backbone(source, registry, network=network, images=images) as found:
            blueprint = built(found, registry)
            check_fit(found, blueprint)
            placed = sharder.place(copy.deepcopy(blueprint), trains=False)
            fill_placed(placed, blueprint, found)
            return _loaded(found, placed.eval(), registry)

    try:
        return together(load)
    except RankFailure as failure:
        raise failure.for_process() from failure.own


def _loaded(found: Recognised, backbone: torch.nn.Module, registry: Registry) -> LoadedBackbone:
    backbone.images = found.images  # type: ignore[assignment]
    return LoadedBackbone(
        backbone=backbone,  # type: ignore[arg-type]
        images=found.images,
        size=found.size,
        provenance=dict(found.provenance),
        component=registry.of_config(found.config).component.name,
        config=found.config,
    )
