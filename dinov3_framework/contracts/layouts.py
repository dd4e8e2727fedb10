"""Layouts: how files name a component's tensors; and published files of weights.

A *layout* belongs to one family of components (backbones, heads, ...) and one file format. It
recognizes the files that are its own and gives, rule by rule, what they hold in place of each
tensor of the official state dict (``module.state_dict()``). Each rule works in both directions, so
a conversion cannot lose on the way back what it did on the way there. Plugins offer layouts by the
hook ``dinov3_layouts`` and published weights by ``dinov3_published``; nothing here imports torch
before a tensor is touched.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from attrs import frozen

from dinov3_framework.configs import WEB_IMAGES, ImagesConfig
from dinov3_framework.errors import CheckpointError
from dinov3_framework.kinds import KINDS

if TYPE_CHECKING:
    from torch import Tensor

    from dinov3_framework.contracts.data import Target

Shape = tuple[int, ...]

_PUBLISHED_AT = "https://dl.fbaipublicfiles.com/dinov3"


class Content(Protocol):
    """The tensors of a file, without any wrapper's prefix, and the settings that came along."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Shape of every tensor, by name."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """``config.json`` of a folder; empty where there is none."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        ...


# --------------------------------------------------------------------------- rules
class Rule(abc.ABC):
    """What a file has in place of one tensor of the official state dict.

    A file may lack what features do not need: ``lacking`` says what becomes of it, and the tensor
    keeps the value that it is initialized with. Empty, it must be there.
    """

    official: str
    lacking: str = ""

    @abc.abstractmethod
    def stored(self, shape: Shape) -> Mapping[str, Shape]:
        """Names and shapes in the file, for an official tensor of ``shape``."""

    @abc.abstractmethod
    def read(self, shape: Shape, take: Callable[[str], Tensor]) -> Tensor | None:
        """The official tensor, or None where it keeps the value it is initialized with."""

    @abc.abstractmethod
    def write(self, tensor: Tensor, initial: Callable[[], Tensor]) -> Mapping[str, Tensor]:
        """What goes into the file. Raises ``CheckpointError`` where the file cannot hold it.

        ``initial()`` is the tensor's value after ``init_weights``, for those that do not depend on
        chance.
        """

    @property
    def lost(self) -> str | None:
        """What is not in the file and a user should know of, if anything."""
        return None


@frozen
class Renamed(Rule):
    """The same tensor under another name, with ``leading`` more axes of length 1 in front."""

    official: str
    name: str
    leading: int = 0
    lacking: str = ""

    def stored(self, shape: Shape) -> Mapping[str, Shape]:
        return {self.name: (1,) * self.leading + shape}

    def read(self, shape: Shape, take: Callable[[str], Tensor]) -> Tensor:
        return take(self.name).reshape(shape)

    def write(self, tensor: Tensor, initial: Callable[[], Tensor]) -> Mapping[str, Tensor]:
        return {self.name: tensor.reshape((1,) * self.leading + tuple(tensor.shape))}


@frozen
class Chunks(Rule):
    """Equal parts along the first axis, each with a name; None for one that is zero throughout."""

    official: str
    names: Sequence[str | None]

    def stored(self, shape: Shape) -> Mapping[str, Shape]:
        part = (shape[0] // len(self.names), *shape[1:])
        return {name: part for name in self.names if name is not None}

    def read(self, shape: Shape, take: Callable[[str], Tensor]) -> Tensor:
        import torch

        given = {name: take(name) for name in self.names if name is not None}
        zeros = next(iter(given.values())).new_zeros(shape[0] // len(self.names), *shape[1:])
        return torch.cat([zeros if name is None else given[name] for name in self.names])

    def write(self, tensor: Tensor, initial: Callable[[], Tensor]) -> Mapping[str, Tensor]:
        parts = zip(self.names, tensor.chunk(len(self.names)), strict=True)
        stored = {}
        for index, (name, part) in enumerate(parts):
            if name is not None:
                stored[name] = part
            elif part.any():
                raise CheckpointError(
                    f"{self.official!r}: part {index + 1} of {len(self.names)} is not zero, and "
                    "files of this format have no place for it"
                )
        return stored


@frozen
class Implied(Rule):
    """Not in the file: the value that the module is initialized with is the only one possible.

    Buffers that follow from the config, such as RoPE's periods.
    """

    official: str

    def stored(self, shape: Shape) -> Mapping[str, Shape]:
        return {}

    def read(self, shape: Shape, take: Callable[[str], Tensor]) -> None:
        return None

    def write(self, tensor: Tensor, initial: Callable[[], Tensor]) -> Mapping[str, Tensor]:
        expected = initial()
        if not tensor.isclose(expected.to(tensor.dtype), rtol=1e-2, atol=0).all():
            raise CheckpointError(
                f"{self.official!r} is not what its config implies, and files of this "
                "format have no place for it"
            )
        return {}


@frozen
class Dropped(Rule):
    """Not in the file, and lost by writing one; ``reason`` says why that is allowed."""

    official: str
    reason: str

    def stored(self, shape: Shape) -> Mapping[str, Shape]:
        return {}

    def read(self, shape: Shape, take: Callable[[str], Tensor]) -> None:
        return None

    def write(self, tensor: Tensor, initial: Callable[[], Tensor]) -> Mapping[str, Tensor]:
        return {}

    @property
    def lost(self) -> str:
        return f"{self.official} ({self.reason})"


# --------------------------------------------------------------------------- layouts
class Layout(abc.ABC):
    """How one file format names the tensors of one family of components."""

    # The name of the format; "meta" stands for the official names themselves.
    format: ClassVar[str]
    # The base of the configs whose components it describes.
    config: ClassVar[type]
    # What its files do not say of a component that is not a published one, in words; the config's
    # defaults are taken for it.
    unsaid: ClassVar[str] = ""
    # Whether its files hold nothing else, and nothing stands before its names: for names so plain
    # that parts of others have them, too.
    alone: ClassVar[bool] = False
    # Names and patterns with ``*`` of what its files may hold of another component.
    others: ClassVar[Sequence[str]] = ()

    @property
    def kind(self) -> str:
        """The kind of its components: ``backbone``, ``head``."""
        return next(k.name for k in KINDS.values() if issubclass(self.config, k.config))

    @abc.abstractmethod
    def recognize(self, content: Content) -> Any | None:
        """The config of the component whose tensors these are; None if they are not this layout's.

        As exact as shapes, settings and (where nothing else tells) small tensors allow, and a
        published preset where one fits. Raises ``CheckpointError`` for content that is clearly of
        this layout and cannot be used, saying why.
        """

    @abc.abstractmethod
    def rules(self, config: Any, names: Sequence[str]) -> Sequence[Rule]:
        """One rule for each of ``names``, those of the official state dict of ``config``.

        Two rules may share a name in the file where the official state dict has one tensor twice.
        """

    def targets(self, content: Content) -> Mapping[str, Target]:
        """What a head in a file of this layout predicts; ``CheckpointError`` if untold."""
        raise CheckpointError("does not say what its head predicts")

    def refusal(self, config: Any) -> str | None:
        """Why files of this format cannot hold such a component, if they cannot."""
        return None

    def settings(
        self, config: Any, images: ImagesConfig, size: int
    ) -> Mapping[str, Mapping[str, Any]]:
        """JSON files to stand beside ``model.safetensors`` in a folder; none: a single file.

        A ``dtype`` in one of them becomes that of the tensors.
        """
        return {}


@frozen
class PublishedFile:
    """One published file of weights."""

    file: str  # as it is offered for download, ending in -<first 8 digits of its SHA-256>.pth
    config: Any
    images: ImagesConfig = WEB_IMAGES
    size: int = 224  # pixels, of the published evaluation
    url: str = ""  # where it can be downloaded, if not at the default place

    @property
    def digest(self) -> str:
        """The first 8 hexadecimal digits of the file's SHA-256."""
        return self.file.rpartition("-")[2].partition(".")[0]


@frozen
class Published:
    """A published component under its torch.hub name, with its weights by training set."""

    name: str
    files: Mapping[str, PublishedFile]  # "LVD1689M", "SAT493M"; the first is the default
    kind: str = "backbone"

    @property
    def default(self) -> PublishedFile:
        return next(iter(self.files.values()))

    def file(self, training_set: str | None) -> PublishedFile | None:
        """The file of a training set, the default if None is named; None if there is no such."""
        return self.files.get(training_set.upper()) if training_set else self.default

    def url(self, file: PublishedFile) -> str:
        """Where one of the files lies; without a signed link the server may answer 403."""
        return file.url or f"{_PUBLISHED_AT}/{self.name}/{file.file}"
