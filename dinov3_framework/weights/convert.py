"""Weights from any format into any other, proven by reading back what was written."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from attrs import frozen
from torch import Tensor, nn

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.contracts.layouts import Layout
from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.errors import CheckpointError, summarize_names
from dinov3_framework.kinds import BackboneConfig
from dinov3_framework.registry import Registry
from dinov3_framework.runtime.durable import no_room
from dinov3_framework.weights.filling import check_fit, initial_values, official_tensors
from dinov3_framework.weights.info import BackboneInfo
from dinov3_framework.weights.opening import open_backbone
from dinov3_framework.weights.recognition import Recognised, built
from dinov3_framework.weights.targets import TARGETS, Target, Weights

log = logging.getLogger(__name__)

_SUFFIXES = {".safetensors": "dinov3_framework", ".pth": "meta", ".pt": "meta", ".onnx": "onnx"}
_SPARE = 1.02  # what files hold besides the tensors, at most


@frozen
class Conversion:
    """What was written."""

    path: Path
    format: str
    source_format: str
    component: str
    parameters: int
    lost: tuple[str, ...]  # tensors that the new file has no place for, each with the reason


def formats(registry: Registry) -> list[str]:
    """The formats that weights can be written in, sorted."""
    return sorted({*TARGETS, *(layout.format for layout in registry.layouts)} - {"folder"})


def format_of(target: Path) -> str | None:
    """The format that a file's name asks for; folders do not say."""
    return _SUFFIXES.get(target.suffix.lower())


def convert_backbone(
    source: str | Path,
    target: str | Path,
    format: str | None = None,
    *,
    network: str = "teacher",
    images: ImagesConfig | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    registry: Registry | None = None,
) -> Conversion:
    """Write the backbone in ``source`` to ``target`` in another format.

    ``source``, ``network`` and ``images`` are those of :func:`load_backbone`. ``format`` is one of

    - ``dinov3_framework``: one safetensors file that says what is in it (``.safetensors``);
    - ``meta``: a state dict under the official names (``.pth``);
    - ``reference``: a training checkpoint ``{"teacher": {"backbone...."}}``;
    - ``checkpoint``: a folder with one sharded checkpoint of this framework;
    - ``huggingface``, ``timm``: folders that ``AutoModel.from_pretrained`` and
      ``timm.create_model("local-dir:...")`` read;
    - ``onnx``: a network that runs by itself (``.onnx``);

    by default what ``target``'s suffix stands for. ``dtype`` is that of the parameters, by default
    the source's. Tensors pass one at a time, but for ``meta``, ``reference``, ``checkpoint`` and
    ``onnx``, which need all of them in memory. What was written is read back and compared, tensor
    by tensor, before it gets its name.

    Raises ``CheckpointError`` where the source cannot be used, the format cannot hold such a
    backbone, ``target`` exists (unless ``overwrite``), or the disk has no room; nothing is left
    then, and what ``target`` named stays.
    """
    registry = registry if registry is not None else Registry.load()
    target = Path(target).expanduser()
    format = _format(target, format, registry)
    if target.exists() and not overwrite:
        raise CheckpointError(
            f"{target} is there already; choose another name, or say that it may be overwritten"
        )
    with open_backbone(source, registry, network=network, images=images) as found:
        backbone = built(found, registry)
        check_fit(found, backbone)
        layout = _layout(found.config, format, registry)
        if layout is not None and (reason := layout.refusal(found.config)) is not None:
            raise CheckpointError(f"{found.path} cannot be written as {format}: {reason}")
        weights = _weights(found, backbone, layout, dtype, registry)
        _check_room(target, weights)
        writer = TARGETS.get(format, TARGETS["folder"])
        with _aside(target) as aside:
            _write(writer, aside, weights)
            with _renamed_in_messages(aside, target):
                _compare(aside, weights, registry)
    return Conversion(
        path=target,
        format=format,
        source_format=found.format,
        component=weights.info.component,
        parameters=sum(parameter.numel() for parameter in backbone.parameters()),
        lost=tuple(weights.lost),
    )


def _format(target: Path, format: str | None, registry: Registry) -> str:
    known = formats(registry)
    chosen = format or format_of(target)
    if chosen is None:
        raise CheckpointError(
            f"{target} does not say in which format; choose one of {', '.join(known)}"
        )
    if chosen not in known:
        raise CheckpointError(f"there is no format {chosen!r}; choose one of {', '.join(known)}")
    return chosen


def _layout(config: BackboneConfig, format: str, registry: Registry) -> Layout | None:
    """How the format names the tensors of this backbone; None for the official names."""
    if format in TARGETS and format not in ("meta", "reference"):
        return None
    if format == "reference":
        format = "meta"
    of_format = [layout for layout in registry.layouts if layout.format == format]
    for layout in of_format:
        if isinstance(config, layout.config):
            return layout
    name = type(config).__name__.removesuffix("Config")
    if not of_format or format == "meta":
        raise CheckpointError(
            f"no plugin says how a plain state dict of a {name} is recognised, so it could not be "
            "loaded again; write it as dinov3_framework"
        )
    families = ", ".join(layout.config.__name__.removesuffix("Config") for layout in of_format)
    raise CheckpointError(f"{format} has no place for a {name}; it knows {families}")


def _weights(
    found: Recognised,
    backbone: Backbone,
    layout: Layout | None,
    dtype: torch.dtype | None,
    registry: Registry,
) -> Weights:
    component, values = registry.values_of(found.config)
    names = list(backbone.state_dict())
    shapes = {name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items()}
    parameters = {name for name, _ in backbone.named_parameters(remove_duplicate=False)}
    rules = None if layout is None else {r.official: r for r in layout.rules(found.config, names)}

    def cast(name: str, tensor: Tensor) -> Tensor:
        wanted = name in parameters and tensor.is_floating_point() and dtype is not None
        return tensor.to(dtype) if wanted else tensor

    def official() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in official_tensors(found, backbone):
            yield name, cast(name, tensor)

    def stored() -> Iterator[tuple[str, Tensor]]:
        written = set()
        for name, tensor in official():
            if rules is None:
                yield name, tensor
                continue
            pieces = rules[name].write(tensor, _initial(backbone, name))
            for each, piece in pieces.items():
                # Two official names of one tensor share a place in the file.
                if each not in written:
                    written.add(each)
                    yield each, piece

    return Weights(
        config=found.config,
        info=BackboneInfo(component, values, found.images, found.size, dict(found.provenance)),
        backbone=backbone,
        layout=layout,
        shapes=shapes,
        official=official,
        stored=stored,
        lost=[r.lost for r in rules.values() if r.lost] if rules else [],
        silent_of_images=layout is not None
        and not layout.settings(found.config, found.images, found.size),
        not_written=frozenset(
            r.official for r in rules.values() if not r.stored(shapes[r.official])
        )
        if rules
        else frozenset(),
    )


def _initial(backbone: nn.Module, name: str) -> Callable[[], Tensor]:
    return lambda: initial_values(backbone, [name])[name]


# --------------------------------------------------------------------------- writing
def _check_room(target: Path, weights: Weights) -> None:
    """Raise before anything is written where the disk is too small."""
    folder = next((each for each in target.absolute().parents if each.is_dir()), Path("/"))
    needed = sum(4 * math.prod(shape) for shape in weights.shapes.values()) * _SPARE
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"cannot write {target}: it takes about {needed / 2**20:,.1f} MiB, {folder} has "
            f"{free / 2**20:,.1f} MiB free"
        )


def _write(writer: Target, aside: Path, weights: Weights) -> None:
    try:
        writer(aside, weights)
    except OSError as error:
        reason = no_room(error.errno, aside.parent) or str(error)
        raise CheckpointError(f"cannot write {aside.parent}: {reason}") from error


@contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """A path beside ``target``, file or folder, that becomes it at the end or vanishes."""
    aside = target.with_name(f".partial.{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(aside)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error
    try:
        yield aside
        old = target.with_name(f".replaced.{target.name}")
        if target.is_dir() or (target.exists() and aside.is_dir()):
            target.rename(old)
        aside.replace(target)
        _remove(old)
    finally:
        _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --------------------------------------------------------------------------- proof
def _compare(aside: Path, weights: Weights, registry: Registry) -> None:
    """Raise unless what was written gives back every tensor that its format has a place for."""
    # Plain state dicts say nothing of images, and need not be told so here.
    images = weights.info.images if weights.silent_of_images else None
    with open_backbone(aside, registry, images=images) as found:
        theirs = official_tensors(found, built(found, registry))
        different = _differences(weights.official(), theirs, weights.not_written)
    if found.images != weights.info.images:
        different.append(f"images: {found.images} instead of {weights.info.images}")
    if different:
        raise CheckpointError(
            f"{aside} was written, but does not give back what went in, and is removed:"
            + summarize_names("differ", different)
        )


def _differences(
    ours: Iterator[tuple[str, Tensor]],
    theirs: Iterator[tuple[str, Tensor]],
    not_written: frozenset[str],
) -> list[str]:
    """Names of tensors that are not the same bits; both sides in about the same order."""
    different = []
    waiting: dict[str, Tensor] = {}
    for name, tensor in ours:
        while name not in waiting and (other := next(theirs, None)) is not None:
            waiting[other[0]] = other[1]
        value = waiting.pop(name, None)
        if name not in not_written and (value is None or not torch.equal(value, tensor)):
            different.append(name)
    for _ in theirs:  # to its end, where what is not finite is found
        pass
    return different


@contextmanager
def _renamed_in_messages(aside: Path, target: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(aside), str(target))) from error
