"""Finds plugins and asks them for their components."""

from __future__ import annotations

import difflib
import inspect
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
    block = tuple(block)
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    blocked = sorted({*block, *blocked_by_environment()})
    found = FoundPlugins(manager, {}, [], blocked)
    seen: set[tuple[str, str]] = set()
    for distribution in metadata.distributions():
        for entry in distribution.entry_points.select(group=hookspecs.PROJECT):
            origin = distribution.metadata["Name"]
            if (entry.name, origin) in seen:
                continue  # one distribution, found twice on sys.path
            seen.add((entry.name, origin))
            if entry.name not in blocked:
                _load(found, entry, origin)
    _refuse_unknown(block, sorted({name for name, _ in seen}))
    return found


def _refuse_unknown(block: Iterable[str], known: list[str]) -> None:
    """Blocking what is not there is a slip of the pen.

    The environment variable is spared: it may be set for a machine where some plugins are missing.
    """
    for name in block:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"plugins: {', '.join(known)}"
            raise PluginError(f"no plugin is named {name!r}, so it cannot be blocked; {hint}")


def _load(found: FoundPlugins, entry: metadata.EntryPoint, origin: str) -> None:
    if entry.name in found.distributions:
        raise PluginError(
            f"two plugins are named {entry.name!r}: one of distribution "
            f"{found.distributions[entry.name]!r}, one of {origin!r}; uninstall one of them"
        )
    try:
        plugin = entry.load()
    except (Exception, SystemExit) as error:  # whatever a stranger's module may raise
        found.broken.append(BrokenPlugin(entry.name, origin, f"{type(error).__name__}: {error}"))
        return
    found.distributions[entry.name] = origin
    register(found.manager, plugin, entry.name, origin)
    if not found.manager.get_hookcallers(plugin):
        found.broken.append(BrokenPlugin(entry.name, origin, f"{entry.value} implements no hook"))


def register(manager: pluggy.PluginManager, plugin: Any, name: str, origin: str) -> None:
    """Register one plugin and refuse hooks that nobody would call."""
    for hook in _hooks():
        function = getattr(plugin, hook, None)
        if inspect.isroutine(function) and manager.parse_hookimpl_opts(plugin, hook) is None:
            raise PluginError(
                f"plugin {name!r} of distribution {origin!r}: {hook} lacks the @hookimpl "
                "decorator, so it would never be called"
            )
    try:
        manager.register(plugin, name)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        message = str(error).splitlines()[0]
        raise PluginError(
            f"plugin {name!r} of distribution {origin!r}: {message}\n"
            f"    the hooks are: {', '.join(_hooks())}"
        ) from error
    except ValueError as error:
        raise PluginError(
            f"plugin {name!r} of distribution {origin!r}: {plugin.__name__} is already loaded "
            "under another name"
        ) from error


def _hooks() -> list[str]:
    return sorted(name for name in vars(hookspecs) if name.startswith("dinov3_"))
