"""Load a backbone from weights of any kind, or initialized as a recipe says; ready for use."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import attrs
import torch

from dinov3_framework.configs import ImagesConfig, replace
from dinov3_framework.errors import Problem, RecipeError
from dinov3_framework.kinds import BackboneConfig
from dinov3_framework.randomness import keyed_seed
from dinov3_framework.registry import Registry
from dinov3_framework.runtime.agreement import OwnErrors, run_on_all_ranks
from dinov3_framework.runtime.processes import pick_device
from dinov3_framework.weights.loaded import LoadedBackbone
from dinov3_framework.weights.locations import exists, missing_hint, published_file
from dinov3_framework.weights.source import WeightSource

if TYPE_CHECKING:
    from dinov3_framework.parallel.sharder import Sharder

_SIZE = 224  # pixels of images, of a backbone that is named and has no weights


def load_backbone(
    source: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    network: str = "teacher",
    images: ImagesConfig | None = None,
    unused: Sequence[str] = (),
    registry: Registry | None = None,
) -> LoadedBackbone:
    """Load a backbone: recognized, built through the registry, strictly filled, in eval mode.

    ``source`` is a path to weights of any known format (this framework's exports and checkpoints,
    Meta's ``.pth``, training checkpoints of the reference, folders of Hugging Face and timm), a
    run's output folder, a URL, or a published name such as ``dinov3_vits16`` or
    ``dinov3_vitl16@SAT493M``.

    ``device`` is where its tensors go, the CPU if left out; ``dtype`` what its parameters become,
    the file's if left out. ``network`` is ``teacher`` or ``student``, of training checkpoints.
    ``images`` overrules what the weights say of their images; ``unused`` are names, or patterns
    with ``*``, of tensors that may be left over; ``registry`` is that of the installed plugins if
    left out.

    Raises ``CheckpointError`` where the source is missing, of an unknown kind or damaged, where no
    plugin offers its backbone, where names or shapes are not exactly the backbone's, and where a
    parameter is not finite.
    """
    registry = registry if registry is not None else Registry.load()
    with WeightSource.open(
        source, registry, network=network, images=images, unused=unused
    ) as weights:
        backbone = weights.load_state(weights.build(), device=device or "cpu", dtype=dtype)
        return _loaded(source, weights, backbone, registry)


def describe_backbone(
    source: str | Path,
    *,
    network: str = "teacher",
    images: ImagesConfig | None = None,
    unused: Sequence[str] = (),
    fetch: bool = True,
    registry: Registry | None = None,
) -> LoadedBackbone:
    """As :func:`load_backbone`, with the backbone on the meta device: names and shapes are
    checked, values are not read and take no memory.

    Without ``fetch`` nothing is downloaded: published weights that are not a file here are
    described by what is known of them.
    """
    registry = registry if registry is not None else Registry.load()
    file = None if fetch or Path(source).exists() else published_file(str(source), registry)
    if file is not None:
        with torch.device("meta"):
            backbone = registry.build(file.config)
        provenance = {"known as": f"the published {file.file}"}
        component = registry.of_config(file.config).component.name
        shown = file.images, file.size, provenance, component, file.config, str(source)
        return LoadedBackbone(backbone.eval(), *shown)
    with WeightSource.open(
        source, registry, network=network, images=images, unused=unused
    ) as weights:
        backbone = weights.build()
        weights.check_fit(backbone)
        return _loaded(source, weights, backbone, registry)


def load_sharded(
    source: str | Path,
    *,
    sharder: Sharder,
    trains: bool = False,
    network: str = "teacher",
    images: ImagesConfig | None = None,
    unused: Sequence[str] = (),
    registry: Registry | None = None,
) -> LoadedBackbone:
    """As :func:`load_backbone`, spread over the processes by ``sharder``; in eval mode.

    To be called by every process, each of which must see ``source``. Each reads it for itself, one
    tensor at a time, and keeps its shards: none ever holds the whole backbone. Parameters are in
    float32; ``sharder`` says what they are gathered in. A backbone that ``trains`` is placed as
    such. What any process raises ends all of them.
    """
    registry = registry if registry is not None else Registry.load()

    def load() -> LoadedBackbone:
        with WeightSource.open(
            source, registry, network=network, images=images, unused=unused
        ) as weights:
            blueprint = weights.build()
            weights.check_fit(blueprint)
            placed = sharder.place(copy.deepcopy(blueprint), trains=trains)
            weights.load_shards(placed, blueprint)
            return _loaded(source, weights, placed, registry)

    with OwnErrors():
        return run_on_all_ranks(load)


def _loaded(
    source: str | Path, weights: WeightSource, backbone: Any, registry: Registry
) -> LoadedBackbone:
    backbone.images = weights.images
    return LoadedBackbone(
        backbone=backbone.eval(),
        images=weights.images,
        size=weights.size,
        provenance=dict(weights.provenance),
        component=registry.of_config(weights.config).component.name,
        config=weights.config,
        name=str(source),
    )


# --------------------------------------------------------------------------- of a recipe
class BackboneChoice(Protocol):
    """The keys of a recipe that name its backbone, as a ``BackboneTaskConfig`` has them."""

    @property
    def weights(self) -> str | None: ...
    @property
    def unused(self) -> tuple[str, ...] | None: ...
    @property
    def backbone(self) -> BackboneConfig | None: ...
    @property
    def images(self) -> ImagesConfig | None: ...
    @property
    def seed(self) -> int: ...


def describe_recipe_backbone(
    config: BackboneChoice, registry: Registry, *, simulated: bool = False
) -> LoadedBackbone:
    """The backbone of a recipe for its check, on the meta device: names and shapes are right.

    For a ``simulated`` run nothing is downloaded. Raises ``RecipeError`` for a contradiction and
    ``CheckpointError`` for wrong weights.
    """
    config, size = _preset(config, registry)
    _refuse_contradictions(config, registry)
    if config.weights is not None:
        return describe_backbone(
            config.weights, unused=config.unused or (), fetch=not simulated, registry=registry
        )
    images = config.images or ImagesConfig()
    backbone = replace(cast(Any, config.backbone), in_chans=images.channels)
    component = registry.of_config(backbone).component.name
    with torch.device("meta"):
        return LoadedBackbone(
            backbone=registry.build(backbone),
            images=images,
            size=size,
            provenance={"backbone": component, "weights": f"random, seed {config.seed}"},
            component=component,
            config=backbone,
            name="random-init backbone",
        )


def load_recipe_backbone(
    config: BackboneChoice,
    registry: Registry,
    device: str = "auto",
    *,
    sharder: Sharder | None = None,
    trains: bool = False,
) -> LoadedBackbone:
    """The backbone of a recipe, with its weights or as initialized, in eval mode.

    Whole on this process's accelerator if ``device`` is ``auto``, else there; or spread over the
    processes by ``sharder``, as one that ``trains``. Errors as of
    :func:`describe_recipe_backbone`.
    """
    chosen, _ = _preset(config, registry)
    _refuse_contradictions(chosen, registry)
    weights, unused = chosen.weights, config.unused or ()
    if weights is not None and sharder is not None:
        return load_sharded(
            weights, sharder=sharder, trains=trains, unused=unused, registry=registry
        )
    if weights is not None:
        return load_backbone(weights, device=pick_device(device), unused=unused, registry=registry)
    from dinov3_framework.parallel.sharder import initial_values, initialize  # takes long

    described = describe_recipe_backbone(config, registry)
    blueprint, seed = described.backbone, keyed_seed(config.seed, "subject")
    if sharder is None:
        backbone: Any = initial_values(blueprint, seed).to(pick_device(device))
    else:
        backbone = sharder.place(copy.deepcopy(blueprint), trains=trains)
        initialize(backbone, blueprint, seed)
    return attrs.evolve(described, backbone=backbone.eval())


def _preset(config: BackboneChoice, registry: Registry) -> tuple[BackboneChoice, int | None]:
    """The same choice, where ``weights`` names a backbone as a ``backbone`` to initialize.

    With it the pixels of images that such a backbone is shown.
    """
    name = config.weights
    if name is None or config.backbone is not None or exists(name, registry):
        return config, None
    if name not in registry.names("backbone"):
        return config, None
    backbone = registry.config_of("backbone", name, {})
    chosen: Any = config
    return replace(chosen, weights=None, backbone=backbone), _SIZE


def _refuse_contradictions(config: BackboneChoice, registry: Registry) -> None:
    """Raise for what can be wrong with the choice of a backbone before any file is opened."""
    if problems := _problems(config, registry):
        raise RecipeError(problems)


def _problems(config: BackboneChoice, registry: Registry) -> list[Problem]:
    weights, backbone, images = config.weights, config.backbone, config.images
    if weights is None and config.unused:
        message = "there are no weights of which tensors could be left over"
        return [Problem("unused", message, "leave it out")]
    if weights is None and backbone is None:
        hint = "give weights (a path) or a [backbone] to initialize at random"
        return [Problem("weights", "there is no backbone to look at", hint)]
    problems = []
    if backbone is not None and weights is None:
        channels = (images or ImagesConfig()).channels
        if backbone.in_chans not in (None, channels):
            message = f"is {backbone.in_chans}, but images.channels is {channels}"
            hint = "set images.channels alone (with mean and std) and leave in_chans out"
            problems.append(Problem("backbone.in_chans", message, hint))
        return problems
    if backbone is not None:
        message = "weights bring their own backbone"
        problems.append(Problem("backbone", message, "leave one of them out"))
    if images is not None:
        message = "weights know what images they were trained on"
        problems.append(Problem("images", message, "leave [images] out"))
    if not exists(str(weights), registry):
        hint = "the path is relative to the current folder; training writes its own into exports/; "
        hint += missing_hint(str(weights), registry)
        problems.append(Problem("weights", f"there is no file {weights}", hint))
    return problems
