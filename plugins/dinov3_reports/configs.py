"""What the two reports can be told."""

from __future__ import annotations

from typing import ClassVar

from dinov3_framework import (
    AugmentationConfig,
    DatasetConfig,
    ImagesConfig,
    TaskConfig,
    config,
    not_negative,
    option,
    positive,
)
from dinov3_framework.kinds import name_of_source

_LONGEST_NAME = 100  # letters of the default name of a comparison's folder


@config
class InspectConfig(TaskConfig):
    """A look at a dataset before anything is trained on it.

    Writes report.html, one page with all its pictures, unreadable.txt and results.json. What is
    looked at is given here or taken from a training's ``recipe``.
    """

    recipe: TaskConfig | None = option(
        "a training's recipe, whose dataset, augmentation and images are looked at unless they "
        "are given beside it; as in recipe.extends = FILE",
        default=None,
    )
    dataset: DatasetConfig | None = option("what is looked at", default=None)
    augmentation: AugmentationConfig | None = option(
        "what is shown of twelve images besides; left out, the recipe's, if it has one",
        default=None,
    )
    images: ImagesConfig | None = option(
        "what images are; left out, as the recipe says, or RGB", default=None
    )
    patch_size: int | None = option(
        "pixels of a patch, for augmentation; left out, that of the recipe's backbone, or 16",
        default=None,
        check=positive,
    )
    limit: int | None = option(
        'images looked at, chosen by the seed from a larger dataset; "none": all of them; of a '
        "stream the first ones",
        default=5000,
        check=positive,
    )
    shown: int = option("images on the contact sheet", default=48, check=not_negative)
    workers: int = option("loader processes", default=4, check=not_negative)
    overwritten: ClassVar = ("report.html", "unreadable.txt")


def _some(value: tuple[str, ...]) -> str | None:
    if not value or not all(value):
        return "must name folders of runs"
    return None if len(set(value)) == len(value) else "names one more than once"


@config
class CompareConfig(TaskConfig):
    """Runs side by side: what they measured, by the same protocol or not, and their curves.

    Writes report.html, comparison.csv and results.json.
    """

    runs: tuple[str, ...] = option(
        "folders of runs: of evaluations, or of trainings with evaluations on the way", check=_some
    )
    names: tuple[str, ...] | None = option(
        "what the runs are called in the report, in their order; left out, as their folders",
        default=None,
        check=_some,
    )
    curves: tuple[str, ...] | None = option(
        "metrics of trainings to draw over iterations; * and ? stand for any letters; left out, "
        "the loss and what was evaluated on the way",
        default=None,
    )
    overwritten: ClassVar = ("report.html", "comparison.csv")

    def run_name(self, recipe: str) -> str:
        names = [name for run in self.runs for name in name_of_source(run)]
        return "-".join([recipe, *names])[:_LONGEST_NAME].rstrip("-.")
