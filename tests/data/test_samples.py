"""What a look at a sample tells before anything is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchvision import tv_tensors

from dinov3_framework import CorruptSampleError, Dataset, Sample, Target
from dinov3_framework.data.samples import check_sample, sample_complaints
from dinov3_framework.errors import WrongTargetError

nan = float("nan")


class Given(Dataset):
    """Targets, or errors, by index."""

    def __init__(self, target: Target, *values: Any, size: tuple[int, int] = (2, 3)) -> None:
        self.targets = {"truth": target, "other": Target("class", n_classes=2)}
        self.values, self.size = values, size

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Sample:
        value = self.values[index]
        if isinstance(value, Exception):
            raise value
        image = torch.zeros(3, *self.size, dtype=torch.uint8)
        return Sample(image, {"truth": tv_tensors.Mask(torch.as_tensor(value)), "other": 0})


MASK = Target("mask", classes=("a", "b", "c"), ignore_index=255)
DEPTH = Target("map", unit="m")
GOOD, VOID = [[0, 2, 2], [255, 0, 0]], [[255] * 3] * 2
BROKEN = CorruptSampleError("x.png", "cannot be read")


def test_what_a_sound_sample_holds() -> None:
    found = check_sample(Given(MASK, BROKEN, VOID, GOOD))
    assert found.complaints == ()
    assert found.rows == [("sample", "2"), ("truth", "0 a, 2 c of 3 classes; 17% ignored")]
    found = check_sample(Given(DEPTH, [[0.5, 1, 2], [3, 4, nan]]))
    assert found.rows[1] == ("truth", "0.5 to 4 m, median 2; 17% unknown")
    assert len(found.rows) == 2


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            Given(MASK, [[0, 3, 150], [0, 0, 255]]),
            "0: the truth holds the ids 3, 150, and ids of 3",
        ),
        (Given(MASK, [[-1, 0, 0], [0, 0, 0]]), "holds the ids -1"),
        (Given(MASK, GOOD, size=(3, 2)), "the truth is 3 x 2 pixels, the image 2 x 3"),
        (Given(MASK, [[0.0, 1, 2], [0, 0, 0]]), "the truth holds torch.float32, not integers"),
        (Given(DEPTH, GOOD), "the truth holds torch.int64, not float32"),
        (Given(MASK, [GOOD]), r"the truth is [1, 2, 3], not a tensor [H, W]"),
        (Given(MASK, *[VOID] * 20), "none of 8 samples has any truth (0: all of truth is to be"),
        (Given(DEPTH, [[nan] * 3] * 2), "none of 1 samples has any truth"),
        (Given(MASK, BROKEN, BROKEN), "none of 2 samples can be read: x.png: cannot be read"),
        (Given(MASK, WrongTargetError("y.png", "holds id 9"), GOOD), "y.png: holds id 9"),
    ],
)
def test_what_has_to_be_mended(dataset: Dataset, message: str) -> None:
    (complaint,) = sample_complaints(dataset)
    assert message in complaint


def test_void_samples_at_the_beginning_are_passed_over() -> None:
    assert check_sample(Given(MASK, *[VOID] * 50, *[GOOD] * 50)).complaints == ()


@pytest.mark.parametrize("scale", [1000, 0.001])
def test_depth_in_another_unit_is_odd(scale: float) -> None:
    values = torch.full((2, 3), 2.5) * scale
    assert check_sample(Given(DEPTH, values)).rows[-1] == (
        "note",
        f"a median truth of {2.5 * scale:.3g} m is odd; is scale (what a stored 1 is in the unit) "
        "meant?",
    )
    assert len(check_sample(Given(Target("map", unit="kPa"), values)).rows) == 2


def test_nothing_is_read_for_other_targets() -> None:
    dataset = Given(MASK, WrongTargetError("y.png", "holds id 9"))
    assert check_sample(dataset, ["other"]).complaints == ()
    assert check_sample(dataset, ["other", "truth"]).complaints != ()
    assert check_sample(None).rows == ()
