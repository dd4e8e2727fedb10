"""The evaluation of masks: its numbers by their definitions, its errors, its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_support import CLASSES, Drawn, pixel_model
from dinov3_segment.areas import Areas, confusion_of
from PIL import Image
from process_groups import run_processes
from segment_processes import SIZES, SLIDE, measure, prepared
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, jaccard_score
from torchvision import tv_tensors

from dinov3_framework import CorruptSampleError, DataError, Sample, Target
from dinov3_framework.data.dense import dense_predictions
from dinov3_framework.data.dense_config import DenseInferenceConfig

IGNORED = 255


class Painted(Drawn):
    """The same images, with truths that ignore some rows and lack a class."""

    def __init__(self, sizes: list[tuple[int, int]], lacking: int = 3) -> None:
        super().__init__(sizes)
        self.lacking = lacking

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        mask = sample.targets["it"].as_subclass(torch.Tensor).clone()
        mask[mask == self.lacking] = 0
        mask[: 3 + index] = IGNORED
        return Sample(sample.image, {"it": tv_tensors.Mask(mask)})


def flat(dataset: Drawn) -> tuple[np.ndarray, np.ndarray]:
    """Truths and predictions of all pixels that count."""
    found = list(dense_predictions(pixel_model(), dataset, SLIDE, "it"))
    truths = torch.cat([torch.as_tensor(each.targets["it"]).flatten() for each in found])
    ours = torch.cat([each.prediction.flatten() for each in found if each.prediction is not None])
    known = truths != IGNORED
    return truths[known].numpy(), ours[known].numpy()


# --------------------------------------------------------------------------- numbers
def test_metrics_are_those_of_scikit_learn_over_all_pixels() -> None:
    dataset = Painted(SIZES)
    truth, predicted = flat(dataset)
    there = sorted({*truth.tolist(), *predicted.tolist()})
    evaluation = prepared(dataset, inference=SLIDE)
    found = evaluation.run(pixel_model())
    iou = jaccard_score(truth, predicted, labels=there, average="macro")
    assert found["mIoU"] == pytest.approx(100 * iou, abs=1e-3)
    assert found["accuracy"] == pytest.approx(100 * accuracy_score(truth, predicted), abs=1e-3)
    dice = f1_score(truth, predicted, labels=there, average="macro")
    assert found["dice"] == pytest.approx(100 * dice, abs=1e-3)
    wanted = confusion_matrix(truth, predicted, labels=range(CLASSES))
    np.testing.assert_array_equal(evaluation.details().arrays["confusion"], wanted)
    of_class = [wanted[k, k] / wanted[k].sum() for k in range(CLASSES) if wanted[k].sum()]
    assert found["class_accuracy"] == pytest.approx(100 * np.mean(of_class), abs=1e-3)
    low, high = evaluation.details().intervals["mIoU"]
    assert low < found["mIoU"] < high
    rows = evaluation.details().tables["classes"]
    assert rows[3]["accuracy"] is None, "no pixel is of class 3"
    assert sum(row["pixels"] for row in rows) == len(truth)


def areas(truth: Sequence[int], predicted: Sequence[int], count: int = 4) -> dict[str, float]:
    given = (torch.tensor([predicted]), torch.tensor([truth]))
    return Areas.of(confusion_of(*given, count, IGNORED)).metrics()


def test_a_class_in_neither_is_left_out() -> None:
    """Of four classes one is in neither, one is predicted alone: it counts, with 0."""
    found = areas([0, 0, 1, 1, IGNORED], [0, 2, 1, 1, 3])
    assert found["mIoU"] == pytest.approx(100 * (1 / 2 + 1 + 0) / 3, abs=1e-3)
    assert found["accuracy"] == 75
    assert found["class_accuracy"] == 75  # class 2 has no pixel, and is left out
    assert found["dice"] == pytest.approx(100 * (2 / 3 + 1 + 0) / 3, abs=1e-3)
    # As the reference has it, a class without a right pixel has no F score, and is left out.
    assert found["fscore"] == pytest.approx(100 * (2 / 3 + 1) / 2, abs=1e-3)
    assert found["precision"] == pytest.approx(100 * (1 + 1 + 0) / 3, abs=1e-3)


def test_what_is_ignored_is_not_predicted_either() -> None:
    assert areas([0, IGNORED], [0, 1]) == areas([0], [0])
    assert areas([0, IGNORED], [0, 1])["mIoU"] == 100


# --------------------------------------------------------------------------- processes
def test_two_processes_count_what_one_counts(tmp_path: Path) -> None:
    """Five images: the last is no one's twice, and both call the network equally often."""
    alone = measure()
    found = run_processes(2, tmp_path, measure)
    images = [each.pop("images") for each in found]
    assert images[0] == images[1]
    alone.pop("images")
    assert found == [alone, alone]


# --------------------------------------------------------------------------- errors
class Odd(Drawn):
    """One image cannot be decoded, another has an id of no class."""

    def __init__(self, *, corrupt: int | None = None, odd: int | None = None) -> None:
        super().__init__(SIZES)
        self.corrupt, self.odd = corrupt, odd

    def __getitem__(self, index: int) -> Sample:
        if index == self.corrupt:
            raise CorruptSampleError("one", "broken on purpose")
        sample = super().__getitem__(index)
        if index == self.odd:
            sample.targets["it"][0, 0] = 77
        return sample


def test_what_cannot_be_decoded_is_left_out_and_said() -> None:
    evaluation = prepared(Odd(corrupt=1))
    evaluation.run(pixel_model())
    assert evaluation.protocol(pixel_model())["unreadable"] == 1
    counted = int(evaluation.details().arrays["confusion"].sum())
    assert counted == sum(h * w for place, (h, w) in enumerate(SIZES) if place != 1)


def test_an_id_of_no_class_is_named() -> None:
    with pytest.raises(DataError, match=r"sample 2 \(folder/2.png\): the truth has the id 77"):
        prepared(Odd(odd=2)).run(pixel_model())


def test_problems_are_told_before_anything_runs() -> None:
    def complaints(dataset: Drawn, model: Any = None, **options: Any) -> dict[str, str]:
        problems = prepared(dataset, **options).problems(model or pixel_model(size=None))
        return {problem.where: problem.message for problem in problems}

    assert complaints(Drawn(SIZES)) == {}
    assert "does not predict it" in complaints(Drawn(SIZES), target="other")["target"]
    assert "no mask" in complaints(Drawn(SIZES), pixel_model("map"))["target"]
    slide = DenseInferenceConfig(mode="slide")
    assert "how large windows" in complaints(Drawn(SIZES), inference=slide)["inference.window"]
    fewer = Drawn(SIZES)
    fewer.targets = {"it": Target("mask", n_classes=3, ignore_index=IGNORED)}
    assert complaints(fewer)["data"] == "the target 'it' of the data has 3 classes, not 5"
    other = Drawn(SIZES)
    other.targets = {"it": Target("mask", classes=tuple("abcdf"))}
    assert "e, f" in complaints(other)["data"]
    message = complaints(Odd(odd=0))["data"]
    assert "the it holds the ids 77, and ids of 5 classes end at 4" in message


def test_the_protocol_names_every_switch() -> None:
    model = pixel_model()
    plain = prepared(Drawn(SIZES)).protocol(model)
    for options in (
        {"resize": 32},
        {"resize": 32, "side": "longer"},
        {"resize": 32, "interpolation": "bicubic"},
        {"mode": "slide"},
        {"mode": "slide", "window": 8},
        {"mode": "slide", "stride": 3},
        {"scales": (1.0, 2.0)},
        {"flip": True},
    ):
        changed = prepared(Drawn(SIZES), inference=DenseInferenceConfig(**options))
        assert changed.protocol(model) != plain, options
        plain = changed.protocol(model)


# --------------------------------------------------------------------------- files
def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def measured(folder: Path, dataset: Drawn | None = None, **options: Any) -> tuple[Any, int]:
    """Metrics, and how often the network was called."""
    evaluation = prepared(dataset or Painted(SIZES), save=("png", "npy"), **options)
    model = pixel_model()
    evaluation.folder = folder
    return evaluation.run(model), model.backbone.n_calls


def test_saved_predictions_are_those_that_were_counted(tmp_path: Path) -> None:
    metrics, calls = measured(tmp_path)
    assert calls == len(SIZES)
    for index, each in enumerate(
        dense_predictions(pixel_model(), Drawn(SIZES), DenseInferenceConfig(), "it")
    ):
        with Image.open(tmp_path / f"folder/{index}.png") as picture:
            np.testing.assert_array_equal(np.array(picture), each.prediction)
        np.testing.assert_array_equal(np.load(tmp_path / f"folder/{index}.npy"), each.prediction)
    assert prepared(Painted(SIZES)).run(pixel_model()) == metrics


def test_a_run_goes_on_from_what_is_saved(tmp_path: Path) -> None:
    metrics, _ = measured(tmp_path)
    before = files(tmp_path)
    (tmp_path / "folder" / "2.npy").unlink()
    assert measured(tmp_path) == (metrics, 1)
    assert files(tmp_path) == before


def test_what_was_saved_of_another_protocol_is_refused(tmp_path: Path) -> None:
    measured(tmp_path)
    with pytest.raises(DataError, match="holds other predictions"):
        measured(tmp_path, inference=DenseInferenceConfig(flip=True))


def test_nothing_is_saved_while_training() -> None:
    evaluation = prepared(Drawn(SIZES), save=("png",))
    assert evaluation.folder is None
    evaluation.run(pixel_model())
