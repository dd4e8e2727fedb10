"""The sheet of crops: what stands where, and which patches are covered."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from dinov3_figures.crops import cover, crops_figure
from dinov3_figures.sheet import Tile, draw_sheet, fit, save_png, to_rgb
from figures_support import drawn_on, read_png, texts_on
from torch import Tensor

from dinov3_framework import DataError, ImagesConfig, normalize

RGB = ImagesConfig()
GRAY = ImagesConfig(channels=1, mean=(0.3,), std=(0.2,))


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
def test_normalized_crops_are_shown_as_the_uint8_ones_they_came_from() -> None:
    images = torch.randint(0, 256, (2, 3, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(to_rgb(images, RGB), images)
    assert torch.equal(to_rgb(normalize(images, RGB), RGB), images)


def test_one_channel_is_gray() -> None:
    image = torch.randint(0, 256, (1, 8, 8), dtype=torch.uint8)
    assert torch.equal(to_rgb(image, GRAY), image.expand(3, -1, -1))


@pytest.mark.parametrize(("channels", "equal"), [(2, True), (5, False)])
def test_other_channel_counts_are_stretched(channels: int, equal: bool) -> None:
    spec = ImagesConfig(channels=channels, mean=(0.0,) * channels, std=(1.0,) * channels)
    image = torch.randint(100, 120, (channels, 16, 16), dtype=torch.uint8)
    shown = to_rgb(image, spec)
    assert shown.shape == (3, 16, 16)
    assert (shown.amin((1, 2)) == 0).all()
    assert (shown.amax((1, 2)) == 255).all()
    assert torch.equal(shown[0], shown[1]) == equal


def test_wrong_channels_are_refused() -> None:
    with pytest.raises(DataError, match=r"\[..., 3, H, W\]"):
        to_rgb(torch.zeros(1, 8, 8), RGB)


def test_fit_repeats_whole_pixels_and_averages_smaller_ones() -> None:
    image = torch.arange(16, dtype=torch.uint8).reshape(1, 1, 4, 4).expand(-1, 3, -1, -1)
    for top, left in ((0, 0), (0, 1), (1, 1)):
        assert torch.equal(fit(image, 8)[..., top::2, left::2], image)
    checks = torch.from_numpy(np.indices((64, 64)).sum(0) % 2 * 255).to(torch.uint8)
    small = fit(checks.expand(1, 3, -1, -1), 16)
    assert small.shape == (1, 3, 16, 16)
    assert (small.int() - 127).abs().max() <= 2


# ---------------------------------------------------------------------- masks
def test_exactly_the_masked_patches_are_covered() -> None:
    images = torch.zeros(1, 3, 168, 168, dtype=torch.uint8)
    masks = torch.zeros(1, 4, 4, dtype=torch.bool)
    masks[0, 1, 2] = masks[0, 3, 0] = True
    by_patch = cover(images, masks)[0].reshape(3, 4, 42, 4, 42)
    assert torch.equal((by_patch > 0).all(4).all(2).all(0), masks[0])
    assert torch.equal((by_patch > 0).any(4).any(2).any(0), masks[0])
    assert len(by_patch[:, 1, :, 2].unique()) > 3  # stripes, not a flat shade


def test_what_is_covered_can_be_made_out() -> None:
    dark, light = (torch.full((1, 3, 64, 64), level, dtype=torch.uint8) for level in (0, 255))
    masks = torch.ones(1, 4, 4, dtype=torch.bool)
    difference = cover(light, masks).int() - cover(dark, masks)
    assert (difference > 40).all()


def test_masks_land_on_their_image_and_crop() -> None:
    batch = flat_batch(**{"global": 0})
    masks = torch.zeros(2, 3, 16, dtype=torch.bool)
    masks[0, 2, 5] = True  # first global crop of the third image: row 1, column 1
    masks[1, 0, 15] = True  # second global crop of the first image: the last patch
    rows = drawn_on(crops_figure(batch | {"masks": masks}, GRAY))
    found = set()
    for row, tiles in enumerate(rows):
        for crop, tile in enumerate(tiles):
            side = len(tile.pixels)
            patches = tile.pixels.reshape(4, side // 4, 4, side // 4, 3).swapaxes(1, 2)
            for place in zip(*np.nonzero((patches > 0).any((2, 3, 4))), strict=True):
                found.add((crop, row, *map(int, place)))
    assert found == {(0, 2, 1, 1), (1, 0, 3, 3)}


def test_masks_of_another_grid_are_refused() -> None:
    for patches in (9, 15):
        masks = torch.zeros(2, 3, patches, dtype=torch.bool)
        with pytest.raises(DataError, match=f"masks of {patches} patches do not fit"):
            crops_figure(flat_batch(**{"global": 0}) | {"masks": masks}, GRAY)


# ---------------------------------------------------------------------- layout
def test_columns_are_global_local_and_other_views() -> None:
    figure = crops_figure(flat_batch(anchor=200, local=100, **{"global": 50}), GRAY)
    expected = [
        "global crop 1\n28 px",
        "global crop 2\n28 px",
        "6 local crops\n14 px",
        "anchor crop 1\n56 px",
        "anchor crop 2\n56 px",
    ]
    assert [text for text in texts_on(figure) if "crop" in text and "px" in text] == expected
    rows = drawn_on(figure)
    assert len(rows) == 3
    for tiles in rows:
        levels = [set(np.unique(tile.pixels)) for tile in tiles]
        assert levels == [{50}, {50}, {100, 255}, {200}, {200}]
        widths = [tile.pixels.shape[1] for tile in tiles]
        assert widths[0] == widths[1] == widths[3] == 168
        # Two rows of three, half as large, with gaps between.
        assert 3 * 84 < widths[2] < 3.3 * 84
        assert (tiles[2].pixels == 100).all(-1).sum() == 6 * 84**2
    wider = texts_on(crops_figure(flat_batch(teacher=9, **{"global": 50}), GRAY))
    assert {"teacher crop 1\n21 px", "teacher crop 2\n21 px"} <= set(wider)


def test_views_without_global_crops_are_refused() -> None:
    with pytest.raises(DataError, match="makes local crops"):
        crops_figure(flat_batch(local=1), GRAY)


def test_a_sheet_keeps_every_picture_in_its_row_and_column() -> None:
    def tile(level: int, side: int) -> Tile:
        return Tile(np.full((side, side, 3), level, np.uint8))

    rows = [
        [tile(1, 40), tile(2, 20), tile(3, 30)],
        [tile(4, 20), None, tile(5, 50)],
    ]
    heads, labels = ["left", "middle", "right"], ["first", "second"]
    figure = draw_sheet("A title", "a note", rows, heads=heads, labels=labels, narrowest=80)
    first, second = drawn_on(figure)
    assert [int(each.pixels[5, 5, 0]) for each in first] == [1, 2, 3]
    assert [int(each.pixels[5, 5, 0]) for each in second] == [4, 5]
    for each, given in zip([*first, *second], (40, 20, 30, 20, 50), strict=True):
        assert each.pixels.shape == (given, given, 3)
        assert len(np.unique(each.pixels)) == 1
    assert first[0].left == second[0].left
    assert first[2].left == second[1].left
    for text in ("A title", "a note", "left", "middle", "right", "first", "second"):
        assert text in texts_on(figure)


@pytest.mark.parametrize(
    ("side", "local", "count"), [(28, 14, 6), (224, 96, 6), (512, 112, 6), (224, 96, 20)]
)
def test_figure_is_a_png_of_sensible_size(
    tmp_path: Path, side: int, local: int, count: int
) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    batch = {"global": draw(2, count, 3, side, side), "local": draw(8, count, 3, local, local)}
    path = tmp_path / "figures" / "crops.png"
    save_png(crops_figure(batch, RGB), path)
    picture = read_png(path)
    assert 500 <= picture.shape[1] <= 2100
    assert 500 <= picture.shape[0] <= 2300
    assert 0.2 < (picture < 250).mean() < 0.95
    assert [entry.name for entry in path.parent.iterdir()] == ["crops.png"]


def test_heads_of_narrow_columns_are_not_cut() -> None:
    tile = Tile(np.zeros((200, 40, 3), np.uint8))
    heads = ["image", "PCA of foreground", "at 28 px: 4 x 4 patches\n62%"]
    figure = draw_sheet("Title", "", [[tile] * 3], heads=heads, narrowest=110)
    shown = [" ".join(text.split()) for text in texts_on(figure)]
    for head in heads:
        assert " ".join(head.split()) in shown
