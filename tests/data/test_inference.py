"""A dataset is walked once, whoever reads it and whatever is wrong with it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from classify_support import GRAY, Memory, gray_images
from dinov3_datasets.configs import ImageFolderConfig
from dinov3_datasets.image_folder import ImageFolder
from PIL import Image
from torch import Tensor

from dinov3_framework import CorruptSampleError, DataError, Dataset, RecipeError, Sample
from dinov3_framework.data.images import ImageFit
from dinov3_framework.data.inference import (
    FitSamples,
    FittedImages,
    InferenceLoader,
    rank_batches,
)
from dinov3_framework.runtime import collectives


class Numbers(Dataset):
    """Sample i holds i; what ``trouble`` gives for it happens first."""

    def __init__(self, size: int, trouble: Any = None) -> None:
        self.size, self.trouble = size, trouble or {}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        if index >= self.size:
            raise IndexError(index)
        happens = self.trouble.get(index)
        if isinstance(happens, Exception):
            raise happens
        if happens is not None:
            happens()
        mask = torch.full((2, 2), index)
        return Sample(torch.full((1, 2, 2), index, dtype=torch.uint8), {"mask": mask})


def number(sample: Sample, index: int) -> int:
    assert int(sample.image[0, 0, 0]) == index
    return index


def loader(dataset: Dataset, batches: Any, **options: Any) -> InferenceLoader[int, list[int]]:
    return InferenceLoader(dataset, number, batches, collate=list, **options)


# --------------------------------------------------------------------------- which are read
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_come_as_they_were_asked_for(workers: int) -> None:
    asked = [range(3), [7, 5], range(8, 10)]
    found = list(loader(Numbers(10), asked, workers=workers))
    assert [batch.data for batch in found] == [[0, 1, 2], [7, 5], [8, 9]]
    assert [list(batch.indices) for batch in found] == [list(each) for each in asked]


@pytest.mark.parametrize("total", [1, 2, 7, 12, 25])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_ranks_share_a_dataset_and_padding_is_never_counted(
    monkeypatch: pytest.MonkeyPatch, total: int, world: int, batch_size: int
) -> None:
    monkeypatch.setattr(collectives, "world_size", lambda: world)
    ranks = []
    for rank in range(world):
        monkeypatch.setattr(collectives, "rank", lambda rank=rank: rank)
        ranks.append(list(loader(Numbers(total), rank_batches(total, batch_size))))
    # Equally many batches of equal lengths, as collectives want them.
    lengths = [[len(batch.indices) for batch in batches] for batches in ranks]
    assert all(each == lengths[0] for each in lengths)
    assert max(lengths[0]) <= batch_size
    # Gathered by rank they are the dataset, once.
    gathered = [batch.data or [] for together in zip(*ranks, strict=True) for batch in together]
    assert [index for data in gathered for index in data] == list(range(total))


def test_what_is_wrong_with_samples_is_reported_and_not_raised() -> None:
    trouble = {2: CorruptSampleError("two", "is half"), 5: DataError("is of another shape")}
    first, second, third = loader(Numbers(7, trouble), [range(4), range(4, 8), [2, 9]])
    assert (first.data, list(first.places)) == ([0, 1, 3], [0, 1, 3])
    assert [(i, error.reason) for i, error in first.corrupt.items()] == [(2, "is half")]
    assert (second.data, list(second.places)) == ([4, 6], [0, 2])
    assert [(i, str(error)) for i, error in second.refused.items()] == [(5, "is of another shape")]
    assert third.data is None
    assert list(third.corrupt) == [2]


# --------------------------------------------------------------------------- what becomes of them
def test_images_are_fitted_and_targets_go_along() -> None:
    images = [*gray_images(2, size=9), *gray_images(1, size=20), *gray_images(1, size=9)]
    dataset = Memory(images, [3, 1, 4, 1])
    fit = ImageFit(GRAY, 4, "pad")
    (batch,) = InferenceLoader(
        dataset, FitSamples(fit), [range(4)], collate=FittedImages.collate, workers=1
    )
    assert batch.data is not None
    assert [targets["label"] for targets in batch.data.targets] == [3, 1, 4, 1]
    assert batch.data.sizes == [(9, 9), (9, 9), (20, 20), (9, 9)]
    groups = batch.data.by_shape()
    assert [list(places) for places, _ in groups] == [[0, 1, 3], [2]]
    for places, pixels in groups:
        for place, found in zip(places, pixels, strict=True):
            image = images[place]
            assert image is not None
            assert torch.equal(found, fit(image))


@pytest.mark.parametrize("workers", [0, 1])
def test_what_takes_too_much_memory_is_a_corrupt_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "a.png")

    def load(self: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    config = ImageFolderConfig(root=str(tmp_path))
    (batch,) = loader(ImageFolder(config, channels=1), [[0]], workers=workers)
    assert "more memory" in batch.corrupt[0].reason


def test_anything_can_be_prepared_and_collated() -> None:
    """As a segmentation does: image and mask changed together, shapes of their own."""

    def flipped(sample: Sample, index: int) -> tuple[Tensor, Tensor]:
        width = index + 1
        return sample.image[..., :width].flip(-1), sample.targets["mask"][..., :width].flip(-1)

    def pairs(items: Sequence[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
        return [image for image, _ in items], [mask for _, mask in items]

    (batch,) = InferenceLoader(Numbers(3), flipped, [range(3)], collate=pairs)
    assert batch.data is not None
    for image, mask in zip(*batch.data, strict=True):
        assert torch.equal(image[0].long(), mask)


# --------------------------------------------------------------------------- workers
@pytest.mark.parametrize("workers", [0, 1])
def test_other_errors_arrive_as_they_are(workers: int) -> None:
    trouble = {1: RecipeError("classes: no such class"), 2: OSError(5, "Input/output error")}
    with pytest.raises(RecipeError, match=r"^classes: no such class$"):
        list(loader(Numbers(2, trouble), [range(2)], workers=workers))
    with pytest.raises(OSError, match="Input/output error"):
        list(loader(Numbers(3, trouble), [[0], [2]], workers=workers))


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "worker died"),
        pytest.param(*(lambda: time.sleep(60), "no batch came within 1 s"), marks=pytest.mark.slow),
    ],
    ids=["killed", "hangs"],
)
def test_a_worker_that_dies_or_hangs_is_named_with_its_sample(trouble: Any, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        list(loader(Numbers(9, {4: trouble}), [range(3), range(3, 6)], workers=1, timeout=1.0))
    assert "worker 0: sample 4" in str(caught.value)


def test_signals_are_for_the_process_that_reads(tmp_path: Path) -> None:
    """A signal to the whole group leaves workers alone; closing the loader ends them."""
    note = tmp_path / "pid"

    def signaled() -> None:
        note.write_text(str(os.getpid()))
        for each in (signal.SIGINT, signal.SIGUSR2, signal.SIGTERM):
            os.kill(os.getpid(), each)

    batches = iter(loader(Numbers(50, {1: signaled}), [[i] for i in range(50)], workers=1))
    assert [next(batches).data for _ in range(3)] == [[0], [1], [2]]
    batches.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)
