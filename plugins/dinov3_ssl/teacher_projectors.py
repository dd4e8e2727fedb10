"""The projectors of a frozen teacher: those that its weights hold, and new ones for the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from attrs import frozen
from torch import nn

from dinov3_framework.contracts.losses import Loss
from dinov3_framework.errors import Problem, summarize_names
from dinov3_ssl.frozen import FrozenWeights
from dinov3_ssl.networks import projector_key


@frozen
class TeacherProjectors:
    """A projector for each loss that wants one, on the meta device."""

    projectors: Mapping[str, nn.Module]  # by loss
    read: Sequence[str]  # the losses whose projectors the weights hold
    new: Sequence[str]  # the others
    problems: Sequence[Problem]

    @classmethod
    def of(
        cls, losses: Mapping[str, Loss], weights: FrozenWeights, source: str
    ) -> TeacherProjectors:
        """``source`` is ``auto``, ``weights`` or ``new``, as the recipe says."""
        with torch.device("meta"):
            projectors = {
                name: projector
                for name, loss in losses.items()
                if (projector := loss.build_teacher_projector(weights.backbone.embed_dim))
                is not None
            }
        held = [
            name
            for name in projectors
            if any(n.startswith(f"{projector_key(name)}.") for n in weights.projectors)
        ]
        problems = []
        if source == "weights":
            problems = [
                Problem(
                    "teacher.projectors",
                    f"{weights.weights} hold no projector of loss {name!r} ({projector_key(name)})",
                    'take a training checkpoint, which has them, or "auto" for a new one',
                )
                for name in projectors
                if name not in held
            ]
        read = [] if source == "new" else held
        for name in read:
            problems += _differences(name, projectors[name], weights)
        return cls(projectors, read, [name for name in projectors if name not in read], problems)

    def rows(self) -> list[tuple[str, str]]:
        """For people: where each comes from."""
        new = "new: the weights hold none; its prototypes will be tokens of the first batches"
        origin = dict.fromkeys(self.read, "of the weights")
        return [(projector_key(name), origin.get(name, new)) for name in self.projectors]


def _differences(loss: str, projector: nn.Module, weights: FrozenWeights) -> list[Problem]:
    prefix = f"{projector_key(loss)}."
    theirs = {
        name.removeprefix(prefix): tuple(shape)
        for name, shape in weights.projectors.items()
        if name.startswith(prefix)
    }
    ours = {name: tuple(tensor.shape) for name, tensor in projector.state_dict().items()}
    lines = [
        summarize_names("missing from the weights", ours.keys() - theirs.keys()),
        summarize_names("in the weights and not here", theirs.keys() - ours.keys()),
        summarize_names(
            "of another shape",
            [
                f"{name}: {list(theirs[name])} in the weights, {list(ours[name])} here"
                for name in ours.keys() & theirs.keys()
                if ours[name] != theirs[name]
            ],
        ),
    ]
    if not any(lines):
        return []
    return [
        Problem(
            f"losses.{loss}",
            f"the teacher's {projector_key(loss)} is another than this loss makes:"
            + "".join(lines),
            f'describe it in losses.{loss}.teacher_head, or set teacher.projectors = "new"',
        )
    ]
