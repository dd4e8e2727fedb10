"""Which backbone a file holds, under which names, and what images it was trained on."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from attrs import frozen
from torch import Tensor

from dinov3_framework.configs import WEB_IMAGES, ImagesConfig
from dinov3_framework.contracts.layouts import (
    Content,
    Layout,
    Published,
    PublishedFile,
    Renamed,
    Rule,
    Shape,
)
from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.errors import CheckpointError, UserError
from dinov3_framework.kinds import BackboneConfig
from dinov3_framework.weights.info import BackboneInfo

log = logging.getLogger(__name__)

BACKBONE = "backbone."
OWN = "dinov3_framework"  # the format of this framework's own files
_SIZE = 224  # pixels, of the published evaluations
_DEPTH = 4  # components of a prefix, at most: model.teacher.backbone.module
_MOMENTUM = ("teacher", "model_ema", "ema", "model_ema_backbone")


class Catalog(Protocol):
    """What is known of backbones; a ``Registry`` is one."""

    @property
    def layouts(self) -> Sequence[Layout]: ...
    @property
    def published(self) -> Mapping[str, Published]: ...
    def build(self, config: Any, /) -> Any: ...
    def config_of(self, kind: str, name: str, values: Mapping[str, Any], /) -> Any:
        """The config of a component from plain values."""
        ...


class Opened(Content, Protocol):
    """A file or folder of weights, open to be read."""

    @property
    def path(self) -> Path: ...
    @property
    def kind(self) -> str:
        """What it is, in words."""
        ...

    @property
    def preprocessor(self) -> Mapping[str, Any]:
        """``preprocessor_config.json`` of a folder; empty where there is none."""
        ...

    @property
    def metadata(self) -> Mapping[str, str]:
        """Of a safetensors file; empty elsewhere."""
        ...


@frozen
class _Part:
    """The tensors of a source below a prefix; a ``layouts.Content``."""

    source: Opened
    prefix: str
    shapes: Mapping[str, Shape]

    @classmethod
    def of(cls, source: Opened, prefix: str) -> _Part:
        cut = len(prefix)
        shapes = {n[cut:]: shape for n, shape in source.shapes.items() if n.startswith(prefix)}
        return cls(source, prefix, shapes)

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.source.settings

    def read(self, name: str) -> Tensor:
        return self.source.read(self.prefix + name)


@frozen
class Recognised:
    """A backbone in a file, found and not yet read."""

    path: Path
    format: str  # "meta", "huggingface", "timm", or this framework's own
    content: _Part
    config: BackboneConfig
    layout: Layout | None  # None for the official names
    images: ImagesConfig
    size: int  # pixels
    provenance: Mapping[str, str]
    notes: Sequence[str]  # what a person should be told

    def rules(self, names: Sequence[str]) -> Sequence[Rule]:
        """A rule for each of the official names."""
        if self.layout is None:
            return [Renamed(name, name) for name in names]
        return self.layout.rules(self.config, names)

    def projectors(self) -> dict[str, Shape]:
        """Names and shapes of everything beside the backbone in its network."""
        prefix, source = self.content.prefix, self.content.source
        if not f".{prefix}".endswith(f".{BACKBONE}"):
            return {}
        return {
            name.removeprefix(self._beside): tuple(shape)
            for name, shape in source.shapes.items()
            if name.startswith(self._beside) and not name.startswith(prefix)
        }

    def read_projector(self, name: str) -> Tensor:
        """A tensor of :meth:`projectors`."""
        return self.content.source.read(self._beside + name)

    @property
    def _beside(self) -> str:
        """What stands before ``backbone.`` in the file, and so before its neighbours' names."""
        return self.content.prefix.removesuffix(BACKBONE)


def recognise(
    source: Opened,
    catalog: Catalog,
    *,
    network: str = "teacher",
    images: ImagesConfig | None = None,
    info: BackboneInfo | None = None,
) -> Recognised:
    """Find the backbone in a file; no tensor but the smallest is read.

    Training checkpoints hold several networks: ``network`` is the one that is wanted, ``teacher``
    or ``student``. ``images`` overrules what file and name say. ``info`` is what is known of the
    backbone from elsewhere, such as a run's recipe. Raises ``CheckpointError`` where there is no
    backbone of a known kind, or more than one.
    """
    if info is None:
        info = BackboneInfo.from_metadata(source.path, source.metadata)
    if info is not None:
        return _own(source, catalog, info, network, images)
    found = list(_candidates(source, catalog.layouts))
    if not found:
        raise CheckpointError(_unknown(source, catalog))
    part, layout, config = _chosen(source, found, network)
    known, notes = _images(source, catalog, config, images)
    if layout.unsaid and not _is_published(catalog, config):
        notes = [
            *notes,
            f"not exactly a published backbone, and the file does not say {layout.unsaid}; these "
            "are taken to be as published",
        ]
    left = len(source.shapes) - len(part.shapes)
    if left:
        notes = [f"{left:,} tensors beside {part.prefix}* left out", *notes]
    return Recognised(
        path=source.path,
        format=layout.format,
        content=part,
        config=config,
        layout=layout,
        images=known.images,
        size=known.size,
        provenance={"file": source.path.name, "format": layout.format},
        notes=notes,
    )


# --------------------------------------------------------------------------- own files
def _own(
    source: Opened,
    catalog: Catalog,
    info: BackboneInfo,
    network: str,
    images: ImagesConfig | None,
) -> Recognised:
    values = {"in_chans": info.images.channels} | dict(info.config)
    try:
        config = catalog.config_of("backbone", info.component, values)
    except UserError as error:
        raise CheckpointError(
            f"{source.path}: its backbone {info.component!r} cannot be built: {error}"
        ) from error
    prefix = f"{network}.backbone."
    if not any(name.startswith(prefix) for name in source.shapes):
        prefix = ""
    return Recognised(
        path=source.path,
        format=OWN,
        content=_Part.of(source, prefix),
        config=config,
        layout=None,
        images=images or info.images,
        size=info.size,
        provenance=dict(info.provenance),
        notes=[],
    )


# --------------------------------------------------------------------------- others' files
def _candidates(
    source: Opened, layouts: Sequence[Layout]
) -> Iterator[tuple[_Part, Layout, BackboneConfig]]:
    for prefix in _prefixes(source.shapes):
        part = _Part.of(source, prefix)
        for layout in layouts:
            try:
                config = layout.recognise(part)
            except CheckpointError as error:
                raise CheckpointError(f"{source.path}: {error}") from error
            if config is not None:
                yield part, layout, config
                break


def _prefixes(names: Mapping[str, Shape]) -> list[str]:
    """Everything that may stand before a backbone's own names, the shortest first."""
    prefixes = {""}
    for name in names:
        parts = name.split(".")
        prefixes.update(
            ".".join(parts[:depth]) + "." for depth in range(1, min(len(parts), _DEPTH + 1))
        )
    return sorted(prefixes, key=lambda prefix: (prefix.count("."), prefix))


def _chosen(
    source: Opened, found: Sequence[tuple[_Part, Layout, BackboneConfig]], network: str
) -> tuple[_Part, Layout, BackboneConfig]:
    """The one backbone that is meant."""
    wanted = _MOMENTUM if network == "teacher" else (network,)
    named = [each for each in found if set(wanted) & set(each[0].prefix.split("."))]
    plain = [each for each in found if not _names_a_network(each[0].prefix)]
    best = named or plain
    if len(best) == 1:
        return best[0]
    prefixes = ", ".join(repr(each[0].prefix.rstrip(".")) for each in best or found)
    if best:
        raise CheckpointError(
            f"{source.path} holds {len(best)} backbones, {prefixes}; save the one you want on its "
            "own"
        )
    raise CheckpointError(
        f"{source.path} holds no {network}, only {prefixes}; ask for that network if you mean it"
    )


def _names_a_network(prefix: str) -> bool:
    return bool({*_MOMENTUM, "student"} & set(prefix.split(".")))


def _unknown(source: Opened, catalog: Catalog) -> str:
    names = sorted(source.shapes)
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4:,} more" if len(names) > 4 else "")
    formats = sorted({layout.format for layout in catalog.layouts})
    model = source.settings.get("model_type") or source.settings.get("architecture")
    says = f" (its config.json says {model!r})" if model else ""
    families = ", ".join(_families(catalog.layouts)) or "no installed plugin"
    return (
        f"{source.path} is {source.kind}{says}, but holds no backbone of a known kind: {shown}\n"
        f"    known are {OWN}'s own files, and the layouts {', '.join(formats) or '(none)'} of "
        f"backbones of {families}"
    )


def _families(layouts: Sequence[Layout]) -> list[str]:
    return sorted({layout.config.__name__.removesuffix("Config") for layout in layouts})


# --------------------------------------------------------------------------- images
@frozen
class _Known:
    images: ImagesConfig
    size: int


def _images(
    source: Opened, catalog: Catalog, config: BackboneConfig, given: ImagesConfig | None
) -> tuple[_Known, list[str]]:
    """What images the weights were trained on, as far as anything tells."""
    candidates = _published(catalog, config)
    size = candidates[0].size if candidates else _SIZE
    channels = config.in_chans or 3
    if given is not None:
        if given.channels != channels:
            raise CheckpointError(
                f"{source.path}: its backbone takes {channels} channels, the images given have "
                f"{given.channels}"
            )
        return _Known(given, size), []
    written = _written(source.preprocessor) or _written(source.settings.get("pretrained_cfg", {}))
    if written is not None and written.channels == channels:
        return _Known(written, size), []
    if channels != 3:
        raise CheckpointError(
            f"{source.path}: its backbone takes {channels} channels, and nothing says how their "
            "values are scaled; give images (channels, mean and std)"
        )
    name = source.path.name.lower()
    named = [each for each in candidates if each.digest in name or _set_of(each) in name]
    choice = {(each.images, each.size) for each in named or candidates}
    if len(choice) == 1:
        return _Known(*choice.pop()), []
    assumed = "nothing in it or in its name says what images it was trained on"
    note = f"{assumed}; assuming photographs, with the mean and deviation of ImageNet"
    if choice:
        note += "; for weights trained on satellite images, say so (images = SATELLITE_IMAGES)"
    return _Known(WEB_IMAGES, size), [note]


def _files(catalog: Catalog) -> list[PublishedFile]:
    return [file for each in catalog.published.values() for file in each.files.values()]


def _is_published(catalog: Catalog, config: BackboneConfig) -> bool:
    return any(file.config == config for file in _files(catalog))


def _published(catalog: Catalog, config: BackboneConfig) -> list[PublishedFile]:
    """Published files that may be this one: of equal config, or else of the same preset."""
    files = _files(catalog)
    equal = [file for file in files if file.config == config]
    return equal or [file for file in files if type(file.config) is type(config)]


def _set_of(file: PublishedFile) -> str:
    """``lvd1689m`` or ``sat493m``, as file and folder names have it."""
    return file.file.rpartition("-")[0].rpartition("_")[2].lower()


def _written(settings: Mapping[str, Any]) -> ImagesConfig | None:
    """Mean and deviation from settings of Hugging Face (image_mean) or timm (mean)."""
    mean = settings.get("image_mean", settings.get("mean"))
    std = settings.get("image_std", settings.get("std"))
    if not isinstance(mean, list) or not isinstance(std, list) or len(mean) != len(std):
        return None
    try:
        return ImagesConfig(
            channels=len(mean), mean=tuple(map(float, mean)), std=tuple(map(float, std))
        )
    except (TypeError, ValueError):
        return None


def built(recognised: Recognised, catalog: Catalog) -> Backbone:
    """The backbone on the meta device, where it takes no memory."""
    import torch

    try:
        with torch.device("meta"):
            backbone = catalog.build(recognised.config)
    except UserError as error:
        raise CheckpointError(
            f"{recognised.path}: its backbone cannot be built: {error}"
        ) from error
    if not isinstance(backbone, Backbone):
        raise CheckpointError(f"{recognised.path}: got a {type(backbone).__name__}, no backbone")
    if backbone.in_chans != recognised.images.channels:
        raise CheckpointError(
            f"{recognised.path}: its backbone takes {backbone.in_chans} channels, its images have "
            f"{recognised.images.channels}"
        )
    return backbone
