"""Several crop sizes in one run: which step has which, and what is refused."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import tomli
import torch
from dinov3_crops import MaskingConfig, MultiCropConfig, ResolutionConfig
from dinov3_crops.masking import hidden_counts
from dinov3_crops.multi_crop import MultiCrop

from dinov3_framework import InvalidOption, RecipeError, Registry, View
from dinov3_framework.recipes.plain import unstructure
from dinov3_framework.recipes.structure import structure_component
from dinov3_framework.recipes.toml_text import to_toml

RATIOS = (0.3, 0.3, 0.3, 0.05, 0.05)
GLOBAL = (512, 768, 768, 768, 768)
LOCAL = (112, 112, 168, 224, 336)
ANCHOR = (768, 1152, 1152, 1152, 1152)
# As published; sizes of the sequence are in pixels, patches have 16.
PUBLISHED = MultiCropConfig(
    trim_local_crops=True,
    resolutions=tuple(
        ResolutionConfig(ratio=ratio, global_size=whole, local_size=local, anchor_size=anchor)
        for ratio, whole, local, anchor in zip(RATIOS, GLOBAL, LOCAL, ANCHOR, strict=True)
    ),
)
SIZES = ({"global_size": 48, "local_size": 16}, {"global_size": 64, "local_size": 24})


def small(*ratios: float, **options) -> MultiCropConfig:
    """Two resolutions of a few pixels, patches of 8."""
    tables = [
        ResolutionConfig(ratio=ratio, **sizes)
        for ratio, sizes in zip(ratios or (0.5, 0.5), SIZES, strict=True)
    ]
    return MultiCropConfig(**({"local_crops": 4, "resolutions": tuple(tables)} | options))


def build(config: MultiCropConfig, patch_size: int = 8) -> MultiCrop:
    return MultiCrop(config, channels=3, patch_size=patch_size)


@pytest.fixture(scope="module")
def image(picture) -> torch.Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1)


# --------------------------------------------------------------------------- which step has which
def test_steps_are_shared_out_by_the_ratios():
    augmentation = build(PUBLISHED, patch_size=16)
    variants, steps = list(augmentation.variants()), 10_000
    chosen = [variants.index(augmentation.at(7, step)) for step in range(steps)]
    seen, wanted = np.bincount(chosen, minlength=5), steps * np.array(RATIOS)
    # A chi-square of four degrees of freedom is below this with probability 1 - 1e-3.
    assert (np.square(seen - wanted) / wanted).sum() < 18.5
    # Steps are independent of each other: neighbors are equal as often as by chance.
    equal = np.mean(np.equal(chosen[1:], chosen[:-1]))
    assert equal == pytest.approx(np.square(RATIOS).sum(), abs=0.02)


def test_a_step_has_the_same_sizes_whenever_and_wherever_it_is_asked_for():
    augmentation = build(small(0.4, 0.6))
    first = [augmentation.at(3, step).views for step in range(60)]
    copied = pickle.loads(pickle.dumps(augmentation))
    assert [copied.at(3, step).views for step in reversed(range(60))][::-1] == first
    assert [build(small(0.4, 0.6)).at(3, step).views for step in range(20, 60)] == first[20:]
    assert [augmentation.at(4, step).views for step in range(60)] != first


def test_without_resolutions_it_is_always_the_same():
    augmentation = build(MultiCropConfig())
    assert list(augmentation.variants()) == [augmentation]
    assert augmentation.at(0, 5) is augmentation
    assert augmentation.share == 1


# --------------------------------------------------------------------------- what each one makes
def test_views_are_those_of_the_largest():
    augmentation = build(PUBLISHED, patch_size=16)
    views = [variant.views for variant in augmentation.variants()]
    assert augmentation.views == views[4]
    assert [(one["global"], one["anchor"]) for one in views] == [
        (View(2, whole), View(2, anchor)) for whole, anchor in zip(GLOBAL, ANCHOR, strict=True)
    ]
    assert [one["local"] for one in views] == [View(8, side) for side in (112, 112, 160, 224, 336)]
    assert [variant.share for variant in augmentation.variants()] == list(RATIOS)


def test_a_resolution_is_the_plain_augmentation_of_these_sizes(image):
    augmentation = build(small())
    for variant, sizes in zip(augmentation.variants(), SIZES, strict=True):
        plain = build(MultiCropConfig(local_crops=4, **sizes))
        made, expected = (one(image, np.random.default_rng(5)) for one in (variant, plain))
        assert made.keys() == expected.keys()
        assert all(torch.equal(made[name], expected[name]) for name in made)
        assert {name: (len(of), of.shape[-1]) for name, of in made.items()} == {
            name: (view.crops, view.size) for name, view in variant.views.items()
        }
    whole = augmentation(image, np.random.default_rng(5))
    assert all(torch.equal(whole[name], expected[name]) for name in whole)


def test_masks_are_of_the_steps_own_grid():
    augmentation, config = build(small()), MaskingConfig()
    sides = set()
    for step in range(12):
        variant = augmentation.at(1, step)
        side = variant.views["global"].size // 8
        sides.add(side)
        masks = variant.masks(rows=range(20), total=20, seed=1, step=step)
        assert masks.shape == (20, side * side)
        counts = hidden_counts(config, side * side, 20)
        assert sorted(masks.sum(1).tolist()) == sorted(counts + [0] * (20 - len(counts)))
        part = variant.masks(rows=[3, 17], total=20, seed=1, step=step)
        assert torch.equal(part, masks[[3, 17]])
    assert sides == {6, 8}


def test_what_a_table_leaves_out_is_the_augmentations_own():
    tables = (ResolutionConfig(ratio=0.5), ResolutionConfig(ratio=0.5, global_size=64))
    config = MultiCropConfig(global_size=32, local_size=16, local_crops=1, resolutions=tables)
    views = [variant.views for variant in build(config).variants()]
    assert views == [
        {"global": View(2, 32), "local": View(1, 16)},
        {"global": View(2, 64), "local": View(1, 16)},
    ]


def test_local_crops_are_trimmed_to_whole_patches(image):
    # The published recipe asks for 168 pixels of 16-pixel patches: half a patch is never seen.
    options = {"global_size": 48, "local_crops": 4, "local_size": 20}
    whole = build(MultiCropConfig(**options), patch_size=4)(image, np.random.default_rng(0))
    trimmed = build(MultiCropConfig(**options, trim_local_crops=True))
    assert trimmed.views["local"] == View(4, 16)
    crops = trimmed(image, np.random.default_rng(0))
    assert torch.equal(crops["local"], whole["local"][..., :16, :16])
    assert crops["local"].is_contiguous()
    assert torch.equal(crops["global"], whole["global"])
    with pytest.raises(RecipeError, match="5 is no multiple of the patch size 8"):
        build(MultiCropConfig(**options | {"local_size": 5}, trim_local_crops=True))
    cut = build(MultiCropConfig(**options, trim_local_crops=True, local_from_global=True))
    assert cut(image, np.random.default_rng(0))["local"].shape == (4, 3, 16, 16)


# --------------------------------------------------------------------------- recipes
def test_tables_come_back_from_the_recipe_that_is_written():
    registry = Registry.load()
    text = """
    teacher_scale = 0.5
    [[resolutions]]
    ratio = 0.25
    global_size = 48
    [[resolutions]]
    ratio = 0.75
    local_size = 24
    """
    config = structure_component(registry, "augmentation", "multi_crop", tomli.loads(text))
    tables = (
        ResolutionConfig(ratio=0.25, global_size=48),
        ResolutionConfig(ratio=0.75, local_size=24),
    )
    assert config == MultiCropConfig(teacher_scale=0.5, resolutions=tables)
    values = tomli.loads(to_toml(unstructure(registry, config)))
    assert values.pop("use") == "multi_crop"
    assert structure_component(registry, "augmentation", "multi_crop", values) == config


@pytest.mark.parametrize("option", ["ratio", "global_size", "local_size", "anchor_size"])
def test_sizes_and_ratios_are_above_zero(option):
    with pytest.raises(InvalidOption, match="must be above 0") as error:
        ResolutionConfig(**({"ratio": 1.0} | {option: 0}))
    assert error.value.name == option


def of_tables(*rows: dict[str, float], **options) -> MultiCropConfig:
    """Resolutions of equal ratios, unless a row says otherwise."""
    full = ({"ratio": 1 / len(rows)} | row for row in rows)
    return MultiCropConfig(**options, resolutions=tuple(ResolutionConfig(**row) for row in full))


@pytest.mark.parametrize(
    ("config", "where", "words"),
    [
        (small(0.5, 0.4), "resolutions", "the ratios sum to 0.9, not to 1"),
        (small(0.5, 0.4), "resolutions", "they are about 0.5556, 0.4444"),
        (
            of_tables({}, {"global_size": 44}, global_size=32),
            "resolutions.2.global_size",
            "44 is no multiple of the patch size 8\n    try 40 or 48",
        ),
        (
            of_tables({}, {"local_size": 44}),
            "resolutions.2.local_size",
            "try 40 or 48, or trim_local_crops = true",
        ),
        (of_tables({}, {"global_size": 48}, global_size=44), "global_size", "try 40 or 48"),
        (
            of_tables({"anchor_size": 44, "global_size": 32}),
            "resolutions.1.anchor_size",
            "44 is no multiple",
        ),
        (
            of_tables({"anchor_size": 64}, {}),
            "resolutions",
            "1 of 2 resolutions have anchor crops, which all have or none",
        ),
        (
            of_tables({"anchor_size": 48}, {"anchor_size": 64, "global_size": 48}, global_size=32),
            "resolutions.2.anchor_size",
            "64 is 1.333 times global_size = 48, in the first table it is 1.5 times",
        ),
        (
            of_tables({"anchor_size": 48}, {"anchor_size": 64, "global_size": 48}, global_size=32),
            "resolutions.2.anchor_size",
            "try 72",
        ),
        (
            of_tables({}, {"global_size": 48}, global_size=32, anchor_size=48),
            "anchor_size",
            "48 is 1 times global_size = 48",
        ),
        (
            of_tables({}, {"local_size": 48, "global_size": 40}, local_from_global=True),
            "resolutions.2.local_size",
            "48 is above global_size = 40",
        ),
        (
            of_tables({"global_size": 48}, {"global_size": 64}, global_size=56),
            "global_size",
            "no resolution has 56: each table of augmentation.resolutions brings a global_size",
        ),
        (
            of_tables({"local_size": 48}, local_size=56),
            "local_size",
            'leave it out (drop = ["augmentation.local_size"]',
        ),
    ],
)
def test_mistakes(config, where, words):
    with pytest.raises(RecipeError) as error:
        build(config)
    (problem,) = error.value.problems
    assert problem.where == f"augmentation.{where}"
    assert words in str(problem)


def test_what_is_wrong_with_several_resolutions_is_said_once():
    with pytest.raises(RecipeError) as error:
        build(
            of_tables({"global_size": 48}, {"global_size": 64}, {"global_size": 52}, local_size=20)
        )
    where = [problem.where for problem in error.value.problems]
    assert where == ["augmentation.local_size", "augmentation.resolutions.3.global_size"]


def test_sizes_that_are_set_may_be_those_of_a_table():
    """An inherited size that a table repeats is in use; the default of one is nobody's wish."""
    build(of_tables({"global_size": 48}, {"global_size": 64}, global_size=48))
    build(of_tables({"global_size": 48}, {"global_size": 64}))
    # Sizes that are no multiple of the patch size do not matter where nothing has them.
    build(of_tables({"global_size": 70, "local_size": 14}), patch_size=14)
