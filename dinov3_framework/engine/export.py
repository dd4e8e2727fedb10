"""Backbones as files of their own: written after a run, and loaded without the training code."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.contracts import Backbone
from dinov3_framework.engine.backbone_file import BackboneInfo, opened, write_tensors
from dinov3_framework.engine.durable import no_room, written_aside
from dinov3_framework.engine.listing import listing
from dinov3_framework.engine.loaded_backbone import LoadedBackbone
from dinov3_framework.errors import CheckpointError, UserError
from dinov3_framework.registry import Registry


def export_backbone(
    path: Path,
    backbone_state: Mapping[str, Tensor],
    *,
    component: str,
    config: Mapping[str, Any],
    images: ImagesConfig,
    size: int,
    provenance: Mapping[str, str],
) -> None:
    """Write a backbone as one safetensors file that :func:`load_backbone` loads on its own.

    ``backbone_state`` holds whole tensors under their official names, on any device; ``component``
    and ``config`` (plain values) are what builds the backbone; ``images`` and ``size`` (pixels)
    what it was trained on; ``provenance`` anything worth knowing of its making. To be called by
    one process. The same input gives the same bytes. Raises ``CheckpointError`` for a value that
    is not finite, and where the file cannot be written; a file that was there then stays.
    """
    path = Path(path)
    _require_finite(f"not exported to {path}", backbone_state.items())
    info = BackboneInfo(component, config, images, size, provenance)
    try:
        with written_aside(path) as aside:
            write_tensors(aside, backbone_state, info.to_metadata())
    except (OSError, SafetensorError) as error:
        reason = no_room(_errno(error), path.parent) or str(error)
        raise CheckpointError(f"cannot write {path}: {reason}") from error


def load_backbone(
    source: str | Path,
    *,
    device: torch.device | str | None = None,
    registry: Registry | None = None,
) -> LoadedBackbone:
    """Load an exported backbone: built through the registry, strictly filled, in eval mode.

    ``device`` is where its tensors go, the CPU if left out; ``registry`` the installed plugins'.
    Raises ``CheckpointError`` where the file is missing, of another kind or damaged, where no
    plugin offers its backbone, where names or shapes are not exactly the backbone's, and where a
    value is not finite.
    """
    path = Path(source)
    with opened(path) as file:
        info = BackboneInfo.from_metadata(path, file.metadata())
        backbone = _build(path, info, registry if registry is not None else Registry.load())
        names = list(file.keys())
        shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name in names}
        _check_fit(path, info, shapes, backbone)
        _fill(backbone, file, names, torch.device("cpu" if device is None else device))
    _check_whole(path, backbone)
    return LoadedBackbone(backbone.eval(), info.images, info.size, dict(info.provenance))


def _build(path: Path, info: BackboneInfo, registry: Registry) -> Backbone:
    """The backbone on the meta device, where it takes no memory."""
    values = {"in_chans": info.images.channels} | dict(info.config)
    try:
        with torch.device("meta"):
            backbone = registry.build("backbone", info.component, **values)
    except UserError as error:
        raise CheckpointError(
            f"{path}: its backbone {info.component!r} cannot be built: {error}"
        ) from error
    if not isinstance(backbone, Backbone):
        raise CheckpointError(f"{path}: {info.component!r} gave a {type(backbone).__name__}")
    if backbone.in_chans != info.images.channels:
        raise CheckpointError(
            f"{path}: its backbone takes {backbone.in_chans} channels, its images have "
            f"{info.images.channels}"
        )
    return backbone


def _check_fit(
    path: Path, info: BackboneInfo, shapes: Mapping[str, torch.Size], backbone: Backbone
) -> None:
    wanted = {name: tensor.shape for name, tensor in backbone.state_dict().items()}
    common = shapes.keys() & wanted.keys()
    complaints = [
        listing("missing from the file", wanted.keys() - shapes.keys()),
        listing("in the file but not in the backbone", shapes.keys() - wanted.keys()),
        listing(
            "of another shape",
            [
                f"{name}: {list(shapes[name])} in the file, {list(wanted[name])} in the backbone"
                for name in common
                if shapes[name] != wanted[name]
            ],
        ),
    ]
    if any(complaints):
        raise CheckpointError(
            f"{path} does not fit the backbone {info.component!r} that it names:"
            + "".join(complaints)
        )


def _fill(backbone: nn.Module, file: Any, names: Iterable[str], device: torch.device) -> None:
    state_dict = backbone.state_dict()
    computed = [name for name, _ in backbone.named_buffers() if name not in state_dict]
    if computed:
        # Buffers that no file holds: only the backbone knows their values.
        backbone.to_empty(device=device)
        with torch.random.fork_rng(devices=[]):
            backbone.init_weights()  # type: ignore[operator]
    # A copy, since what safetensors gives on the CPU is the file itself, mapped: it would change,
    # or crash the process, with the file.
    loaded = {name: file.get_tensor(name).to(device, copy=True) for name in names}
    backbone.load_state_dict(loaded, strict=True, assign=not computed)


def _check_whole(path: Path, backbone: nn.Module) -> None:
    tensors = [*backbone.named_parameters(), *backbone.named_buffers()]
    empty = [name for name, tensor in tensors if tensor.is_meta]
    if empty:
        raise CheckpointError(f"{path}: nothing gave a value to{listing('left empty', empty)}")
    _require_finite(str(path), tensors)


def _require_finite(what: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    bad = [
        f"{name}: {int((~tensor.isfinite()).sum()):,} of {tensor.numel():,} values"
        for name, tensor in tensors
        if tensor.is_floating_point() and not tensor.isfinite().all()
    ]
    if bad:
        raise CheckpointError(f"{what}:{listing('with NaN or inf', bad)}")


def _errno(error: Exception) -> int | None:
    """The system's error number; safetensors has it only in the text."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None
