"""What a look at many samples comes to: numbers, classes, sizes, repeated images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import numpy as np

from dinov3_framework import Target
from dinov3_framework.errors import printable
from dinov3_reports.looking import Seen, Unreadable
from dinov3_reports.moments import merge


@attrs.frozen(eq=False)
class Channels:
    """Means and standard deviations [C] of values in 0..1."""

    mean: np.ndarray  # every pixel counts once
    std: np.ndarray
    mean_by_image: np.ndarray  # every image counts once, whatever its size
    std_by_image: np.ndarray

    @classmethod
    def of(cls, seen: Sequence[Seen]) -> Channels:
        by_pixel = merge(each.moments for each in seen)
        by_image = merge(each.moments.as_one() for each in seen)
        return cls(by_pixel.mean, by_pixel.std, by_image.mean, by_image.std)

    @property
    def recipe(self) -> str:
        """Lines to paste into a recipe."""
        numbers = (
            ", ".join(f"{value:.4f}" for value in values) for values in (self.mean, self.std)
        )
        mean, std = numbers
        return f"[images]\nchannels = {len(self.mean)}\nmean = [{mean}]\nstd = [{std}]"

    @property
    def apart(self) -> float:
        """How far the two ways of counting are from each other."""
        pairs = ((self.mean, self.mean_by_image), (self.std, self.std_by_image))
        return float(max(np.abs(one - other).max() for one, other in pairs))


@attrs.frozen(eq=False)
class Classes:
    """How often the classes of a target are in the images."""

    target: str
    what: str  # that is counted: "images", "objects" or "pixels"
    names: tuple[str, ...]
    counts: np.ndarray  # int64 [classes]
    images: np.ndarray  # int64 [classes]: how many images have it

    @classmethod
    def of(cls, name: str, target: Target, seen: Sequence[Seen]) -> Classes | None:
        """None where no image has the target."""
        found = [each.classes[name] for each in seen if name in each.classes]
        if not found:
            return None
        largest = max((max(each, default=-1) for each in found), default=-1)
        size = max(target.count or 0, largest + 1)
        counts, images = np.zeros(size, np.int64), np.zeros(size, np.int64)
        for each in found:
            for label, count in each.items():
                counts[label] += count
                images[label] += 1
        given = target.classes or ()
        names = [
            printable(given[label], kept="") if label < len(given) else str(label)
            for label in range(size)
        ]
        what = "pixels" if target.kind == "mask" else "images"
        if target.kind == "class" and target.per_object:
            what = "objects"
        return cls(name, what, tuple(names), counts, images)

    @property
    def empty(self) -> list[str]:
        return [name for name, count in zip(self.names, self.counts, strict=True) if not count]

    @property
    def imbalance(self) -> float:
        """How many times the largest class is the smallest that is not empty."""
        there = self.counts[self.counts > 0]
        return float(there.max() / there.min()) if len(there) else 1.0

    @property
    def order(self) -> list[int]:
        """The classes from the largest to the smallest."""
        found: list[int] = np.argsort(-self.counts, kind="stable").tolist()
        return found


@attrs.frozen(eq=False)
class Findings:
    """All of it."""

    seen: Sequence[Seen]  # in the order of the dataset
    unreadable: Sequence[Unreadable]
    total: int | None  # samples of the dataset; None of a stream
    channels: Channels
    classes: Sequence[Classes]
    repeated: Sequence[Sequence[Seen]]  # images with equal pixels, the largest group first

    @classmethod
    def of(
        cls,
        seen: Sequence[Seen],
        unreadable: Sequence[Unreadable],
        total: int | None,
        targets: Mapping[str, Target],
    ) -> Findings:
        seen = sorted(seen, key=lambda each: each.place)
        counted = [Classes.of(name, target, seen) for name, target in targets.items()]
        groups: dict[bytes, list[Seen]] = {}
        for each in seen:
            groups.setdefault(each.digest, []).append(each)
        repeated = [group for group in groups.values() if len(group) > 1]
        return cls(
            seen,
            sorted(unreadable, key=lambda each: each.place),
            total,
            Channels.of(seen),
            [each for each in counted if each is not None],
            sorted(repeated, key=lambda group: (-len(group), group[0].place)),
        )

    @property
    def looked_at(self) -> int:
        return len(self.seen) + len(self.unreadable)

    @property
    def is_all(self) -> bool:
        return self.looked_at == self.total

    @property
    def sizes(self) -> np.ndarray:
        """Height and width of each image, int64 [n, 2]."""
        return np.array([(each.height, each.width) for each in self.seen], np.int64)

    @property
    def blank(self) -> list[Seen]:
        """Images of one color."""
        return [each for each in self.seen if each.blank]

    @property
    def repeats(self) -> int:
        """Images that repeat an earlier one."""
        return sum(len(group) - 1 for group in self.repeated)

    @property
    def contradicting(self) -> list[Sequence[Seen]]:
        """Groups of equal images that have different classes."""
        return [
            group
            for group in self.repeated
            if any(dict(each.classes) != dict(group[0].classes) for each in group)
        ]

    @property
    def reasons(self) -> list[tuple[str, int]]:
        """Why samples cannot be read, the most frequent first."""
        return Counter(each.reason for each in self.unreadable).most_common()

    # ------------------------------------------------------------------ results.json
    def results(self) -> dict[str, Any]:
        channels = self.channels
        height, width = self.sizes.T
        return {
            "samples": self.total,
            "looked_at": self.looked_at,
            "readable": len(self.seen),
            "unreadable": [attrs.asdict(each) for each in self.unreadable],
            "images": {
                "channels": len(channels.mean),
                "mean": _rounded(channels.mean),
                "std": _rounded(channels.std),
                "mean_by_image": _rounded(channels.mean_by_image),
                "std_by_image": _rounded(channels.std_by_image),
            },
            "sizes": {
                name: {
                    "min": round(float(values.min()), 4),
                    "median": round(float(np.median(values)), 4),
                    "max": round(float(values.max()), 4),
                }
                for name, values in (
                    ("height", height),
                    ("width", width),
                    ("shorter_side", np.minimum(height, width)),
                    ("aspect_ratio", width / height),
                )
            },
            "classes": {
                each.target: {
                    "counted": each.what,
                    "counts": dict(_unique(each.names, each.counts.tolist())),
                    "empty": each.empty,
                    "imbalance": round(each.imbalance, 4),
                }
                for each in self.classes
            },
            "repeated": [[each.name for each in group] for group in self.repeated],
            "blank": [each.name for each in self.blank],
        }


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 6) for value in values]


def _unique(names: Sequence[str], values: Sequence[int]) -> list[tuple[str, int]]:
    """Pairs whose names differ: two classes may print alike."""
    seen: Counter[str] = Counter()
    found = []
    for name, value in zip(names, values, strict=True):
        seen[name] += 1
        found.append((name if seen[name] == 1 else f"{name} ({seen[name]})", value))
    return found
