"""Convert weights from any format into any other, and compare what was written with the source."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.contracts.layouts import Layout
from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.errors import CheckpointError, summarize_names
from dinov3_framework.kinds import resolve
from dinov3_framework.parallel.state_dicts import fingerprint, is_same
from dinov3_framework.registry import Registry
from dinov3_framework.runtime.durable import no_room
from dinov3_framework.weights import formats
from dinov3_framework.weights._recognition import family_name, family_names
from dinov3_framework.weights._writers import WRITERS, Conversion, folder
from dinov3_framework.weights.heads import LoadedHead, load_head
from dinov3_framework.weights.source import WeightSource
from dinov3_framework.weights.tensors import shapes_of

_SUFFIXES = {".safetensors": "dinov3_framework", ".pth": "meta", ".pt": "meta"}
FINGERPRINT = "fingerprint of the backbone"  # in the provenance of a head that was trained
_SPARE = 1.02  # what files hold besides the tensors, at most


@frozen
class Converted:
    """What was written."""

    path: Path
    format: str
    source_format: str
    component: str
    parameters: int
    lost: tuple[str, ...]  # tensors that the new file has no place for, each with the reason
    compared: str  # how the file was compared with the source


def convert_backbone(
    source: str | Path,
    target: str | Path,
    format: str | None = None,
    *,
    network: str = "teacher",
    images: ImagesConfig | None = None,
    unused: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    head: str | Path | None = None,
    overwrite: bool = False,
    registry: Registry | None = None,
) -> Converted:
    """Write the backbone in ``source`` to ``target`` in another format.

    ``source``, ``network``, ``images`` and ``unused`` are those of :func:`load_backbone`.
    ``format`` is one of

    - ``dinov3_framework``: one safetensors file that says what is in it (``.safetensors``);
    - ``meta``: a state dict under the official names (``.pth``);
    - ``reference``: a training checkpoint ``{"teacher": {"backbone...."}}``;
    - ``checkpoint``: a folder with one sharded checkpoint of this framework;
    - that of a layout of this backbone, such as ``huggingface`` and ``timm``: folders that
      ``AutoModel.from_pretrained`` and ``timm.create_model("local-dir:...")`` read;
    - what plugins write, such as ``onnx``: a network that runs by itself (``.onnx``);

    by default what ``target``'s suffix stands for. ``dtype`` is that of the parameters, by default
    the source's. ``head`` is a head trained on the backbone, a file or the folder of a run, for a
    format that holds both, such as ``onnx``: what is written then gives predictions. Tensors pass
    one at a time, but for ``meta``, ``reference``, ``checkpoint`` and the formats of plugins, which
    need all of them in memory. What was written is read back and compared, tensor by tensor, before
    it gets its name; what is not read back is compared by the plugin that wrote it.

    Raises ``CheckpointError`` where the source cannot be used, the format cannot hold such a
    backbone or head, the head was trained on another backbone, ``target`` exists (unless
    ``overwrite``), or the disk has no room; nothing is left then, and what ``target`` named stays.
    """
    registry = registry if registry is not None else Registry.load()
    target = Path(target).expanduser()
    format = _format(target, format, registry)
    if head is not None:
        _require_place_for_head(format, registry)
    if target.exists() and not overwrite:
        raise CheckpointError(
            f"{target} is there already; choose another name, or say that it may be overwritten"
        )
    with WeightSource.open(
        source, registry, network=network, images=images, unused=unused
    ) as found:
        backbone = found.build()
        found.check_fit(backbone)
        parameters = sum(parameter.numel() for parameter in backbone.parameters())
        layout = _layout(found, format, registry)
        weights = Conversion(found, found.info(registry), backbone, layout, dtype)
        _check_room(target, weights)
        with _aside(target) as aside:
            compared = _write(aside, weights, format, registry, head)
    return Converted(
        path=target,
        format=format,
        source_format=found.format,
        component=weights.info.component,
        parameters=parameters,
        lost=tuple(rule.lost for rule in weights.rules().values() if rule.lost),
        compared=compared,
    )


def _format(target: Path, format: str | None, registry: Registry) -> str:
    known = formats(registry)
    suffixes = _SUFFIXES | {w.suffix: w.format for w in registry.weights_writers.values()}
    chosen = format or suffixes.get(target.suffix.lower())
    if chosen in known:
        return chosen
    raise CheckpointError(
        (
            f"{target} does not say in which format"
            if chosen is None
            else f"there is no format {chosen!r}"
        )
        + f"; choose one of {', '.join(known)}"
    )


def _require_place_for_head(format: str, registry: Registry) -> None:
    writers = registry.weights_writers
    able = sorted(name for name, writer in writers.items() if writer.write_with_head is not None)
    if format not in able:
        known = f"; {', '.join(able)} has" if able else ""
        raise CheckpointError(f"{format} has no place for a head on the backbone{known}")


def _require_its_backbone(head: LoadedHead, backbone: Backbone, source: object) -> None:
    """Raise where the head's file says that it was trained on other weights."""
    before, now = head.provenance.get(FINGERPRINT), fingerprint(backbone)
    if before is not None and not is_same(float(before), now):
        trained_on = head.provenance.get("trained on", "another backbone")
        raise CheckpointError(f"{head.name} was trained on {trained_on}, not on {source}")


def _layout(found: WeightSource, format: str, registry: Registry) -> Layout | None:
    """How the format names the tensors of this backbone; None for the official names.

    Raises ``CheckpointError`` where the format has no place for it.
    """
    if format in registry.weights_writers or format in ("dinov3_framework", "checkpoint"):
        return None
    wanted = "meta" if format == "reference" else format
    of_format = [each for each in registry.layouts if each.format == wanted]
    layout = next((each for each in of_format if isinstance(found.config, each.config)), None)
    name = family_name(found.config)
    if layout is None and (not of_format or wanted == "meta"):
        raise CheckpointError(
            f"no plugin says how a plain state dict of a {name} is recognized, so it could not be "
            "loaded again; write it as dinov3_framework"
        )
    if layout is None:
        raise CheckpointError(
            f"{format} has no place for a {name}; it knows {family_names(of_format)}"
        )
    if (reason := layout.refusal(found.config)) is not None:
        raise CheckpointError(f"{found.path} cannot be written as {format}: {reason}")
    return layout


# --------------------------------------------------------------------------- writing
def _check_room(target: Path, weights: Conversion) -> None:
    """Raise before anything is written where the disk is too small."""
    folder = next((each for each in target.absolute().parents if each.is_dir()), Path("/"))
    values = sum(math.prod(shape) for shape in shapes_of(weights.backbone).values())
    needed, free = 4 * values * _SPARE, shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"cannot write {target}: it takes about {needed / 2**20:,.1f} MiB, {folder} has "
            f"{free / 2**20:,.1f} MiB free"
        )


@contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """A path beside ``target``, file or folder, that becomes it at the end or vanishes.

    Errors of those who write or read it name ``target``.
    """
    aside = target.with_name(f".partial.{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(aside)
        yield aside
        old = target.with_name(f".replaced.{target.name}")
        if target.is_dir() or (target.exists() and aside.is_dir()):
            target.rename(old)
        aside.replace(target)
        _remove(old)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(aside), str(target))) from error
    except OSError as error:
        reason = no_room(error.errno, target.parent) or str(error)
        raise CheckpointError(f"cannot write {target}: {reason}") from error
    finally:
        _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write(
    aside: Path,
    weights: Conversion,
    format: str,
    registry: Registry,
    head: str | Path | None,
) -> str:
    """Write the file or folder and compare it with the source; how it was compared."""
    if format in registry.weights_writers:
        writer = registry.weights_writers[format]
        if head is not None and writer.write_with_head is not None:
            write = resolve(writer.write_with_head, f"the writer of format {format!r}:")
            backbone: Any = weights.filled().eval()
            loaded = load_head(head, backbone, registry=registry)
            _require_its_backbone(loaded, backbone, weights.source.path)
            return str(write(aside, backbone, weights.info, loaded))
        write = resolve(writer.write, f"the writer of format {format!r}:")
        return str(write(aside, weights.filled().eval(), weights.info))
    WRITERS.get(format, folder)(aside, weights)
    _compare(aside, weights, registry)
    return "read back and equal"


def _compare(aside: Path, weights: Conversion, registry: Registry) -> None:
    """Raise unless what was written gives back every tensor that its format has a place for."""
    # Plain state dicts say nothing of images, and need not be told so here.
    silent = weights.layout is not None and not weights.settings()
    with WeightSource.open(
        aside, registry, images=weights.info.images if silent else None
    ) as found:
        theirs = found.tensors(found.build())
        different = _differences(weights, theirs)
    if found.images != weights.info.images:
        different.append(f"images: {found.images} instead of {weights.info.images}")
    if different:
        raise CheckpointError(
            f"{aside} was written, but does not give back what went in, and is removed:"
            + summarize_names("differ", different)
        )


def _differences(weights: Conversion, theirs: Iterator[tuple[str, Tensor]]) -> list[str]:
    """Names of tensors that are not the same bits; both sides in about the same order."""
    shapes, rules, different = shapes_of(weights.backbone), weights.rules(), []
    waiting: dict[str, Tensor] = {}
    for name, tensor in weights.official():
        while name not in waiting and (other := next(theirs, None)) is not None:
            waiting[other[0]] = other[1]
        value = waiting.pop(name, None)
        written = name not in rules or rules[name].stored(shapes[name])
        if written and (value is None or not torch.equal(value, tensor)):
            different.append(name)
    for _ in theirs:  # to its end, where what is not finite is found
        pass
    return different
