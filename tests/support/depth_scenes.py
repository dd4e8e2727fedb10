"""Files of rooms with measured depth: drawn ones, and a photograph with that of a stereo camera."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

# Of the Middlebury scene "Motorcycle" at a quarter of its size, as scikit-image documents it.
_FOCAL, _BASELINE, _OFFSET = 994.978, 0.193001, 31.086


def write_pair(folder: Path, name: str, image: np.ndarray, depth: np.ndarray) -> None:
    """An image as PNG, and its depth as 16-bit PNG in millimeters, 0 where it is not known."""
    for part in ("images", "depth"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(folder / "images" / f"{name}.png")
    stored = np.nan_to_num(depth * 1000, nan=0.0).round().astype(np.uint16)
    Image.fromarray(stored).save(folder / "depth" / f"{name}.png")


def drawn_room(seed: int, height: int = 96, width: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """A floor, a wall and some balls in fog: image [H, W, 3] uint8, depth [H, W] in m.

    What is farther away is paler, as fog has it: brightness goes from that of the thing to white.
    """
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float64)
    horizon = height * rng.uniform(0.3, 0.5)
    wall = rng.uniform(4.0, 9.0)
    floor = 1.2 * height / np.maximum(rows - horizon, 1e-6)
    depth = np.minimum(wall, np.where(rows > horizon, floor, np.inf))
    color = np.where((depth < wall)[..., None], rng.uniform(0, 120, 3), rng.uniform(0, 120, 3))
    for _ in range(rng.integers(3, 7)):
        radius = rng.uniform(8, 22)
        row, column = rng.uniform(0, height), rng.uniform(0, width)
        square = radius**2 - (rows - row) ** 2 - (columns - column) ** 2
        ball = rng.uniform(1.0, 8.0) - np.sqrt(np.maximum(square, 0)) / 40
        nearer = (square > 0) & (ball < depth)
        depth = np.where(nearer, ball, depth)
        color = np.where(nearer[..., None], rng.uniform(0, 120, 3), color)
    clear = np.exp(-depth / 4.0)[..., None]
    image = color * clear + 255 * (1 - clear) + rng.normal(0, 4, color.shape)
    depth = np.where(rng.uniform(size=depth.shape) < 0.05, np.nan, depth)  # as sensors have holes
    return image.clip(0, 255).astype(np.uint8), depth


def write_rooms(folder: Path, count: int, first: int = 0) -> Path:
    for number in range(count):
        write_pair(folder, f"{number:03}", *drawn_room(first + number))
    return folder


def motorcycle() -> tuple[np.ndarray, np.ndarray]:
    """A photograph [500, 741, 3] and its depth in m, NaN where the stereo camera found none.

    "Motorcycle" of Middlebury 2014 (Scharstein et al.), as scikit-image brings it.
    """
    from skimage import data

    image, _, disparity = data.stereo_motorcycle()
    with np.errstate(divide="ignore", invalid="ignore"):
        depth = _FOCAL * _BASELINE / (disparity + _OFFSET)
    return np.asarray(image), np.where(depth > 0, depth, np.nan)


def write_photo(folder: Path) -> dict[str, Path]:
    """The photograph, with half of its depth to learn from and the other half to be measured on.

    The halves are the black and the white squares of a chessboard, 25 pixels wide.
    """
    image, depth = motorcycle()
    rows, columns = np.indices(depth.shape) // 25
    white = (rows + columns) % 2 == 0
    for name, squares in (("train", white), ("val", ~white)):
        write_pair(folder / name, "motorcycle", image, np.where(squares, depth, np.nan))
    return {name: folder / name for name in ("train", "val")}
