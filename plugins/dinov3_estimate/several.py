"""A step of several students side by side: one process of each, one student after the other."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from dinov3_ssl.configs import DistillConfig, MultiDistillConfig, of_student
from dinov3_ssl.multi_distill import SideStudent
from dinov3_ssl.preflight import Parts
from dinov3_ssl.sharing import outputs_of

from dinov3_estimate import report
from dinov3_estimate.accelerators import Accelerator
from dinov3_estimate.assumptions import rows as assumptions
from dinov3_estimate.findings import Findings
from dinov3_estimate.report import Rows, Spent
from dinov3_estimate.stage import Seat
from dinov3_estimate.units import seconds
from dinov3_framework.data.loader import Layout
from dinov3_framework.registry import Registry


class PretendedStudent(SideStudent):
    """One student, which knows of the others what they would tell it."""

    rehearses = True

    def __init__(
        self,
        config: DistillConfig,
        *,
        registry: Registry,
        name: str,
        spans: Mapping[str, range],
        needs: Mapping[str, Collection[str]],
    ) -> None:
        super().__init__(config, registry=registry, name=name, spans=spans)
        self._needs_of = needs

    def _needs(self, parts: Parts) -> Sequence[Collection[str]]:
        return [self._needs_of[name] for name, span in self._spans.items() for _ in span]


def rehearse_students(
    config: MultiDistillConfig,
    registry: Registry,
    spans: Mapping[str, range],
    accelerator: Accelerator,
) -> dict[str, Rows]:
    """The report on all students; raises as ``rehearse`` does. ``spans`` are their ranks."""
    configs = {name: of_student(config, name, None) for name in config.students}
    needs = {
        name: outputs_of(registry.build(loss) for loss in own.losses.values())
        for name, own in configs.items()
    }
    found: dict[str, Findings] = {}
    for name, own in configs.items():
        student = PretendedStudent(own, registry=registry, name=name, spans=spans, needs=needs)
        found[name] = student.rehearsed(_fullest(own, spans, name))
        teacher = student.teacher_rows()
    return _sections(config, configs, found, accelerator, teacher)


def _fullest(config: DistillConfig, spans: Mapping[str, range], name: str) -> Seat:
    """The first of a student's processes that have most images to show to the teacher."""
    world = sum(map(len, spans.values()))

    def shown(rank: int) -> int:
        layout = Layout(world, rank, config.accumulation_steps, config.batch_size)
        return len(layout.places(0, 0))

    return Seat(world, max(spans[name], key=shown), list(spans.values()))


def _sections(
    config: MultiDistillConfig,
    configs: Mapping[str, DistillConfig],
    found: Mapping[str, Findings],
    accelerator: Accelerator,
    teacher: Rows,
) -> dict[str, Rows]:
    spent = {name: Spent.of(findings, accelerator) for name, findings in found.items()}
    world = sum(findings.layout.world_size for findings in found.values())
    shown = max(findings.taught for findings in found.values())
    told: dict[str, Rows] = {
        "rehearsal": [
            ("processes", report.processes(world)),
            ("images per step", f"{config.batch_size:,}, all of which every student sees"),
            ("of the teacher", f"{world:,} x {config.accumulation_steps} passes x {shown} at most"),
            *((f"of {name}", report.split(each.layout)) for name, each in found.items()),
        ],
        "teacher": teacher,
    }
    for name, findings in found.items():
        own = {
            "step": list(report.what(configs[name], findings)),
            **report.counted(configs[name], findings, spent[name]),
            f"estimated on {accelerator.title}": [
                *report.times(findings, spent[name]),
                ("step", seconds(spent[name].step)),
            ],
            **report.fitting(configs[name], findings, accelerator),
        }
        told |= {f"{name}: {title}": rows for title, rows in own.items()}
    slowest = max(spent, key=lambda name: spent[name].step)
    flops = sum(findings.flops * findings.layout.world_size for findings in found.values())
    whole = report.whole(config, world, flops, spent[slowest].step, accelerator)
    told[f"estimated on {accelerator.title}"] = [("slowest", f"{slowest}: all wait for it"), *whole]
    return told | {report.ASSUMPTIONS: assumptions(accelerator)}
