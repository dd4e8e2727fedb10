"""Every other component keeps the framework's contracts, on pictures of clothes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from clothes import CLASSES, write_clothes
from dinov3_example_plugin import (
    AgreementConfig,
    BackgroundConfig,
    ContrastiveConfig,
    ConvMixerConfig,
    ImagesAndMasksConfig,
    JournalConfig,
    LinearClassConfig,
    LinearMaskConfig,
    RmsPropConfig,
    SquareConfig,
    TarStreamConfig,
    TwoCropsConfig,
)
from dinov3_example_plugin.contrastive import contrastive_loss

from dinov3_framework import (
    Constant,
    DataError,
    FeatureInfo,
    ImagesConfig,
    Registry,
    Target,
    UserError,
)
from dinov3_framework.testing import (
    AugmentationSuite,
    DatasetSuite,
    EvaluationSuite,
    HeadSuite,
    LauncherSuite,
    ObserverSuite,
    OptimizerSuite,
    StreamDatasetSuite,
    TrainUnitSuite,
    TransformSuite,
)

GRAY = ImagesConfig(channels=1, mean=(0.5,), std=(0.25,))
SCHEMA = {
    "label": Target("class", classes=CLASSES),
    "mask": Target("mask", classes=CLASSES, ignore_index=255),
}


@pytest.fixture(scope="session")
def clothes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clothes")
    write_clothes(folder)
    return folder


def pairs(clothes: Path) -> ImagesAndMasksConfig:
    images, masks = str(clothes / "images"), str(clothes / "masks")
    return ImagesAndMasksConfig(images=images, masks=masks, classes=CLASSES)


class TestImagesAndMasks(DatasetSuite):
    channels = 1

    @pytest.fixture(autouse=True)
    def _config(self, clothes: Path) -> None:
        self.config = pairs(clothes)


class TestTarStream(StreamDatasetSuite):
    channels = 1

    @pytest.fixture(autouse=True)
    def _config(self, clothes: Path) -> None:
        archives = (str(clothes / "a.tar"), str(clothes / "b.tar"))
        self.config = TarStreamConfig(archives=archives)


class TestSquare(TransformSuite):
    config = SquareConfig(size=32, flip=0.5)
    schema = SCHEMA


class TestTwoCrops(AugmentationSuite):
    config = TwoCropsConfig(size=28)


class TestLinearClass(HeadSuite):
    config = LinearClassConfig()
    schema = SCHEMA


class TestLinearMask(HeadSuite):
    config = LinearMaskConfig(layer=-2)
    schema = SCHEMA


class TestRmsProp(OptimizerSuite):
    config = RmsPropConfig(lr=Constant(value=1e-3), weight_decay=Constant(value=0.01))


class TestBackground(LauncherSuite):
    config = BackgroundConfig()


class TestJournal(ObserverSuite):
    config = JournalConfig()


class TestContrastive(TrainUnitSuite):
    @pytest.fixture(autouse=True)
    def _config(self, clothes: Path) -> None:
        self.config = ContrastiveConfig(
            iterations=4,
            batch_size=8,
            dataset=pairs(clothes),
            images=GRAY,
            optimizer=RmsPropConfig(lr=Constant(value=1e-3), weight_decay=Constant(value=0.01)),
            backbone=ConvMixerConfig(patch_size=7, embed_dim=16, depth=2),
        )


class TestAgreement(EvaluationSuite):
    images = GRAY

    @pytest.fixture(autouse=True)
    def _config(self, clothes: Path) -> None:
        registry = Registry.load()
        features = (FeatureInfo(channels=8, stride=4),)
        head = registry.build(LinearClassConfig(), features=features, targets=SCHEMA)
        self.head = head.eval()
        self.config = AgreementConfig(dataset=pairs(clothes), transform=SquareConfig(size=32))


# --------------------------------------------------------------------------- by hand
def test_contrastive_loss_by_hand() -> None:
    # Of two images, each view has its partner at similarity 1 and two others at 0.
    views = torch.eye(2)
    expected = -torch.log(torch.e**2 / (torch.tensor(torch.e**2) + 2))
    assert float(contrastive_loss(views, views, 0.5)) == pytest.approx(float(expected))


def test_a_label_follows_from_its_mask(clothes: Path) -> None:
    dataset = Registry.load().build(pairs(clothes), channels=1)
    for index in range(len(dataset)):
        targets = dataset[index].targets
        assert (targets["mask"] == targets["label"]).sum() > 0
        assert set(targets["mask"].unique().tolist()) == {0, targets["label"]}


def test_a_missing_mask_is_said(clothes: Path, tmp_path: Path) -> None:
    config = ImagesAndMasksConfig(
        images=str(clothes / "images"), masks=str(tmp_path), classes=CLASSES
    )
    with pytest.raises(DataError, match="an image has no mask"):
        Registry.load().build(config, channels=1)


def test_a_head_wants_its_target() -> None:
    features = (FeatureInfo(channels=16, stride=4),)
    with pytest.raises(UserError, match="'mask'"):
        Registry.load().build(LinearMaskConfig(), features=features, targets={})
