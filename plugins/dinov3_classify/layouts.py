"""Files of classifiers that say nothing of themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dinov3_classify.configs_heads import LinearClassifierConfig
from dinov3_framework import Layout, Renamed, Rule
from dinov3_framework.contracts.layouts import Content

if TYPE_CHECKING:
    from dinov3_framework import Target


class LinearClassifierLayout(Layout):
    """The published classifier: the state dict of one linear layer, and nothing else."""

    format = "meta"
    config = LinearClassifierConfig
    alone = True  # any linear layer has these names

    def recognize(self, content: Content) -> LinearClassifierConfig | None:
        shapes = content.shapes
        if shapes.keys() != {"weight", "bias"} or len(shapes["weight"]) != 2:
            return None
        classes = shapes["weight"][0]
        return LinearClassifierConfig() if tuple(shapes["bias"]) == (classes,) else None

    def rules(self, config: LinearClassifierConfig, names: Sequence[str]) -> Sequence[Rule]:
        return [Renamed(name, name) for name in names]

    def targets(self, content: Content) -> Mapping[str, Target]:
        from dinov3_framework import Target  # takes torch

        return {"label": Target("class", n_classes=content.shapes["weight"][0])}


LAYOUTS: list[Layout] = [LinearClassifierLayout()]
