"""``init_from``: a run that starts from weights instead of random values.

The weights are opened and compared with the run's networks before anything is written, and read
when the networks are in their places: every process reads for itself, one tensor at a time, and
keeps its shards. A run that goes on from a checkpoint of its own does not come here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from attrs import frozen
from torch import Tensor, nn

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.contracts.layouts import Shape
from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.errors import CheckpointError, Problem, RecipeError
from dinov3_framework.parallel.state_dicts import load_tensor
from dinov3_framework.registry import Registry
from dinov3_framework.weights.matching import Match, match, patterns_for
from dinov3_framework.weights.source import WeightSource
from dinov3_framework.weights.tensors import initial_tensors
from dinov3_ssl.configs import InitFromConfig, StudentTrainingConfig, resolved_backbone
from dinov3_ssl.init_check import image_problems, setting_problems
from dinov3_ssl.networks import Blueprint

BACKBONE = "backbone."


@frozen
class InitialWeights:
    """Weights that fit a run, open to be read into its networks."""

    config: InitFromConfig
    source: WeightSource
    backbone: Backbone  # the weights' own, on the meta device
    match: Match

    @property
    def into(self) -> str:
        return self.config.into

    def has(self, part: str) -> bool:
        """Whether any tensor of a network's part, such as ``backbone``, comes from the weights."""
        return bool(self.match.of(part).loaded)

    def fill(self, part: str, module: nn.Module, blueprint: nn.Module, seed: int) -> None:
        """Give an allocated part, whole or sharded, the values of the weights.

        ``blueprint`` is the same part, whole, on the meta device. What is new is drawn from
        ``seed``, alike on every process; no process talks to another. Raises ``CheckpointError``
        for parameters that are not finite, after all were read.
        """
        names = self.match.of(part)
        state = module.state_dict()
        for name, tensor in self._tensors(names):
            load_tensor(state[_inside(name)], tensor)
        buffers = dict(module.named_buffers())
        drawn = [*map(_inside, names.new), *(name for name in buffers if name not in state)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            initial = initial_tensors(blueprint, drawn)
        for name, tensor in initial.items():
            load_tensor(state[name] if name in state else buffers[name], tensor)

    def _tensors(self, names: Match) -> Iterator[tuple[str, Tensor]]:
        ours = [_inside(name) for name in names.loaded if name.startswith(BACKBONE)]
        for name, tensor in self.source.tensors(self.backbone, ours):
            yield f"{BACKBONE}{name}", tensor
        others = [name for name in names.loaded if not name.startswith(BACKBONE)]
        yield from self.source.projector_tensors(others)

    # ------------------------------------------------------------------ what a person sees
    def rows(self, blueprint: Blueprint) -> list[tuple[str, str]]:
        """The section of a report: what the weights are and what they go into."""
        parts = list(blueprint.student())
        counts = [
            f"{part}: {self.match.of(part).counts() if self.has(part) else 'at random'}"
            for part in [*parts, *(part for part in self.match.parts() if part not in parts)]
        ]
        family = type(self.source.config).__name__.removesuffix("Config")
        rows = [
            ("weights", self.config.weights),
            ("what they are", f"{family}, {self.source.format} format"),
            *((key, value) for key, value in self.source.provenance.items() if key != "format"),
        ]
        for network in ("student", "teacher"):
            loaded = self.into in (network, "both")
            rows.append((network, "; ".join(counts) if loaded else "at random"))
        for label, names in (("new", self.match.new), ("unused", self.match.unused)):
            if names:
                others = [*self.match.loaded, *(self.match.new if label == "unused" else ())]
                rows.append((label, ", ".join(patterns_for(names, [*names, *others]))))
        return rows

    def origin(self) -> dict[str, str]:
        """Where the first values came from, for the provenance of what the run exports."""
        told = {"network": self.config.network, "into": self.into, "format": self.source.format}
        told |= {"tensors": self.match.counts()} | dict(self.source.provenance)
        nested = {f"init_from.{key}": value for key, value in told.items()}
        return {"init_from": self.config.weights, **nested}


def _inside(name: str) -> str:
    """A tensor's name without the part of the network that it is in."""
    return name.partition(".")[2]


# --------------------------------------------------------------------------- opening
@contextmanager
def open_weights(
    config: StudentTrainingConfig, blueprint: Blueprint, registry: Registry
) -> Iterator[InitialWeights]:
    """The weights of ``[init_from]``, compared with the run's networks.

    Names and shapes are compared, no values are read. Raises ``RecipeError`` with all that does not
    fit and is not allowed by name, and for weights that are missing or unusable.
    """
    init = config.init_from
    if init is None:
        raise ValueError("the recipe has no init_from")
    with ExitStack() as stack:
        try:
            source = _opened(stack, config, init, registry)
            backbone = source.build()
            available = {f"{BACKBONE}{n}": s for n, s in source.available(backbone).items()}
        except CheckpointError as error:
            raise RecipeError([_unusable(error, config)]) from error
        problems = [
            *setting_problems(init, resolved_backbone(config), source),
            *image_problems(init, config.images, source),
        ]
        if init.projectors:
            heads = source.projectors
            available |= heads
            if not heads:
                problems.append(_no_projectors(init))
        matched, differences = match(
            _wanted(blueprint, init), available, new=init.new, unused=init.unused
        )
        problems += differences
        if problems:
            raise RecipeError(problems)
        yield InitialWeights(init, source, backbone, matched)


def _opened(
    stack: ExitStack, config: StudentTrainingConfig, init: InitFromConfig, registry: Registry
) -> WeightSource:
    def opened(images: ImagesConfig | None) -> WeightSource:
        return stack.enter_context(
            WeightSource.open(
                init.weights,
                registry,
                network=init.network,
                images=images,
                projectors=init.projectors,
            )
        )

    try:
        return opened(None)
    except CheckpointError:
        if "images" not in init.differing:
            raise
    # Weights that do not say how images are scaled cannot be opened without being told.
    return opened(config.images)


def _unusable(error: CheckpointError, config: StudentTrainingConfig) -> Problem:
    hint = ""
    if config.images.channels != 3:
        hint = (
            "where nothing says what images the weights were trained on, "
            'init_from.differing = ["images"] takes [images] for them'
        )
    return Problem("init_from.weights", str(error), hint)


# --------------------------------------------------------------------------- projectors
def _no_projectors(init: InitFromConfig) -> Problem:
    return Problem(
        "init_from.projectors",
        f"{init.weights} holds a backbone alone",
        "leave projectors out, or take a training checkpoint, which has them",
    )


def _wanted(blueprint: Blueprint, init: InitFromConfig) -> dict[str, Shape]:
    """Names and shapes of what the weights are to give."""
    student = blueprint.student()
    parts = list(student) if init.projectors else [BACKBONE.rstrip(".")]
    return {
        f"{part}.{name}": tuple(tensor.shape)
        for part in parts
        for name, tensor in student[part].state_dict().items()
    }
