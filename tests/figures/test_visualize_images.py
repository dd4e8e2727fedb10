"""Which images are shown, and how the backbone sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dinov3_figures import images
from dinov3_figures.images import choose, look, patch_grid, seen_shape
from process_groups import run_processes
from visualize_support import (
    SIZES,
    LastOnly,
    LastOnlyConfig,
    Pixels,
    PixelsConfig,
    Scenes,
    ScenesConfig,
    registry,
    settings,
)

from dinov3_framework import DataError, LoadedBackbone, RecipeError, load_recipe_backbone, normalize


def scenes(count: int = 4, corrupt: tuple[int, ...] = ()) -> Scenes:
    return Scenes(ScenesConfig(count=count, corrupt=corrupt), channels=3)


def subject() -> LoadedBackbone:
    return load_recipe_backbone(settings(), registry())


# --------------------------------------------------------------------------- which
def test_images_are_spread_over_the_dataset() -> None:
    assert choose(scenes(100), None, 4) == [range(start, start + 25) for start in (0, 25, 50, 75)]
    assert len(choose(scenes(100), None, None)) == 8
    assert [list(each) for each in choose(scenes(3), None, None)] == [[0], [1], [2]]


def test_names_and_patterns_pick_in_their_order_and_once() -> None:
    names = ["dir 7/scene&7.png", "dir 1*/*", "dir 1?/scene&12.png"]
    picked = [list(each) for each in choose(scenes(14), names, None)]
    assert picked == [[7], [1], [10], [11], [12], [13]]
    assert [list(each) for each in choose(scenes(14), names, 2)] == [[7, 1, 10], [11, 12, 13]]


def test_names_that_pick_nothing_are_all_said_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        choose(scenes(), ["dir 1/scne&1.png", "dir 2/*", "*.jpg"], None)
    first, second = caught.value.problems
    assert first.where == "names[0]"
    assert "did you mean 'dir 1/scene&1.png'" in first.hint
    assert second.where == "names[2]"
    assert "'dir 0/scene&0.png'" in second.hint


def test_a_pattern_that_picks_thousands_asks_for_a_count() -> None:
    with pytest.raises(RecipeError, match="pick 1,000 images"):
        choose(scenes(1000), ["*"], None)
    assert len(choose(scenes(1000), ["*"], 300)) == 300


def test_an_empty_dataset() -> None:
    with pytest.raises(DataError, match="holds no images"):
        choose(scenes(0), None, None)


# --------------------------------------------------------------------------- how large
@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [
        (None, "shorter", (96, 208)),  # 100 x 206: to the nearest multiples
        (32, "shorter", (32, 64)),
        (50, "shorter", (48, 96)),
        (64, "longer", (32, 64)),
        (16, "longer", (16, 16)),  # one patch at least
    ],
)
def test_sides_are_whole_patches_at_the_image_s_aspect(
    size: int | None, side: str, expected: tuple[int, int]
) -> None:
    assert seen_shape(100, 206, size, side, 16) == expected
    assert seen_shape(206, 100, size, side, 16) == expected[::-1]


# --------------------------------------------------------------------------- looking
def test_each_image_is_seen_at_its_own_size() -> None:
    dataset = scenes()
    seen = look(subject(), dataset, choose(dataset, None, None), settings())
    assert [tuple(each.features.shape[:2]) for each in seen] == [(h // 4, w // 4) for h, w in SIZES]
    assert [each.original for each in seen] == list(SIZES)
    assert [each.label for each in seen] == ["tops", "shoes"] * 2
    assert seen[1].name == "dir 1/scene&1.png"
    enlarged = look(subject(), dataset, [[0]], settings(size=64))
    assert enlarged[0].image.shape == (3, 64, 96)
    assert enlarged[0].features.shape == (16, 24, 49)


def test_a_layer_by_either_number() -> None:
    dataset = scenes()
    first, last = (
        look(subject(), dataset, [[0]], settings(layer=layer))[0].features for layer in (-2, 1)
    )
    assert first.shape[-1] == 48
    assert torch.equal(last[..., :48], first)


def test_patches_lie_where_their_pixels_are() -> None:
    backbone = Pixels(PixelsConfig(in_chans=1))
    backbone.init_weights()
    image = torch.zeros(1, 8, 12)
    image[0, 4:, 8:] = 1.0
    features = patch_grid(backbone, image, layer=0)
    assert features.shape == (2, 3, 16)
    assert [tuple(place) for place in (features[..., 0] > 1.5).nonzero().tolist()] == [(1, 2)]
    assert not features.requires_grad


def test_a_backbone_that_offers_the_least() -> None:
    image = normalize(scenes()[0].image, settings().images)
    features = patch_grid(LastOnly(LastOnlyConfig()), image, layer=-1)
    assert features.shape == (8, 12, 3)
    torch.testing.assert_close(features[2, 3], image[:, 8:12, 12:16].mean((1, 2)))


def test_what_cannot_be_decoded_gives_way_to_the_next(caplog: pytest.LogCaptureFixture) -> None:
    dataset = scenes(8, corrupt=(0, 4, 5))
    seen = look(subject(), dataset, choose(dataset, None, 4), settings())
    assert [each.name for each in seen] == [f"dir {i}/scene&{i}.png" for i in (1, 2, 6)]
    assert caplog.text.count("cannot be decoded") == 3
    with pytest.raises(DataError, match="none of the chosen images can be decoded"):
        look(subject(), dataset, [[0], [4, 5]], settings())


def test_images_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"is uint8 \[1, 32, 48\] where uint8 \[3, H, W\]"):
        look(subject(), Scenes(ScenesConfig(), channels=1), [[0]], settings())
    monkeypatch.setattr(images, "_MOST_PATCHES", 90)
    with pytest.raises(DataError, match=r'32 x 48 px, 96 patches.*side = "longer"'):
        look(subject(), scenes(), [[0]], settings())


def test_features_that_are_not_finite() -> None:
    backbone = Pixels(PixelsConfig())
    torch.nn.init.constant_(backbone.shift, torch.nan)
    with pytest.raises(DataError, match="not finite"):
        patch_grid(backbone, torch.zeros(3, 8, 8), layer=0)


# --------------------------------------------------------------------------- processes
def on_two() -> dict[str, Any]:
    """What one of two processes got, and the error that came of no image at all."""
    dataset = scenes(5, corrupt=(1,))
    seen = look(subject(), dataset, choose(dataset, None, None), settings())
    try:
        look(subject(), scenes(5, corrupt=(0, 1, 2, 3, 4)), [[0], [1]], settings())
        error = "none"
    except DataError as caught:
        error = str(caught)
    return {
        "names": [each.name for each in seen],
        "features": [each.features for each in seen],
        "error": error,
    }


@pytest.mark.slow
def test_processes_share_the_images_and_all_get_everything(tmp_path: Path) -> None:
    alone = look(subject(), scenes(5, corrupt=(1,)), [[0], [1], [2], [3], [4]], settings())
    for result in run_processes(2, tmp_path, on_two):
        assert result["names"] == [each.name for each in alone]
        assert "none of the chosen" in result["error"]
        for found, expected in zip(result["features"], alone, strict=True):
            assert torch.equal(found, expected.features)
