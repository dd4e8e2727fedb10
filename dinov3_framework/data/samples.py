"""Looks at one sample of a dataset before anything is trained or measured on it.

A wrong id ends in a device assertion somewhere in a loss, and depth in millimeters in a loss that
looks well: here both are told while a recipe is checked.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from dinov3_framework.contracts.data import Dataset, Sample, StreamDataset, Target
from dinov3_framework.contracts.running import Rows
from dinov3_framework.errors import CorruptSampleError, WrongTargetError, first_few, printable

_TRIED = 8  # samples, until one can be read and has a truth
_BY_PIXEL = ("mask", "map")
# Medians of maps outside of these are likely to be in another unit than the dataset says.
_PLAUSIBLE = {"m": (0.01, 1000.0)}
_SCALE = "is scale (what a stored 1 is in the unit) meant?"
_IDS = "is reduce_zero_label, offset, ignore_index or n_classes meant?"


@frozen
class SampleCheck:
    """What a sample shows: rows for a check's report, and what has to be mended first."""

    rows: Rows = ()
    complaints: tuple[str, ...] = ()


def check_sample(
    dataset: Dataset | StreamDataset | None,
    names: Collection[str] | None = None,
    *,
    same_size: bool = True,
) -> SampleCheck:
    """What the first sample that can be read shows of its targets by pixel.

    ``names`` are the targets that matter, by default all. Nothing is read for others, nor of a
    stream. ``same_size`` wants targets to be as large as images, as transforms do; evaluations do
    not need it. Samples that cannot be read, and those without any truth, are passed over, as long
    as one of a few that are spread over the data is better.
    """
    if not isinstance(dataset, Dataset):
        return SampleCheck()
    wanted = {
        name: target
        for name, target in dataset.targets.items()
        if target.kind in _BY_PIXEL and (names is None or name in names)
    }
    if not wanted:
        return SampleCheck()
    failed: list[str] = []
    empty: list[str] = []
    rows: Rows = ()
    for index in _spread(len(dataset)):
        try:
            sample = dataset[index]
        except WrongTargetError as error:
            return SampleCheck((), (str(error),))
        except CorruptSampleError as error:
            failed.append(str(error))
            continue
        name = printable(dataset.name(index), kept="")
        complaints = [
            text for key in wanted for text in _complaints(key, wanted[key], sample, same_size)
        ]
        if complaints:
            return SampleCheck((), tuple(f"{name}: {text}" for text in complaints))
        rows = [("sample", name), *(_row(k, wanted[k], sample.targets[k]) for k in wanted)]
        rows += [("note", note) for k in wanted for note in _notes(k, wanted[k], sample)]
        if not (void := [k for k in wanted if not _known(wanted[k], sample.targets[k]).any()]):
            return SampleCheck(rows)
        empty.append(f"{name}: all of {', '.join(void)} is to be ignored")
    if not empty:
        text = f"none of {len(failed)} samples can be read: {first_few(failed, 2, '; ')}"
        return SampleCheck((), (text,))
    text = f"none of {len(empty)} samples has any truth ({empty[0]})"
    return SampleCheck(rows, (f"{text}; {_IDS if 'mask' in _kinds(wanted) else _SCALE}",))


def sample_complaints(
    dataset: Dataset | StreamDataset | None,
    names: Collection[str] | None = None,
    *,
    same_size: bool = True,
) -> tuple[str, ...]:
    """The complaints of :func:`check_sample` alone."""
    return check_sample(dataset, names, same_size=same_size).complaints


def _spread(count: int) -> list[int]:
    """The indices that are tried: the first, and some over all the rest."""
    last = max(count - 1, 0)
    return sorted({round(place * last / (_TRIED - 1)) for place in range(_TRIED)} if count else ())


def _kinds(wanted: dict[str, Target]) -> set[str]:
    return {target.kind for target in wanted.values()}


def _complaints(name: str, target: Target, sample: Sample, same_size: bool) -> list[str]:
    """What is wrong with one target of a sample."""
    value: Any = sample.targets.get(name)
    if not isinstance(value, Tensor) or value.ndim != 2:
        what = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        return [f"the {name} is {what}, not a tensor [H, W]"]
    is_map = target.kind == "map"
    if value.is_floating_point() != is_map:
        return [f"the {name} holds {value.dtype}, not {'float32' if is_map else 'integers'}"]
    found = []
    height, width = sample.image.shape[-2:]
    if same_size and value.shape != (height, width):
        rows, columns = value.shape
        found.append(f"the {name} is {columns} x {rows} pixels, the image {width} x {height}")
    if target.kind == "mask" and target.count is not None:
        ids = torch.unique(value.as_subclass(Tensor)).tolist()
        known = range(target.count)
        if odd := [
            number for number in ids if number not in known and number != target.ignore_index
        ]:
            found.append(
                f"the {name} holds the ids {first_few(odd)}, and ids of {target.count} classes end "
                f"at {target.count - 1}; {_IDS}"
            )
    return found


def _known(target: Target, value: Tensor) -> Tensor:
    """Where there is a truth, bool [H, W]."""
    plain = value.as_subclass(Tensor)
    if target.kind == "map":
        return plain.isfinite()
    if target.ignore_index is None:
        return torch.ones_like(plain, dtype=torch.bool)
    return plain != target.ignore_index


def _row(name: str, target: Target, value: Tensor) -> tuple[str, str]:
    """What a target holds, in words."""
    known = _known(target, value)
    void = 1 - float(known.float().mean())
    values = value.as_subclass(Tensor)[known]
    if not values.numel():
        return name, "nothing but what is to be ignored"
    if target.kind == "map":
        unit = f" {target.unit}" if target.unit else ""
        text = f"{values.min():.3g} to {values.max():.3g}{unit}, median {values.median():.3g}"
        return name, f"{text}; {void:.0%} unknown"
    ids = torch.unique(values).tolist()
    names = target.classes
    shown = ids if names is None else [f"{number} {printable(names[number])}" for number in ids]
    return name, f"{first_few(shown, 6)} of {target.count} classes; {void:.0%} ignored"


def _notes(name: str, target: Target, sample: Sample) -> list[str]:
    values = sample.targets[name].as_subclass(Tensor)
    values = values[_known(target, values)]
    if target.kind != "map" or target.unit not in _PLAUSIBLE or not values.numel():
        return []
    low, high = _PLAUSIBLE[target.unit]
    median = float(values.abs().median())
    if low <= median <= high:
        return []
    return [f"a median {name} of {median:.3g} {target.unit} is odd; {_SCALE}"]
