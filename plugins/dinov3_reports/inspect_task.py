"""The task ``inspect``: a look at a dataset before anything is trained on it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from dinov3_framework import (
    DataError,
    Dataset,
    Plan,
    Registry,
    StreamDataset,
    Task,
    write_results,
)
from dinov3_framework.data.workers import memory_complaint
from dinov3_framework.errors import first_few
from dinov3_framework.runtime import collectives
from dinov3_framework.runtime.agreement import OwnErrors, gather_from_all_ranks
from dinov3_framework.runtime.output import write_aside
from dinov3_reports.configs import InspectConfig
from dinov3_reports.findings import Findings
from dinov3_reports.inspect_page import write_page
from dinov3_reports.looking import (
    AUGMENTED,
    Look,
    Seen,
    Unreadable,
    candidates,
    look_at,
    look_at_stream,
    places_to_look_at,
)
from dinov3_reports.subject import Subject, build_subject

log = logging.getLogger("dinov3_framework.reports")

PAGE, UNREADABLE = "report.html", "unreadable.txt"


class Inspect(Task):
    """Looks at samples and writes report.html, unreadable.txt and results.json."""

    def __init__(self, config: InspectConfig, *, registry: Registry) -> None:
        self.config, self.registry = config, registry

    def check(self, world_size: int) -> Plan:
        try:
            subject = build_subject(self.config, self.registry)
        except DataError as error:
            return Plan({}, [str(error)])
        lack = memory_complaint(0, workers=self.config.workers, processes=world_size)
        rows = [*self._rows(subject), ("processes", str(world_size))]
        return Plan({"data": rows}, [lack] if lack else [], prepared=subject)

    def run(self, output_dir: Path, plan: Plan | None = None) -> None:
        subject = plan.prepared if plan is not None else None
        if subject is None:
            subject = build_subject(self.config, self.registry)
        with OwnErrors():
            shares = gather_from_all_ranks(self._look, subject)
        if not collectives.is_main():
            return
        seen = [each for share, _ in shares for each in share]
        unreadable = [each for _, share in shares for each in share]
        if not seen:
            reasons = first_few(
                (f"{each.name}: {each.reason}" for each in unreadable), separator="; "
            )
            raise DataError(
                f"{subject.dataset.describe()}: none of {len(unreadable):,} samples looked at can "
                f"be read\n    {reasons}"
            )
        self._write(output_dir, subject, seen, unreadable)

    # ------------------------------------------------------------------ looking
    def _places(self, subject: Subject) -> Sequence[int]:
        config = self.config
        if subject.total is None:
            return range(config.limit or 0)
        return places_to_look_at(subject.total, config.limit, config.seed)

    def _look(self, subject: Subject) -> tuple[list[Seen], list[Unreadable]]:
        config, dataset, places = self.config, subject.dataset, self._places(subject)
        look = Look(
            dataset.targets,
            subject.images,
            subject.augmentation,
            config.seed,
            frozenset(candidates(places, config.shown, config.seed)),
            frozenset(candidates(places, AUGMENTED, config.seed)),
            dataset if isinstance(dataset, Dataset) else None,
        )
        if isinstance(dataset, Dataset):
            return look_at(dataset, look, places, config.workers)
        # A stream is read from its beginning, which takes one process.
        is_main = collectives.is_main()
        return look_at_stream(dataset, look, len(places), config.seed) if is_main else ([], [])

    def _rows(self, subject: Subject) -> list[tuple[str, str]]:
        dataset, number = subject.dataset, len(self._places(subject))
        extent = f"{number:,}, all of them"
        if subject.total is None:
            extent = f"the first {number:,} of a stream, which may repeat itself"
        elif number < subject.total:
            extent = f"{number:,} of {subject.total:,}, chosen by seed {self.config.seed}"
        targets = ", ".join(f"{name} ({target})" for name, target in dataset.targets.items())
        augmentation = type(subject.augmentation).__name__ if subject.augmentation else "none"
        notes = [] if isinstance(dataset, StreamDataset) else dataset.notes()
        return [
            ("dataset", dataset.describe()),
            ("looked at", extent),
            ("targets", targets or "none"),
            ("channels", str(subject.images.channels)),
            ("augmentation", augmentation),
            *(("note", note) for note in notes),
        ]

    # ------------------------------------------------------------------ files
    def _write(
        self,
        output_dir: Path,
        subject: Subject,
        seen: Sequence[Seen],
        unreadable: Sequence[Unreadable],
    ) -> None:
        """Write all files; results.json, which completes the run, last."""
        config, places = self.config, self._places(subject)
        found = Findings.of(seen, unreadable, subject.total, subject.dataset.targets)
        statistics = getattr(subject.dataset, "statistics", None)
        bands = statistics() if callable(statistics) else None
        lines = [f"{each.name}\t{each.reason}\n" for each in found.unreadable]
        write_aside(output_dir / UNREADABLE, "".join(lines))
        by_place = {each.place: each for each in found.seen}
        order = {
            count: [by_place[place] for place in candidates(places, count, config.seed)
                    if place in by_place][:count]
            for count in (config.shown, AUGMENTED)
        }  # fmt: skip
        write_page(
            output_dir / PAGE,
            subject,
            found,
            self._rows(subject),
            sheet=order[config.shown],
            augmented=order[AUGMENTED],
            bands=bands,
            seed=config.seed,
        )
        results = {
            "task": "inspect",
            "dataset": subject.dataset.describe(),
            "seed": config.seed,
            **found.results(),
            "files": [PAGE, UNREADABLE],
        }
        write_results(output_dir, results)
        _log(found)
        log.info("report: %s", output_dir / PAGE)


def _log(found: Findings) -> None:
    log.info(
        "%d images looked at, %d unreadable, %d that repeat another",
        found.looked_at,
        len(found.unreadable),
        found.repeats,
    )
    for each in found.classes:
        empty = f", without any: {first_few(each.empty)}" if each.empty else ""
        log.info(
            "%s: %d classes, the largest %.3g times the smallest%s",
            each.target,
            len(each.names),
            each.imbalance,
            empty,
        )
    log.info("for a recipe:\n%s", found.channels.recipe)
