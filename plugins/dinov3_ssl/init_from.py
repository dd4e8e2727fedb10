"""``init_from``: a run that starts from weights instead of random values.

The weights are opened and compared with the run's networks before anything is written, and read
when the networks are in their places: every process reads for itself, one tensor at a time, and
keeps its shards. A run that goes on from a checkpoint of its own does not come here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from attrs import frozen
from torch import Tensor, nn

from dinov3_framework.contracts.layouts import Rule, Shape
from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.errors import CheckpointError, Problem, RecipeError, summarize_names
from dinov3_framework.parallel.state_dicts import put
from dinov3_framework.registry import Registry
from dinov3_framework.weights.filling import initial_values
from dinov3_framework.weights.matching import Match, match, patterns_for
from dinov3_framework.weights.opening import open_backbone
from dinov3_framework.weights.recognition import BACKBONE, Recognised, built
from dinov3_ssl.configs import InitFromConfig, StudentTrainingConfig, resolved_backbone
from dinov3_ssl.init_check import image_problems, setting_problems
from dinov3_ssl.networks import Blueprint


@frozen
class InitialWeights:
    """Weights that fit a run, open to be read into its networks."""

    config: InitFromConfig
    found: Recognised
    source: Backbone  # the weights' own, on the meta device
    rules: Mapping[str, Rule]  # by official name, of its tensors that the weights have
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
            put(state[_inside(name)], tensor)
        buffers = dict(module.named_buffers())
        drawn = [*map(_inside, names.new), *(name for name in buffers if name not in state)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            initial = initial_values(blueprint, drawn)
        for name, tensor in initial.items():
            put(state[name] if name in state else buffers[name], tensor)

    def _tensors(self, names: Match) -> Iterator[tuple[str, Tensor]]:
        shapes = {name: tuple(tensor.shape) for name, tensor in self.source.state_dict().items()}
        buffers = {f"{BACKBONE}{name}" for name, _ in self.source.named_buffers()}
        bad = []
        for name in names.loaded:
            inside = _inside(name)
            if not name.startswith(BACKBONE):
                tensor = self.found.read_projector(name)
            else:
                read = self.rules[inside].read(shapes[inside], self.found.content.read)
                if read is None or (name in buffers and not _is_finite(read)):
                    # It follows from the config: files leave it out, or saved it before it was set.
                    read = initial_values(self.source, [inside])[inside]
                tensor = read
            if not _is_finite(tensor):
                bad.append(name)
            yield name, tensor
        if bad:
            raise CheckpointError(f"{self.found.path}:{summarize_names('with NaN or inf', bad)}")

    # ------------------------------------------------------------------ what a person sees
    def rows(self, blueprint: Blueprint) -> list[tuple[str, str]]:
        """The section of a report: what the weights are and what they go into."""
        parts = list(blueprint.student())
        counts = [
            f"{part}: {self.match.of(part).counts() if self.has(part) else 'at random'}"
            for part in [*parts, *(part for part in self.match.parts() if part not in parts)]
        ]
        family = type(self.found.config).__name__.removesuffix("Config")
        rows = [
            ("weights", self.config.weights),
            ("what they are", f"{family}, {self.found.format} format"),
            *((key, value) for key, value in self.found.provenance.items() if key != "format"),
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
        told = {"network": self.config.network, "into": self.into, "format": self.found.format}
        told |= {"tensors": self.match.counts()} | dict(self.found.provenance)
        nested = {f"init_from.{key}": value for key, value in told.items()}
        return {"init_from": self.config.weights, **nested}


def _inside(name: str) -> str:
    """A tensor's name without the part of the network that it is in."""
    return name.partition(".")[2]


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


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
            found = _opened(stack, config, init, registry)
            source = built(found, registry)
            rules, available = _available(found, source)
        except CheckpointError as error:
            raise RecipeError([_unusable(error, config)]) from error
        problems = [
            *setting_problems(init, resolved_backbone(config), found),
            *image_problems(init, config.images, found),
        ]
        if init.projectors:
            heads = found.projectors()
            available |= heads
            if not heads:
                problems.append(_no_projectors(init))
        matched, differences = match(
            _wanted(blueprint, init), available, new=init.new, unused=init.unused
        )
        problems += differences
        if problems:
            raise RecipeError(problems)
        yield InitialWeights(init, found, source, rules, matched)


def _opened(
    stack: ExitStack, config: StudentTrainingConfig, init: InitFromConfig, registry: Registry
) -> Recognised:
    try:
        opened = open_backbone(
            init.weights, registry, network=init.network, projectors=init.projectors
        )
        return stack.enter_context(opened)
    except CheckpointError:
        if "images" not in init.differing:
            raise
    # Weights that do not say how images are scaled cannot be opened without being told.
    opened = open_backbone(
        init.weights,
        registry,
        network=init.network,
        images=config.images,
        projectors=init.projectors,
    )
    return stack.enter_context(opened)


def _unusable(error: CheckpointError, config: StudentTrainingConfig) -> Problem:
    hint = ""
    if config.images.channels != 3:
        hint = (
            "where nothing says what images the weights were trained on, "
            'init_from.differing = ["images"] takes [images] for them'
        )
    return Problem("init_from.weights", str(error), hint)


def _available(found: Recognised, source: Backbone) -> tuple[dict[str, Rule], dict[str, Shape]]:
    """Rules of the backbone's tensors that the file has, by official name; and the names and shapes
    of all its tensors, those without an official name under their own.

    Raises ``CheckpointError`` where tensors are not of the shapes that their backbone has.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in source.state_dict().items()}
    given = found.content.shapes
    rules: dict[str, Rule] = {}
    used: set[str] = set()
    misshapen: list[str] = []
    for rule in found.rules(list(shapes)):
        stored = rule.stored(shapes[rule.official])
        used |= stored.keys()
        misshapen += [
            f"{name}: {list(given[name])}, where the others of its backbone want {list(shape)}"
            for name, shape in stored.items()
            if name in given and tuple(given[name]) != tuple(shape)
        ]
        if stored.keys() <= given.keys() and rule.lost is None:
            rules[rule.official] = rule
    if misshapen:
        raise CheckpointError(f"{found.path}:{summarize_names('of a wrong shape', misshapen)}")
    named = {name: shapes[name] for name in rules}
    named |= {name: tuple(given[name]) for name in given if name not in used}
    return rules, {f"{BACKBONE}{name}": shape for name, shape in named.items()}


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
