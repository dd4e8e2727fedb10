"""Milliseconds per image and core of the multi-crop augmentation.

Beside it the same augmentation spelled as usual, with torchvision's v2 transforms on PIL images.
Both start from a decoded image, end with uint8 crops and run in one thread.

    python benchmarks/augmentation.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from dinov3_crops import MultiCropConfig
from dinov3_crops.multi_crop import MultiCrop
from PIL import Image
from torchvision.transforms import v2

Crops = Callable[[], object]


def photo(height: int, width: int, channels: int) -> np.ndarray:
    """Something like a photo, uint8 [height, width, channels]: structure at every scale."""
    rng = np.random.default_rng(0)
    planes = []
    for _ in range(channels):
        plane = np.zeros((height, width), np.float32)
        for scale in (4, 8, 16, 32, 64):
            noise = rng.normal(size=(height // scale + 2, width // scale + 2)).astype(np.float32)
            smooth = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
            plane += scale**0.8 * np.asarray(smooth)
        planes.append((plane - plane.min()) * (255 / np.ptp(plane)))
    return np.stack(planes, axis=-1).astype(np.uint8)


def usual(config: MultiCropConfig, pixels: np.ndarray) -> Crops:
    """The augmentation in PIL and torchvision, for three channels or one."""
    options = config.distortions
    image = Image.fromarray(pixels.squeeze())

    def view(size: int, scale: tuple[float, float], blur: float, solarize: float) -> v2.Transform:
        jitter = v2.ColorJitter(
            options.brightness, options.contrast, options.saturation, options.hue
        )
        gaussian = v2.GaussianBlur(options.blur_kernel, options.blur_sigma)
        return v2.Compose(
            [
                v2.RandomResizedCrop(size, scale, interpolation=v2.InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(0.5),
                v2.RandomApply([jitter], options.jitter_probability),
                v2.RandomGrayscale(options.grayscale_probability),
                v2.RandomApply([gaussian], blur),
                v2.RandomSolarize(options.solarize_threshold, solarize),
                v2.PILToTensor(),
            ]
        )

    first, second = (
        view(config.global_size, config.global_scale, blur, solarize)
        for blur, solarize in zip(
            options.blur_probability, options.solarize_probability, strict=True
        )
    )
    local = view(config.local_size, config.local_scale, options.local_blur_probability, 0.0)
    views = [first, second] + [local] * config.local_crops
    return lambda: [transform(image) for transform in views]


def ours(config: MultiCropConfig, pixels: np.ndarray, patch_size: int) -> Crops:
    augmentation = MultiCrop(config, channels=pixels.shape[2], patch_size=patch_size)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    rng = np.random.default_rng(0)
    return lambda: augmentation(image, rng)


def milliseconds(crops: Crops, draws: int) -> float:
    """Per call, averaged over ``draws``."""
    start = time.perf_counter()
    for _ in range(draws):
        crops()
    return (time.perf_counter() - start) / draws * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the multi-crop augmentation.")
    parser.add_argument("--draws", type=int, default=40, help="images per measurement")
    parser.add_argument("--repeats", type=int, default=5, help="measurements; the least counts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    small = {"global_size": 28, "local_size": 14, "local_crops": 6}
    cases = [
        ("500x375 RGB, 2x224 + 8x96", (375, 500, 3), 16, {}),
        ("500x375 RGB, 2x256 + 8x112", (375, 500, 3), 16, {"global_size": 256, "local_size": 112}),
        ("32x32 RGB, 2x28 + 6x14", (32, 32, 3), 7, small),
        ("28x28 gray, 2x28 + 6x14", (28, 28, 1), 7, small),
    ]
    print(f"{'image and crops':28}{'ms, ours':>10}{'ms, PIL + v2':>14}{'ratio':>8}")
    for name, shape, patch_size, options in cases:
        config, pixels = MultiCropConfig(**options), photo(*shape)
        contenders = [ours(config, pixels, patch_size), usual(config, pixels)]
        # Taken in turns, and the least of several, so that other load hits both alike or neither.
        rounds = [
            [milliseconds(crops, arguments.draws) for crops in contenders]
            for _ in range(arguments.repeats)
        ]
        mine, theirs = np.min(rounds, axis=0)
        print(f"{name:28}{mine:10.2f}{theirs:14.2f}{theirs / mine:8.1f}", flush=True)


if __name__ == "__main__":
    main()
