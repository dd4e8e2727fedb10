"""What a suite of promises is."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from dinov3_framework.errors import first_few
from dinov3_framework.parallel.sharder import initial_values, tensors_of
from dinov3_framework.registry import Registry


class ContractError(AssertionError):
    """A component does not keep a promise of its contract."""


class Suite:
    """Promises of a component, a test method each; subclass it in a test module, with a ``config``.

    The component comes from ``registry`` (left out, the installed plugins) or from ``factory``,
    called with the config and the runtime arguments of its kind.
    """

    kind: ClassVar[str]
    contract: ClassVar[type]  # of the component
    config: Any = None
    registry: Registry | None = None
    factory: Callable[..., Any] | None = None

    @classmethod
    def check(cls, config: Any, **options: Any) -> None:
        """Try every promise for one config; ``options`` are the suite's, by name."""
        suite = cls()
        for name, value in ({"config": config} | options).items():
            if not hasattr(cls, name):
                raise TypeError(f"{cls.__name__} has no option {name!r}")
            setattr(suite, name, value)
        for name in cls.promises():
            try:
                suite.keep(name)
            except Exception as error:
                is_said = isinstance(error, AssertionError)
                what = str(error) if is_said else f"raised {type(error).__name__}: {error}"
                raise ContractError(f"{suite.name}, {name}: {what}") from error

    @classmethod
    def promises(cls) -> list[str]:
        """The names of the test methods, bases first, as they are written."""
        names = [name for base in reversed(cls.__mro__) for name in vars(base)]
        return [name for name in dict.fromkeys(names) if name.startswith("test_")]

    def keep(self, name: str) -> None:
        """Call one test method, as pytest does."""
        promise = getattr(self, name)
        if "tmp_path" not in inspect.signature(promise).parameters:
            promise()
            return
        with tempfile.TemporaryDirectory() as folder:
            promise(Path(folder))

    # ------------------------------------------------------------------ the component
    def arguments(self) -> dict[str, Any]:
        """Runtime arguments of the factory."""
        return {}

    @cached_property
    def known(self) -> Registry:
        """Where components come from."""
        return self.registry if self.registry is not None else Registry.load()

    @property
    def name(self) -> str:
        """What messages call the component."""
        if self.factory is not None:
            return f"{self.kind} of {type(self.config).__name__}"
        return f"{self.kind} {self.known.of_config(self.config).component.name!r}"

    def build(self) -> Any:
        """A new component, an instance of its contract's class."""
        factory: Any = self.factory or self.known.build
        if getattr(factory, "__self__", None) is self:  # a function in the class's body
            factory = factory.__func__
        component = factory(self.config, **self.arguments())
        made, wanted = type(component).__name__, self.contract.__name__
        assert isinstance(component, self.contract), f"the factory gave a {made}, no {wanted}"
        return component


class NetworkSuite(Suite):
    """Promises of everything that has weights: backbones, projectors, heads."""

    @cached_property
    def blueprint(self) -> Any:
        with torch.device("meta"):
            return self.build()

    def initialized(self, seed: int = 1) -> Any:
        """A network with the values that it draws from a seed."""
        return initial_values(self.blueprint, seed)

    @cached_property
    def network(self) -> Any:
        """A network with its first values."""
        return self.initialized()

    @cached_property
    def twin(self) -> Any:
        """Another with the same values, initialized otherwise and loaded from a state dict."""
        twin = self.initialized(seed=2)
        twin.load_state_dict(self.network.state_dict(), strict=True)
        return twin

    def test_meta_device(self) -> None:
        """Built on the meta device, it takes no memory."""
        real = [name for name, tensor in tensors_of(self.blueprint) if not tensor.is_meta]
        assert not real, f"built on the meta device, these take memory: {first_few(real)}"

    def test_initial_values(self) -> None:
        """``init_weights`` gives every tensor a finite value that torch's seed alone decides."""
        again = dict(tensors_of(self.initialized()))
        moved = [n for n, t in tensors_of(self.network) if not torch.equal(t, again[n])]
        assert not moved, (
            f"init_weights() gives other values for the same seed of torch's generator: "
            f"{first_few(moved)}"
        )

    def test_state_dict(self) -> None:
        """A state dict loads strictly, and every build has the same names and shapes."""
        with torch.random.fork_rng(devices=[]):
            other = self.build()  # away from the meta device
        shapes, others = (
            {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
            for network in (self.twin, other)
        )
        differing = [n for n in shapes | others if shapes.get(n) != others.get(n)]
        assert not differing, (
            f"two builds of one config differ in names or shapes of tensors: {first_few(differing)}"
        )
