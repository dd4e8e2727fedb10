"""The components of this project keep their contracts."""

from __future__ import annotations

from typing import Any

import pytest
from dinov3_classify.configs import KnnConfig
from dinov3_crops.configs import MultiCropConfig
from dinov3_datasets.configs import FashionMnistConfig
from dinov3_figures.configs import FiguresConfig
from dinov3_heads import EvaluateWhileTrainingConfig
from dinov3_launchers import LocalConfig, SlurmConfig
from dinov3_optimizers import AdamWConfig, SgdConfig
from dinov3_vit.configs import VitConfig

from dinov3_framework import Registry
from dinov3_framework.configs import ImagesConfig
from dinov3_framework.recipes.structure import structure_component
from dinov3_framework.schedules import Constant
from dinov3_framework.testing import (
    AugmentationSuite,
    BackboneSuite,
    DatasetSuite,
    LauncherSuite,
    LossSuite,
    ObserverSuite,
    OptimizerSuite,
    TaskSuite,
    TrainUnitSuite,
)

VIT: dict[str, Any] = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
HEAD = {"n_prototypes": 32, "bottleneck_dim": 8, "hidden_dim": 16}
GRAY = ImagesConfig(channels=1, mean=(0.3,), std=(0.3,))
FEW = FashionMnistConfig(split="test")


def structured(kind: str, name: str, **values: Any) -> Any:
    return structure_component(Registry.load(), kind, name, values)


# --------------------------------------------------------------------------- networks and losses
class TestVit(BackboneSuite):
    config = VitConfig(**VIT)


class TestUntiedVit(BackboneSuite):
    config = VitConfig(
        **VIT,
        untie_global_and_local_cls_norm=True,
        untie_cls_and_patch_norms=True,
        n_storage_tokens=0,
        ffn_layer="swiglu",
        norm_layer="rmsnorm",
        drop_path_rate=0.3,
        pos_embed_rope_rescale_coords=2.0,
        in_chans=1,
    )


class TestLosses(LossSuite):
    @pytest.fixture(
        autouse=True,
        params=[
            ("dino", {"head": HEAD}),
            ("dino", {"head": HEAD, "local_weight": 0.0}),
            ("dino", {"head": HEAD, "chunk": 3}),
            ("ibot", {"head": HEAD}),
            ("ibot", {"head": HEAD, "chunk": 3}),
            ("koleo", {}),
            ("koleo", {"distributed": True, "topk": 2}),
            ("gram", {}),
            ("gram", {"image_level": False, "tokens": "masked", "compute_stats": True}),
        ],
        ids=str,
    )
    def _config(self, request: pytest.FixtureRequest) -> None:
        name, values = request.param
        self.config = structured("loss", name, **values)


class TestAdamW(OptimizerSuite):
    config = AdamWConfig(lr=Constant(value=0.1), weight_decay=Constant(value=0.0))


class TestSgd(OptimizerSuite):
    config = SgdConfig(lr=Constant(value=0.1), weight_decay=Constant(value=0.0), nesterov=True)


class TestSgdWithoutMomentum(OptimizerSuite):
    config = SgdConfig(lr=Constant(value=0.1), weight_decay=Constant(value=0.0), momentum=0.0)


# --------------------------------------------------------------------------- data
class TestMultiCrop(AugmentationSuite):
    @pytest.fixture(
        autouse=True,
        params=[
            {},
            {"anchor_size": 24, "local_from_global": True},
            {
                "resolutions": [{"ratio": 0.4}, {"ratio": 0.6, "global_size": 24}],
                "teacher_scale": 0.5,
            },
        ],
        ids=["plain", "anchors", "resolutions"],
    )
    def _config(self, request: pytest.FixtureRequest) -> None:
        sizes = {"global_size": 16, "local_size": 8, "local_crops": 2}
        self.config = structured("augmentation", "multi_crop", **sizes, **request.param)


class TestMultiCropOfGrayImages(AugmentationSuite):
    config = MultiCropConfig(global_size=16, local_size=8, local_crops=2)
    channels = 1


class TestFashionMnist(DatasetSuite):
    config = FEW


class TestFashionMnistInGray(DatasetSuite):
    config = FEW
    channels = 1


# --------------------------------------------------------------------------- what runs
class TestOneProcess(LauncherSuite):
    config = LocalConfig(processes=1)


class TestTwoProcesses(LauncherSuite):
    config = LocalConfig(processes=2)


class TestSlurm(LauncherSuite):
    config = SlurmConfig(nodes=2, gpus_per_node=4)
    launch = False


class TestEvaluateWhileTraining(ObserverSuite):
    config = EvaluateWhileTrainingConfig(evaluations={"knn": KnnConfig(train=FEW, test=FEW)})
    images = GRAY


class TestFigures(ObserverSuite):
    config = FiguresConfig(dataset=FEW)
    images = GRAY


PRETRAIN = {
    "iterations": 4,
    "batch_size": 4,
    "images": {"channels": 1, "mean": [0.3], "std": [0.3]},
    "dataset": {"use": "fashion_mnist"},
    "augmentation": {"use": "multi_crop", "global_size": 16, "local_size": 8, "anchor_size": 16},
    "backbone": {"use": "vit", "drop_path_rate": 0.2, **VIT},
    "losses": {
        "dino": {"use": "dino", "head": HEAD},
        "ibot": {"use": "ibot", "head": HEAD},
        "gram": {"use": "gram", "anchor": {"period": 2, "first_refresh": 2}},
    },
    "teacher": {"momentum": 0.9},
    "optimizer": {"use": "adamw", "lr": 1e-3, "weight_decay": 0.1},
}


class TestPretrain(TaskSuite):
    config = structured("task", "pretrain", **PRETRAIN)


class TestPretrainUnit(TrainUnitSuite):
    config = structured("task", "pretrain", **PRETRAIN)
