"""Plugins: how they mark their hooks, where they are found, and which hooks there are.

A plugin is a module (or package) with functions marked by ``hookimpl``, named by an entry point of
the group ``dinov3_framework``. Each hook takes no argument and returns a list. Hooks are called
once, when the registry loads, and must not import torch or any other heavy package, so that
listing, describing and checking stay quick: give a component's factory as ``"module:attribute"``.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import metadata
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy
from attrs import field, frozen

from dinov3_framework.blame import FILES, PROJECT, line_in
from dinov3_framework.errors import PluginError, suggest
from dinov3_framework.kinds import KINDS

BLOCK_VARIABLE = "DINOV3_BLOCK_PLUGINS"

hookimpl = pluggy.HookimplMarker(PROJECT)

# Hooks that offer something else than components of a kind, and the class of what they offer.
OFFERS = {
    "dinov3_layouts": "dinov3_framework.contracts.layouts:Layout",
    "dinov3_published": "dinov3_framework.contracts.layouts:Published",
    "dinov3_weights_writers": "dinov3_framework.kinds:WeightsWriter",
    "dinov3_flags": "dinov3_framework.kinds:Flag",
}
HOOKS = (*(kind.hook for kind in KINDS.values()), *OFFERS)


def hook_specifications() -> ModuleType:
    """The hooks as pluggy wants them: a module of functions without arguments."""
    specifications = ModuleType("dinov3_hooks")
    mark = pluggy.HookspecMarker(PROJECT)
    for hook in HOOKS:

        def specification() -> None:
            """Return a list."""

        specification.__name__ = hook
        setattr(specifications, hook, mark(specification))
    return specifications


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
    printed: list[str] = field(factory=list)  # what plugins wrote to standard output, in words

    @contextmanager
    def listening(self, plugin: str, origin: str) -> Iterator[None]:
        """Keep what a plugin prints while it loads from what the command line is asked for."""
        try:
            with redirect_stdout(StringIO()) as out:
                yield
        finally:
            if text := out.getvalue().strip():
                self.printed.append(f"plugin {plugin!r} of distribution {origin!r} printed: {text}")


def blocked_by_environment() -> list[str]:
    """Names in ``DINOV3_BLOCK_PLUGINS``, separated by commas."""
    names = os.environ.get(BLOCK_VARIABLE, "").split(",")
    return [name.strip() for name in names if name.strip()]


def find_plugins(block: Iterable[str] = (), files: Iterable[str] = ()) -> FoundPlugins:
    """Load every installed plugin but those in ``block``, and those in ``files``.

    A plugin that fails to import is set aside with its distribution's name and takes nothing else
    down; one that misspells a hook is an error, since a hook never called looks like one that is.
    """
    block = tuple(block)
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hook_specifications())
    blocked = sorted({*block, *blocked_by_environment()})
    found = FoundPlugins(manager, {}, [], blocked)
    seen: set[tuple[str, str]] = set()
    for distribution in metadata.distributions():
        for entry in distribution.entry_points.select(group=PROJECT):
            origin = distribution.metadata["Name"]
            if (entry.name, origin) in seen:
                continue  # one distribution, found twice on sys.path
            seen.add((entry.name, origin))
            if entry.name not in blocked:
                _load(found, entry, origin)
    _refuse_unknown(block, sorted({name for name, _ in seen}))
    for file in files:
        _load_file(found, file)
    return found


def _refuse_unknown(block: Iterable[str], known: list[str]) -> None:
    """Blocking what is not there is a slip of the pen.

    The environment variable is spared: it may be set for a machine where some plugins are missing.
    """
    for name in block:
        if name not in known:
            hint = suggest(name, known, "plugins")
            raise PluginError(f"no plugin is named {name!r}, so it cannot be blocked; {hint}")


def _load(found: FoundPlugins, entry: metadata.EntryPoint, origin: str) -> None:
    if entry.name in found.distributions:
        raise PluginError(
            f"two plugins are named {entry.name!r}: one of distribution "
            f"{found.distributions[entry.name]!r}, one of {origin!r}; uninstall one of them"
        )
    try:
        with found.listening(entry.name, origin):
            plugin = entry.load()
    except (Exception, SystemExit) as error:  # whatever a stranger's module may raise
        found.broken.append(BrokenPlugin(entry.name, origin, f"{type(error).__name__}: {error}"))
        return
    found.distributions[entry.name] = origin
    register(found.manager, plugin, entry.name, origin)
    if not found.manager.get_hookcallers(plugin):
        found.broken.append(BrokenPlugin(entry.name, origin, f"{entry.value} implements no hook"))


def _load_file(found: FoundPlugins, file: str) -> None:
    """Load a plugin that is not installed: a Python file, as the module of its name."""
    path, name = Path(file).expanduser().absolute(), Path(file).stem
    where = f"--plugin {file}"
    if path.suffix != ".py" or not path.is_file():
        raise PluginError(f"{where}: there is no such Python file")
    if FILES.get(name) != str(path):
        if not name.isidentifier() or _is_taken(name, path):
            raise PluginError(f"{where}: {name!r} cannot be its module's name; rename the file")
        # Found there by what it imports beside it, and by processes that unpickle its objects.
        sys.path.append(str(path.parent))
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # whatever a stranger's module may raise
            what = f"{type(error).__name__}: {error}"
            line = line_in({name}, error) if not isinstance(error, SyntaxError) else ""
            raise PluginError(": ".join(filter(None, (where, line, what)))) from error
        FILES[name] = str(path)
    if name in found.distributions:
        raise PluginError(f"{where}: a plugin named {name!r} is installed; rename the file")
    plugin = sys.modules[name]
    found.distributions[name] = str(path)
    register(found.manager, plugin, name, str(path))
    if not found.manager.get_hookcallers(plugin):
        raise PluginError(f"{where}: has no hook, a function marked @hookimpl")


def _is_taken(name: str, path: Path) -> bool:
    """Whether a module of this name is another one than the file."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # a module without a spec, such as __main__
        return True
    return spec is not None and os.path.realpath(spec.origin or "") != os.path.realpath(path)


def register(manager: pluggy.PluginManager, plugin: Any, name: str, origin: str) -> None:
    """Register one plugin and refuse hooks that nobody would call."""
    for hook in HOOKS:
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
            f"    the hooks are: {', '.join(sorted(HOOKS))}"
        ) from error
    except ValueError as error:
        raise PluginError(
            f"plugin {name!r} of distribution {origin!r}: {plugin.__name__} is already loaded "
            "under another name"
        ) from error
