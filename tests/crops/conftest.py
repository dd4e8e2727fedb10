"""Images and the usual spelling of the augmentation, for comparison."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image


def photo(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Structure at several scales, uint8 [height, width, channels], uneven over the image."""
    rng = np.random.default_rng(seed)
    planes = []
    for _ in range(channels):
        plane = np.linspace(0, 30, width, dtype=np.float32) * np.ones((height, 1), np.float32)
        for scale in (2, 4, 8, 16, 32):
            noise = rng.normal(size=(height // scale + 2, width // scale + 2)).astype(np.float32)
            smooth = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
            plane += scale * np.asarray(smooth)
        planes.append((plane - plane.min()) * (255 / np.ptp(plane)))
    return np.stack(planes, axis=-1).astype(np.uint8)


@pytest.fixture(scope="session")
def picture() -> np.ndarray:
    return photo(90, 120)
