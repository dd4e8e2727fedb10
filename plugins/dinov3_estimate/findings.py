"""What a rehearsal finds: of a step of each resolution, and of the process that took it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from attrs import frozen
from dinov3_ssl.preflight import Parts

from dinov3_estimate.batch import Hidden
from dinov3_estimate.memory import Kind, Moment
from dinov3_estimate.tally import Tally
from dinov3_framework.contracts.data import Augmentation, View
from dinov3_framework.data.loader import Layout


@frozen
class Tokens:
    """What the backbones put out for one image, over all crops."""

    student: int
    teacher: int
    anchors: int


@frozen
class Resolution:
    """What one process has to do in a step with crops of certain sizes, and what it takes."""

    views: Mapping[str, View]
    share: float  # of the steps of a run
    peak: Moment
    tally: Tally
    tokens: Tokens
    hidden: Hidden | None


@frozen
class Findings:
    """What one process has to do in a step, and what it takes.

    Its peak and the like are those of the resolution that takes most memory.
    """

    world_size: int  # all processes there are
    layout: Layout  # of those that train the student
    taught: int  # images of a pass that this process shows to the teacher
    resolutions: Sequence[Resolution]
    rest: Moment  # between two steps
    parameters: Mapping[Kind, tuple[int, int]]  # of each network: all, and those of this process
    left_out: Mapping[str, str]  # loss -> why it could not take part

    @property
    def largest(self) -> Resolution:
        return max(self.resolutions, key=lambda each: each.peak.total)

    @property
    def peak(self) -> Moment:
        return self.largest.peak

    @property
    def tally(self) -> Tally:
        return self.largest.tally

    @property
    def tokens(self) -> Tokens:
        return self.largest.tokens

    @property
    def hidden(self) -> Hidden | None:
        return self.largest.hidden

    def mean(self, of: Callable[[Resolution], float]) -> float:
        """Of a run's steps, whose resolutions have their shares."""
        return sum(each.share * of(each) for each in self.resolutions)

    def called(self, kind: Kind) -> str:
        """For people; beside a frozen teacher, the student's moving average is none."""
        return "average" if kind is Kind.TEACHER and Kind.FROZEN in self.parameters else kind.value

    @property
    def flops(self) -> float:
        """Of this process in a mean step."""
        return self.mean(lambda each: sum(each.tally.flops().values()))


def tokens(parts: Parts, augmentation: Augmentation, teacher: Any) -> Tokens:
    """``augmentation`` is one of the variants, ``teacher`` the backbone that the student learns
    from, on the meta device."""
    views = augmentation.views
    needs = set().union(*(loss.needs for loss in parts.losses.values()))
    parted = [need.split(".") for need in needs]
    seen = {
        network: {n[1] for n in parted if n[0] == network} for network in ("student", "teacher")
    }
    if "teacher" in views:
        seen["teacher"] = {"teacher" if name == "global" else name for name in seen["teacher"]}

    def of_view(name: str, backbone: Any) -> int:
        view = views[name]
        image = torch.empty(1, backbone.in_chans, view.size, view.size, device="meta")
        return int(view.crops * backbone.forward_features(image)["x_prenorm"].shape[1])

    blueprint = parts.blueprint
    with torch.no_grad():
        return Tokens(
            student=sum(of_view(name, blueprint.backbone) for name in seen["student"]),
            teacher=sum(of_view(name, teacher) for name in seen["teacher"]),
            anchors=sum(
                of_view(anchor.view, blueprint.anchor_backbone(name))
                for name, anchor in blueprint.anchors.items()
            ),
        )
