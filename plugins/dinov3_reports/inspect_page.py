"""The page of an inspection."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from markupsafe import Markup

from dinov3_framework import Augmentation
from dinov3_framework.errors import first_few, printable
from dinov3_framework.runtime.report import Block, Image, Section, write_report
from dinov3_reports.charts import DENSITY, classes_chart, sizes_chart
from dinov3_reports.findings import Classes, Findings
from dinov3_reports.looking import Seen
from dinov3_reports.shown import in_a_row, pixels_of, veil
from dinov3_reports.subject import Subject

_LISTED = 50  # rows of a table before it is cut
_COMMON = 8  # sizes in a table
_NARROWEST = 104  # pixels that the text below a picture needs
_TINY = 64  # pixels up to which images are enlarged
_APART = 0.01  # two ways to count pixels, before both are shown


def write_page(
    path: Path,
    subject: Subject,
    found: Findings,
    rows: Sequence[tuple[str, str]],
    *,
    sheet: Sequence[Seen],
    augmented: Sequence[Seen],
    bands: Any,
    seed: int,
) -> None:
    """Write everything on one page; raises ``OutputError``."""
    facts: dict[str, Any] = {}
    for label, value in rows:
        facts[label] = f"{facts[label]}; {value}" if label in facts else value
    sections = [
        Section(blocks=[facts]),
        Section("In short", [_list(_short(subject, found))]),
        *(_classes(each, found) for each in found.classes),
        _sizes(subject, found),
        _channels(found),
        *([] if bands is None else [Section("Bands", [_table(bands)])]),
        _unreadable(found),
        _repeated(found),
    ]
    if sheet:
        sections.append(_sheet(subject, found, sheet, seed))
    if subject.augmentation is not None:
        sections.append(_augmented(subject.augmentation, augmented, seed))
    write_report(path, "A look at the data", sections, style=_STYLE)


def _list(lines: Sequence[tuple[bool, str]]) -> Markup:
    """Lines of which some are warnings, which a word says too, and not the color alone."""
    items = [
        Markup('<span class="{}">{}</span> {}').format(
            "warning" if is_warning else "fine",
            "Look:" if is_warning else "Fine:",
            printable(text),
        )
        for is_warning, text in lines
    ]
    return Markup("<br>").join(items)


def _short(subject: Subject, found: Findings) -> list[tuple[bool, str]]:
    """What is odd about the data, and what is not: (whether to look at it, a line)."""
    number = len(found.unreadable)
    share = f"{number:,} of {counted(found.looked_at, 'image')} cannot be read"
    lines = [(number > 0, f"{share}; unreadable.txt lists them" if number else share)]
    repeated = f"repeated images, pixel by pixel: {found.repeats:,}"
    if found.contradicting:
        repeated += f"; {counted(len(found.contradicting), 'group')} with different classes"
    lines.append((found.repeats > 0, repeated))
    if found.blank:
        names = first_few(each.name for each in found.blank)
        lines.append((True, f"of one color: {counted(len(found.blank), 'image')}, {names}"))
    for each in found.classes:
        text = f"{each.target}: the largest class has {each.imbalance:.3g} times the smallest"
        if each.empty:
            where = "" if found.is_all else " looked at"
            text += f"; without any image{where}: {first_few(each.empty)}"
        lines.append((bool(each.empty) or each.imbalance > 10, text))
    if size := _largest_crop(subject.augmentation):
        small = int((found.sizes.min(1) < size).sum())
        text = f"smaller than the largest crops, {size} px, and so enlarged: "
        lines.append((small > 0, f"{text}{counted(small, 'image')}"))
    return lines


# --------------------------------------------------------------------------- sections
def _classes(classes: Classes, found: Findings) -> Section:
    order, total = classes.order, max(int(classes.counts.sum()), 1)
    names = [classes.names[label] for label in order]
    counts = [int(classes.counts[label]) for label in order]
    there = sum(1 for count in counts if count)
    text = (
        f"{len(order):,} classes, {there:,} of them among the {len(found.seen):,} images that can "
        f"be read. The largest has {classes.imbalance:.3g} times the {classes.what} of the "
        "smallest that is not empty."
    )
    chart = classes_chart(names, counts, classes.what)
    alt = f"{classes.what} of each class, from the largest; the same as the table below"
    table = [
        {
            "class": name,
            classes.what: count,
            "share": f"{count / total:.2%}",
            **({} if classes.what == "images" else {"in images": int(classes.images[label])}),
            "": "" if count else "EMPTY",
        }
        for label, name, count in zip(order, names, counts, strict=True)
    ]
    blocks: list[Block] = [text, [_chart(chart, alt)]]
    if len(table) > 2 * _LISTED:
        left = len(table) - 2 * _LISTED
        blocks += [
            table[:_LISTED],
            f"{left:,} classes between are left out here; results.json has all.",
            table[-_LISTED:],
        ]
    else:
        blocks.append(table)
    return Section(f"Classes of {classes.target}", blocks)


def _sizes(subject: Subject, found: Findings) -> Section:
    sizes = found.sizes
    height, width = sizes.T
    common = Counter(map(tuple, sizes.tolist())).most_common(_COMMON)
    blocks: list[Block] = []
    if len(set(map(tuple, sizes.tolist()))) == 1:
        blocks.append(f"All images are {width[0]} x {height[0]} px (width x height).")
        return Section("Sizes", blocks)
    size = _largest_crop(subject.augmentation)
    chart = sizes_chart(sizes, [(size, f"crops of {size} px")] if size else [])
    blocks.append([_chart(chart, "widths against heights; shorter sides; aspect ratios")])
    aspect = width / height
    odd = {
        "smallest": int(np.argmin(height * width)),
        "largest": int(np.argmax(height * width)),
        "tallest": int(np.argmin(aspect)),
        "widest": int(np.argmax(aspect)),
    }
    blocks.append(
        [
            {
                "": what,
                "image": found.seen[at].name,
                "width x height, px": f"{width[at]} x {height[at]}",
                "aspect ratio": f"{aspect[at]:.3g}",
            }
            for what, at in odd.items()
        ]
    )
    rows = [
        {
            "width x height, px": f"{one[1]} x {one[0]}",
            "images": count,
            "share": f"{count / len(sizes):.1%}",
        }
        for one, count in common
    ]
    distinct = len({*map(tuple, sizes.tolist())})
    blocks += [f"{distinct:,} different sizes; the most frequent:", rows]
    return Section("Sizes", blocks)


def _channels(found: Findings) -> Section:
    channels = found.channels
    table = [
        {"channel": place, "mean": f"{mean:.4f}", "deviation": f"{std:.4f}"}
        for place, (mean, std) in enumerate(zip(channels.mean, channels.std, strict=True))
    ]
    blocks: list[Block] = [
        "Means and standard deviations of values in 0..1, over the pixels of the "
        f"{len(found.seen):,} images that can be read; a large image counts more than a small one.",
        table,
        Markup("For a recipe:</p><pre>{}</pre><p>").format(channels.recipe),
    ]
    if channels.apart > _APART:
        mean, std = (
            ", ".join(f"{value:.4f}" for value in values)
            for values in (channels.mean_by_image, channels.std_by_image)
        )
        blocks.append(
            "With every image counted alike, as a training with crops of one size sees them: "
            f"mean = [{mean}], std = [{std}]."
        )
    return Section("Channels", blocks)


def _unreadable(found: Findings) -> Section:
    if not found.unreadable:
        text = f"All {found.looked_at:,} images looked at can be read."
        return Section("Unreadable images", [text])
    rows = [{"image": each.name, "why": each.reason} for each in found.unreadable[:_LISTED]]
    more = len(found.unreadable) - len(rows)
    blocks: list[Block] = [f"{len(found.unreadable):,} of {found.looked_at:,} looked at.", rows]
    if more:
        blocks.append(f"{more:,} more are in unreadable.txt.")
    return Section("Unreadable images", blocks)


def _repeated(found: Findings) -> Section:
    if not found.repeated:
        return Section("Repeated images", ["No two images looked at have equal pixels."])
    contradicting = {group[0].place for group in found.contradicting}
    rows = [
        {
            "times": len(group),
            "images": first_few((each.name for each in group), 6),
            "": "DIFFERENT CLASSES" if group[0].place in contradicting else "",
        }
        for group in found.repeated[:_LISTED]
    ]
    blocks: list[Block] = [
        f"{counted(len(found.repeated), 'group')} of images with equal pixels. Images that "
        "merely look alike, or were saved once more, are not found.",
        rows,
    ]
    if len(found.repeated) > len(rows):
        blocks.append("results.json lists all of them.")
    return Section("Repeated images", blocks)


def _sheet(subject: Subject, found: Findings, sheet: Sequence[Seen], seed: int) -> Section:
    names = {each.target: each.names for each in found.classes if each.what != "pixels"}
    images = []
    for each in sheet:
        labels = [
            names[target][label]
            for target, counts in each.classes.items()
            for label in counts
            if target in names
        ]
        title = first_few(labels, 3) if labels else each.name
        size = f"{each.width} x {each.height} px"
        note = f"{each.name}, {size}" if labels else size
        if each.thumbnail is not None:
            images.append(_tile(pixels_of(each.thumbnail), title, note, each.name))
    text = f"{len(images):,} of the images, chosen by seed {seed}, as the dataset gives them."
    if len(subject.images.mean) not in (1, 3):
        text += " Of their channels the first three are shown, each stretched to its range."
    return Section("Contact sheet", [text, images])


def _tile(pixels: np.ndarray, title: str, note: str, alt: str) -> Image:
    """A picture wide enough for its text: tiny ones are enlarged, others have white beside them."""
    if max(pixels.shape[:2]) <= _TINY:
        return Image(pixels, title, note, alt, _NARROWEST, crisp=True)
    lack = max(_NARROWEST - pixels.shape[1], 0)
    padded = np.pad(pixels, ((0, 0), (0, lack), (0, 0)), constant_values=255)
    return Image(padded, title, note, alt, padded.shape[1])


def _augmented(augmentation: Augmentation, seen: Sequence[Seen], seed: int) -> Section:
    cropped = [
        (each, each.thumbnail, dict(each.crops))
        for each in seen
        if each.crops is not None and each.thumbnail is not None
    ]
    complaints = [f"{each.name}: {each.complaint}" for each in seen if each.complaint]
    views = augmentation.views
    order = sorted(views, key=lambda view: -views[view].size)
    masks = None
    if augmentation.makes_masks and "global" in views and cropped:
        total = views["global"].crops * len(cropped)
        masks = augmentation.masks(rows=range(total), total=total, seed=seed, step=0)
    images = []
    for place, (each, image, crops) in enumerate(cropped):
        if masks is not None:
            # Crop g of image j is row g * images + j.
            crops["global"] = veil(crops["global"], masks[place :: len(cropped)])
        pixels = in_a_row(image, [crops[view] for view in order])
        images.append(
            Image(pixels, each.name, f"{each.width} x {each.height} px", width=pixels.shape[1])
        )
    said = ", ".join(f"{views[view].crops} {view} of {views[view].size} px" for view in order)
    text = f"Each row is an image, then its crops: {said}. They are drawn by seed {seed}."
    if masks is not None:
        text += " Gray: patches that the student does not see."
    blocks: list[Block] = [text]
    if complaints:
        blocks.append(f"The augmentation failed: {first_few(complaints, 3, '; ')}")
    return Section("What the augmentation makes of them", [*blocks, images] if images else blocks)


# --------------------------------------------------------------------------- parts
def counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _chart(pixels: np.ndarray, alt: str) -> Image:
    return Image(pixels, alt=alt, width=pixels.shape[1] // DENSITY)


def _largest_crop(augmentation: Augmentation | None) -> int:
    """Pixels of the largest crop; 0 without an augmentation."""
    if augmentation is None:
        return 0
    return max((view.size for view in augmentation.views.values()), default=0)


def _table(statistics: Any) -> Block:
    """A dataset's own statistics, in whatever form of tables it gives them."""
    if attrs.has(type(statistics)):
        statistics = attrs.asdict(statistics)
    if isinstance(statistics, Mapping):
        columns = list(statistics.values())
        if columns and all(isinstance(each, Mapping) for each in columns):  # by band
            return [{"band": str(band), **row} for band, row in statistics.items()]
        listed = (list, tuple, np.ndarray, torch.Tensor)
        lengths = {len(each) for each in columns if isinstance(each, listed)}
        if len(lengths) == 1:  # by number, each for all bands
            return [
                {"band": band}
                | {
                    str(name): _plain(each[band])
                    for name, each in statistics.items()
                    if isinstance(each, listed)
                }
                for band in range(lengths.pop())
            ]
        return {str(name): str(each) for name, each in statistics.items()}
    if isinstance(statistics, Sequence) and not isinstance(statistics, str):
        rows = [attrs.asdict(each) if attrs.has(type(each)) else each for each in statistics]
        if rows and all(isinstance(each, Mapping) for each in rows):
            return rows
    return str(statistics)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


_STYLE = """\
.warning { color: #b3261e; font-weight: bold; }
.fine { color: #1a7f37; font-weight: bold; }
pre { background: #f6f8fa; border: 1px solid var(--faint); padding: 8px 12px; overflow-x: auto; }
"""
