"""The embedded Fashion-MNIST, and the tool that makes it."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import runpy
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dinov3_datasets.configs import FashionMnistConfig
from dinov3_datasets.fashion import FashionMnist

from dinov3_framework.errors import DataError

TOOL = Path(__file__).parents[2] / "tools" / "make_fashion_mnist.py"


def build(split: Any = "train", channels: int = 1) -> FashionMnist:
    return FashionMnist(FashionMnistConfig(split=split), channels=channels)


@pytest.mark.parametrize(
    ("split", "count", "checksum"),
    [
        ("train", 5000, "3e4733ae8450a2837c1f62ea9946542fde2197204feb158e5b790257ac34143a"),
        ("test", 1000, "22489d4842e74e85dc8dfa1e618d5c8b760cc913f0c941bf9aebbb0d0b933b9e"),
    ],
)
def test_content(split: str, count: int, checksum: str) -> None:
    dataset = build(split)
    assert len(dataset) == count
    samples = [dataset[index] for index in range(count)]
    labels = np.array([sample.label for sample in samples])
    assert np.bincount(labels).tolist() == [count // 10] * 10
    pixels = torch.stack([sample.image for sample in samples])
    assert pixels.shape == (count, 1, 28, 28)
    assert pixels.dtype == torch.uint8
    digest = hashlib.sha256(pixels.numpy().tobytes() + labels.astype(np.uint8).tobytes())
    assert digest.hexdigest() == checksum


def test_three_channels_repeat_the_gray_value() -> None:
    gray, color = build()[17], build(channels=3)[17]
    assert color.image.shape == (3, 28, 28)
    assert all(torch.equal(channel, gray.image[0]) for channel in color.image)
    assert color.label == gray.label


def test_other_channel_counts_are_refused() -> None:
    with pytest.raises(DataError, match=r"1 or 3 channels, images\.channels is 4"):
        build(channels=4)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sample_can_be_written_to_without_harm(channels: int) -> None:
    dataset = build(channels=channels)
    before = dataset[3].image.clone()
    dataset[3].image.zero_()
    assert torch.equal(dataset[3].image, before)
    assert before.any()


def test_it_pickles_small_and_ends() -> None:
    dataset = build("test")
    frozen = pickle.dumps(dataset)
    assert len(frozen) < 1000  # the pixels stay behind: a worker reads its own
    assert torch.equal(pickle.loads(frozen)[999].image, dataset[999].image)
    with pytest.raises(IndexError):
        dataset[1000]


def test_describe_names_split_and_size() -> None:
    assert build("test").describe() == (
        "fashion_mnist, test split: 1,000 images of 28 x 28 in 10 classes"
    )


def write_idx(path: Path, array: np.ndarray) -> None:
    header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def write_source(folder: Path, train: int, test: int) -> tuple[np.ndarray, np.ndarray]:
    """A source with so many images a class, shuffled; returns the training set."""
    rng = np.random.default_rng(0)
    first: list[np.ndarray] = []
    for prefix, per_class in (("train", train), ("t10k", test)):
        labels = rng.permutation(np.repeat(np.arange(10), per_class))
        images = rng.integers(0, 256, (len(labels), 2, 3))
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels)
        first = first or [images, labels]
    return first[0], first[1]


def test_the_tool_takes_the_first_of_every_class(tmp_path: Path) -> None:
    images, labels = write_source(tmp_path, 503, 100)
    main = runpy.run_path(str(TOOL))["main"]
    assert main([str(tmp_path), "--output", str(tmp_path)]) == 0
    seen = dict.fromkeys(range(10), 0)
    expected = []
    for index, label in enumerate(labels):
        seen[label] += 1
        if seen[label] <= 500:
            expected.append(index)
    made = np.load(tmp_path / "train.npz")
    assert np.array_equal(made["labels"], labels[expected])
    assert np.array_equal(made["images"], images[expected])
    first = (tmp_path / "train.npz").read_bytes()
    main([str(tmp_path), "--output", str(tmp_path)])
    assert (tmp_path / "train.npz").read_bytes() == first


@pytest.mark.parametrize(("train", "message"), [(499, "class 0 has 499 images"), (None, "No such")])
def test_the_tool_says_what_is_wrong_with_its_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], train: int | None, message: str
) -> None:
    if train:
        write_source(tmp_path, train, 100)
    assert runpy.run_path(str(TOOL))["main"]([str(tmp_path), "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.npz"))
