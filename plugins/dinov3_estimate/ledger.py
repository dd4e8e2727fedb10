"""What tensors take up at each moment, by kind: a ledger of storages."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial

import torch
from attrs import define, field, frozen
from torch import Tensor
from torch.distributed.tensor import DTensor

# What a storage is for; those of a unit's own tensors are named by the unit.
OPTIMIZER, GRADIENTS, GATHERED = "optimizer state", "gradients", "gathered parameters"
BATCH, ACTIVATIONS, TEMPORARY = "batch", "activations", "temporary"
KINDS = (OPTIMIZER, GRADIENTS, GATHERED, BATCH, ACTIVATIONS, TEMPORARY)


@define
class _Entry:
    size: int
    kind: str
    reference: object = None  # a weak one, whose end is the storage's


@frozen
class Moment:
    """Bytes by kind at one time, and when that was."""

    bytes: Mapping[str, int]  # 0 of kinds that it does not know
    when: str

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


@define
class Ledger:
    """Every storage that it was shown, until its end, and the greatest sum there has been.

    ``granularity`` is what an allocator rounds sizes up to. A storage is noted once, by the tensor
    that brought it; views add nothing.
    """

    granularity: int = 1
    _entries: dict[int, _Entry] = field(factory=dict, init=False)
    _held: Counter[str] = field(factory=Counter, init=False)
    _total: int = field(default=0, init=False)
    _peak: tuple[int, Counter[str], str] = field(factory=lambda: (0, Counter(), ""), init=False)

    def note(self, tensor: Tensor, kind: str, when: str) -> None:
        """Add a tensor that may have a new storage; one that is known keeps its kind."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._entries:
            self._add(storage, kind)
            self._look(when)

    def assign(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Give the storages of tensors another kind, known or not."""
        for tensor in tensors:
            storage = local(tensor).untyped_storage()
            entry = self._entries.get(storage._cdata)
            if entry is None:
                self._add(storage, kind)
            elif entry.kind != kind:
                self._held[entry.kind] -= entry.size
                self._held[kind] += entry.size
                entry.kind = kind
        greatest, _, when = self._peak
        if self._total == greatest:  # what is known only now was so at that moment
            self._peak = (greatest, self._held.copy(), when)

    def kind_of(self, tensor: Tensor) -> str | None:
        entry = self._entries.get(local(tensor).untyped_storage()._cdata)
        return None if entry is None else entry.kind

    def resized(self, storage: torch.UntypedStorage, when: str) -> None:
        """Follow a storage that grew or shrank in place, as those of gathered parameters do."""
        entry = self._entries.get(storage._cdata)
        if entry is not None:
            size = self._rounded(storage.nbytes())
            self._change(entry.kind, size - entry.size)
            entry.size = size
            self._look(when)

    def forget_peak(self) -> None:
        """Begin to look for the greatest sum anew."""
        self._peak = (0, self._held.copy(), "")

    def peak(self) -> Moment:
        _, held, when = self._peak
        return Moment(held, when)

    def now(self) -> Moment:
        return Moment(self._held.copy(), "now")

    # ------------------------------------------------------------------ bookkeeping
    def _add(self, storage: torch.UntypedStorage, kind: str) -> None:
        key, entry = storage._cdata, _Entry(self._rounded(storage.nbytes()), kind)
        entry.reference = weakref.ref(storage, partial(self._gone, key))
        self._entries[key] = entry
        self._change(kind, entry.size)

    def _gone(self, key: int, _: object) -> None:
        entry = self._entries.pop(key)
        self._change(entry.kind, -entry.size)

    def _change(self, kind: str, size: int) -> None:
        self._held[kind] += size
        self._total += size

    def _look(self, when: str) -> None:
        if self._total > self._peak[0]:
            self._peak = (self._total, self._held.copy(), when)

    def _rounded(self, size: int) -> int:
        return -(-size // self.granularity) * self.granularity


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
