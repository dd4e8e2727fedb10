"""Finds plugins and asks them for their components."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib import metadata
from typing import Any

import pluggy
from attrs import frozen

from dinov3_framework import hookspecs
from dinov3_framework.errors import PluginError

BLOCK_VARIABLE = "DINOV3_BLOCK_PLUGINS"


@frozen
class BrokenPlugin:
    """A plugin that could not be imported."""

    name: str
    distribution: str
    error: str

    def __str__(self) -> str:
        return (
            f"plugin {self.name!r} of distribution {self.distribution!r} cannot be loaded: "
            f"{self.error}\n    repair or uninstall it, or leave it out with "
            f"--block-plugin {self.name}"
        )


@frozen
class FoundPlugins:
    """The plugin manager, where each plugin came from, and those that failed."""

    manager: pluggy.PluginManager
    distributions: dict[str, str]
    broken: list[BrokenPlugin]
    blocked: list[str]


def blocked_by_environment() -> list[str]:
    """Names in ``DINOV3_BLOCK_PLUGINS``, separated by commas."""
    names = os.environ.get(BLOCK_VARIABLE, "").split(",")
    return [name.strip() for name in names if name.strip()]


def find_plugins(block: Iterable[str] = ()) -> FoundPlugins:
    """Load every installed plugin but those in ``block``.

    A plugin that fails to import is set aside with its distribution's name and takes nothing else
    down; one that misspells a hook is an error, since a hook never called looks like one that is.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    blocked = sorted({*block, *blocked_by_environment()})
    found = FoundPlugins(manager, {}, [], blocked)
    for distribution in metadata.distributions():
        for entry in distribution.entry_points.select(group=hookspecs.PROJECT):
            origin = distribution.metadata["Name"]
            if entry.name in blocked or found.distributions.get(entry.name) == origin:
                continue  # the second case: one distribution seen twice on sys.path
            _load(found, entry, origin)
    return found


def _load(found: FoundPlugins, entry: metadata.EntryPoint, origin: str) -> None:
    if entry.name in found.distributions:
        raise PluginError(
            f"two plugins are named {entry.name!r}: one of distribution "
            f"{found.distributions[entry.name]!r}, one of {origin!r}; uninstall one of them"
        )
    try:
        plugin = entry.load()
    except Exception as error:  # whatever a stranger's module may raise
        found.broken.append(BrokenPlugin(entry.name, origin, f"{type(error).__name__}: {error}"))
        return
    found.distributions[entry.name] = origin
    register(found.manager, plugin, entry.name, origin)


def register(manager: pluggy.PluginManager, plugin: Any, name: str, origin: str) -> None:
    """Register one plugin and refuse hooks that nobody would call."""
    try:
        manager.register(plugin, name)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        hooks = ", ".join(sorted(n for n in vars(hookspecs) if n.startswith("dinov3_")))
        message = str(error).splitlines()[0]
        raise PluginError(
            f"plugin {name!r} of distribution {origin!r}: {message}\n    the hooks are: {hooks}"
        ) from error
