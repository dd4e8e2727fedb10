"""The parts in which features are written, and what says that they belong together.

A part holds the features of ``rows_per_part`` images that follow each other in the dataset, less
those that cannot be read; it is a safetensors file whose metadata list the images. A part that is
there is whole, so a run that was killed goes on with those that are missing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import asdict, astuple, frozen
from torch import Tensor

from dinov3_features.files import TensorFile, TensorSpec, tensor_bytes, write_safetensors
from dinov3_framework.contracts.data import Dataset
from dinov3_framework.errors import OutputError
from dinov3_framework.runtime.output import output_file, unwritable, write_aside

FOLDER, PLAN = "features", "plan.json"
_VALUES = 64  # of each tensor, that tell weights apart


@frozen
class Row:
    """One image whose features are there."""

    index: int  # in the dataset
    name: str
    label: int | None
    height: int  # pixels of the image as it was read
    width: int
    grid_height: int  # patches of the image as the backbone saw it
    grid_width: int


@frozen
class Skipped:
    """One image that cannot be read."""

    index: int
    name: str
    reason: str


@frozen
class PartPlan:
    """How a dataset is cut into parts; what every part of a run has to agree with."""

    images: int
    rows_per_part: int
    names: str  # a digest of the images' names, in order
    weights: str  # a digest of the backbone

    @classmethod
    def of(cls, dataset: Dataset, rows_per_part: int, weights: str) -> PartPlan:
        """``weights`` is the :func:`digest` of the backbone."""
        names = hashlib.sha256()
        for index in range(len(dataset)):
            names.update(dataset.name(index).encode("utf-8", "surrogateescape") + b"\n")
        return cls(len(dataset), rows_per_part, names.hexdigest(), weights)

    @property
    def parts(self) -> int:
        return -(-self.images // self.rows_per_part)

    def indices(self, part: int) -> range:
        first = part * self.rows_per_part
        return range(first, min(first + self.rows_per_part, self.images))


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Of names, shapes and the first values of every tensor: training changes all of them."""
    found = hashlib.sha256()
    for name, tensor in tensors:
        first = tensor.flatten()[:_VALUES].double().tolist()
        found.update(f"{name} {list(tensor.shape)} {first}\n".encode())
    return found.hexdigest()


class PartStore:
    """The parts below an output folder."""

    def __init__(self, output_dir: Path, plan: PartPlan) -> None:
        self.folder, self.plan = output_dir / FOLDER, plan

    def prepare(self) -> None:
        """Make the folder, or find that it is this plan's; by one process.

        Raises ``OutputError`` if the parts there are of other images or other weights.
        """
        path = self.folder / PLAN
        plan = json.loads(json.dumps(asdict(self.plan)))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # What a killed run was writing; nobody else writes here now.
            for pattern in (f"{FOLDER}/.part-*", ".features.*", ".index.csv.*", ".skipped.csv.*"):
                for left in self.folder.parent.glob(pattern):
                    left.unlink()
            before = json.loads(path.read_text("utf-8")) if path.exists() else None
        except OSError as error:
            raise unwritable(error, path) from error
        except ValueError as error:
            raise OutputError(f"{path} is damaged; delete {self.folder} and run again") from error
        if before is None:
            write_aside(path, json.dumps(plan, indent=2) + "\n")
        elif before != plan:
            changed = [key for key in plan if before.get(key) != plan[key]]
            what = " and ".join({"names": "the images' names"}.get(key, key) for key in changed)
            raise OutputError(
                f"{self.folder} holds parts from before {what} changed; choose another "
                "--output-dir, or delete that folder to start anew"
            )

    def path(self, part: int) -> Path:
        return self.folder / f"part-{part:05}.safetensors"

    def missing(self) -> list[int]:
        return [part for part in range(self.plan.parts) if not self.path(part).exists()]

    def write(
        self,
        part: int,
        tensors: Mapping[str, Tensor],
        rows: Sequence[Row],
        skipped: Sequence[Skipped],
    ) -> None:
        """Raises ``OutputError`` if it cannot be written; then nothing is left behind."""
        metadata = {
            "format": "pt",
            "rows": json.dumps([astuple(row) for row in rows]),
            "skipped": json.dumps([astuple(each) for each in skipped]),
        }
        specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
        path = self.path(part)
        with output_file(path) as aside:
            write_safetensors(aside, specs, lambda n: [tensor_bytes(tensors[n])], metadata)

    def remove(self) -> None:
        """Delete all parts, which are in other files by now."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def read(self, part: int) -> Part:
        """Raises ``OutputError`` if it is not there or not whole."""
        path = self.path(part)
        if not path.exists():
            raise OutputError(
                f"{path} is not there, though a process wrote it; the output folder must be one "
                "that all processes see"
            )
        return Part(TensorFile.opened(path))


@frozen
class Part:
    """A part on the disk."""

    file: TensorFile

    @property
    def rows(self) -> list[Row]:
        return [Row(*values) for values in self._listed("rows")]

    @property
    def skipped(self) -> list[Skipped]:
        return [Skipped(*values) for values in self._listed("skipped")]

    def _listed(self, key: str) -> Any:
        try:
            return json.loads(self.file.metadata[key])
        except (KeyError, ValueError) as error:
            raise OutputError(
                f"{self.file.path} lists no images; delete it and run again, it will be made anew"
            ) from error


def patch_offsets(grids: Tensor) -> Tensor:
    """Where each image's patches begin in their sequence, and its end: int64 [n + 1].

    ``grids``, int64 [n, 2], are patches along height and width.
    """
    offsets = torch.zeros(len(grids) + 1, dtype=torch.int64)
    offsets[1:] = grids.prod(1).cumsum(0)
    return offsets
