"""Names and rules for files in which other libraries keep these Vision Transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from attrs import frozen

from dinov3_framework import Chunks, Dropped, Implied, Renamed, Rule
from dinov3_vit.configs import VitConfig

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
Names = Mapping[str, str]

_LOCAL_NORM = "normalizes local crops in training, nothing else"
# Of a file without mask_token, as exports for inference are: features do not need it.
NO_MASK_TOKEN = "masked training begins with a new one"


# --------------------------------------------------------------------------- names
@frozen
class Naming:
    """Official names and another library's.

    ``outer`` and ``inner`` (of a block) give its names of tensors, or of modules whose tensors'
    last names are the same; block 3 is ``<blocks>3.``.
    """

    blocks: str
    outer: Names
    inner: Names

    def __call__(self, name: str) -> str:
        """The other library's name of an official tensor."""
        translated = _translated(name, "blocks.", self.blocks, self.outer, self.inner)
        if translated is None:
            raise KeyError(name)
        return translated

    def official(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Shapes under official names, of those tensors that have one."""
        outer, inner = ({new: old for old, new in n.items()} for n in (self.outer, self.inner))
        names = {name: _translated(name, self.blocks, "blocks.", outer, inner) for name in shapes}
        return {new: shapes[old] for old, new in names.items() if new is not None}


def _translated(name: str, before: str, after: str, outer: Names, inner: Names) -> str | None:
    index, dot, part = name.removeprefix(before).partition(".")
    if not (name.startswith(before) and dot and index.isdecimal()):
        return _looked_up(name, outer)
    translated = _looked_up(part, inner)
    return None if translated is None else f"{after}{index}.{translated}"


def _looked_up(name: str, names: Names) -> str | None:
    if name in names:
        return names[name]
    module, _, last = name.rpartition(".")
    return f"{names[module]}.{last}" if module in names else None


# --------------------------------------------------------------------------- rules
@frozen
class MaskedKeyBias(Chunks):
    """Biases of queries, keys and values, where the keys' is masked and not in the file.

    Whatever the official tensor holds for the keys has no effect; zeros are read back.
    """

    def write(self, tensor: Tensor, initial: Callable[[], Tensor]) -> Mapping[str, Tensor]:
        parts = zip(self.names, tensor.chunk(len(self.names)), strict=True)
        return {name: part for name, part in parts if name is not None}


@frozen
class BesideEmpty(Renamed):
    """A renamed tensor [1, 1, D], and with it the file's tensor ``empty`` [1, 0, D].

    For a tensor that the file always has, and the official state dict only where it has values.
    """

    empty: str = ""

    def stored(self, shape: Shape) -> Mapping[str, Shape]:
        return {**super().stored(shape), self.empty: (1, 0, shape[-1])}

    def write(self, tensor: Tensor, initial: Callable[[], Tensor]) -> Mapping[str, Tensor]:
        nothing = tensor.new_empty(1, 0, tensor.shape[-1])
        return {**super().write(tensor, initial), self.empty: nothing}


def is_buffer(name: str) -> bool:
    """Whether an official tensor follows from the config: RoPE's periods, a bias's mask."""
    return name == "rope_embed.periods" or name.endswith(".bias_mask")


def rule_without_place(name: str) -> Rule | None:
    """The rule of an official tensor that only official files have; None for any other."""
    if is_buffer(name):
        return Implied(name)
    if name.startswith("local_cls_norm."):
        return Dropped(name, _LOCAL_NORM)
    return None


def unlike_the_published(config: VitConfig) -> str | None:
    """Why a library that knows DINOv3's published backbones alone has no place for this one."""
    if config.untie_cls_and_patch_norms:
        return "it has one final norm, and this backbone untie_cls_and_patch_norms = true"
    if config.pos_embed_rope_min_period is not None:
        return (
            "its RoPE has a base alone, and this backbone pos_embed_rope_min_period and "
            "pos_embed_rope_max_period"
        )
    if config.pos_embed_rope_normalize_coords != "separate":
        return (
            "its RoPE divides each coordinate by its own side, and this backbone has "
            f'pos_embed_rope_normalize_coords = "{config.pos_embed_rope_normalize_coords}"'
        )
    return None
