"""Made-up steps for losses: tokens at random, and a record of what is read of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from attrs import evolve, field, frozen
from torch import Tensor

from dinov3_framework.contracts.losses import StepOutputs, ViewFeatures

Project = Callable[..., Tensor]

# Crops and grid of each view; all different, so that nothing fits by chance.
VIEWS = {"global": (2, (4, 3)), "local": (3, (2, 2)), "anchor": (2, (5, 6))}
_STORAGE = 1
_OUTPUTS = {"cls": "class", "storage": "storage", "patches": "patches"}


class _Watched(ViewFeatures):
    """Features that note which of their outputs somebody reads."""

    def __getattribute__(self, name: str) -> object:
        if name in _OUTPUTS:
            watch = object.__getattribute__(self, "__dict__")
            watch["reads"].add(f"{watch['place']}.{_OUTPUTS[name]}")
        return object.__getattribute__(self, name)


def _watched(features: ViewFeatures, place: str, reads: set[str]) -> ViewFeatures:
    watched = _Watched(features.cls, features.storage, features.patches, features.grid)
    object.__setattr__(watched, "place", place)
    object.__setattr__(watched, "reads", reads)
    return watched


@frozen
class DrawnTokens:
    """Tokens [crops, samples, ..., D] by ``network.view``, and masks of the global crops."""

    views: Mapping[str, ViewFeatures]
    masks: Tensor | None
    reads: set[str] = field(factory=set)  # needs

    @classmethod
    def draw(
        cls,
        needs: frozenset[str],
        samples: int,
        dim: int,
        *,
        collapsed: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> DrawnTokens:
        """What ``needs`` names; ``collapsed`` makes all tokens of all crops and samples equal."""
        generator = torch.Generator().manual_seed(3)
        one = torch.randn(dim, generator=generator)

        def tokens(*shape: int) -> Tensor:
            drawn = torch.randn(*shape, dim, generator=generator)
            return (one.expand_as(drawn).clone() if collapsed else drawn).to(dtype)

        views = {}
        for place in sorted({need.rpartition(".")[0] for need in needs if need != "masks"}):
            crops, grid = VIEWS[place.partition(".")[2]]
            sizes = (crops, samples)
            views[place] = ViewFeatures(
                cls=tokens(*sizes),
                storage=tokens(*sizes, _STORAGE),
                patches=tokens(*sizes, grid[0] * grid[1]),
                grid=grid,
            )
        return cls(views, _masks(samples) if "masks" in needs else None)

    def of_samples(self, start: int, stop: int) -> DrawnTokens:
        """A part of the batch."""
        parts = {
            place: evolve(view, **{name: getattr(view, name)[:, start:stop] for name in _OUTPUTS})
            for place, view in self.views.items()
        }
        return DrawnTokens(parts, None if self.masks is None else self.masks[:, start:stop])

    def tensors(self) -> dict[str, Tensor]:
        """Tokens by need."""
        return {
            f"{place}.{output}": getattr(view, name)
            for place, view in self.views.items()
            for name, output in _OUTPUTS.items()
        }

    def requires_grad(self) -> dict[str, Tensor]:
        """Let gradient flow to the student's tokens, and give them by need."""
        tokens = self.tensors().items()
        return {n: t.requires_grad_() for n, t in tokens if n.startswith("student.")}

    def copies(self) -> dict[str, Tensor]:
        """Every tensor by name, as it is now."""
        values = {name: tokens.detach().clone() for name, tokens in self.tensors().items()}
        return values if self.masks is None else values | {"masks": self.masks.clone()}

    def step(self, project: Project, project_teacher: Project) -> StepOutputs:
        """The middle of a short run, with these tokens."""
        by_network: dict[str, dict[str, ViewFeatures]] = {}
        for place, features in self.views.items():
            network, _, view = place.partition(".")
            by_network.setdefault(network, {})[view] = _watched(features, place, self.reads)
        return StepOutputs(
            iteration=5,
            total_iterations=10,
            student=by_network.get("student", {}),
            teacher=by_network.get("teacher", {}),
            anchor=next(iter(by_network.get("anchor", {}).values()), None),
            masks=self.masks,
            project=project,
            project_teacher=torch.no_grad()(project_teacher),
        )


def _masks(samples: int) -> Tensor:
    """Every crop masked differently; the first not at all, as happens in training."""
    crops, (height, width) = VIEWS["global"]
    count = crops * samples
    fractions = torch.arange(count).view(crops, samples, 1) / count * 0.6
    generator = torch.Generator().manual_seed(4)
    return torch.rand(crops, samples, height * width, generator=generator) < fractions
