"""The sizes of crops in each resolution, and what can be wrong with them."""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from dinov3_crops.configs import MultiCropConfig
from dinov3_framework import Problem, View

GLOBAL_CROPS = 2

_SUM_TOLERANCE = 1e-6  # of the ratios
_WHOLE_TOLERANCE = 0.01  # pixels: teacher_scale may be a rounded third


def by_resolution(config: MultiCropConfig) -> list[tuple[float, MultiCropConfig]]:
    """Each resolution's share of the steps, and its config as if it were the only one."""
    if not config.resolutions:
        return [(1.0, config)]
    return [
        (
            one.ratio,
            attrs.evolve(
                config,
                resolutions=(),
                global_size=one.global_size or config.global_size,
                local_size=one.local_size or config.local_size,
                anchor_size=one.anchor_size or config.anchor_size,
            ),
        )
        for one in config.resolutions
    ]


def views_of(config: MultiCropConfig, patch_size: int) -> dict[str, View]:
    """What is made in one resolution."""
    views = {"global": View(GLOBAL_CROPS, config.global_size)}
    if config.local_crops:
        over = config.local_size % patch_size if config.trim_local_crops else 0
        views["local"] = View(config.local_crops, config.local_size - over)
    if config.anchor_size is not None:
        views["anchor"] = View(GLOBAL_CROPS, config.anchor_size)
    if config.teacher_scale is not None:
        views["teacher"] = View(GLOBAL_CROPS, round(config.teacher_scale * config.global_size))
    return views


def total_pixels(views: dict[str, View]) -> int:
    """Pixels of all crops of an image."""
    return sum(view.crops * view.size**2 for view in views.values())


def size_problems(config: MultiCropConfig, patch_size: int) -> list[Problem]:
    """What keeps crops from being made, or from being cut into patches."""
    found = [*_odd_local_crops(config), *_ratio_problems(config), *_unused_sizes(config)]
    for index, (_, one) in enumerate(by_resolution(config)):
        found += _patch_problems(config, one, index, patch_size)
        found += _local_problems(config, one, index)
        found += _teacher_problems(one)
    # Once where several resolutions have a size from the same key.
    return list(dict.fromkeys([*found, *_anchor_problems(config)]))


def _place(config: MultiCropConfig, index: int, key: str) -> str:
    """The key path of a resolution's size; tables are counted from 1, as by the recipe's checks."""
    if config.resolutions and getattr(config.resolutions[index], key) is not None:
        return f"augmentation.resolutions.{index + 1}.{key}"
    return f"augmentation.{key}"


def _patch_problems(
    config: MultiCropConfig, one: MultiCropConfig, index: int, patch_size: int
) -> Iterator[Problem]:
    sizes = {"global_size": one.global_size}
    if one.local_crops and not (one.trim_local_crops and one.local_size >= patch_size):
        sizes["local_size"] = one.local_size
    if one.anchor_size is not None:
        sizes["anchor_size"] = one.anchor_size
    for key, size in sizes.items():
        if size % patch_size:
            below = size - size % patch_size
            near = f"{below} or {below + patch_size}" if below else f"{patch_size}"
            trim = ", or trim_local_crops = true" if key == "local_size" and below else ""
            yield Problem(
                _place(config, index, key),
                f"{size} is no multiple of the patch size {patch_size}",
                f"try {near}{trim}",
            )


def _odd_local_crops(config: MultiCropConfig) -> Iterator[Problem]:
    if config.local_from_global and config.local_crops % GLOBAL_CROPS:
        yield Problem(
            "augmentation.local_crops",
            f"{config.local_crops} is odd, but local_from_global takes half of the local "
            "crops from each global crop",
            f"try {config.local_crops + 1}",
        )


def _local_problems(config: MultiCropConfig, one: MultiCropConfig, index: int) -> Iterator[Problem]:
    if one.local_crops and one.local_from_global and one.local_size > one.global_size:
        yield Problem(
            _place(config, index, "local_size"),
            f"{one.local_size} is above global_size = {one.global_size}, out of which "
            "local_from_global cuts the local crops",
            f"try at most {one.global_size}, or local_from_global = false",
        )


def _teacher_problems(one: MultiCropConfig) -> Iterator[Problem]:
    if one.teacher_scale is None:
        return
    size = one.teacher_scale * one.global_size
    if abs(size - round(size)) > _WHOLE_TOLERANCE or round(size) < 1:
        sides = [side for side in (int(size), int(size) + 1) if side]
        near = " or ".join(f"{side / one.global_size:.6g} ({side} px)" for side in sides)
        yield Problem(
            "augmentation.teacher_scale",
            f"{one.teacher_scale:g} x global_size = {one.global_size} is {size:g} pixels, which "
            "is no whole number",
            f"try {near}",
        )


def _ratio_problems(config: MultiCropConfig) -> Iterator[Problem]:
    total = sum(one.ratio for one in config.resolutions)
    if config.resolutions and abs(total - 1) > _SUM_TOLERANCE:
        scaled = ", ".join(f"{one.ratio / total:.4g}" for one in config.resolutions)
        yield Problem(
            "augmentation.resolutions",
            f"the ratios sum to {total:g}, not to 1",
            f"in the same proportion they are about {scaled}",
        )


def _anchor_problems(config: MultiCropConfig) -> Iterator[Problem]:
    """Anchors are larger than global crops by one factor: their features are resized by it."""
    resolutions = [one for _, one in by_resolution(config)]
    sizes = [
        (index, one.global_size, one.anchor_size)
        for index, one in enumerate(resolutions)
        if one.anchor_size is not None
    ]
    if 0 < len(sizes) < len(resolutions):
        yield Problem(
            "augmentation.resolutions",
            f"{len(sizes)} of {len(resolutions)} resolutions have anchor crops, which all have or "
            "none",
            "give each table an anchor_size, or augmentation.anchor_size for all, or leave it out "
            "everywhere",
        )
        return
    for index, side, anchor in sizes:
        _, first_side, first_anchor = sizes[0]
        if anchor * first_side != first_anchor * side:
            fitting = first_anchor * side / first_side
            yield Problem(
                _place(config, index, "anchor_size"),
                f"{anchor} is {anchor / side:.4g} times global_size = {side}, in the first table "
                f"it is {first_anchor / first_side:.4g} times: the features of anchors are resized "
                "by one factor throughout a run",
                f"try {fitting:.0f}"
                if fitting.is_integer()
                else f"take sizes of the proportion {first_anchor}:{first_side}",
            )


def _unused_sizes(config: MultiCropConfig) -> Iterator[Problem]:
    """Sizes that were set and that no resolution has: all tables bring another."""
    defaults = {field.name: field.default for field in attrs.fields(MultiCropConfig)}
    keys = ["global_size", "local_size", "anchor_size"]
    for key in keys if config.resolutions else []:
        size = getattr(config, key)
        used = {getattr(one, key) for _, one in by_resolution(config)}
        if size != defaults[key] and size not in used:
            yield Problem(
                f"augmentation.{key}",
                f"no resolution has {size}: each table of augmentation.resolutions brings a "
                f"{key} of its own",
                f'leave it out (drop = ["augmentation.{key}"] where it is inherited), or leave '
                f"{key} out of a table",
            )
