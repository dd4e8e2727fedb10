"""ConvNeXt's weights in files of Meta, transformers and timm, against those libraries' models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import field, frozen
from dinov3_convnext.components import PUBLISHED
from dinov3_convnext.configs import PRESETS, ConvNextConfig, ConvNextTinyConfig
from dinov3_convnext.layouts import LAYOUTS, HuggingFaceLayout, MetaLayout, TimmLayout
from dinov3_convnext.network import ConvNeXt
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dinov3_framework import CheckpointError, ImagesConfig, Layout

SMALL: dict[str, Any] = {"depths": (1, 2, 1, 1), "dims": (8, 12, 16, 24)}
IMAGES = ImagesConfig(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
GRAY = ImagesConfig(channels=1, mean=(0.3,), std=(0.2,))


@frozen
class Tensors:
    """Tensors by name, as a file holds them."""

    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any] = field(factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


@torch.no_grad()
def spread(module: nn.Module) -> nn.Module:
    """Weights as spread out as trained ones: initial layer scales hide what the blocks do."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
        else:
            parameter.copy_(0.2 * noise + float(not name.endswith("bias")))
    return module.eval()


def convnext(**options: Any) -> ConvNeXt:
    model = spread(ConvNeXt(ConvNextConfig(**{**SMALL, **options})))
    assert isinstance(model, ConvNeXt)
    return model


def images(channels: int = 3) -> Tensor:
    return torch.randn(2, channels, 64, 96, generator=torch.Generator().manual_seed(1))


def read(layout: Layout, content: Tensors) -> ConvNeXt:
    """The backbone in a file, by the layout's rules: every name used, none left over."""
    config = layout.recognize(content)
    assert isinstance(config, ConvNextConfig)
    model = ConvNeXt(config)
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    rules = layout.rules(config, list(state))
    stored: dict[str, tuple[int, ...]] = {}
    for rule in rules:
        stored |= rule.stored(state[rule.official])
    assert stored == content.shapes
    tensors = {rule.official: rule.read(state[rule.official], content.read) for rule in rules}
    model.load_state_dict(tensors, strict=True)
    return model.eval()


def write(layout: Layout, model: ConvNeXt) -> dict[str, Tensor]:
    """What a file of this layout has in it."""
    state = model.state_dict()
    assert layout.refusal(model.config) is None
    stored: dict[str, Tensor] = {}
    for rule in layout.rules(model.config, list(state)):
        stored |= rule.write(state[rule.official], state[rule.official].clone)
    return stored


def write_folder(
    folder: Path, layout: Layout, model: ConvNeXt, spec: ImagesConfig
) -> dict[str, Any]:
    """A folder as other libraries load it; what ``config.json`` says."""
    tensors = {name: tensor.contiguous() for name, tensor in write(layout, model).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = layout.settings(model.config, spec, 64)
    for name, content in settings.items():
        (folder / name).write_text(json.dumps(content))
    return dict(settings["config.json"])


def assert_same(ours: ConvNeXt, cls: Tensor, patches: Tensor, batch: Tensor) -> None:
    """Class and patch tokens, [B, D] and [B, P, D], of another library's model."""
    features = ours.forward_features(batch)
    for name, theirs in (("x_norm_clstoken", cls), ("x_norm_patchtokens", patches)):
        torch.testing.assert_close(features[name], theirs, rtol=1e-4, atol=1e-5)
        assert theirs.std() > 0.1


# ------------------------------------------------------------------------- transformers
def of_hugging_face(model: Any, batch: Tensor) -> tuple[Tensor, Tensor]:
    output = model(batch)
    return output.pooler_output, output.last_hidden_state[:, 1:]


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers")


@torch.no_grad()
def test_from_hugging_face(transformers: Any, tmp_path: Path) -> None:
    config = transformers.DINOv3ConvNextConfig(
        hidden_sizes=list(SMALL["dims"]), depths=list(SMALL["depths"])
    )
    model = spread(transformers.DINOv3ConvNextModel(config))
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    saved, held = LAYOUTS[1:3]
    file = Tensors(load_file(tmp_path / "model.safetensors"), settings)
    state = Tensors(dict(model.state_dict()))
    for layout, content, other in ((saved, file, held), (held, state, saved)):
        assert other.recognize(content) is None
        assert layout.recognize(content) == ConvNextConfig(**SMALL)
        assert_same(read(layout, content), *of_hugging_face(model, images()), images())


@torch.no_grad()
@pytest.mark.parametrize("spec", [IMAGES, GRAY])
def test_to_hugging_face(transformers: Any, spec: ImagesConfig, tmp_path: Path) -> None:
    layout, channels = HuggingFaceLayout(), spec.channels
    model = convnext(in_chans=channels)
    written = write_folder(tmp_path, layout, model, spec)
    loaded, info = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert isinstance(loaded, transformers.DINOv3ConvNextModel)
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == write(layout, model).keys()
    assert_same(model, *of_hugging_face(loaded.eval(), images(channels)), images(channels))
    assert written["depths"] == list(SMALL["depths"])

    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert list(processor.image_mean) == list(spec.mean)
    assert list(processor.image_std) == list(spec.std)
    assert (processor.size["height"], processor.size["width"]) == (64, 64)


def test_hugging_face_cannot_do_without_layer_scale() -> None:
    layout = HuggingFaceLayout()
    refusal = layout.refusal(ConvNextConfig(**SMALL, layer_scale_init_value=0.0))
    assert refusal is not None
    assert "layer_scale_init_value = 0" in refusal
    assert layout.refusal(ConvNextTinyConfig()) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act = 'relu'; these backbones have 'gelu'"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps = 1e-05; these backbones have 1e-06"),
    ],
)
def test_hugging_face_settings_that_compute_otherwise(
    settings: dict[str, Any], message: str
) -> None:
    tensors = write(HuggingFaceLayout(), convnext())
    with pytest.raises(CheckpointError, match=message):
        HuggingFaceLayout().recognize(Tensors(tensors, settings))


# ------------------------------------------------------------------------- timm
def of_timm(model: Any, batch: Tensor) -> tuple[Tensor, Tensor]:
    """timm norms what it has pooled, and leaves the map as it is."""
    maps = model.forward_features(batch)
    return model.forward_head(maps), model.head.norm(maps).flatten(2).mT


@pytest.fixture(scope="module")
def timm() -> Any:
    return pytest.importorskip("timm")


@torch.no_grad()
@pytest.mark.parametrize("ls_init_value", [1e-6, None])
def test_from_timm(timm: Any, ls_init_value: float | None) -> None:
    model = spread(
        timm.models.convnext.ConvNeXt(num_classes=0, ls_init_value=ls_init_value, **SMALL)
    )
    layout, content = TimmLayout(), Tensors(dict(model.state_dict()))
    options = {} if ls_init_value else {"layer_scale_init_value": 0.0}
    assert layout.recognize(content) == ConvNextConfig(**SMALL, **options)
    assert_same(read(layout, content), *of_timm(model, images()), images())


@torch.no_grad()
@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (IMAGES, {"layer_scale_init_value": None}),
        (GRAY, {}),
        (ImagesConfig(channels=5, mean=(0.1,) * 5, std=(0.2,) * 5), {}),
    ],
)
def test_to_timm(timm: Any, spec: ImagesConfig, options: dict[str, Any], tmp_path: Path) -> None:
    model = convnext(in_chans=spec.channels, **options)
    write_folder(tmp_path, TimmLayout(), model, spec)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert loaded.state_dict().keys() == write(TimmLayout(), model).keys()
    batch = images(spec.channels)
    assert_same(model, *of_timm(loaded, batch), batch)
    data = timm.data.resolve_model_data_config(loaded)
    assert (list(data["mean"]), list(data["std"])) == (list(spec.mean), list(spec.std))
    assert tuple(data["input_size"]) == (spec.channels, 64, 64)


@pytest.mark.parametrize("name", PRESETS)
def test_timm_knows_the_published_sizes(timm: Any, name: str) -> None:
    with torch.device("meta"):
        ours, theirs = ConvNeXt(PRESETS[name]()), timm.create_model(name, num_classes=0)
    shapes = {n: tuple(tensor.shape) for n, tensor in theirs.state_dict().items()}
    assert {n: tuple(tensor.shape) for n, tensor in write(TimmLayout(), ours).items()} == shapes
    settings = TimmLayout().settings(PRESETS[name](), ImagesConfig(), 224)["config.json"]
    assert settings["architecture"] == name
    assert "model_args" not in settings


def test_timm_architectures_that_compute_otherwise() -> None:
    content = Tensors(write(TimmLayout(), convnext()), {"architecture": "test_convnext"})
    with pytest.raises(CheckpointError, match=r"'test_convnext'; .* convnext_tiny, .* what these"):
        TimmLayout().recognize(content)


# ------------------------------------------------------------------------- all
@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: type(layout).__name__)
@pytest.mark.parametrize("options", [{}, {"in_chans": 4}])
def test_round_trip(layout: Layout, options: dict[str, Any]) -> None:
    model = convnext(**options)
    content = Tensors(write(layout, model))
    assert layout.recognize(content) == model.config
    for name, tensor in read(layout, content).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    others = [each for each in LAYOUTS if each is not layout]
    assert [each.recognize(content) for each in others] == [None] * 3


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: type(layout).__name__)
def test_presets_are_recognized(layout: Layout) -> None:
    for preset in PRESETS.values():
        with torch.device("meta"):
            model = ConvNeXt(preset())
        found = layout.recognize(Tensors(write(layout, model)))
        assert type(found) is preset
        assert found == preset()


@pytest.mark.parametrize(
    "gone",
    [
        "downsample_layers.2.1.weight",
        "stages.3.0.dwconv.weight",
        "norm.weight",
    ],
)
def test_what_is_no_convnext(gone: str) -> None:
    state = dict(convnext().state_dict())
    del state[gone]
    assert MetaLayout().recognize(Tensors(state)) is None
    assert MetaLayout().recognize(Tensors({"weight": torch.zeros(3)})) is None


def test_published() -> None:
    assert [each.name for each in PUBLISHED] == [f"dinov3_{name}" for name in PRESETS]
    for published, preset in zip(PUBLISHED, PRESETS.values(), strict=True):
        (file,) = published.files.values()
        assert list(published.files) == ["LVD1689M"]
        assert file.config == preset()
        assert file.file == f"{published.name}_pretrain_lvd1689m-{file.digest}.pth"
        assert len(bytes.fromhex(file.digest)) == 4
