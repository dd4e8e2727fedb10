"""Images whose depth a head reads off their brightness, so that every error is known beforehand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from dinov3_depth.configs_evaluation import DepthConfig
from dinov3_depth.evaluation import DepthEvaluation
from torch import Tensor, nn
from torchvision import tv_tensors

from dinov3_framework import (
    Dataset,
    DatasetConfig,
    FeatureNeeds,
    Head,
    HeadFeatures,
    ImagesConfig,
    LossResult,
    Model,
    Registry,
    Sample,
    Target,
    config,
    option,
)
from dinov3_framework.errors import CorruptSampleError
from dinov3_framework.kinds import Component
from dinov3_framework.testing.toy_backbone import ToyBackbone

GRAY = ImagesConfig(channels=1, mean=(0.5,), std=(0.25,))
METERS = 8.0  # of a white pixel
MAP = Target("map", unit="m")


class Brightness(Head):
    """Depth is brightness times 8 m, with a factor, a shift and more to the right if asked for."""

    needs = FeatureNeeds(image=True)

    def __init__(self, factor: float = 1.0, shift: float = 0.0, tilt: float = 0.0) -> None:
        super().__init__()
        self.targets = {"depth": MAP}
        self.factor = nn.Parameter(torch.tensor([factor]))
        self.shift, self.tilt = shift, tilt

    def init_weights(self) -> None:
        pass

    def forward(self, features: HeadFeatures) -> Tensor:
        assert features.image is not None
        depth = (features.image[:, 0] * GRAY.std[0] + GRAY.mean[0]) * METERS
        return depth * self.factor + self.shift + self.tilt * torch.linspace(0, 1, depth.shape[-1])

    def loss(self, outputs: Any, targets: Mapping[str, Any]) -> LossResult:
        raise NotImplementedError

    def predict(self, outputs: Tensor, size: tuple[int, int]) -> Mapping[str, Tensor]:
        return {"depth": F.interpolate(outputs[:, None], size, mode="bilinear")[:, 0]}


@config
class ScenesConfig(DatasetConfig):
    """Images of noise whose depth is that of their brightness, plus an error."""

    sizes: tuple[tuple[int, int], ...] = option("of the images", default=((16, 24), (20, 16)))
    factor: float = option("of the truth by the brightness", default=1.0)
    shift: float = option("added to the truth, in m, times one more than the index", default=0.0)
    unit: str = option("of the target", default="m")
    name: str = option("of the target", default="depth")
    empty: tuple[int, ...] = option("images whose depth is not known", default=())
    corrupt: tuple[int, ...] = option("images that do not decode", default=())
    enlarged: int = option("how many pixels of the truth a pixel of the image has", default=1)


class Scenes(Dataset):
    def __init__(self, config: ScenesConfig, *, channels: int = 1) -> None:
        self.config, self.targets = config, {config.name: Target("map", unit=config.unit)}

    def __len__(self) -> int:
        return len(self.config.sizes)

    def __getitem__(self, index: int) -> Sample:
        if index in self.config.corrupt:
            raise CorruptSampleError(self.name(index), "broken on purpose")
        image = self.image(index)
        truth = self.truth(index)
        return Sample(image, {self.config.name: tv_tensors.Mask(truth)})

    def image(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        return torch.randint(60, 256, (1, *self.config.sizes[index]), generator=generator).byte()

    def truth(self, index: int) -> Tensor:
        depth = self.image(index)[0].float() / 255 * METERS
        truth = depth * self.config.factor + self.config.shift * (index + 1)
        truth[0] = math.nan
        if index in self.config.empty:
            truth[:] = math.nan
        times = self.config.enlarged
        return truth.repeat_interleave(times, 0).repeat_interleave(times, 1)

    def name(self, index: int) -> str:
        return f"rooms/{index}.png"

    def describe(self) -> str:
        return f"{len(self)} scenes"


def registry() -> Registry:
    made = Registry()
    made.add("dataset", Component("scenes", ScenesConfig, Scenes), "tests", "tests")
    made.add("evaluation", Component("depth", DepthConfig, DepthEvaluation), "tests", "tests")
    return made


def model_of(head: Head | None = None) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = ToyBackbone(1)
    return Model(backbone.eval(), GRAY, Brightness().eval() if head is None else head.eval())


def depth(scenes: Mapping[str, Any] | None = None, **options: Any) -> DepthConfig:
    return DepthConfig(data=ScenesConfig(**(scenes or {})), **options)


def evaluated(
    config: DepthConfig, head: Head | None = None, folder: Path | None = None
) -> tuple[DepthEvaluation, dict[str, float]]:
    """An evaluation after a run, and its metrics."""
    evaluation: DepthEvaluation = registry().build(config)
    evaluation.prepare(registry().build, GRAY)
    evaluation.folder = folder
    model = model_of(head)
    problems: Sequence[Any] = evaluation.problems(model)
    assert not problems, problems
    return evaluation, dict(evaluation.run(model))


def everything(config: DepthConfig) -> dict[str, Any]:
    """All that an evaluation says, to compare."""
    evaluation, metrics = evaluated(config)
    model = model_of()
    return {
        "metrics": metrics,
        "intervals": dict(evaluation.details().intervals),
        "tables": dict(evaluation.details().tables),
        "protocol": dict(evaluation.protocol(model)),
        "baselines": dict(evaluation.baselines(model)),
    }
