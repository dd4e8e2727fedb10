"""Features of whole datasets, on one process and on several."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from classify_support import GRAY, Memory, gray_images, tiny
from process_groups import run_processes
from torch import Tensor

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.data.features import Features, extract_features, raw_pixels
from dinov3_framework.data.images import evaluation_image, normalize
from dinov3_framework.errors import DataError


def by_hand(images: list[Tensor | None], size: int | None = None) -> Tensor:
    """Class tokens of the readable images, one at a time."""
    backbone = tiny().eval()
    rows = []
    for image in images:
        if image is not None:
            shown = image if size is None else evaluation_image(image, size)
            rows.append(backbone(normalize(shown[None], GRAY)))
    return torch.cat(rows).detach()


def assert_same(found: Features, expected: Tensor, labels: list[int] | None) -> None:
    torch.testing.assert_close(found.cls, expected)
    assert found.cls.dtype == torch.float32
    assert not found.cls.requires_grad
    assert (found.labels.tolist() if found.labels is not None else None) == labels


@pytest.mark.parametrize("batch_size", [1, 3, 10, 100])
def test_they_stand_in_the_datasets_order(batch_size: int) -> None:
    images, labels = gray_images(10), [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    backbone = tiny()
    found = extract_features(
        backbone, Memory(images, labels), images=GRAY, size=None, batch_size=batch_size
    )
    assert_same(found, by_hand(images), labels)
    assert found.skipped == 0
    assert len(found) == 10
    assert sum(backbone.calls) == 10  # alone, nothing is computed in vain


def test_images_are_brought_to_size() -> None:
    images = [*gray_images(2, size=9), *gray_images(2, seed=1, size=4)]
    found = extract_features(tiny(), Memory(images), images=GRAY, size=4)
    assert_same(found, by_hand(images, size=4), None)


def test_corrupt_samples_are_left_out_counted_and_named(caplog: pytest.LogCaptureFixture) -> None:
    images = gray_images(6)
    images[0] = images[4] = None
    with caplog.at_level(logging.WARNING):
        found = extract_features(
            tiny(), Memory(images, [0, 1, 2, 3, 4, 5]), images=GRAY, size=None, batch_size=2
        )
    assert_same(found, by_hand(images), [1, 2, 3, 5])
    assert found.skipped == 2
    assert "2 of 6 samples left out" in caplog.text
    assert "image 4: half of it is missing" in caplog.text


def test_modes_are_restored_as_they_were_even_after_an_error() -> None:
    backbone = tiny().train()
    backbone.linear.eval()
    first = extract_features(backbone, Memory(gray_images(3)), images=GRAY, size=None)
    assert [backbone.training, backbone.linear.training, backbone.dropout.training] == [
        True,
        False,
        True,
    ]
    again = extract_features(backbone, Memory(gray_images(3)), images=GRAY, size=None)
    assert torch.equal(first.cls, again.cls)  # dropout was off
    with pytest.raises(RuntimeError, match="shape"):
        extract_features(backbone, Memory(gray_images(3, size=5)), images=GRAY, size=None)
    assert backbone.dropout.training


def test_a_bf16_backbone_gives_float32_features() -> None:
    images = gray_images(5)
    found = extract_features(tiny().bfloat16(), Memory(images), images=GRAY, size=None)
    torch.testing.assert_close(found.cls, by_hand(images), rtol=0.05, atol=0.3)
    assert found.cls.dtype == torch.float32


def test_loader_workers_change_nothing() -> None:
    images = gray_images(7)
    images[2] = None
    dataset = Memory(images, list(range(7)))
    alone = extract_features(tiny(), dataset, images=GRAY, size=None, batch_size=2)
    found = extract_features(tiny(), dataset, images=GRAY, size=None, batch_size=2, workers=2)
    assert_same(found, alone.cls, [0, 1, 3, 4, 5, 6])
    assert found.skipped == 1


def test_raw_pixels_are_the_normalized_pixels() -> None:
    images = gray_images(5)
    images[1] = None
    found = raw_pixels(Memory(images, [1, 2, 3, 4, 5]), GRAY, None, batch_size=2)
    kept = torch.stack([image for image in images if image is not None])
    assert_same(found, normalize(kept, GRAY).flatten(1), [1, 3, 4, 5])
    assert found.skipped == 1
    resized = raw_pixels(Memory(gray_images(2, size=9)), GRAY, 6)
    assert resized.cls.shape == (2, 36)


@pytest.mark.parametrize(
    ("dataset", "size", "message"),
    [
        (Memory([]), 4, "no images to evaluate"),
        (Memory([None, None]), 4, "none of 2 samples can be decoded, the first: image 0: half"),
        (Memory([None, None]), None, "not one sample can be decoded"),
        (Memory([*gray_images(3), *gray_images(1, size=6)]), None, r"sample 3 has shape \[1, 6, 6"),
        (Memory([torch.zeros(3, 4, 4, dtype=torch.uint8)]), 4, "sample 0: .* 3 channels"),
        (Memory(gray_images(3), [1, None, 1]), None, "1 of 3 samples have no label"),
    ],
)
def test_datasets_that_cannot_be_evaluated(dataset: Memory, size: int | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        extract_features(tiny(), dataset, images=GRAY, size=size, batch_size=2)


def test_images_of_another_channel_count_than_said() -> None:
    with pytest.raises(DataError, match="1 channels, the backbone takes 3"):
        raw_pixels(Memory(gray_images(2)), ImagesConfig(), 4)


def uneven() -> tuple[list[Tensor | None], list[int | None]]:
    """Eleven images, one of them corrupt: no multiple of processes or batch."""
    images = gray_images(11)
    images[5] = None
    return images, [index % 3 for index in range(11)]


def on_some() -> dict[str, Any]:
    """What one of several processes got, and the error that came of a wrong image."""
    images, labels = uneven()
    backbone = tiny()
    dataset = Memory(images, labels)
    found = extract_features(backbone, dataset, images=GRAY, size=None, batch_size=2)
    pixels = raw_pixels(dataset, GRAY, None, batch_size=4)
    # Only one process reads the image of another size, and all must hear of it.
    misfit = Memory([*images[:3], *gray_images(1, size=6)])
    try:
        extract_features(backbone, misfit, images=GRAY, size=None, batch_size=1)
        error = "none"
    except DataError as caught:
        error = str(caught)
    return {
        "cls": found.cls,
        "labels": found.labels,
        "skipped": found.skipped,
        "calls": backbone.calls,
        "pixels": pixels.cls,
        "error": error,
    }


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_work_and_all_get_everything(tmp_path: Path, world: int) -> None:
    results = run_processes(world, tmp_path, on_some)
    images, labels = uneven()
    kept = torch.stack([image for image in images if image is not None])
    for result in results:
        torch.testing.assert_close(result["cls"], by_hand(images))
        assert result["labels"].tolist() == [labels[i] for i in range(11) if i != 5]
        assert result["skipped"] == 1
        torch.testing.assert_close(result["pixels"], normalize(kept, GRAY).flatten(1))
        assert result["error"].startswith("sample 3 has shape [1, 6, 6]")
        assert result["calls"] == results[0]["calls"]
    assert sum(sum(result["calls"]) for result in results) < 2 * (11 + 4)  # shared, not repeated
