"""One teacher for several students: all processes share its work, then exchange.

Every process makes the crops of its share of the global batch and runs the teacher on them. Each
student sees the whole batch, spread over its own processes; a process gets the crops and the
teacher's features of the samples that are its part of that from whoever has them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from attrs import evolve, frozen
from torch import Tensor, nn

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.contracts.losses import OUTPUTS, Loss, ViewFeatures
from dinov3_ssl.batches import CropBatch
from dinov3_ssl.teaching import look

_FIELDS = {"class": "cls", "storage": "storage", "patches": "patches"}


@frozen
class Exchange:
    """Which samples go to whom; both sides are in the order of the global batch."""

    send: Sequence[slice]  # of this process's share, by rank of all processes
    receive: Sequence[int]  # samples, by rank

    @classmethod
    def between(cls, rank: int, have: Sequence[range], want: Sequence[range]) -> Exchange:
        """``have`` and ``want`` are places in a pass, by rank; ``rank`` is this process's."""
        start = have[rank].start
        send = []
        for other in want:
            both = _common(have[rank], other)
            send.append(slice(both.start - start, both.stop - start))
        return cls(send, [len(_common(other, want[rank])) for other in have])

    def only(self, rank: int, receivers: Sequence[bool]) -> Exchange:
        """The same, to those processes alone that are ``receivers``, by rank."""
        send = [part if r else slice(0, 0) for part, r in zip(self.send, receivers, strict=True)]
        return Exchange(send, list(self.receive) if receivers[rank] else [0] * len(self.receive))

    def __call__(self, tensor: Tensor) -> Tensor:
        """Samples [G, B, ...] of this process's share to those that it wants [G, b, ...]."""
        samples = tensor.transpose(0, 1)
        sent = torch.cat([samples[part] for part in self.send])
        received = samples.new_empty(sum(self.receive), *samples.shape[1:])
        counts = [part.stop - part.start for part in self.send]
        dist.all_to_all_single(received, sent, list(self.receive), counts)
        return received.transpose(0, 1).contiguous()


def _common(one: range, other: range) -> range:
    start, stop = max(one.start, other.start), min(one.stop, other.stop)
    return range(start, max(start, stop)) if start < stop else range(one.start, one.start)


def outputs_of(losses: Iterable[Loss]) -> set[str]:
    """Of the teacher, those that losses read."""
    needs = (need for loss in losses for need in loss.needs)
    return {need.rpartition(".")[2] for need in needs if need.startswith("teacher.global.")}


def by_output(needs: Sequence[Collection[str]]) -> dict[str, list[bool]]:
    """Which process, by rank, gets which output of the teacher; ``needs`` are theirs, by rank."""
    return {output: [output in each for each in needs] for output in sorted(set().union(*needs))}


@frozen
class SharedTeaching:
    """The teaching of one of several students; all processes call it together.

    Of ``networks`` the backbone is spread over all processes, this student's projectors in the
    teacher over its own. ``wanted`` says of each output whose processes, by rank, are to get it.
    """

    networks: nn.ModuleDict  # backbone, dino_head ...
    images: ImagesConfig
    exchange: Exchange
    wanted: Mapping[str, Sequence[bool]]

    def __call__(
        self, batch: CropBatch, outputs: Collection[str]
    ) -> tuple[CropBatch, dict[str, ViewFeatures]]:
        features = look(self.networks["backbone"], batch, self.images, self.wanted.keys())
        crops = {
            view: self.exchange(of_view)
            for view, of_view in batch.crops.items()
            if view != "teacher"  # which nobody else looks at
        }
        mine = {view: self._exchanged(of_view) for view, of_view in features.items()}
        return evolve(batch, crops=crops), mine

    def _exchanged(self, features: ViewFeatures) -> ViewFeatures:
        rank, parts = dist.get_rank(), {}
        for output in OUTPUTS:
            tensor: Tensor = getattr(features, _FIELDS[output])
            if output in self.wanted:
                parts[_FIELDS[output]] = self.exchange.only(rank, self.wanted[output])(tensor)
            else:
                parts[_FIELDS[output]] = tensor[:, :0]
        return ViewFeatures(**parts, grid=features.grid)
