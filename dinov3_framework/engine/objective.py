"""The objective of a step: networks run once, every loss looks at what they said.

Nothing here knows a loss: what a loss needs, it says (``contracts.Loss``).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from dinov3_framework.configs import LossConfig
from dinov3_framework.contracts import Augmentation, Loss, LossResult, StepOutputs, ViewFeatures
from dinov3_framework.engine.loader import Batch
from dinov3_framework.engine.networks import Networks, head_name
from dinov3_framework.errors import Problem

OUTPUTS = ("class", "storage", "patches")
# The views each network may be asked for; anchors see the view their loss names.
STUDENT_VIEWS = ("global", "local")
TEACHER_VIEWS = ("global",)


def check_needs(losses: Mapping[str, Loss], augmentation: Augmentation) -> list[Problem]:
    """What the losses need and this augmentation does not offer."""
    problems = []
    for name, loss in losses.items():
        anchor = loss.anchor()
        offered = {"student": STUDENT_VIEWS, "teacher": TEACHER_VIEWS}
        offered["anchor"] = (anchor.view,) if anchor is not None else ()
        for need in sorted(loss.needs):
            if complaint := _unmet(need, offered, augmentation):
                problems.append(Problem(f"losses.{name}", f"needs {need!r}: {complaint}"))
    return problems


def _unmet(
    need: str, offered: Mapping[str, tuple[str, ...]], augmentation: Augmentation
) -> str | None:
    if need == "masks":
        return None if augmentation.makes_masks else "the augmentation makes no masks"
    network, _, rest = need.partition(".")
    view, _, output = rest.partition(".")
    if network not in offered or output not in OUTPUTS:
        return (
            "a need is 'masks' or network.view.output, of networks "
            f"{', '.join(offered)} and outputs {', '.join(OUTPUTS)}"
        )
    if view not in offered[network]:
        return f"the {network} sees {', '.join(offered[network]) or 'nothing'}"
    if view not in augmentation.views or augmentation.views[view].crops == 0:
        return f"the augmentation makes {', '.join(augmentation.views)} crops only"
    return None


@attrs.frozen
class Outcome:
    """What one pass came to: the weighted total, and figures to log by name."""

    total: Tensor
    losses: dict[str, Tensor]  # each loss before its weight
    metrics: dict[str, Tensor | float]


class Objective:
    """Runs the networks on a batch and sums up the weighted losses."""

    def __init__(
        self,
        losses: Mapping[str, Loss],
        configs: Mapping[str, LossConfig],
        networks: Networks,
        total_iterations: int,
    ) -> None:
        self.losses, self.configs, self.networks = losses, configs, networks
        self.total_iterations = total_iterations
        needs: set[str] = set().union(*(loss.needs for loss in losses.values()))
        self._student_views = [v for v in STUDENT_VIEWS if _wanted(needs, "student", v)]
        self._teacher_views = [v for v in TEACHER_VIEWS if _wanted(needs, "teacher", v)]
        self._masks = "masks" in needs

    def __call__(self, batch: Batch, iteration: int) -> Outcome:
        """Evaluate the objective; call ``backward()`` on the outcome's total."""
        masks = batch.masks if self._masks else None
        with torch.no_grad():
            teacher = {
                view: _features(self.networks.teacher["backbone"], batch.crops[view])
                for view in self._teacher_views
            }
        student = self._student(batch, masks)
        total: Tensor = torch.zeros((), device=next(iter(batch.crops.values())).device)
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor | float] = {}
        for name, loss in self.losses.items():
            outputs = StepOutputs(
                iteration=iteration,
                total_iterations=self.total_iterations,
                student=student,
                teacher=teacher,
                anchor=self._anchor(name, batch),
                masks=masks,
                masked=batch.masked if self._masks else None,
                project=partial(_project, self.networks.student, name),
                project_teacher=torch.no_grad()(partial(_project, self.networks.teacher, name)),
            )
            result: LossResult = loss(outputs)
            weight = outputs.value(self.configs[name].weight)
            total = total + weight * result.loss
            losses[name] = result.loss.detach()
            metrics[f"{name}/weight"] = weight
            metrics |= {f"{name}/{key}": value for key, value in result.metrics.items()}
        return Outcome(total, losses, metrics)

    def _student(self, batch: Batch, masks: Tensor | None) -> dict[str, ViewFeatures]:
        """All views in one pass, so that sharded parameters are gathered once."""
        backbone: Any = self.networks.student["backbone"]
        views = self._student_views
        flat = [batch.crops[view].flatten(0, 1) for view in views]
        hidden = [
            masks.flatten(0, 1) if masks is not None and v == "global" else None for v in views
        ]
        outputs = backbone.forward_features(flat, hidden)
        return {
            view: _unflatten(output, batch.crops[view], backbone.patch_size)
            for view, output in zip(views, outputs, strict=True)
        }

    def _anchor(self, loss: str, batch: Batch) -> ViewFeatures | None:
        if loss not in self.networks.anchors:
            return None
        view = self.networks.blueprint.anchors[loss].view
        with torch.no_grad():
            return _features(self.networks.anchors[loss], batch.crops[view])

    def named_state(self) -> dict[str, Tensor]:
        """The losses' buffers by name, to save or to load in place."""
        return {
            f"losses.{name}.{buffer}": tensor
            for name, loss in self.losses.items()
            for buffer, tensor in loss.named_buffers()
        }


def _wanted(needs: set[str], network: str, view: str) -> bool:
    return any(need.startswith(f"{network}.{view}.") for need in needs)


def _project(networks: nn.ModuleDict, loss: str, tokens: Tensor, *others: Any) -> Tensor:
    name = head_name(loss)
    if name not in networks:
        raise KeyError(f"loss {loss!r} projects tokens and built no projector")
    projected: Tensor = networks[name](tokens, *others)
    return projected


def _features(backbone: Any, crops: Tensor) -> ViewFeatures:
    return _unflatten(backbone.forward_features(crops.flatten(0, 1)), crops, backbone.patch_size)


def _unflatten(output: Mapping[str, Tensor], crops: Tensor, patch_size: int) -> ViewFeatures:
    sizes = crops.shape[:2]
    height, width = crops.shape[-2:]
    return ViewFeatures(
        cls=output["x_norm_clstoken"].unflatten(0, sizes),
        storage=output["x_storage_tokens"].unflatten(0, sizes),
        patches=output["x_norm_patchtokens"].unflatten(0, sizes),
        grid=(height // patch_size, width // patch_size),
    )
