"""Batches are functions of (seed, step); whoever makes them, and whatever the files are like."""

from __future__ import annotations

import itertools
import logging
import os
import re
import signal
import time
from typing import Any

import numpy as np
import pytest
import torch
from attrs import frozen
from dinov3_ssl.batches import CropBatches
from loader_support import BATCH, ONE, Numbers, assert_same, loader
from torch import Tensor
from trainer_support import dataset_of, pretrain, registry

from dinov3_framework import Augmentation, DataError, Dataset, Sample, View
from dinov3_framework.blame import describe_error
from dinov3_framework.data import workers as loader_workers
from dinov3_framework.data.loader import Layout


class Plain(Augmentation):
    """Two crops: the image, and random numbers; masks as the row says."""

    views = {"global": View(2, 4)}  # noqa: RUF012
    makes_masks = True

    def __call__(self, image: Tensor, rng: np.random.Generator) -> dict[str, Tensor]:
        noise = torch.from_numpy(rng.integers(0, 256, (1, 4, 4), dtype=np.uint8))
        return {"global": torch.stack([image, noise])}

    def masks(self, *, rows: Any, total: int, seed: int, step: int) -> Tensor:
        return torch.tensor([[(row + step) % 2 == 0, row >= total // 2] for row in rows])


def maker(dataset: Dataset | None = None, layout: Layout = ONE, workers: int = 0) -> CropBatches:
    return CropBatches(dataset or Numbers(), Plain(), layout, seed=7, workers=workers)


# --------------------------------------------------------------------------- what a batch is
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("start", [0, 3])
def test_workers_and_start_change_nothing(workers: int, start: int) -> None:
    made = maker(Numbers(corrupt={3, 4, 11}), workers=workers)
    _, batches = loader(made, start, 6, workers=workers)
    found = list(batches)
    assert len(found) == 6 - start
    for step, batch in enumerate(found, start):
        assert_same(batch, made[step, 0])


def test_workers_change_nothing_with_real_parts() -> None:
    task = pretrain()
    parts, dataset = task.method.prepare(), dataset_of(task)
    made = CropBatches(dataset, parts.augmentation, ONE, seed=0, workers=2)
    _, batches = loader(made, 1, 3, workers=2)
    for step, batch in enumerate(batches, 1):
        assert batch.crops["local"].shape == (2, BATCH, 1, 14, 14)
        assert_same(batch, made[step, 0])


def test_shapes() -> None:
    batch = maker()[0, 0]
    assert batch.crops["global"].shape == (2, BATCH, 1, 4, 4)
    assert batch.masks is not None
    assert batch.masks.shape == (2, BATCH, 2)


@pytest.mark.parametrize(("world", "passes"), [(1, 2), (2, 1), (2, 3), (3, 2), (12, 1), (1, 12)])
def test_splits_share_out_the_same_step(world: int, passes: int) -> None:
    for step in (0, 5):
        whole = maker()[step, 0]
        layouts = [Layout(world, rank, passes, BATCH) for rank in range(world)]
        parts = [maker(layout=layout)[step, micro] for micro in range(passes) for layout in layouts]
        assert all(part.crops["global"].shape[1] == BATCH // world // passes for part in parts)
        joined = torch.cat([part.crops["global"] for part in parts], dim=1)
        assert torch.equal(joined, whole.crops["global"])
        masks = torch.cat([part.masks for part in parts if part.masks is not None], dim=1)
        assert torch.equal(masks, whole.masks if whole.masks is not None else masks[:0])


def test_splits_share_out_the_same_masks_of_the_real_augmentation() -> None:
    task = pretrain()
    augmentation, dataset = task.method.prepare().augmentation, dataset_of(task)
    whole = CropBatches(dataset, augmentation, ONE, seed=0, workers=0)[2, 0]
    parts = [
        CropBatches(dataset, augmentation, Layout(2, rank, 2, BATCH), seed=0, workers=0)[2, micro]
        for micro, rank in itertools.product(range(2), range(2))
    ]
    assert whole.masks is not None
    assert whole.masks.any()
    assert torch.equal(torch.cat([part.masks for part in parts], dim=1), whole.masks)
    for view in ("global", "local"):
        joined = torch.cat([part.crops[view] for part in parts], dim=1)
        assert torch.equal(joined, whole.crops[view])


def test_a_pass_over_the_data_shows_each_image_once() -> None:
    made = maker(Numbers(36))
    seen = [made[step, 0].crops["global"][0, :, 0, 0, 0].tolist() for step in range(3)]
    assert sorted(itertools.chain(*seen)) == list(range(36))


def test_a_batch_larger_than_the_dataset() -> None:
    seen = maker(Numbers(5))[0, 0].crops["global"][0, :, 0, 0, 0].tolist()
    assert sorted(seen[:5]) == sorted(seen[5:10]) == list(range(5))


def test_an_image_seen_again_is_cropped_anew() -> None:
    noise = [maker(Numbers(1))[0, 0].crops["global"][1, place] for place in range(BATCH)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(noise, 2))


# --------------------------------------------------------------------------- corrupt samples
def test_a_corrupt_sample_is_substituted_the_same_way_every_time() -> None:
    corrupt = {3, 4, 11}
    sound, broken = maker(), maker(Numbers(corrupt=corrupt))
    names: list[str] = []
    for step in range(4):
        batch, expected = broken[step, 0], sound[step, 0]
        assert_same(batch, broken[step, 0])
        shown = batch.crops["global"][0, :, 0, 0, 0].tolist()
        meant = expected.crops["global"][0, :, 0, 0, 0].tolist()
        for got, wanted in zip(shown, meant, strict=True):
            assert got == wanted if wanted not in corrupt else got not in corrupt
        # The crops' randomness is the place's, not the sample's.
        assert torch.equal(batch.crops["global"][1], expected.crops["global"][1])
        names += batch.corrupt
    assert any("image 11: broken on purpose" in name for name in names)


def test_corrupt_samples_are_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    made = maker(Numbers(36, corrupt={3, 4, 11}))
    counted, batches = loader(made, 0, 9)
    with caplog.at_level(logging.WARNING):
        found = list(batches)
    # Each once, however often it came up.
    assert sum(len(batch.corrupt) for batch in found) > 3
    assert counted.corrupt == len(caplog.records) == 3
    assert "undecodable sample 1, substituted: image" in caplog.text


def test_one_bad_file_that_comes_up_again_and_again_does_not_end_the_run() -> None:
    _, batches = loader(maker(Numbers(4, corrupt={1})), 0, 4, max_corrupt=1)
    assert len(list(batches)) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_corrupt_samples_end_the_run(workers: int) -> None:
    made = maker(Numbers(36, corrupt={3, 4, 11}), workers=workers)
    _, batches = loader(made, 0, 3, max_corrupt=2, workers=workers)
    with pytest.raises(DataError, match="could not be decoded") as caught:
        list(batches)
    assert "loader.max_corrupt = 2 are allowed" in str(caught.value)
    assert "image" in str(caught.value)
    _, batches = loader(made, 0, 3, max_corrupt=100, workers=workers)
    assert len(list(batches)) == 3


def test_a_dataset_of_rubbish_is_given_up() -> None:
    _, batches = loader(maker(Numbers(corrupt=range(40))))
    with pytest.raises(DataError, match="20 samples in a row could not be decoded") as caught:
        next(batches)
    assert "damaged or of another format" in str(caught.value)


# --------------------------------------------------------------------------- other errors
class Faulty(Numbers):
    def __init__(self, error: Any) -> None:
        super().__init__()
        self.error = error

    def __getitem__(self, index: int) -> Sample:
        raise self.error

    def name(self, index: int) -> str:
        return f"image of {index}"


@pytest.mark.parametrize(
    ("error", "workers"),
    [
        (OSError(5, "Input/output error"), 0),
        (RuntimeError("the plug-in timed out"), 0),
        (ConnectionError("no such bucket"), 0),
        (ConnectionError("no such bucket"), 1),
    ],
)
def test_a_datasets_own_errors_are_not_mistaken_for_a_dead_worker(
    error: Exception, workers: int
) -> None:
    _, batches = loader(maker(Faulty(error), workers=workers), workers=workers)
    with pytest.raises(type(error), match=str(error.args[-1])):
        next(batches)


@frozen
class Frozen(Exception):
    """One that takes no attributes."""

    what: str


class Picky(Exception):
    """One that cannot be made of its message alone."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} and {other}")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "error", [KeyError("top"), Picky("hat", "coat"), SystemExit(0), StopIteration(), Frozen("x")]
)
def test_an_error_names_its_dataset_and_sample(error: Any, workers: int) -> None:
    _, batches = loader(maker(Faulty(error), workers=workers), workers=workers)
    with pytest.raises(Exception) as caught:  # noqa: PT011
        next(batches)
    said = "sys.exit(0)" if isinstance(error, SystemExit) else str(error)
    text = describe_error(caught.value)
    assert re.match(r"dataset Faulty, sample \d+ \(image of \d+\): ", text), text
    assert said in text


def test_what_cannot_leave_a_worker_is_an_error_at_once() -> None:
    class Unsendable(Plain):
        def __call__(self, image: Tensor, rng: np.random.Generator) -> Any:
            return super().__call__(image, rng) | {"global": lambda: image}

    made = CropBatches(Numbers(), Unsendable(), ONE, seed=7, workers=1)
    made.collate = lambda items, *rest: list(items)  # type: ignore[assignment, method-assign]
    _, batches = loader(made, workers=1, timeout=60.0)
    started = time.monotonic()
    with pytest.raises(Exception, match="pickle"):
        next(batches)
    assert time.monotonic() - started < 30


def test_a_datasets_complaint_arrives_as_it_is() -> None:
    _, batches = loader(maker(Faulty(DataError("no such bucket")), workers=1), workers=1)
    with pytest.raises(DataError, match=r"^no such bucket$"):
        next(batches)


def flaky(**options: Any) -> Dataset:
    dataset: Dataset = registry().build(
        registry().get("dataset", "flaky").component.config(**options), channels=1
    )
    return dataset


class Crop(Plain):
    def __call__(self, image: Tensor, rng: np.random.Generator) -> dict[str, Tensor]:
        return super().__call__(image[:, :4, :4], rng)


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ("kill_at", r"a loader worker died \(killed, or out of memory\)"),
        pytest.param(
            *("hang_at", r"no batch came within loader.timeout = 2 s"), marks=pytest.mark.slow
        ),
    ],
)
def test_a_worker_that_dies_or_hangs_is_named_with_its_sample(trouble: str, words: str) -> None:
    made = CropBatches(flaky(**{trouble: 30}), Crop(), ONE, seed=0, workers=2)
    _, batches = loader(made, 0, 6, workers=2, timeout=2.0)
    with pytest.raises(DataError, match=words) as caught:
        list(batches)
    assert "sample 30" in str(caught.value)
    assert "worker 0: sample" in str(caught.value)


# --------------------------------------------------------------------------- shared memory
@pytest.mark.parametrize(
    ("free", "batch", "workers", "ahead", "complains"),
    [
        (100, 10, 5, 2, False),
        (99, 10, 5, 2, True),
        (99, 0, 5, 2, False),
        (0, 0, 1, 1, True),
        (0, 10, 0, 2, False),
    ],
)
def test_batches_ahead_have_to_fit_into_shared_memory(
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    batch: int,
    workers: int,
    ahead: int,
    complains: bool,
) -> None:
    monkeypatch.setattr(loader_workers, "free_shared_memory", lambda: free)
    found = loader_workers.memory_complaint(batch, workers=workers, processes=1, ahead=ahead)
    assert found.startswith("worker memory") == complains == ("--shm-size" in found)


def test_processes_of_other_machines_have_memory_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loader_workers, "free_shared_memory", lambda: 100)
    assert loader_workers.memory_complaint(10, workers=5, processes=4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert not loader_workers.memory_complaint(10, workers=5, processes=4)


class NoMemory(Numbers):
    def __getitem__(self, index: int) -> Sample:
        os.kill(os.getpid(), signal.SIGBUS)
        return super().__getitem__(index)


def test_a_worker_without_memory_is_reported_as_such() -> None:
    _, batches = loader(maker(NoMemory(), workers=1), workers=1)
    with pytest.raises(DataError, match=r"^worker memory: ") as caught:
        next(batches)
    assert "lower loader.workers" in str(caught.value)
