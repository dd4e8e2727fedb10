"""The backbone that a recipe looks at: one with weights, or one as it is initialised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from attrs import frozen

from dinov3_framework.configs import ImagesConfig, replace
from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.errors import Problem, RecipeError
from dinov3_framework.kinds import BackboneConfig, SubjectConfig
from dinov3_framework.randomness import keyed_seed
from dinov3_framework.registry import Registry
from dinov3_framework.runtime.processes import pick_device
from dinov3_framework.weights.loaded import LoadedBackbone
from dinov3_framework.weights.loading import describe_backbone, load_backbone
from dinov3_framework.weights.opening import exists


@frozen
class Subject:
    """A backbone, and the images it wants."""

    name: str
    backbone: Backbone
    images: ImagesConfig
    size: int | None  # pixels of its training, where that is known
    origin: Sequence[tuple[str, str]]  # rows for people: where it comes from

    @classmethod
    def described(cls, config: SubjectConfig, registry: Registry) -> Subject:
        """The subject for a check, its backbone on the meta device: names and shapes are right.

        Raises ``RecipeError`` for a contradiction and ``CheckpointError`` for wrong weights.
        """
        _refuse_contradictions(config, registry)
        if config.weights is None:
            with torch.device("meta"):
                return _built(config, registry)
        return cls.of_weights(config.weights, describe_backbone(config.weights, registry=registry))

    @classmethod
    def opened(cls, config: SubjectConfig, registry: Registry, device: str = "auto") -> Subject:
        """The subject itself, in eval mode, on this process's accelerator if ``auto`` finds one.

        Errors as of :meth:`described`.
        """
        _refuse_contradictions(config, registry)
        place = pick_device(device)
        if config.weights is not None:
            loaded = load_backbone(config.weights, device=place, registry=registry)
            return cls.of_weights(config.weights, loaded)
        subject = _built(config, registry)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cls.seed(config))
            subject.backbone.init_weights()
        subject.backbone.eval().to(place)
        return subject

    @classmethod
    def of_weights(cls, weights: str, loaded: LoadedBackbone) -> Subject:
        """The subject that was loaded from ``weights``."""
        origin = [("weights", weights), *sorted(loaded.provenance.items())]
        return cls(weights, loaded.backbone, loaded.images, loaded.size, origin)

    @staticmethod
    def seed(config: SubjectConfig) -> int:
        """What a subject without weights is initialised from."""
        return keyed_seed(config.seed, "subject")


def _built(config: SubjectConfig, registry: Registry) -> Subject:
    images = config.images or ImagesConfig()
    backbone: Any = replace(cast(Any, config.backbone), in_chans=images.channels)
    name = registry.of_config(backbone).component.name
    origin = [("backbone", name), ("weights", f"random, seed {config.seed}")]
    return Subject("random-init backbone", registry.build(backbone), images, None, origin)


def _refuse_contradictions(config: SubjectConfig, registry: Registry) -> None:
    problems = _contradictions(config, registry)
    if problems:
        raise RecipeError(problems)


def _contradictions(config: SubjectConfig, registry: Registry) -> list[Problem]:
    """What can be wrong with the choice of a backbone before any file is opened."""
    weights, backbone, images = config.weights, config.backbone, config.images
    if weights is None and backbone is None:
        hint = "give weights (a path) or a [backbone] to initialise at random"
        return [Problem("weights", "there is no backbone to look at", hint)]
    if backbone is not None and weights is None:
        return _channel_problems(backbone, images or ImagesConfig())
    problems = []
    if backbone is not None:
        message = "weights bring their own backbone"
        problems.append(Problem("backbone", message, "leave one of them out"))
    if images is not None:
        message = "weights know what images they were trained on"
        problems.append(Problem("images", message, "leave [images] out"))
    if not exists(str(weights), registry):
        hint = "the path is relative to the current folder; training writes its own into exports/"
        if registry.published:
            hint += f"; published names: {', '.join(sorted(registry.published))}"
        problems.append(Problem("weights", f"there is no file {weights}", hint))
    return problems


def _channel_problems(backbone: BackboneConfig, images: ImagesConfig) -> list[Problem]:
    if backbone.in_chans in (None, images.channels):
        return []
    message = f"is {backbone.in_chans}, but images.channels is {images.channels}"
    hint = "set images.channels alone (with mean and std) and leave in_chans out"
    return [Problem("backbone.in_chans", message, hint)]
