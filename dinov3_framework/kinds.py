"""The kinds of components, a row each: adding a kind is adding a row.

A row says on which config a component's config is based, which class the object is of, and how it
is built. The hook by which plugins offer components of a kind follows from its name. Nothing here
imports torch.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import attrs
from attrs import frozen

from dinov3_framework.configs import (
    ImagesConfig,
    config,
    fraction,
    not_negative,
    option,
    positive,
    throughout,
)
from dinov3_framework.errors import PluginError
from dinov3_framework.schedules import Constant, Schedule, Span


@frozen
class Component:
    """A name, a config class, and what builds an object from such a config.

    ``factory`` is called as ``factory(config, **runtime)``; given as ``"module:attribute"`` it is
    imported at the first build, so that a plugin's ``__init__`` stays light. One that ``composes``
    is also given ``build``, ``Registry.build``, for the components that its config holds.
    ``formerly`` are names of its kind that went: whoever still writes one is told this component's.
    """

    name: str
    config: type
    factory: Callable[..., Any] | str
    formerly: Sequence[str] = ()
    composes: bool = False

    def resolve(self) -> Callable[..., Any]:
        """The factory itself, imported if need be."""
        return resolve(self.factory, f"component {self.name!r}: its factory")


def resolve(target: Callable[..., Any] | str, what: str) -> Callable[..., Any]:
    """The function or class that ``"module:attribute"`` names; ``what`` it is, for the error."""
    if not isinstance(target, str):
        return target
    module, _, attribute = target.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise PluginError(f"{what} {target!r} cannot be imported: {error}") from error
    return found  # type: ignore[no-any-return]


@frozen
class Registered:
    """A component and where it came from."""

    kind: str
    component: Component
    plugin: str
    distribution: str

    @property
    def origin(self) -> str:
        return f"plugin {self.plugin!r} of distribution {self.distribution!r}"


# --------------------------------------------------------------------------- config bases
@config
class BackboneConfig:
    """Base of every backbone's config."""

    in_chans: int | None = option(
        "input channels; left out, the recipe's images.channels (3 outside a recipe)",
        default=None,
        check=positive,
    )

    def evaluation_settings(self) -> dict[str, object]:
        """What, by name, decides on the features that given weights give in evaluation.

        Two configs whose weights have equal names and shapes mean the same backbone where these
        are equal; it is how a training knows that weights are what its recipe takes them for. All
        fields, unless a family leaves out those that act in training alone or that names and
        shapes show.
        """
        cls: Any = type(self)
        names = [field.name for field in attrs.fields(cls)]
        return {name: getattr(self, name) for name in names if name != "in_chans"}


@config
class AugmentationConfig:
    """Base of every augmentation's config."""


@config
class TransformConfig:
    """Base of every transform's config."""


@config
class LossConfig:
    """Base of every loss's config."""

    weight: Schedule = option(
        "factor of this loss in the total: a number or a schedule",
        factory=lambda: Constant(value=1.0),
        check=throughout(not_negative),
    )


@config
class DatasetConfig:
    """Base of every dataset's config."""


@config
class HeadConfig:
    """Base of every evaluation head's config."""


@config
class EvaluationConfig:
    """Base of every evaluation's config."""


@config
class OptimizerConfig:
    """Base of every optimizer's config: schedules, and how parameters differ."""

    lr: Schedule = option(
        "learning rate, before scaling: a number or a schedule", check=throughout(not_negative)
    )
    lr_scaling: Literal["none", "sqrt_wrt_1024", "linear_wrt_256"] = option(
        "how the learning rate grows with the global batch: 4 sqrt(batch / 1024), batch / 256",
        default="none",
    )
    freeze_last_layer: Span = option(
        "first iterations of the run in which prototypes do not learn",
        default=0,
        check=not_negative,
    )
    weight_decay: Schedule = option(
        "weight decay of parameters of two dimensions or more: a number or a schedule",
        check=throughout(not_negative),
    )
    clip_grad: float | None = option(
        'largest gradient norm of each network; "none": no clipping', default=3.0, check=positive
    )
    layerwise_decay: float = option(
        "factor of the learning rate from a layer to the one below", default=0.9, check=fraction
    )
    patch_embed_lr_mult: float = option(
        "factor of the patch embedding's learning rate", default=0.2, check=not_negative
    )


@config
class LauncherConfig:
    """Base of every launcher's config."""


@config
class ObserverConfig:
    """Base of every observer's config."""

    every: Span = option("iterations between two calls", default=1, check=positive)


@attrs.frozen
class InnerRun:
    """A run that is a part of another one, in a folder of its own inside the other's.

    ``inherited`` names, by key path, the earlier ones that its values are paths into.
    """

    name: str
    config: TaskConfig
    inherited: Mapping[tuple[str, ...], str]


@config
class TaskConfig:
    """Base of every task's config, and so of every recipe: the keys that all recipes share."""

    output_dir: str | None = option(
        "folder of all that the run writes; left out, runs/<name of the first recipe>, for some "
        "tasks with the name of the weights",
        default=None,
    )
    seed: int = option("seed of everything random", default=0, check=not_negative)
    launcher: LauncherConfig | None = option(
        "where the processes come from; left out, this process alone", default=None
    )

    # Files and patterns that the task leaves in its folder besides the ``files`` that results.json
    # names: what --overwrite deletes. None refuses it, as is right for what took days.
    overwritten: ClassVar[Sequence[str] | None] = None

    def run_name(self, recipe: str) -> str:
        """The name of the run's folder in ``runs``, where the recipe says none."""
        return recipe

    def free_keys(self, output_dir: Path) -> Sequence[str]:
        """Keys in which a run that goes on in a folder may differ from what it was."""
        return ()

    def places(self) -> Sequence[str]:
        """Keys that say where something lies that is known again by other means."""
        return ()

    def ways_on(self, output_dir: Path) -> str:
        """The keys by which another run goes on from what a run of this recipe left in a folder."""
        return ""

    def inner_runs(self, output_dir: Path) -> Sequence[InnerRun]:
        """The runs that this one consists of, in their order, if it does."""
        return ()


@config
class BackboneTaskConfig(TaskConfig):
    """Base of tasks on one backbone: of ``weights``, or a ``backbone`` as it is initialized."""

    weights: str | None = option(
        "weights of the backbone: a file or folder of any known format, or a published name",
        default=None,
    )
    unused: tuple[str, ...] | None = option(
        "names, or patterns with *, of tensors of the weights that may be left over", default=None
    )
    backbone: BackboneConfig | None = option(
        "a backbone to look at as it is initialized, with the recipe's seed", default=None
    )
    images: ImagesConfig | None = option(
        "what images are, for backbone (left out, RGB); weights know it by themselves",
        default=None,
    )

    def run_name(self, recipe: str) -> str:
        return "-".join([recipe, *name_of_source(self.weights)])


def name_of_source(source: str | None) -> list[str]:
    """What weights are called where a folder is named after them; nothing if there are none."""
    if source is None:
        return []
    path = Path(source.partition("?")[0]).expanduser()
    *folders, name = path.parts or path.absolute().parts
    if len(folders) > 1 and folders[-1] in ("exports", "checkpoints"):  # of a run
        name = folders[-2] if folders[-1] == "exports" else f"{folders[-2]}-{name}"
    return [re.sub(r"[^\w.@+-]+", "_", re.sub(r"\.[A-Za-z]+$", "", name))[-100:]]


# --------------------------------------------------------------------------- the table
@frozen
class Kind:
    """What components of one kind have in common."""

    name: str
    config: type  # the base of their configs
    contract: str  # module:class of the objects
    arguments: str  # of the factory, besides the config
    doc: str

    @property
    def hook(self) -> str:
        """The hook by which plugins offer them: ``dinov3_losses``."""
        return f"dinov3_{self.name}{'es' if self.name.endswith('s') else 's'}"

    @property
    def names(self) -> list[str]:
        """The names of ``arguments``."""
        return re.findall(r"\w+(?==)", self.arguments)

    @property
    def selector(self) -> str:
        """The key by which a table chooses one of them: a whole recipe by its ``task``."""
        return "task" if self.name == "task" else "use"


_CONTRACTS = "dinov3_framework.contracts"

_ROWS = (
    Kind(
        "backbone",
        BackboneConfig,
        f"{_CONTRACTS}.networks:Backbone",
        "",
        "Networks that turn images into class, storage and patch tokens.",
    ),
    Kind(
        "augmentation",
        AugmentationConfig,
        f"{_CONTRACTS}.data:Augmentation",
        "channels=..., patch_size=...",
        "What turns one image into the crops and masks of a training sample.",
    ),
    Kind(
        "transform",
        TransformConfig,
        f"{_CONTRACTS}.data:Transform",
        "images=..., targets=...",
        "What changes an image and its targets together, and makes batches of them.",
    ),
    Kind(
        "loss",
        LossConfig,
        f"{_CONTRACTS}.losses:Loss",
        "",
        "Terms of a self-supervised objective, with their projectors and anchors.",
    ),
    Kind(
        "dataset",
        DatasetConfig,
        f"{_CONTRACTS}.data:Dataset",
        "channels=...",
        "Sources of images, with targets or without.",
    ),
    Kind(
        "head",
        HeadConfig,
        f"{_CONTRACTS}.networks:Head",
        "features=..., targets=...",
        "Networks on a backbone's features: classifiers, segmenters, depth estimators.",
    ),
    Kind(
        "evaluation",
        EvaluationConfig,
        f"{_CONTRACTS}.running:Evaluation",
        "",
        "Measures of a backbone or of a head on it.",
    ),
    Kind(
        "optimizer",
        OptimizerConfig,
        f"{_CONTRACTS}.training:OptimizerFactory",
        "",
        "Ways of changing parameters by their gradients.",
    ),
    Kind(
        "launcher",
        LauncherConfig,
        f"{_CONTRACTS}.running:Launcher",
        "",
        "Ways to get processes: on this machine, on a cluster.",
    ),
    Kind(
        "task",
        TaskConfig,
        f"{_CONTRACTS}.running:Task",
        "registry=...",
        "What a recipe runs; the config types the whole recipe.",
    ),
    Kind(
        "observer",
        ObserverConfig,
        f"{_CONTRACTS}.running:Observer",
        "",
        "What watches a training: in-loop evaluations, plots, experiment trackers.",
    ),
)
KINDS: Mapping[str, Kind] = {kind.name: kind for kind in _ROWS}


# --------------------------------------------------------------------------- other offers
@frozen
class Flag:
    """A flag of ``dinov3-run`` that a plugin brings: something to do with a recipe besides running.

    ``run``, ``"module:function"``, is called as ``run(task, world_size=..., **values)`` and returns
    the text to print; ``world_size`` is the launcher's. ``values`` has one entry for each of
    ``options``, which are further flags with an argument, by name: (type, placeholder, help).
    """

    name: str  # "rehearse" for --rehearse
    help: str
    run: str
    options: Mapping[str, tuple[Callable[[str], Any], str, str]] = attrs.field(factory=dict)


@frozen
class WeightsWriter:
    """A format that weights are written in and not read from.

    ``write``, ``"module:function"``, is called as ``write(path, backbone, info)`` with a backbone
    that has its values and the ``ComponentInfo`` that belongs to it. It compares what it wrote with
    the backbone, raises ``CheckpointError`` where they differ, and returns in a few words how they
    were compared. ``write_with_head`` is called as ``(path, backbone, info, head)``, with a
    ``weights.heads.LoadedHead``.
    """

    format: str
    suffix: str  # of files in this format, such as ".onnx"
    write: str
    write_with_head: str | None = None
