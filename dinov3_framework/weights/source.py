"""Weights of one component, wherever they are: what they are, and their values into a module."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from attrs import field, frozen
from torch import Tensor, nn

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.contracts.layouts import Content, Layout, Renamed, Rule, Shape
from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.errors import CheckpointError, UserError, first_few, summarize_names
from dinov3_framework.parallel.state_dicts import load_tensor
from dinov3_framework.runtime import collectives
from dinov3_framework.weights._file_diagnosis import exhaustion
from dinov3_framework.weights._files import OpenWeights
from dinov3_framework.weights._recognition import (
    Catalog,
    family_name,
    find,
    images_of,
    is_published,
)
from dinov3_framework.weights.info import ComponentInfo
from dinov3_framework.weights.locations import find_path, open_path
from dinov3_framework.weights.matching import matches, patterns_for, patterns_text
from dinov3_framework.weights.sharded import is_checkpoint
from dinov3_framework.weights.tensors import initial_tensors, not_finite, set_tensor, shapes_of

if TYPE_CHECKING:
    from dinov3_framework.registry import Registry

log = logging.getLogger(__name__)


@frozen
class WeightSource:
    """A component in open weights, found and not yet read.

    >>> with WeightSource.open("dinov3_vits16", registry) as weights:
    ...     backbone = weights.load_state(weights.build())

    Official names are those of the module's state dict. Tensors are read one at a time.
    """

    kind: str  # of the component: "backbone", "head"
    config: Any
    layout: Layout | None  # None for the official names
    images: ImagesConfig
    size: int  # pixels
    provenance: Mapping[str, str]
    _catalog: Catalog = field(repr=False)
    _opened: OpenWeights = field(repr=False)
    _prefix: str  # of the component's names in it
    unused: Sequence[str] = ()  # names and patterns of tensors below it that may be left over
    _content: OpenWeights = field(init=False, repr=False)
    _told: set[str] = field(init=False, factory=set, repr=False)  # notes that were logged

    @_content.default
    def _below_prefix(self) -> OpenWeights:
        return self._opened.below(self._prefix)

    # ------------------------------------------------------------------ opening
    @classmethod
    @contextmanager
    def open(
        cls,
        source: str | Path,
        registry: Registry,
        *,
        kind: str = "backbone",
        network: str = "teacher",
        images: ImagesConfig | None = None,
        unused: Sequence[str] = (),
        projectors: bool = False,
        thorough: bool = True,
    ) -> Iterator[WeightSource]:
        """Open ``source`` and find its component of a kind; nothing is built or read.

        ``source`` is a path to a file or folder of any known format, a run's output folder, a URL,
        or a published name such as ``dinov3_vits16`` or ``dinov3_vitl16@SAT493M``. ``network`` is
        the one of a training checkpoint: ``student``, another by its name there, or ``teacher`` for
        the student's moving average. ``images`` overrules what the weights say of their images.
        ``unused`` are names, or patterns with ``*``, of tensors beside the component's own that
        may be in its file. With ``projectors`` a run's folder stands for its checkpoints, which
        have them, rather than its export. Shards of checkpoints are compared with their hashes,
        which takes time, unless not ``thorough``: for when no values are read.

        What a user should know is logged as a warning. Raises ``CheckpointError`` for what is
        missing or not usable.
        """
        path = find_path(source, registry, kind)
        with ExitStack() as stack:
            with exhaustion(path):
                opened = open_path(
                    path,
                    stack,
                    kind=kind,
                    network=network,
                    projectors=projectors,
                    thorough=thorough,
                )
                info = ComponentInfo.from_metadata(opened.path, opened.metadata, kind)
                if info is None and kind == "backbone" and is_checkpoint(opened.path):
                    # Here, since it needs the libraries of recipes, which torch.hub's users lack.
                    from dinov3_framework.weights._runs import recipe_info

                    info = recipe_info(opened.path, registry)
                found = cls.recognize(
                    opened,
                    registry,
                    kind=kind,
                    network=network,
                    images=images,
                    unused=unused,
                    info=info,
                )
            yield found

    @classmethod
    def recognize(
        cls,
        opened: OpenWeights,
        catalog: Catalog,
        *,
        kind: str = "backbone",
        network: str = "teacher",
        images: ImagesConfig | None = None,
        unused: Sequence[str] = (),
        info: ComponentInfo | None = None,
    ) -> WeightSource:
        """Find the component of a kind in open weights, as :meth:`open` does.

        ``info`` is what is known of it from elsewhere, such as a run's recipe.
        """
        info = info or ComponentInfo.from_metadata(opened.path, opened.metadata, kind)
        if info is not None:
            config = _config_of(info, opened, catalog)
            prefix = ""
            if is_checkpoint(opened.path):
                prefixes = (f"{network}.{kind}.", f"{kind}.")
                names = opened.shapes
                prefix = next((p for p in prefixes if any(n.startswith(p) for n in names)), "")
            known = images or info.images, info.size, dict(info.provenance)
            return cls(kind, config, None, *known, catalog, opened, prefix, unused)
        found = find(opened, catalog, kind, network)
        layout, config = found.layout, found.config
        given, size, notes = images_of(opened, catalog, config, images)
        if layout.unsaid and not is_published(catalog, config):
            notes.append(
                f"not exactly a published {kind}, and the file does not say {layout.unsaid}; these "
                "are taken to be as published"
            )
        if found.note:
            notes.insert(0, found.note)
        notes = [*opened.notes, *notes]
        if left := sum(not name.startswith(found.prefix) for name in opened.shapes):
            notes.insert(0, f"{left:,} tensors beside {found.prefix}* left out")
        for note in notes if collectives.is_main() else ():
            log.warning("%s: %s", opened.path, note)
        provenance = {"file": opened.path.name, "format": layout.format}
        where = catalog, opened, found.prefix
        return cls(kind, config, layout, given, size, provenance, *where, unused)

    # ------------------------------------------------------------------ what it is
    @property
    def path(self) -> Path:
        return self._opened.path

    @property
    def content(self) -> Content:
        """What is in the file of this component."""
        return self._content

    @property
    def format(self) -> str:
        """``meta``, ``huggingface``, ``timm``, or ``dinov3_framework`` for its own files."""
        return "dinov3_framework" if self.layout is None else self.layout.format

    def info(self, registry: Registry) -> ComponentInfo:
        """What a file of this framework's own says of these weights."""
        component, values = registry.values_of(self.config)
        provenance = dict(self.provenance)
        return ComponentInfo(component, values, self.images, self.size, provenance, self.kind)

    def build(self, **runtime: Any) -> Any:
        """The module on the meta device, where it takes no memory."""
        with torch.device("meta"), exhaustion(self.path):
            try:
                module = self._catalog.build(self.config, **runtime)
            except UserError as error:
                raise CheckpointError(
                    f"{self.path}: its {self.kind} cannot be built: {error}"
                ) from error
        if self.kind == "backbone":
            if not isinstance(module, Backbone):
                raise CheckpointError(f"{self.path}: got a {type(module).__name__}, no backbone")
            if module.in_chans != self.images.channels:
                raise CheckpointError(
                    f"{self.path}: its backbone takes {module.in_chans} channels, its images have "
                    f"{self.images.channels}"
                )
        return module

    def rules(self, names: Sequence[str]) -> Sequence[Rule]:
        """A rule for each of the official names."""
        if self.layout is None:
            return [Renamed(name, name) for name in names]
        return self.layout.rules(self.config, names)

    def check_fit(self, module: nn.Module) -> None:
        """Raise ``CheckpointError`` unless ``module`` (it may be on the meta device) uses every
        tensor of the file, and every one that it needs is there in its shape."""
        shapes = shapes_of(module)
        rules = self.rules(list(shapes))
        stored = [rule.stored(shapes[rule.official]) for rule in rules]
        wanted = {name: tuple(shape) for each in stored for name, shape in each.items()}
        given = self._content.shapes
        allowed = self.unused if self.layout is None else (*self.unused, *self.layout.others)
        beside = {
            name
            for name in given.keys() - wanted.keys()
            if matches(name, allowed) or (self.layout is not None and _is_beside(name))
        }
        extra = given.keys() - wanted.keys() - beside
        lacking = {
            name: rule.lacking
            for rule, names in zip(rules, stored, strict=True)
            for name in names
            if rule.lacking and name not in given
        }
        complaints = [
            summarize_names("missing from the file", wanted.keys() - given.keys() - lacking.keys()),
            summarize_names(f"in the file but not in the {self.kind}", extra),
            summarize_names(
                "of another shape",
                [
                    f"{n}: {list(given[n])} in the file, {list(wanted[n])} in the {self.kind}"
                    for n in given.keys() & wanted.keys()
                    if tuple(given[n]) != wanted[n]
                ],
            ),
        ]
        if any(complaints):
            raise CheckpointError(
                f"{self.path} does not fit the {self.kind} {family_name(self.config)} that it "
                "seems to hold:"
                + "".join(complaints)
                + (self._allowing(extra) if complaints[0] == complaints[2] == "" else "")
            )
        notes = [f"left out: {first_few(sorted(beside))}"] if beside else []
        notes += [f"there is no {name}; {what}" for name, what in lacking.items()]
        for note in notes if collectives.is_main() else ():
            if note not in self._told:
                log.warning("%s: %s", self.path, note)
        self._told.update(notes)

    def _allowing(self, extra: Collection[str]) -> str:
        """What allows tensors to be left over, ready to be copied; "" where nothing does."""
        if self.kind != "backbone":
            return ""
        patterns = [*self.unused, *patterns_for(extra, self._content.shapes)]
        flags = " ".join(f"--unused {shlex.quote(pattern)}" for pattern in patterns)
        return (
            f"\n  if these may be left over, say so beside the weights ({flags}):"
            f"\n    unused = {patterns_text(patterns)}"
        )

    def available(self, module: nn.Module) -> dict[str, Shape]:
        """Names and shapes of all tensors in the file: those of ``module`` by their official names,
        others by their own.

        For modules that take some of them. Raises ``CheckpointError`` where tensors are not of the
        shapes that their module has.
        """
        shapes, given = shapes_of(module), self._content.shapes
        named: dict[str, Shape] = {}
        used: set[str] = set()
        misshapen: list[str] = []
        for rule in self.rules(list(shapes)):
            stored = rule.stored(shapes[rule.official])
            used |= stored.keys()
            misshapen += [
                f"{name}: {list(given[name])}, where the others of its {self.kind} want "
                f"{list(shape)}"
                for name, shape in stored.items()
                if name in given and tuple(given[name]) != tuple(shape)
            ]
            if stored.keys() <= given.keys() and rule.lost is None:
                named[rule.official] = shapes[rule.official]
        if misshapen:
            raise CheckpointError(f"{self.path}:{summarize_names('of a wrong shape', misshapen)}")
        return named | {name: tuple(given[name]) for name in given if name not in used}

    # ------------------------------------------------------------------ values
    def tensors(
        self, module: nn.Module, names: Iterable[str] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of ``module``'s state dict, or those of ``names``, one at a time on the CPU.

        ``module`` gives names and shapes (and, for what the file leaves out, initial values); it
        may be on the meta device and is left alone. Raises ``CheckpointError`` where it does not
        fit, before anything is read, and for parameters that are not finite, after everything was.
        A buffer that is not finite was saved before it was ever set, and gets the value that
        belongs there.
        """
        if names is None:
            self.check_fit(module)
        shapes = shapes_of(module)
        rules = {rule.official: rule for rule in self.rules(list(shapes))}
        wanted = list(shapes if names is None else names)
        buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}

        def is_left_out(rule: Rule) -> bool:
            stored = rule.stored(shapes[rule.official]).keys()
            return not stored or bool(rule.lacking and stored - self._content.shapes.keys())

        initial = initial_tensors(module, [name for name in wanted if is_left_out(rules[name])])
        # Parameters that the file does not have are of the type of those that it has.
        first = next((n for n in wanted if n not in initial and n not in buffers), None)
        if first is not None and initial.keys() - buffers:
            like = rules[first].read(shapes[first], self._content.read)
            initial |= {n: initial[n].to(like) for n in initial.keys() - buffers}

        def read() -> Iterator[tuple[str, Tensor]]:
            for name in wanted:
                given = name not in initial
                tensor = rules[name].read(shapes[name], self._content.read) if given else None
                if tensor is None:
                    tensor = initial[name]
                elif name in buffers and not_finite(name, tensor):
                    tensor = initial_tensors(module, [name])[name]
                yield name, tensor

        return self._finite(read())

    def load_state(
        self,
        module: nn.Module,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Any:
        """Give a module on the meta device its values; strictly, with one copy in memory.

        ``dtype`` is that of the parameters, by default the file's. Raises ``CheckpointError`` as
        :meth:`tensors` does; the module is of no use afterwards.
        """
        parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        state = {}
        for name, tensor in self.tensors(module):
            cast = dtype if name in parameters and tensor.is_floating_point() else None
            state[name] = tensor.to(device, cast)
        computed = _computed_buffers(module, state)
        module.load_state_dict(state, strict=True, assign=True)
        for name, tensor in computed.items():
            set_tensor(module, name, tensor.to(device))
        empty = [n for n, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta]
        if empty:
            raise CheckpointError(
                f"{self.path}: nothing gave a value to{summarize_names('left empty', empty)}"
            )
        return module

    def load_shards(self, module: nn.Module, blueprint: nn.Module) -> None:
        """Give an allocated module, whole or sharded, its values.

        ``blueprint`` is the same module, whole, on the meta device. Every process reads the file
        for itself, one tensor at a time, and keeps its shard alone; no process talks to another.
        """
        state = module.state_dict()
        for name, tensor in self.tensors(blueprint):
            load_tensor(state[name], tensor)
        buffers = dict(module.named_buffers())
        for name, tensor in _computed_buffers(blueprint, state).items():
            load_tensor(buffers[name], tensor)

    # ------------------------------------------------------------------ projectors
    @property
    def projectors(self) -> dict[str, Shape]:
        """Names and shapes of everything beside the backbone in its network."""
        beside = self._beside
        if beside is None:
            return {}
        return {
            name.removeprefix(beside): tuple(shape)
            for name, shape in self._opened.shapes.items()
            if name.startswith(beside) and not name.startswith(self._prefix)
        }

    def projector_tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Some tensors of :attr:`projectors`, one at a time; errors as of :meth:`tensors`."""
        return self._finite((n, self._opened.read(f"{self._beside}{n}")) for n in names)

    @property
    def _beside(self) -> str | None:
        """The prefix of the network that the backbone is a part of; None if it is of none."""
        own = f"{self.kind}."
        return self._prefix.removesuffix(own) if f".{self._prefix}".endswith(f".{own}") else None

    def _finite(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        bad = []
        for name, tensor in tensors:
            if complaint := not_finite(name, tensor):
                bad.append(complaint)
            yield name, tensor
        if bad:
            raise CheckpointError(f"{self.path}:{summarize_names('with NaN or inf', bad)}")


# What classifiers and averages of other libraries have beside a backbone: timm's and Hugging Face's
# heads and timm's pooling before one, the count of torch's ``AveragedModel``.
_BESIDE = ("head", "head_dist", "fc", "classifier", "fc_norm", "attn_pool", "n_averaged")


def _is_beside(name: str) -> bool:
    return name.partition(".")[0] in _BESIDE


def _config_of(info: ComponentInfo, opened: OpenWeights, catalog: Catalog) -> Any:
    values = dict(info.config)
    if info.kind == "backbone":
        values = {"in_chans": info.images.channels} | values
    try:
        return catalog.config_of(info.kind, info.component, values)
    except UserError as error:
        raise CheckpointError(
            f"{opened.path}: its {info.kind} {info.component!r} cannot be built: {error}"
        ) from error


def _computed_buffers(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Buffers that no file holds: only the module knows their values."""
    return initial_tensors(module, [n for n, _ in module.named_buffers() if n not in state])
