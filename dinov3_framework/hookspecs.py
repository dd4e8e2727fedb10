"""The hooks a plugin may implement.

Each returns a list, of :class:`~dinov3_framework.Component` unless it says otherwise. The hooks are
called once, when the registry loads; they must not import torch or any other heavy package, so that
listing, describing and checking stay quick: give a component's factory as ``"module:attribute"``.

A plugin is a module (or package) with such functions, named by an entry point of the group
``dinov3_framework``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from dinov3_framework.components import Component
    from dinov3_framework.weights.layouts import Layout, Published

PROJECT = "dinov3_framework"  # also the entry-point group

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def dinov3_backbones() -> list[Component]:  # type: ignore[empty-body]
    """Networks that turn images into class, storage and patch tokens.

    Config: a subclass of ``BackboneConfig``. Built as ``factory(config)``; see
    ``contracts.Backbone`` for what the object must offer.
    """


@hookspec
def dinov3_layouts() -> list[Layout]:  # type: ignore[empty-body]
    """How files of other formats name the tensors of a plugin's backbones.

    See ``weights.layouts.Layout``. A backbone without layouts is read from and written to this
    framework's own files.
    """


@hookspec
def dinov3_published() -> list[Published]:  # type: ignore[empty-body]
    """Published weights of a plugin's backbones, by their torch.hub names."""


@hookspec
def dinov3_augmentations() -> list[Component]:  # type: ignore[empty-body]
    """What turns one image into the crops and masks of a training sample.

    Config: a subclass of ``AugmentationConfig``. Built as ``factory(config, channels=...,
    patch_size=...)``; see ``contracts.Augmentation``.
    """


@hookspec
def dinov3_losses() -> list[Component]:  # type: ignore[empty-body]
    """Terms of the training objective, each with its projector and anchors if it wants any.

    Config: a subclass of ``LossConfig``. Built as ``factory(config)``; see ``contracts.Loss``.
    """


@hookspec
def dinov3_datasets() -> list[Component]:  # type: ignore[empty-body]
    """Sources of images, labelled or not.

    Config: a subclass of ``DatasetConfig``. Built as ``factory(config, channels=...)``; see
    ``contracts.Dataset``.
    """


@hookspec
def dinov3_heads() -> list[Component]:  # type: ignore[empty-body]
    """Modules on top of a backbone's features: classifiers, segmenters, depth estimators.

    Config: a subclass of ``HeadConfig``. Built as ``factory(config, embed_dim=...)``; see
    ``contracts.Head``.
    """


@hookspec
def dinov3_launchers() -> list[Component]:  # type: ignore[empty-body]
    """Ways to get processes: on this machine, on a cluster.

    Config: a subclass of ``LauncherConfig``. Built as ``factory(config)``; see
    ``contracts.Launcher``.
    """


@hookspec
def dinov3_tasks() -> list[Component]:  # type: ignore[empty-body]
    """What a recipe runs: pretraining, an evaluation, an export.

    Config: a subclass of ``TaskConfig``, which types the whole recipe. Built as
    ``factory(config, registry=...)``; see ``contracts.Task``.
    """


@hookspec
def dinov3_observers() -> list[Component]:  # type: ignore[empty-body]
    """What watches a training run: in-loop evaluations, figures, experiment trackers.

    Config: a subclass of ``ObserverConfig``. Built as ``factory(config)``; see
    ``contracts.Observer``.
    """
