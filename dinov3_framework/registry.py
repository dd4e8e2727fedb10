"""What can be built, by kind and name, and the building."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import attrs

from dinov3_framework.contracts.layouts import Layout, Published
from dinov3_framework.errors import (
    PluginError,
    Problem,
    RecipeError,
    UnknownNameError,
    suggest,
)
from dinov3_framework.kinds import KINDS, Component, Flag, Registered, WeightsWriter
from dinov3_framework.plugins import OFFERS, BrokenPlugin, FoundPlugins, find_plugins

if TYPE_CHECKING:
    from dinov3_framework.recipes.describe import Description


class Registry:
    """Every component that the installed plugins offer.

    >>> registry = Registry.load()
    >>> registry.names("backbone")
    >>> registry.build("backbone", "vit_small", drop_path_rate=0.1)
    """

    def __init__(self) -> None:
        self._components: dict[str, dict[str, Registered]] = {kind: {} for kind in KINDS}
        self._by_config: dict[type, Registered] = {}
        self.layouts: list[Layout] = []
        self.published: dict[str, Published] = {}
        self.weights_writers: dict[str, WeightsWriter] = {}
        self.flags: dict[str, Flag] = {}
        self.broken: list[BrokenPlugin] = []
        self.printed: list[str] = []
        self.blocked: list[str] = []
        self.distributions: dict[str, str] = {}

    @classmethod
    def load(cls, block: Iterable[str] = (), files: Iterable[str] = ()) -> Registry:
        """Discover the installed plugins, leaving out those named in ``block``.

        ``files`` are plugins that are not installed: Python files with hooks.
        """
        return cls.from_plugins(find_plugins(block, files))

    @classmethod
    def from_plugins(cls, found: FoundPlugins) -> Registry:
        registry = cls()
        registry.broken, registry.blocked = found.broken, found.blocked
        registry.distributions, registry.printed = found.distributions, found.printed
        for name, kind in KINDS.items():
            for plugin, origin, component in _offered(registry, found, kind.hook):
                registry.add(name, component, plugin, origin)
        for hook in OFFERS:
            for plugin, origin, offer in _offered(registry, found, hook):
                registry.add_offer(hook, offer, plugin, origin)
        return registry

    def add(self, kind: str, component: Component, plugin: str, distribution: str) -> None:
        """Take one component; a name or config class that is taken is an error."""
        kind = self._known_kind(kind)
        new = Registered(kind, component, plugin, distribution)
        if not isinstance(component, Component):
            raise PluginError(f"{new.origin}: {component!r} is not a Component")
        base = KINDS[kind].config
        if not (isinstance(component.config, type) and issubclass(component.config, base)):
            raise PluginError(
                f"{new.origin}: the config of {kind} {component.name!r} must be a subclass of "
                f"{base.__name__}"
            )
        if not attrs.has(component.config) or "__attrs_attrs__" not in vars(component.config):
            raise PluginError(
                f"{new.origin}: {component.config.__name__} lacks the @config decorator"
            )
        reserved = (
            {"task", "extends", "drop", "shorthand"} if kind == "task" else {KINDS[kind].selector}
        )
        for name in sorted(reserved & attrs.fields_dict(component.config).keys()):
            raise PluginError(
                f"{new.origin}: {component.config.__name__} has a field {name!r}, a word that "
                "recipes keep for themselves"
            )
        old = self._components[kind].get(component.name)
        if old is not None:
            raise PluginError(
                f"{kind} {component.name!r} is registered twice: by {old.origin} and by "
                f"{new.origin}; leave one out with --block-plugin"
            )
        old = self._by_config.get(component.config)
        if old is not None:
            raise PluginError(
                f"{component.config.__name__} is the config of {old.kind} {old.component.name!r} "
                f"of {old.origin} and of {kind} {component.name!r} of {new.origin}; give each "
                "component a config class of its own"
            )
        self._components[kind][component.name] = new
        self._by_config[component.config] = new

    def add_offer(self, hook: str, offer: Any, plugin: str, distribution: str) -> None:
        """Take what a hook offers besides components; a name that is taken is an error."""
        module, _, name = OFFERS[hook].partition(":")
        origin = f"plugin {plugin!r} of distribution {distribution!r}"
        if not isinstance(offer, getattr(importlib.import_module(module), name)):
            raise PluginError(f"{origin}: {offer!r} is not a {name}")
        if isinstance(offer, Layout):
            self.layouts.append(offer)
            return
        tables: dict[str, tuple[dict[str, Any], str]] = {
            "dinov3_published": (self.published, "name"),
            "dinov3_weights_writers": (self.weights_writers, "format"),
            "dinov3_flags": (self.flags, "name"),
        }
        table, key = tables[hook]
        taken = getattr(offer, key)
        if taken in table:
            raise PluginError(
                f"{origin}: a {name} named {taken!r} is there already; leave one plugin out with "
                "--block-plugin"
            )
        table[taken] = offer

    def config_of(self, kind: str, name: str, values: Mapping[str, Any]) -> Any:
        """The config of a component by its fields' values, checked as strictly as a recipe's."""
        from dinov3_framework.recipes.structure import structure_component

        return structure_component(self, kind, name, dict(values))

    def values_of(self, config: Any) -> tuple[str, dict[str, Any]]:
        """(name, plain values) of a component's config: what :meth:`config_of` takes."""
        from dinov3_framework.recipes.plain import unstructure

        values = unstructure(self, config)
        return values.pop("use"), values

    def names(self, kind: str) -> list[str]:
        """The names of a kind, sorted."""
        return sorted(self._components[self._known_kind(kind)])

    def get(self, kind: str, name: str) -> Registered:
        """A component by kind and name; an unknown name lists the near ones."""
        kind = self._known_kind(kind)
        if name in self._components[kind]:
            return self._components[kind][name]
        raise UnknownNameError(f"no {kind} is named {name!r}; {self.suggest(kind, name)}")

    def suggest(self, kind: str, name: str) -> str:
        """What somebody may have meant by a name that is not there; the plugins it may be of."""
        offered = [found.component for found in self._components[kind].values()]
        now = [component.name for component in offered if name in component.formerly]
        hint = f"it is called {now[0]!r} now" if now else suggest(name, self.names(kind))
        absent = [str(broken) for broken in self.broken]
        if self.blocked:
            absent.append(f"blocked plugins: {', '.join(self.blocked)}")
        return "\n    ".join([hint, *absent])

    def of_config(self, config: Any) -> Registered:
        """The component that a config belongs to."""
        cls = config if isinstance(config, type) else type(config)
        if cls not in self._by_config:
            raise UnknownNameError(f"no component has the config class {cls.__name__}")
        return self._by_config[cls]

    def build(self, kind_or_config: Any, name: str | None = None, /, **values: Any) -> Any:
        """``build("dataset", "image_folder", root="x", channels=3)``, or by its config.

        By name, ``values`` are the config's fields, checked as strictly as a recipe's, and what the
        factories of the kind take besides a config.
        """
        if name is None:
            if isinstance(kind_or_config, str):
                raise TypeError("build(kind, name, **values) or build(config, **arguments)")
            component = self.of_config(kind_or_config).component
            if component.composes:
                values["build"] = self.build
            return component.resolve()(kind_or_config, **values)
        found = self.get(kind_or_config, name)
        fields, arguments = attrs.fields_dict(found.component.config), KINDS[found.kind].names
        given = {key: values.pop(key) for key in arguments if key in values.keys() - fields}
        for key in sorted(values.keys() - fields.keys()):
            if get_close_matches(key, arguments):
                hint = suggest(key, [*arguments, *fields])
                raise RecipeError([Problem(key, f"unknown key of {found.kind} {name}", hint)])
        return self.build(self.config_of(found.kind, name, values), **given)

    def describe(self, kind: str, name: str) -> Description:
        """Fields, types, defaults and docs of a component; builds and imports nothing heavy."""
        from dinov3_framework.recipes.describe import describe

        return describe(self.get(kind, name))

    def _known_kind(self, name: str) -> str:
        for kind in KINDS.values():
            if name in (kind.name, kind.hook.removeprefix("dinov3_")):
                return kind.name
        hint = suggest(name, list(KINDS), "kinds")
        raise UnknownNameError(f"no kind is named {name!r}; {hint}")


def _offered(registry: Registry, found: FoundPlugins, hook: str) -> Iterator[tuple[str, str, Any]]:
    """(plugin, distribution, object) for all that the implementations of a hook return."""
    for implementation in getattr(found.manager.hook, hook).get_hookimpls():
        plugin = implementation.plugin_name
        origin = found.distributions.get(plugin, "?")
        try:
            with found.listening(plugin, origin):
                offered = implementation.function()
        except (Exception, SystemExit) as error:  # whatever a stranger's function may raise
            reason = f"{hook}: {type(error).__name__}: {error}"
            registry.broken.append(BrokenPlugin(plugin, origin, reason))
            continue
        if not isinstance(offered, list | tuple):
            raise PluginError(
                f"plugin {plugin!r} of distribution {origin!r}: {hook} returned "
                f"{type(offered).__name__}, not a list"
            )
        for each in offered:
            yield plugin, origin, each
