"""Which fields of configs the code reads: attribute accesses by the type of what they are asked of.

mypy infers the types and tells a plugin of every access: reading ``trainer.depth`` then says
nothing of a config's ``depth``, and ``getattr`` over all fields nothing at all.
"""

from __future__ import annotations

import ast
import importlib
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from types import UnionType
from typing import Any

import attrs
from attrs import field, frozen
from mypy import build
from mypy.modulefinder import BuildSource
from mypy.options import Options
from mypy.plugin import AttributeContext, MethodContext, Plugin
from mypy.types import Instance, Type, TypeVarType, get_proper_type
from mypy.types import UnionType as Union
from source_imports import module_name

from dinov3_framework.recipes.option_types import resolved_fields

# Libraries that configs do not come from; to follow them would take minutes.
_LIBRARIES = (
    "PIL", "cattrs", "matplotlib", "numpy", "pluggy", "rich", "safetensors", "submitit", "tomli",
    "tomli_w", "torch", "torchvision",
)  # fmt: skip

_STRICT = (
    "disallow_any_generics", "disallow_subclassing_any", "disallow_untyped_calls",
    "disallow_untyped_decorators", "disallow_untyped_defs", "warn_return_any",
)  # fmt: skip

# What runs when a config is made: it checks fields, which nobody may act upon all the same.
_CHECKS = "__attrs_post_init__"


@frozen
class Read:
    """``receiver.name``, somewhere."""

    receiver: str  # full name of its class
    name: str
    package: str  # top-level package of the module
    within: tuple[str, str] | None  # class and method, if in a method


@frozen
class Sources:
    """A folder and the packages in it that are looked at, strictly or not."""

    root: Path
    packages: list[str] = field(factory=list)
    strict: bool = False

    def modules(self) -> Iterator[tuple[Path, str]]:
        for package in self.packages:
            for path in sorted((self.root / package).rglob("*.py")):
                if not path.with_suffix(".pyi").exists():
                    yield path, module_name(path, self.root)


@frozen
class Inferred:
    """What mypy found in the modules of some sources."""

    modules: Mapping[str, str]  # by path
    lines: list[str]  # of its output

    def reads(self, ignore: str = "") -> set[Read]:
        """Every attribute access on an object whose class it can tell; ``ignore`` is a package."""
        return {
            Read(receiver, name, module.partition(".")[0], _within(path, module, line))
            for receiver, name, path, line in _accesses
            if (module := self.modules.get(path))
            and not f"{module}.".startswith(f"{ignore}.")
            and name in _written(path).get(line, ())
        }

    def messages(self, module: str) -> list[str]:
        """Its errors and notes of one module."""
        path = next(path for path, name in self.modules.items() if name == module)
        return [line for line in self.lines if line.startswith(f"{path}:")]


def infer(*sources: Sources) -> Inferred:
    """Let mypy look at all modules of some sources."""
    modules = {str(path): name for source in sources for path, name in source.modules()}
    options = Options()
    options.python_executable = sys.executable
    options.incremental = False
    options.check_untyped_defs = options.ignore_missing_imports = True
    options.mypy_path = [str(source.root) for source in sources]
    for library in _LIBRARIES:
        for pattern in (library, f"{library}.*"):
            options.per_module_options[pattern] = {"follow_imports": "skip"}
    for source in sources:
        for package in source.packages if source.strict else ():
            options.per_module_options[package] = dict.fromkeys(_STRICT, True)
    _accesses.clear()
    files = [BuildSource(path, name) for path, name in modules.items()]
    result = build.build(files, options, extra_plugins=[AccessPlugin(options)])
    return Inferred(modules, result.errors)


# --------------------------------------------------------------------------- mypy's part
_accesses: set[tuple[str, str, str, int]] = set()  # class, attribute, file, line


class AccessPlugin(Plugin):
    """Changes no type; notes what is read."""

    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        return partial(_note_attribute, fullname.rpartition(".")[2])

    def get_method_hook(self, fullname: str) -> Callable[[MethodContext], Type] | None:
        return partial(_note_method, fullname.rpartition(".")[2])


def _note_attribute(name: str, access: AttributeContext) -> Type:
    if not access.is_lvalue:
        _note(access.type, name, access)
    return access.default_attr_type


def _note_method(name: str, call: MethodContext) -> Type:
    _note(call.type, name, call)
    return call.default_return_type


def _note(receiver: Type, name: str, access: AttributeContext | MethodContext) -> None:
    for cls in _classes(receiver):
        _accesses.add((cls, name, access.api.path, access.context.line))


def _classes(inferred: Type) -> Iterator[str]:
    """Full names of the classes that a type may stand for."""
    proper = get_proper_type(inferred)
    if isinstance(proper, Instance):
        yield proper.type.fullname
    elif isinstance(proper, TypeVarType):
        yield from _classes(proper.upper_bound)
    elif isinstance(proper, Union):
        for item in proper.items:
            yield from _classes(item)


# --------------------------------------------------------------------------- the source's part
@cache
def _tree(path: str) -> ast.Module:
    return ast.parse(Path(path).read_text("utf-8"))


@cache
def _written(path: str) -> dict[int, set[str]]:
    """The ``.name`` that stand in each line; mypy also looks up what a class merely declares."""
    names: dict[int, set[str]] = {}
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                names.setdefault(line, set()).add(node.attr)
    return names


@cache
def _methods(path: str) -> list[tuple[int, int, str, str]]:
    """First line, last line, class and name of each method of a file's top-level classes."""
    return [
        (member.lineno, member.end_lineno or member.lineno, node.name, member.name)
        for node in _tree(path).body
        if isinstance(node, ast.ClassDef)
        for member in node.body
        if isinstance(member, ast.FunctionDef)
    ]


def _within(path: str, module: str, line: int) -> tuple[str, str] | None:
    return next(
        (
            (f"{module}.{cls}", method)
            for start, stop, cls, method in _methods(path)
            if start <= line <= stop
        ),
        None,
    )


# --------------------------------------------------------------------------- configs
def unread_fields(cls: type, reads: Iterable[Read], core: str) -> list[str]:
    """Fields of a config that neither ``core`` nor the config's own package reads.

    A read counts if the object is known to be of the class, a base of it or a protocol of ``core``
    that it meets; what a base of ``core`` declares, such as a loss's weight, is for any package to
    read. Inside the class itself
    it counts if it happens in a method or property that somebody else reads in turn.
    """
    line = {f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__}
    receivers = {read.receiver for read in reads if read.receiver.startswith(f"{core}.")}
    line |= {receiver for receiver in receivers if _meets(cls, receiver)}
    packages = {core, *(base.__module__.partition(".")[0] for base in cls.__mro__)}
    ours = [
        read
        for read in reads
        if read.receiver in line
        and (read.package in packages or read.receiver.startswith(f"{core}."))
    ]
    outside = {r.name for r in ours if r.within is None or r.within[0] not in line}
    inside = {
        (r.within[1], r.name)
        for r in ours
        if r.within is not None and r.within[0] in line and r.within[1] != _CHECKS
    }
    live = set(outside)
    while more := {name for method, name in inside if method in live} - live:
        live |= more
    return sorted(attribute.name for attribute in attrs.fields(cls) if attribute.name not in live)


@cache
def _meets(cls: type, receiver: str) -> bool:
    """Whether a config class has the properties that the protocol of a full name asks for."""
    module, _, name = receiver.rpartition(".")
    try:
        protocol = getattr(importlib.import_module(module), name, None)
    except ImportError:  # a class in a class
        return False
    if not getattr(protocol, "_is_protocol", False):
        return False
    asked = {name for name, member in vars(protocol).items() if isinstance(member, property)}
    return bool(asked) and asked <= {attribute.name for attribute in attrs.fields(cls)}


def with_nested(cls: type) -> Iterator[type]:
    """A config class and those of the tables in it."""
    yield cls
    for attribute in resolved_fields(cls):
        for inner in _parts(attribute.type):
            if attrs.has(inner) and inner is not cls:
                yield from with_nested(inner)


def _parts(declared: Any) -> Iterator[Any]:
    """The classes that a type is made of: ``X`` of ``dict[str, X | None]``."""
    if typing.get_origin(declared) in (typing.Union, UnionType, dict, tuple):
        for part in typing.get_args(declared):
            yield from _parts(part)
    elif isinstance(declared, type):
        yield declared
