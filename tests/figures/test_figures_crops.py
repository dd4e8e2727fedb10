"""The sheet of crops: what stands where, and which patches are covered."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dinov3_figures.canvas import save_png
from dinov3_figures.crops import cover, crops_figure, crops_sheet
from dinov3_figures.pixels import fit, to_rgb
from dinov3_figures.sheet import GAP, ROW_GAP, Block, compose
from figures_support import read_png
from torch import Tensor

from dinov3_framework import DataError, ImagesConfig, normalize

RGB = ImagesConfig()
GREY = ImagesConfig(channels=1, mean=(0.3,), std=(0.2,))


def flat_batch(**levels: int) -> dict[str, Tensor]:
    """Three images of uniform crops, 28 px but for some views."""
    sides = {"local": 14, "anchor": 56, "teacher": 21}
    counts = {"local": 6}
    return {
        name: torch.full(
            (counts.get(name, 2), 3, 1, sides.get(name, 28), sides.get(name, 28)),
            level,
            dtype=torch.uint8,
        )
        for name, level in levels.items()
    }


# ---------------------------------------------------------------------- pixels
def test_normalised_crops_are_shown_as_the_uint8_ones_they_came_from() -> None:
    images = torch.randint(0, 256, (2, 3, 3, 8, 8), dtype=torch.uint8)
    shown = to_rgb(images, RGB)
    assert shown.shape == (2, 3, 8, 8, 3)
    assert np.array_equal(shown, images.movedim(2, -1).numpy())
    assert np.array_equal(to_rgb(normalize(images, RGB), RGB), shown)


def test_one_channel_is_grey() -> None:
    image = torch.randint(0, 256, (1, 8, 8), dtype=torch.uint8)
    assert np.array_equal(to_rgb(image, GREY), image[0, :, :, None].expand(-1, -1, 3).numpy())


@pytest.mark.parametrize(("channels", "equal"), [(2, True), (5, False)])
def test_other_channel_counts_are_stretched(channels: int, equal: bool) -> None:
    spec = ImagesConfig(channels=channels, mean=(0.0,) * channels, std=(1.0,) * channels)
    image = torch.randint(100, 120, (channels, 16, 16), dtype=torch.uint8)
    shown = to_rgb(image, spec)
    assert shown.shape == (16, 16, 3)
    assert (shown.min((0, 1)) == 0).all()
    assert (shown.max((0, 1)) == 255).all()
    assert np.array_equal(shown[..., 0], shown[..., 1]) == equal


def test_wrong_channels_are_refused() -> None:
    with pytest.raises(DataError, match=r"\[..., 3, H, W\]"):
        to_rgb(torch.zeros(1, 8, 8), RGB)


def test_fit_repeats_whole_pixels_and_averages_smaller_ones() -> None:
    image = torch.arange(16, dtype=torch.uint8).reshape(1, 4, 4, 1).expand(-1, -1, -1, 3).numpy()
    assert np.array_equal(fit(image, 8)[:, ::2, 1::2], image)
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    small = fit(np.repeat(checks[None, :, :, None], 3, axis=-1).astype(np.uint8), 16)
    assert small.shape == (1, 16, 16, 3)
    assert np.abs(small.astype(int) - 127).max() <= 2


# ---------------------------------------------------------------------- masks
def test_exactly_the_masked_patches_are_covered() -> None:
    pixels = np.zeros((1, 168, 168, 3), np.uint8)
    masks = np.zeros((1, 4, 4), bool)
    masks[0, 1, 2] = masks[0, 3, 0] = True
    covered = cover(pixels, masks)[0]
    by_patch = covered.reshape(4, 42, 4, 42, 3).swapaxes(1, 2)
    touched = (by_patch > 0).all((2, 3, 4))
    assert np.array_equal(touched, masks[0])
    assert (by_patch[~masks[0]] == 0).all()
    assert len(np.unique(by_patch[1, 2])) > 3  # stripes, not a flat shade


def test_what_is_covered_can_be_made_out() -> None:
    dark, light = (np.full((1, 64, 64, 3), level, np.uint8) for level in (0, 255))
    masks = np.ones((1, 4, 4), bool)
    difference = cover(light, masks).astype(int) - cover(dark, masks)
    assert (difference > 40).all()


def test_masks_land_on_their_image_and_crop() -> None:
    batch = flat_batch(**{"global": 0})
    masks = torch.zeros(2, 3, 16, dtype=torch.bool)
    masks[0, 2, 5] = True  # first global crop of the third image: row 1, column 1
    masks[1, 0, 15] = True  # second global crop of the first image: the last patch
    sheet = crops_sheet(batch | {"masks": masks}, GREY, patch_size=7)
    found = set()
    for crop, (_, left, right) in enumerate(sheet.titles):
        side = right - left
        for row in range(3):
            top = row * (side + ROW_GAP)
            cell = sheet.pixels[top : top + side, left:right]
            patches = cell.reshape(4, side // 4, 4, side // 4, 3).swapaxes(1, 2)
            for place in zip(*np.nonzero((patches > 0).any((2, 3, 4))), strict=True):
                found.add((crop, row, *map(int, place)))
    assert found == {(0, 2, 1, 1), (1, 0, 3, 3)}


def test_masks_of_another_grid_are_refused() -> None:
    batch = flat_batch(**{"global": 0}) | {"masks": torch.zeros(2, 3, 9, dtype=torch.bool)}
    with pytest.raises(DataError, match=r"masks of 9 patches do not fit .* 4 x 4"):
        crops_sheet(batch, GREY, patch_size=7)


# ---------------------------------------------------------------------- layout
def test_columns_are_global_local_and_other_views() -> None:
    sheet = crops_sheet(flat_batch(anchor=200, local=100, **{"global": 50}), GREY, patch_size=7)
    titles = [title for title, _, _ in sheet.titles]
    assert titles == [
        "global crop 1\n28 px",
        "global crop 2\n28 px",
        "6 local crops\n14 px",
        "anchor crop 1\n56 px",
        "anchor crop 2\n56 px",
    ]
    wider = crops_sheet(flat_batch(teacher=9, **{"global": 50}), GREY, patch_size=7)
    assert [title for title, _, _ in wider.titles][2:] == [
        "teacher crop 1\n21 px",
        "teacher crop 2\n21 px",
    ]
    levels = [set(np.unique(sheet.pixels[:, left:right])) for _, left, right in sheet.titles]
    assert levels == [{50, 255}, {50, 255}, {100, 255}, {200, 255}, {200, 255}]
    widths = [right - left for _, left, right in sheet.titles]
    assert widths[0] == widths[1] == widths[3] == 168
    assert widths[2] == 3 * 84 + 2 * GAP  # two rows of three, half as large


def test_views_without_global_crops_are_refused() -> None:
    with pytest.raises(DataError, match="makes local crops"):
        crops_sheet(flat_batch(local=1), GREY, patch_size=7)


def test_compose_keeps_every_image_and_its_row() -> None:
    large = np.arange(2, dtype=np.uint8).reshape(2, 1, 1, 1, 1) + np.zeros(
        (2, 1, 40, 40, 3), np.uint8
    )
    small = np.arange(10, 20, dtype=np.uint8).reshape(2, 5, 1, 1, 1) + np.zeros(
        (2, 5, 20, 20, 3), np.uint8
    )
    sheet = compose([Block("large", large), Block("small", small)])
    first_row, second_row = np.array_split(sheet.pixels, [sheet.pixels.shape[0] // 2])
    assert set(np.unique(first_row)) == {0, *range(10, 15), 255}
    assert set(np.unique(second_row)) == {1, *range(15, 20), 255}
    for level in range(10, 20):
        assert (sheet.pixels == level).sum() == 20 * 20 * 3


@pytest.mark.parametrize(("side", "local"), [(28, 14), (224, 96), (512, 112)])
def test_figure_is_a_png_of_sensible_size(tmp_path, side: int, local: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    batch = {"global": draw(2, 6, 3, side, side), "local": draw(8, 6, 3, local, local)}
    path = tmp_path / "figures" / "crops.png"
    save_png(crops_figure(batch, RGB, patch_size=7), path)
    picture = read_png(path)
    assert 500 <= picture.shape[1] <= 2000
    assert 500 <= picture.shape[0] <= 2000
    assert 0.2 < (picture < 250).mean() < 0.95
    assert [entry.name for entry in path.parent.iterdir()] == ["crops.png"]
