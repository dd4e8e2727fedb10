"""A component: a name, its config, and what builds it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from attrs import frozen

from dinov3_framework.errors import PluginError


@frozen
class Component:
    """A name, a config class, and what builds an object from such a config.

    ``factory`` is called as ``factory(config, **runtime)``; given as ``"module:attribute"`` it is
    imported at the first build, so that a plugin's ``__init__`` stays light.
    """

    name: str
    config: type
    factory: Callable[..., Any] | str

    def resolve(self) -> Callable[..., Any]:
        """The factory itself, imported if need be."""
        if not isinstance(self.factory, str):
            return self.factory
        module, _, attribute = self.factory.partition(":")
        try:
            target: Any = importlib.import_module(module)
            for part in attribute.split("."):
                target = getattr(target, part)
        except (ImportError, AttributeError) as error:
            raise PluginError(
                f"component {self.name!r}: its factory {self.factory!r} cannot be imported: {error}"
            ) from error
        return target  # type: ignore[no-any-return]
