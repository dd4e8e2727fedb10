"""What can be built, by kind and name, and the building."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import attrs
from attrs import field, frozen

from dinov3_framework import configs
from dinov3_framework.components import Component
from dinov3_framework.errors import PluginError, UnknownNameError
from dinov3_framework.plugins import BrokenPlugin, FoundPlugins, find_plugins
from dinov3_framework.weights.layouts import Layout, Published

KINDS: dict[str, type] = {
    "backbone": configs.BackboneConfig,
    "augmentation": configs.AugmentationConfig,
    "loss": configs.LossConfig,
    "dataset": configs.DatasetConfig,
    "head": configs.HeadConfig,
    "launcher": configs.LauncherConfig,
    "task": configs.TaskConfig,
    "observer": configs.ObserverConfig,
}


def hook_of(kind: str) -> str:
    return f"dinov3_{kind}es" if kind.endswith("s") else f"dinov3_{kind}s"


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


@frozen
class FieldInfo:
    """One field of a config, for people to read."""

    name: str
    type: str
    default: str
    doc: str
    fields: list[FieldInfo] = field(factory=list)  # of the table that this field holds, if any


@frozen
class Description:
    """All that is known of a component without building it."""

    kind: str
    name: str
    doc: str
    plugin: str
    distribution: str
    fields: list[FieldInfo]


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
        self.broken: list[BrokenPlugin] = []
        self.blocked: list[str] = []
        self.distributions: dict[str, str] = {}

    @classmethod
    def load(cls, block: Iterable[str] = ()) -> Registry:
        """Discover the installed plugins, leaving out those named in ``block``."""
        return cls.from_plugins(find_plugins(block))

    @classmethod
    def from_plugins(cls, found: FoundPlugins) -> Registry:
        registry = cls()
        registry.broken, registry.blocked = found.broken, found.blocked
        registry.distributions = found.distributions
        for kind in KINDS:
            for plugin, origin, component in _offered(registry, found, hook_of(kind)):
                registry.add(kind, component, plugin, origin)
        for plugin, origin, layout in _offered(registry, found, "dinov3_layouts"):
            registry.add_layout(layout, plugin, origin)
        for plugin, origin, published in _offered(registry, found, "dinov3_published"):
            registry.publish(published, plugin, origin)
        return registry

    def add(self, kind: str, component: Component, plugin: str, distribution: str) -> None:
        """Take one component; a name or config class that is taken is an error."""
        kind = self._known_kind(kind)
        new = Registered(kind, component, plugin, distribution)
        if not isinstance(component, Component):
            raise PluginError(f"{new.origin}: {component!r} is not a Component")
        base = KINDS[kind]
        if not (isinstance(component.config, type) and issubclass(component.config, base)):
            raise PluginError(
                f"{new.origin}: the config of {kind} {component.name!r} must be a subclass of "
                f"{base.__name__}"
            )
        if not attrs.has(component.config) or "__attrs_attrs__" not in vars(component.config):
            raise PluginError(
                f"{new.origin}: {component.config.__name__} lacks the @config decorator"
            )
        reserved = {"task", "extends", "drop"} if kind == "task" else {"use"}
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

    def add_layout(self, layout: Layout, plugin: str, distribution: str) -> None:
        """Take one layout of weights in files."""
        if not isinstance(layout, Layout):
            raise PluginError(
                f"plugin {plugin!r} of distribution {distribution!r}: {layout!r} is not a Layout"
            )
        self.layouts.append(layout)

    def publish(self, published: Published, plugin: str, distribution: str) -> None:
        """Take one published backbone; a name that is taken is an error."""
        if not isinstance(published, Published):
            raise PluginError(
                f"plugin {plugin!r} of distribution {distribution!r}: {published!r} is not a "
                "Published"
            )
        if published.name in self.published:
            raise PluginError(
                f"plugin {plugin!r} of distribution {distribution!r}: weights are published twice "
                f"as {published.name!r}; leave one plugin out with --block-plugin"
            )
        self.published[published.name] = published

    def config_of(self, kind: str, name: str, values: Mapping[str, Any]) -> Any:
        """The config of a component by its fields' values, checked as strictly as a recipe's."""
        from dinov3_framework.structure import structure_component

        return structure_component(self, kind, name, dict(values))

    def values_of(self, config: Any) -> tuple[str, dict[str, Any]]:
        """(name, plain values) of a component's config: what :meth:`config_of` takes."""
        from dinov3_framework.structure import unstructure

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
        raise UnknownNameError(
            f"no {kind} is named {name!r}; {self.suggest(kind, name)}" + self.failed_plugins()
        )

    def suggest(self, kind: str, name: str) -> str:
        """What somebody who wrote ``name`` may have meant."""
        near = difflib.get_close_matches(name, self.names(kind), n=3, cutoff=0.5)
        if near:
            return f"did you mean {' or '.join(map(repr, near))}?"
        known = ", ".join(self.names(kind)) or "none"
        return f"known: {known}"

    def of_config(self, config: Any) -> Registered:
        """The component that a config belongs to."""
        cls = config if isinstance(config, type) else type(config)
        if cls not in self._by_config:
            raise UnknownNameError(f"no component has the config class {cls.__name__}")
        return self._by_config[cls]

    def build(self, kind_or_config: Any, name: str | None = None, /, **values: Any) -> Any:
        """``build("backbone", "vit_small", depth=6)`` or ``build(config, **runtime)``.

        By name, ``values`` are the config's fields; checked as strictly as a recipe's.
        """
        if name is None:
            if isinstance(kind_or_config, str):
                raise TypeError("build(kind, name, **fields) or build(config, **runtime)")
            return self.of_config(kind_or_config).component.resolve()(kind_or_config, **values)
        return self.build(self.config_of(kind_or_config, name, values))

    def describe(self, kind: str, name: str) -> Description:
        """Fields, types, defaults and docs of a component; builds and imports nothing heavy."""
        found = self.get(kind, name)
        return Description(
            found.kind,
            name,
            inspect.cleandoc(found.component.config.__doc__ or ""),
            found.plugin,
            found.distribution,
            _describe_fields(found.component.config),
        )

    def _known_kind(self, kind: str) -> str:
        singular = next((k for k in KINDS if kind in (k, hook_of(k).removeprefix("dinov3_"))), None)
        if singular is None:
            near = difflib.get_close_matches(kind, KINDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"kinds: {', '.join(KINDS)}"
            raise UnknownNameError(f"no kind is named {kind!r}; {hint}")
        return singular

    def failed_plugins(self) -> str:
        """Broken and blocked plugins, a line each: what is missing may be theirs."""
        notes = [str(broken) for broken in self.broken]
        if self.blocked:
            notes.append(f"blocked plugins: {', '.join(self.blocked)}")
        return "".join(f"\n  {note}" for note in notes)


def _offered(registry: Registry, found: FoundPlugins, hook: str) -> Iterator[tuple[str, str, Any]]:
    """(plugin, distribution, object) for all that the implementations of a hook return."""
    for implementation in getattr(found.manager.hook, hook).get_hookimpls():
        plugin = implementation.plugin_name
        origin = found.distributions.get(plugin, "?")
        try:
            offered = implementation.function()
        except Exception as error:  # whatever a stranger's function may raise
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


def _describe_fields(config: type) -> list[FieldInfo]:
    from dinov3_framework.option_types import nested_config, resolved_fields, type_name

    fields = []
    for attribute in resolved_fields(config):
        default: Any = attribute.default
        if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
            default = default.factory()
        nested = nested_config(attribute.type)
        if default is attrs.NOTHING:
            shown = "required"
        elif nested is not None and default == nested_default(nested):
            shown = "as below"
        else:
            shown = show_default(default)
        inner = _describe_fields(nested) if nested is not None else []
        doc = attribute.metadata.get("doc", "")
        fields.append(FieldInfo(attribute.name, type_name(attribute.type), shown, doc, inner))
    return fields


def nested_default(config: type) -> Any:
    """A config with nothing set; None if it has required fields."""
    required = [a for a in attrs.fields(config) if a.init and a.default is attrs.NOTHING]
    return None if required else config()


def show_default(value: Any) -> str:
    """A default as a recipe would spell it."""
    from dinov3_framework.structure import to_toml_value

    if value is None:
        return "none"
    return to_toml_value(value)
