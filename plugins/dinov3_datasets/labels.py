"""Labels as data state them, numbers or names, as numbers from 0."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from attrs import evolve, frozen

from dinov3_datasets.labeled_config import LabeledConfig
from dinov3_framework import DataError, Target
from dinov3_framework.errors import first_few, printable

NONE = -1  # of a sample without a label
_HIGHEST = 2**31  # a label is a class, not a number that identifies something

Value = int | str


@frozen(eq=False)
class Labels:
    """Labels of all samples, int64 [n], ``NONE`` where there is none; and what they are."""

    values: np.ndarray
    target: Target

    def label(self, index: int) -> int | None:
        """That of one sample."""
        found = int(self.values[index])
        return None if found == NONE else found

    @property
    def digest(self) -> str:
        """The beginning of a SHA-256 of all labels and of the classes' names."""
        names = "\0".join(self.target.classes or ()).encode("utf-8", "surrogateescape")
        return hashlib.sha256(self.values.tobytes() + names).hexdigest()[:16]


class Classes:
    """The classes that labels are of, as far as they are known: by name, by number or both."""

    def __init__(self, names: Sequence[str] | None, count: int | None) -> None:
        self.target = Target("class", classes=None if names is None else tuple(names))
        if names is None:
            self.target = evolve(self.target, n_classes=count)
        self._numbers = {name: number for number, name in enumerate(names or ())}

    @classmethod
    def of(cls, config: LabeledConfig, stated: Sequence[str] | None = None) -> Classes:
        """Those that a recipe names, or else the data do."""
        return cls(config.classes or stated, config.n_classes)

    def number(self, value: Value) -> int:
        """The label that a number or a name is; ``ValueError`` says why it is none."""
        if isinstance(value, str) and value in self._numbers:
            return self._numbers[value]
        number = whole_number(value)
        if number is None:
            known = "is a name, and classes names none" if not self._numbers else "is no class"
            raise ValueError(f"label {printable(str(value))[:80]!r} {known}")
        count = _HIGHEST if self.target.count is None else self.target.count
        if not 0 <= number < count:
            raise ValueError(f"label {number} is not in 0..{count - 1}")
        return number


def whole_number(value: object) -> int | None:
    """An int, or the int that a text is; None for anything else."""
    if isinstance(value, str):
        text = value.strip()
        digits = text.removeprefix("-")
        return int(text) if digits.isascii() and digits.isdigit() and len(digits) < 19 else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def name_classes(values: Iterable[Value | None], classes: Classes) -> Classes:
    """The classes of some data: as known, or all names that occur, sorted; or by the highest label.

    Texts are names unless each of them is a whole number.
    """
    found = {value for value in values if value is not None}
    if classes.target.classes is not None or not found:
        return classes
    numbers = [whole_number(value) for value in found]
    if None in numbers and classes.target.count is None:
        return Classes(sorted(map(str, found)), None)
    if classes.target.count is None:
        highest = max(number for number in numbers if number is not None)
        return Classes(None, max(highest + 1, 1) if highest < _HIGHEST else None)
    return classes


def number_labels(
    values: Sequence[Value | None], classes: Classes, what: str, name: Callable[[int], str]
) -> Labels:
    """The labels of all samples; None has none.

    Raises ``DataError`` with all that are out of range or of no class: ``what`` are the data, and
    ``name`` tells a sample's.
    """
    classes = name_classes(values, classes)
    known: dict[Value | None, int | str] = {None: NONE}
    labels, wrong = np.full(len(values), NONE, dtype=np.int64), []
    for index, value in enumerate(values):
        if value not in known:
            try:
                known[value] = classes.number(value)  # type: ignore[arg-type]
            except ValueError as error:
                known[value] = str(error)
        found = known[value]
        if isinstance(found, str):
            wrong.append(index)
        else:
            labels[index] = found
    if wrong:
        shown = first_few((f"{printable(name(i))}: {known[values[i]]}" for i in wrong), 3, "; ")
        raise DataError(
            f"{what}: {len(wrong):,} of {len(values):,} labels are wrong: {shown}\n"
            "    state all classes (classes or n_classes), mend the labels, or leave them out "
            '(label = "none")'
        )
    return Labels(labels, classes.target)
