"""Makes the small Fashion-MNIST that the plugin dinov3_datasets carries.

    python tools/make_fashion_mnist.py [SOURCE] [--output FOLDER]

SOURCE holds the four ``*-ubyte.gz`` files of the original, as Debian's package
dataset-fashion-mnist installs them. The subset is the first 500 images of every class of the
training set and the first 100 of every class of the test set, in the source's order. The same
source gives the same arrays wherever this runs.
"""

from __future__ import annotations

import argparse
import gzip
import math
import os
import sys
from pathlib import Path

import numpy as np

SOURCE = Path("/usr/share/datasets/fashion-mnist")
OUTPUT = Path(__file__).parents[1] / "plugins" / "dinov3_datasets" / "fashion_mnist"
SPLITS = {"train": ("train", 500), "test": ("t10k", 100)}  # name: (source's prefix, per class)
CLASSES = 10


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of a gzipped IDX file.

    The format: two zero bytes, the element type (8 is uint8), the number of dimensions, each
    dimension as a big-endian 32-bit integer, the elements.
    """
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: not an IDX file of bytes")
    ndim = data[3]
    shape = tuple(int(n) for n in np.frombuffer(data, ">u4", count=ndim, offset=4))
    body = data[4 + 4 * ndim :]
    if len(body) != math.prod(shape):
        raise ValueError(f"{path}: {len(body)} elements where the header says {shape}")
    return np.frombuffer(body, np.uint8).reshape(shape)


def first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    """Indices of the first ``count`` samples of every class, in the order of the source."""
    chosen = [np.flatnonzero(labels == label)[:count] for label in range(CLASSES)]
    for label, indices in enumerate(chosen):
        if len(indices) < count:
            raise ValueError(f"class {label} has {len(indices)} images, {count} are wanted")
    return np.sort(np.concatenate(chosen))


def make(source: Path, output: Path, split: str) -> Path:
    """Write ``output``/<split>.npz: ``images`` uint8 [n, 28, 28] and ``labels`` uint8 [n]."""
    prefix, per_class = SPLITS[split]
    images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")
    labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")
    if len(images) != len(labels):
        raise ValueError(f"{source}: {len(images)} images and {len(labels)} labels in {prefix}")
    chosen = first_of_each_class(labels, per_class)
    path = output / f"{split}.npz"
    aside = path.with_suffix(".partial.npz")
    np.savez_compressed(aside, images=images[chosen], labels=labels[chosen])
    os.replace(aside, path)
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, nargs="?", default=SOURCE)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args(argv)
    try:
        for split in SPLITS:
            path = make(arguments.source, arguments.output, split)
            print(f"{path}: {path.stat().st_size:,} bytes")
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
