"""Weights of heads, alone in a file and beside the backbone that they stand on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from dinov3_vit.components import COMPONENTS
from dinov3_vit.layouts import LAYOUTS
from torch import Tensor, nn

from dinov3_framework import (
    WEB_IMAGES,
    CheckpointError,
    Component,
    Content,
    HeadConfig,
    Layout,
    Published,
    PublishedFile,
    Registry,
    Renamed,
    Rule,
    config,
    load_backbone,
    option,
)
from dinov3_framework.checkpoints.store import CheckpointStore
from dinov3_framework.weights.export import export_tensors
from dinov3_framework.weights.hub import PlainCatalog, load_published
from dinov3_framework.weights.info import ComponentInfo
from dinov3_framework.weights.source import WeightSource

VIT = {"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
FILE = "toy_classifier-0123abcd.pth"


@config
class ClassifierConfig(HeadConfig):
    """A linear classifier."""

    classes: int = option("outputs", default=5)


class Classifier(nn.Module):
    """Its width is that of the features, which no config says."""

    def __init__(self, settings: ClassifierConfig, *, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, settings.classes)

    def init_weights(self) -> None:
        self.linear.reset_parameters()


class ClassifierLayout(Layout):
    """Files that call the layer ``fc``."""

    format: ClassVar[str] = "toy"
    config: ClassVar[type] = ClassifierConfig

    def recognize(self, content: Content) -> ClassifierConfig | None:
        if content.shapes.keys() != {"fc.weight", "fc.bias"}:
            return None
        return ClassifierConfig(classes=content.shapes["fc.bias"][0])

    def rules(self, config: Any, names: Sequence[str]) -> Sequence[Rule]:
        return [Renamed(name, name.replace("linear", "fc")) for name in names]


CLASSIFIER = Component("classifier", ClassifierConfig, Classifier)
PUBLISHED = Published(
    "toy_classifier",
    {"TOY": PublishedFile(FILE, ClassifierConfig(), url=f"https://elsewhere/{FILE}")},
    kind="head",
)


@pytest.fixture
def registry() -> Registry:
    registry = Registry.load()
    registry.add("head", CLASSIFIER, "toys", "toy-box")
    registry.add_offer("dinov3_layouts", ClassifierLayout(), "toys", "toy-box")
    registry.add_offer("dinov3_published", PUBLISHED, "toys", "toy-box")
    return registry


@pytest.fixture
def head() -> Classifier:
    torch.manual_seed(0)
    return Classifier(ClassifierConfig(classes=3), features=32)


def in_files(head: Classifier) -> dict[str, Tensor]:
    return {f"fc.{name}": tensor for name, tensor in head.linear.state_dict().items()}


def loaded(source: Path | str, registry: Registry, **options: Any) -> Classifier:
    with WeightSource.open(source, registry, kind="head", **options) as weights:
        found = weights.load_state(weights.build(features=32))
    assert isinstance(found, Classifier)
    return found


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    state = expected.state_dict()
    assert found.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.state_dict().items())


def test_a_head_is_recognized_by_its_layout(
    tmp_path: Path, registry: Registry, head: Classifier
) -> None:
    torch.save(in_files(head), tmp_path / "x.pth")
    with WeightSource.open(tmp_path / "x.pth", registry, kind="head") as weights:
        assert (weights.kind, weights.format) == ("head", "toy")
        assert weights.config == ClassifierConfig(classes=3)
        assert weights.info(registry).component == "classifier"
    assert_same(loaded(tmp_path / "x.pth", registry), head)
    with pytest.raises(CheckpointError, match="holds no backbone"):
        load_backbone(tmp_path / "x.pth", registry=registry)


def test_a_file_may_hold_a_backbone_and_a_head(
    tmp_path: Path, registry: Registry, head: Classifier
) -> None:
    backbone = registry.build("backbone", "vit", **VIT)
    content = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    content |= {f"head.{name}": tensor for name, tensor in in_files(head).items()}
    torch.save(content, tmp_path / "x.pth")
    assert_same(loaded(tmp_path / "x.pth", registry), head)
    found = load_backbone(tmp_path / "x.pth", images=WEB_IMAGES, registry=registry)
    assert_same(found.backbone, backbone)


def test_heads_in_own_files_and_checkpoints(
    tmp_path: Path, registry: Registry, head: Classifier
) -> None:
    info = ComponentInfo("classifier", {"classes": 3}, WEB_IMAGES, 64, {"made": "here"}, "head")
    state = head.state_dict()
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    run = tmp_path / "run"
    for path in (tmp_path / "x.safetensors", run / "exports" / "head.safetensors"):
        export_tensors(path, specs, state.items(), info.to_metadata())
        assert_same(loaded(path, registry), head)
    other = Classifier(ClassifierConfig(classes=3), features=32)
    tensors = {f"head.{name}": tensor for name, tensor in other.state_dict().items()}
    CheckpointStore(run / "checkpoints").save(7, tensors, {"head": info.to_metadata()})
    assert_same(loaded(run, registry), head)
    assert_same(loaded(run / "checkpoints" / "step_00000007", registry), other)
    with WeightSource.open(run, registry, kind="head") as weights:
        assert weights.info(registry) == info
        with pytest.raises(
            CheckpointError, match=r"of another shape:\n *linear\.weight: \[3, 32\]"
        ):
            weights.load_state(weights.build(features=16))
    with pytest.raises(CheckpointError, match="holds no backbone"):
        load_backbone(tmp_path / "x.safetensors", registry=registry)


def test_published_heads(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    head = Classifier(ClassifierConfig(), features=32)
    torch.save(in_files(head), cache / FILE)
    assert_same(loaded("toy_classifier", registry), head)
    with pytest.raises(CheckpointError, match="toy_classifier is a published head, not a backbone"):
        load_backbone("toy_classifier", registry=registry)
    catalog = PlainCatalog(
        [*COMPONENTS, CLASSIFIER], [*LAYOUTS, ClassifierLayout()], {PUBLISHED.name: PUBLISHED}
    )
    found = load_published(catalog, "toy_classifier", runtime={"features": 32})
    assert_same(found, head)
    assert found.images == WEB_IMAGES
    drawn = load_published(catalog, "toy_classifier", pretrained=False, runtime={"features": 8})
    assert drawn.linear.in_features == 8
