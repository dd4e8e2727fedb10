"""Heads on backbones as ONNX: one file from images to predictions, compared when it is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from dinov3_onnx.export import export_predictions
from dinov3_onnx.networks import Predictions
from heads_fixed import FixedHead
from heads_support import RECIPE, SEGMENTATION, registry
from run_support import run_here
from torch import Tensor, nn

from dinov3_framework import (
    CheckpointError,
    HeadFeatures,
    ImagesConfig,
    Model,
    Registry,
    Target,
    load_backbone,
)
from dinov3_framework.contracts.networks import Backbone, Head
from dinov3_framework.data.predictions import predict
from dinov3_framework.weights.cli import main
from dinov3_framework.weights.convert import convert_backbone
from dinov3_framework.weights.heads import LoadedHead, load_head
from dinov3_framework.weights.info import ComponentInfo

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

TARGETS = {
    "label": Target("class", classes=("a", "b", "c")),
    "mask": Target("mask", classes=("x", "y", "z"), ignore_index=255),
    "depth": Target("map", unit="m"),
}
VIT = {"embed_dim": 32, "num_heads": 2, "depth": 4, "patch_size": 16, "ffn_ratio": 2.0}
MASK2FORMER = {
    "hidden_dim": 32,
    "queries": 4,
    "heads": 2,
    "ffn_dim": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "adapter_channels": 4,
    "adapter_heads": 2,
}


def drawn(network: nn.Module) -> nn.Module:
    """A network in eval mode in which every parameter matters."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network.eval()


def backbone_of(known: Registry, **options: Any) -> Any:
    torch.manual_seed(0)
    return drawn(known.build("backbone", "vit", **VIT | options))


def head_on(known: Registry, backbone: Backbone, name: str, options: Mapping[str, Any]) -> Any:
    features = backbone.feature_info
    head = known.build("head", name, features=features, targets=TARGETS, **options)
    head.init_weights()
    return drawn(head)


def written(path: Path, backbone: Any, head: Head, name: str = "a_head") -> str:
    info = ComponentInfo("vit", VIT, ImagesConfig(), 64, {})
    loaded = LoadedHead(head, ImagesConfig(), 64, {"run": "a test"}, "x", name, {"a": 1})
    return export_predictions(path, backbone, info, loaded)


def assert_predicts(path: Path, model: Model, size: tuple[int, int], batch: int = 1) -> None:
    """The file gives what evaluations see, for such images."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = torch.randn(batch, model.images.channels, *size)
    found = session.run(None, {"images": images.numpy()})
    named = dict(zip([each.name for each in session.get_outputs()], found, strict=True))
    wanted = predict(model, images)
    assert named.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(torch.from_numpy(named[name]), value, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------- from the shell
@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backbone that was tuned for its head, and that head."""
    output = tmp_path_factory.mktemp("trained") / "run"
    options = ("iterations=2", "tune_backbone=true", 'drop=["observers.score"]')
    found = run_here(output, *SEGMENTATION[:2], *options, "head.layers=[-1]", recipe=RECIPE)
    assert found.returncode == 0, found.stderr
    return output


def test_a_trained_head_is_converted_with_its_backbone(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    known = registry()
    monkeypatch.setattr(Registry, "load", lambda *_: known)
    path = tmp_path / "segmenter.onnx"
    words = [str(trained / "exports" / "backbone.safetensors"), str(path), "--head", str(trained)]
    assert main(["convert", *words]) == 0
    shown = capsys.readouterr().out
    assert "takes any batch, sides that are multiples of 7 px" in shown
    assert shown.count("largest difference") == 2
    backbone = load_backbone(trained, registry=known)
    head = load_head(trained, backbone.backbone, registry=known).head
    model = Model(backbone.backbone, backbone.images, head)
    assert_predicts(path, model, (28, 28), batch=3)
    assert_predicts(path, model, (14, 35))
    file = onnx.load(path)
    metadata = {each.key: each.value for each in file.metadata_props}
    targets = json.loads(metadata["targets"])
    assert targets["mask"]["kind"] == "mask"
    assert targets["mask"]["n_classes"] == 2
    assert json.loads(metadata["head"])["use"] == "toy_segmentation"
    assert json.loads(metadata["images"])["mean"] == [0.5]
    assert metadata["takes"] == "any batch, sides that are multiples of 7 px"
    (output,) = file.graph.output
    axes = [each.dim_param or each.dim_value for each in output.type.tensor_type.shape.dim]
    assert axes == ["batch", 2, "height", "width"]
    weights = {each.name for each in file.graph.initializer}
    assert {"head.conv.weight", "backbone.norm.weight"} <= weights


def test_what_cannot_hold_a_head_refuses_it(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    with pytest.raises(CheckpointError, match=r"meta has no place for a head .*; onnx has"):
        convert_backbone(trained, path, head=trained, registry=registry())
    assert not path.exists()


def test_a_head_of_another_backbone_is_refused(trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    options = ("iterations=1", "tune_backbone=true", "seed=7", 'drop=["observers.score"]')
    assert run_here(other, *options, recipe=RECIPE).returncode == 0
    path = tmp_path / "x.onnx"
    with pytest.raises(CheckpointError, match=r"was trained on .*, not on "):
        convert_backbone(trained, path, head=other, registry=registry())
    assert list(tmp_path.glob("*.onnx*")) == []


def test_predictions_that_are_no_tensors_are_refused() -> None:
    head = FixedHead()
    head.targets = {"boxes": Target("boxes")}
    with pytest.raises(CheckpointError, match=r"predicts 'boxes', .* no single tensor"):
        Predictions(backbone_of(registry(), depth=1), head)


# ---------------------------------------------------------------------------- heads
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "depth"),
    [
        ("linear_segmentation", {"layers": [0], "class_token": True}, 1),
        ("dpt_depth", {"channels": 8, "widths": [4, 8, 8, 8], "layers": [0, 0, 1, 1]}, 2),
        ("plain_mask_transformer", {"queries": 3, "blocks": 2, "heads": 2, "layers": [0, 1]}, 2),
        ("mask2former", {**MASK2FORMER, "layers": [0, 0, 1, 1]}, 2),
    ],
)
def test_heads_predict_at_any_size(
    tmp_path: Path, name: str, options: dict[str, Any], depth: int
) -> None:
    known = Registry.load()
    # Blocks take time in a trace, and that mask2former fills sides up to 32 several times as much.
    patch = 32 if name == "mask2former" else 16
    backbone = backbone_of(known, depth=depth, patch_size=patch)
    head = head_on(known, backbone, name, options)
    path = tmp_path / "x.onnx"
    said = written(path, backbone, head, name)
    assert f"any batch, sides that are multiples of {patch} px" in said
    model = Model(backbone, ImagesConfig(), head)
    assert_predicts(path, model, (3 * patch, 5 * patch), batch=3)
    assert_predicts(path, model, (6 * patch, 4 * patch))


class Coarse(FixedHead):
    """How many squares of three patches hold an image, the last of which may have fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.targets = {"depth": Target("map", unit="m")}

    def forward(self, features: HeadFeatures) -> Tensor:
        rows, columns = (-(-side // 3) for side in features.maps[0].shape[2:])
        mean = features.maps[0].mean((1, 2, 3))[:, None, None]
        return mean.expand(-1, rows, columns).sum((1, 2))

    def predict(self, outputs: Tensor, size: tuple[int, int]) -> Mapping[str, Tensor]:
        return {"depth": outputs[:, None, None].expand(-1, *size)}


@pytest.mark.slow
def test_sizes_are_rounded_as_python_does(tmp_path: Path) -> None:
    backbone, path = backbone_of(Registry.load(), depth=1), tmp_path / "x.onnx"
    assert "multiples of 16 px" in written(path, backbone, Coarse())
    for rows in (2, 3, 4, 7):
        assert_predicts(path, Model(backbone, ImagesConfig(), Coarse()), (16 * rows, 48))


class OneAtATime(FixedHead):
    """Counts its images in Python, which torch.export takes for a constant."""

    def forward(self, features: HeadFeatures) -> Tensor:
        means = features.maps[0].mean((2, 3))[:, :4]
        return torch.cat([means[place : place + 1] for place in range(len(means))])


@pytest.mark.slow
def test_a_head_that_is_not_followed_freely_is_written_for_one_size(tmp_path: Path) -> None:
    backbone, path = backbone_of(Registry.load(), depth=1), tmp_path / "x.onnx"
    said = written(path, backbone, OneAtATime())
    assert said.startswith("takes batches of 1, images of 64 x 64 px; run by onnxruntime")
    assert_predicts(path, Model(backbone, ImagesConfig(), OneAtATime()), (64, 64))
