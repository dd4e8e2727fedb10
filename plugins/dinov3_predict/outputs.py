"""What a run leaves of its predictions besides themselves: overlays, a table and a page."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from attrs import frozen

from dinov3_framework import CorruptSampleError, Dataset
from dinov3_framework.data.saved_predictions import SavedPredictions, relative_path, unique_stems
from dinov3_framework.errors import first_few
from dinov3_framework.runtime.agreement import broadcast_from_rank0
from dinov3_framework.runtime.durable import clear_aside
from dinov3_framework.runtime.output import output_file
from dinov3_framework.runtime.results import write_csv, write_results
from dinov3_predict import PredictConfig
from dinov3_predict.canvas import Pixels, as_pixels, shrunk
from dinov3_predict.drawing import Drawing, Row
from dinov3_predict.report import THUMBNAIL, Shown, write_page
from dinov3_predict.walk import Predicted

log = logging.getLogger("dinov3_framework.predict")

PREDICTIONS, OVERLAYS = "predictions", "overlays"
TABLE, SKIPPED, PAGE = "predictions.csv", "skipped.csv", "report.html"
_QUALITY = 90  # of JPEG
_LONGEST = 65_500  # pixels of a side that JPEG holds


@frozen
class Seen:
    """What became of one image."""

    index: int
    size: tuple[int, int]  # height and width
    seconds: float | None
    row: Row
    shown: Shown | None


class Outputs:
    """Writes them into a folder. To be made by every process."""

    def __init__(
        self,
        config: PredictConfig,
        drawing: Drawing,
        folder: Path,
        names: Sequence[str],
        saved: SavedPredictions | None,
    ) -> None:
        self.config, self.drawing, self.folder = config, drawing, folder
        self.names, self.saved = names, saved
        self._stems = unique_stems(names)
        self.overlays = config.overlays and drawing.has_files
        broadcast_from_rank0(_clear, folder / OVERLAYS)

    def overlay(self, index: int) -> Path:
        """The file of an overlay, called as that of the prediction."""
        name = self.names[index]
        return self.folder / OVERLAYS / relative_path(self._stems.get(name, name), "jpg")

    def wants_image(self, index: int) -> bool:
        """Whether an image is drawn: those of an earlier start are there already."""
        if index < self.config.report_images:
            return True
        if not self.overlays:
            return False
        was_there = self.saved is not None and self.saved.has(self.names[index])
        return not (was_there and self.overlay(index).is_file())

    def seen(self, each: Predicted) -> Seen:
        """Draw an image, and keep what the table and the page say of it."""
        row, shown = self.drawing.row(each.prediction), None
        if each.image is not None:
            image = as_pixels(each.image)
            if self.overlays and not (each.seconds is None and self.overlay(each.index).is_file()):
                self._write(self.overlay(each.index), image, each)
            if each.index < self.config.report_images:
                shown = self._shown(image, each, row)
        return Seen(each.index, each.size, each.seconds, row, shown)

    def _write(self, path: Path, image: Pixels, each: Predicted) -> None:
        from PIL import Image

        sheet = shrunk(self.drawing.sheet(image, each.prediction), _LONGEST)
        with output_file(path) as aside:
            Image.fromarray(sheet).save(aside, format="JPEG", quality=_QUALITY)

    def _shown(self, image: Pixels, each: Predicted, row: Row) -> Shown:
        small, picture = shrunk(image, THUMBNAIL), None
        if self.drawing.has_files:
            picture = self.drawing.picture(
                small, self.drawing.resized(each.prediction, *small.shape[:2])
            )
        return Shown(self.names[each.index], small, picture, self.drawing.caption(row))

    # ------------------------------------------------------------------ at the end
    def conclude(
        self, dataset: Dataset, found: Sequence[Seen], facts: Mapping[str, str], notes: list[str]
    ) -> None:
        """Write the table, the page and the results of all processes; on one of them."""
        seen = sorted(found, key=lambda each: each.index)
        files = [TABLE, PAGE]
        self._write_table(seen)
        if skipped := list(_skipped(dataset, {each.index for each in seen})):
            with output_file(self.folder / SKIPPED) as aside:
                write_csv(aside, ["image", "reason"], skipped)
            files.append(SKIPPED)
            names = first_few([name for name, _ in skipped], 5)
            notes = [*notes, f"{len(skipped):,} of {len(dataset):,} images unreadable: {names}"]
        shown = [each for each in seen if each.shown is not None]
        if left := len(seen) - len(shown):
            notes = [*notes, f"{left:,} more images are in {TABLE}, and not on this page."]
        legend = self.drawing.legend([each.row for each in shown])
        pictures = [each.shown for each in shown if each.shown is not None]
        notes = [*notes, *self.drawing.notes()]
        write_page(self.folder / PAGE, facts, pictures, legend, notes)
        results = {"task": "predict", **facts, "predicted": len(seen), "skipped": len(skipped)}
        write_results(self.folder, {**results, "files": files})
        log.info("Predictions of %d images: %s", len(seen), self.folder / PAGE)

    def _write_table(self, seen: Sequence[Seen]) -> None:
        there = {column for each in seen for column in each.row}
        columns = [column for column in self.drawing.columns() if column in there]
        lines = (
            [
                self.names[each.index],
                *reversed(each.size),
                "" if each.seconds is None else round(each.seconds, 4),
                *(each.row.get(column, self.drawing.absent) for column in columns),
            ]
            for each in seen
        )
        with output_file(self.folder / TABLE) as aside:
            write_csv(aside, ["image", "width", "height", "seconds", *columns], list(lines))


def _clear(folder: Path) -> None:
    """Remove what a killed process left half written."""
    for each, _, _ in os.walk(folder):
        clear_aside(Path(each))


def _skipped(dataset: Dataset, seen: set[int]) -> Iterator[tuple[str, str]]:
    """(name, reason) of each sample that could not be decoded."""
    for index in range(len(dataset)):
        if index not in seen:
            try:
                _ = dataset[index]
            except CorruptSampleError as error:
                yield dataset.name(index), error.reason
            else:
                yield dataset.name(index), "could be read the second time"
