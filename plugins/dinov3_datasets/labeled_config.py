"""Options of datasets that keep labels beside their images."""

from __future__ import annotations

from dinov3_datasets.configs import PicturesConfig
from dinov3_framework import InvalidOption, config, option, positive


def _classes(value: tuple[str, ...]) -> str | None:
    if not value:
        return "must name at least one class"
    repeated = sorted({name for name in value if value.count(name) > 1})
    return f"names {repeated} more than once" if repeated else None


@config
class LabeledConfig(PicturesConfig):
    """Base of datasets whose labels are numbers from 0 or names of classes."""

    classes: tuple[str, ...] | None = option(
        "names of classes in the order of their labels; left out, those that the data state, or "
        "all names that occur, sorted",
        default=None,
        check=_classes,
    )
    n_classes: int | None = option(
        "how many classes there are, where labels are numbers; left out, one more than the "
        "highest label",
        default=None,
        check=positive,
    )

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if self.classes is not None and self.n_classes not in (None, len(self.classes)):
            raise InvalidOption(
                "n_classes", f"is {self.n_classes}, classes has {len(self.classes)} names"
            )
