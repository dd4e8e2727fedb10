"""What is being checked, and how a broken promise is reported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from attrs import frozen

from dinov3_framework.registry import Registry

_SHOWN = 5  # names that a message lists


class ContractError(AssertionError):
    """A component does not keep a promise of its contract."""


@frozen
class Subject:
    """The component under test: how to build it, and what messages call it."""

    name: str
    build: Callable[[], Any]

    @classmethod
    def of(
        cls,
        kind: str,
        config: Any,
        registry: Registry | None,
        factory: Callable[..., Any] | None,
        /,
        **runtime: Any,
    ) -> Subject:
        """A component of ``kind``, built by the factory or else through the registry."""
        if factory is not None:
            given = factory
            return cls(f"{kind} of {type(config).__name__}", lambda: given(config, **runtime))
        known = registry if registry is not None else Registry.load()
        name = known.of_config(config).component.name
        return cls(f"{kind} {name!r}", lambda: known.build(config, **runtime))

    def part(self, name: str, build: Callable[[], Any]) -> Subject:
        """Something that the component brings along, such as a loss's projector."""
        return Subject(f"{name} of {self.name}", build)

    def require(self, kept: bool, complaint: str) -> None:
        """Raise ``ContractError`` unless the promise is kept."""
        if not kept:
            raise ContractError(f"{self.name}: {complaint}")

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Report whatever the component raises meanwhile as a promise that it broke."""
        try:
            yield
        except ContractError:
            raise
        except Exception as error:
            raise ContractError(
                f"{self.name}: {what} raised {type(error).__name__}: {error}"
            ) from error

    def built(self, base: type) -> Any:
        """The component, which must be an instance of its contract's class."""
        with self.doing("building it"):
            component = self.build()
        self.require(
            isinstance(component, base),
            f"the factory gave a {type(component).__name__}, which is no {base.__name__}",
        )
        return component

    def one_line(self, method: str, text: object) -> None:
        """Require of ``describe()`` and the like that they give one line for people."""
        self.require(
            isinstance(text, str) and bool(text.strip()) and "\n" not in text,
            f"{method} must give one line of text, gave {text!r}",
        )


def some(names: Iterable[str]) -> str:
    """The first few of some names, and how many there are besides."""
    listed = list(names)
    rest = len(listed) - _SHOWN
    return ", ".join(listed[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
