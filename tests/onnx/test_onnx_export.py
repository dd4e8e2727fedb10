"""ONNX models compute what the backbone does at any size, and are compared with it when written."""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dinov3_onnx import export as onnx_export
from dinov3_onnx import graph as onnx_graph
from dinov3_onnx.export import export_onnx
from torch import Tensor, nn

from dinov3_framework import CheckpointError, ImagesConfig, Registry, load_backbone
from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.weights import formats
from dinov3_framework.weights.convert import convert_backbone
from dinov3_framework.weights.export import export_backbone
from dinov3_framework.weights.info import ComponentInfo

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

VIT = {"embed_dim": 16, "num_heads": 2, "depth": 1, "patch_size": 4, "ffn_ratio": 2.0}
# (batch, rows, columns) of patches; none is what the graph was traced with.
SHAPES = [(1, 1, 1), (3, 2, 2), (1, 4, 3), (2, 3, 6)]
IMAGES = ImagesConfig(channels=2, mean=(0.5, 0.25), std=(0.5, 1.0))

TRAINING_ALONE = {"mask_token", "local_cls_norm"}

Made = tuple[Path, Backbone]


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.load()


def backbone_of(registry: Registry, component: str, **options: Any) -> Backbone:
    """A backbone in which every parameter matters."""
    torch.manual_seed(0)
    built = registry.build("backbone", component, in_chans=2, **options)
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.3)
    return built.eval()  # type: ignore[no-any-return]


def info_of(registry: Registry, backbone: Any) -> ComponentInfo:
    component, values = registry.values_of(backbone.config)
    return ComponentInfo(component, values, IMAGES, 24, {"run": "a test"})


def exported(registry: Registry, path: Path, backbone: Backbone) -> Made:
    export_onnx(path, backbone, info_of(registry, backbone))
    return path, backbone


@pytest.fixture(scope="module")
def graph(registry: Registry) -> Any:
    """The graph of ``VIT``, the same for all weights."""
    return onnx_graph.backbone_graph(backbone_of(registry, "vit", **VIT), None)


@pytest.fixture(scope="module")
def vit(registry: Registry, graph: Any, tmp_path_factory: pytest.TempPathFactory) -> Made:
    path = tmp_path_factory.mktemp("vit") / "x.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_export, "backbone_graph", lambda *_: copy.deepcopy(graph))
        return exported(registry, path, backbone_of(registry, "vit", **VIT))


def expected(backbone: Backbone, images: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        features = backbone.forward_features(images)
    names = ["x_norm_clstoken", "x_norm_patchtokens", "x_storage_tokens"]
    return {name: features[name] for name in names if features[name].numel()}


def assert_computes(path: Path, backbone: Backbone) -> None:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == ["images"]
    side = backbone.patch_size
    for batch, rows, columns in SHAPES:
        images = torch.randn(batch, backbone.in_chans, rows * side, columns * side)
        outputs = expected(backbone, images)
        assert [each.name for each in session.get_outputs()] == list(outputs)
        found = session.run(None, {"images": images.numpy()})
        for given, (name, wanted) in zip(found, outputs.items(), strict=True):
            torch.testing.assert_close(
                torch.from_numpy(given), wanted, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m
            )


def assert_same(path: Path, backbone: Backbone) -> None:
    """The file holds every tensor that its graph uses to the bit, under its official name."""
    model = onnx.load(path)
    official = backbone.state_dict()
    held = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    tied = {official[name].data_ptr() for name in official.keys() & held.keys()}
    lost = [n for n in official.keys() - held.keys() if official[n].data_ptr() not in tied]
    assert {name.partition(".")[0] for name in lost} <= TRAINING_ALONE
    for name in official.keys() & held.keys():
        tensor = official[name].float() if official[name].is_floating_point() else official[name]
        assert torch.equal(torch.from_numpy(held[name].copy()), tensor), name
    metadata = {each.key: each.value for each in model.metadata_props}
    found = ComponentInfo.from_metadata(path, metadata)
    assert found is not None
    assert (found.images, found.size, found.provenance) == (IMAGES, 24, {"run": "a test"})


# --------------------------------------------------------------------------- networks
def test_vit(vit: Made) -> None:
    assert_computes(*vit)
    assert_same(*vit)
    onnx.checker.check_model(onnx.load(vit[0]), full_check=True)


@pytest.mark.slow
def test_swiglu_without_storage_tokens(registry: Registry, tmp_path: Path) -> None:
    """With all else that a ViT may have otherwise, and in an older version of the operators."""
    options = {"ffn_layer": "swiglu", "n_storage_tokens": 0, "mask_k_bias": False}
    rope = {"pos_embed_rope_normalize_coords": "min", "norm_layer": "rmsnorm"}
    untied = {"untie_cls_and_patch_norms": True, "untie_global_and_local_cls_norm": True}
    made = backbone_of(registry, "vit", **VIT, **options, **rope, **untied)
    path = tmp_path / "x.onnx"
    export_onnx(path, made, info_of(registry, made), opset=18)
    assert [(each.domain, each.version) for each in onnx.load(path).opset_import] == [("", 18)]
    assert_computes(path, made)
    assert_same(path, made)


@pytest.mark.slow
def test_convnext(registry: Registry, tmp_path: Path) -> None:
    """``patch_size`` resizes intermediate layers, and leaves the network's outputs as they are."""
    sizes = {"depths": (1, 1, 1, 1), "dims": (4, 8, 12, 16)}
    resized = backbone_of(registry, "convnext", **sizes, patch_size=16)
    path, _ = exported(registry, tmp_path / "x.onnx", resized)
    plain = backbone_of(registry, "convnext", **sizes)
    assert_computes(path, plain)
    assert_same(path, resized)


@pytest.mark.slow
def test_half_precision_is_widened(registry: Registry, tmp_path: Path) -> None:
    """Parameters in bfloat16 and rotation in bfloat16: runtimes compute all of it in float32."""
    half = backbone_of(registry, "vit", **VIT, pos_embed_rope_dtype="bf16").to(torch.bfloat16)
    path, _ = exported(registry, tmp_path / "x.onnx", half)
    exact = backbone_of(registry, "vit", **VIT)
    exact.load_state_dict(half.state_dict())
    assert_computes(path, exact)
    assert_same(path, half)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


# --------------------------------------------------------------------------- the file
def test_axes_are_named(vit: Made) -> None:
    graph = onnx.load(vit[0]).graph
    axes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*graph.input, *graph.output]
    }
    assert axes == {
        "images": ["batch", 2, "height", "width"],
        "x_norm_clstoken": ["batch", 16],
        "x_norm_patchtokens": ["batch", "patches", 16],
        "x_storage_tokens": ["batch", 4, 16],
    }


def test_what_the_graph_uses_is_an_initializer(vit: Made) -> None:
    """Runtimes warn of initializers without use, so the mask token is none of the graph's."""
    path, backbone = vit
    model = onnx.load(path)
    used = {name for node in model.graph.node for name in node.input}
    initializers = {each.name for each in model.graph.initializer}
    assert initializers <= used
    assert backbone.state_dict().keys() - initializers == {"mask_token"}


def test_nothing_of_this_machine_is_in_the_file(vit: Made) -> None:
    content = vit[0].read_bytes()
    assert b".py" not in content
    assert b"stack_trace" not in content


@pytest.mark.slow
def test_export_is_quiet_and_leaves_the_backbone_alone(
    registry: Registry,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = backbone_of(registry, "vit", **VIT).train()
    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.INFO):
        warnings.simplefilter("always")
        path, _ = exported(registry, tmp_path / "x.onnx", made)
    assert capfd.readouterr() == ("", "")
    assert [str(each.message) for each in warned] == []
    spoken = [record.name for record in caplog.records if record.levelno >= logging.INFO]
    assert spoken == ["dinov3_framework.onnx"]
    assert made.training
    assert all(parameter.requires_grad for parameter in made.parameters())
    # Dropped layers and random coordinates are not in the graph, whatever mode it came in.
    assert_computes(path, made.eval())


@pytest.fixture
def writer(graph: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The exporter, which traces a ``VIT`` once for all tests."""
    monkeypatch.setattr(onnx_export, "backbone_graph", lambda *_: copy.deepcopy(graph))
    return export_onnx


@pytest.fixture
def apart(registry: Registry, tmp_path: Path, graph: Any, monkeypatch: pytest.MonkeyPatch) -> Made:
    """A model whose weights are in a file of their own."""
    monkeypatch.setattr(onnx_export, "_LARGEST", 100)
    monkeypatch.setattr(onnx_export, "backbone_graph", lambda *_: copy.deepcopy(graph))
    return exported(registry, tmp_path / "x.onnx", backbone_of(registry, "vit", **VIT))


def test_weights_beside_the_model(apart: Made, tmp_path: Path) -> None:
    path, backbone = apart
    model, data = sorted(tmp_path.iterdir(), key=lambda each: each != path)
    assert model == path
    assert data.name.startswith("dinov3-")
    assert data.name.endswith(".onnx.data")
    assert_computes(path, backbone)
    assert_same(path, backbone)
    moved = path.rename(tmp_path / "other.onnx")
    assert_same(moved, backbone)
    onnx.checker.check_model(str(moved))


# --------------------------------------------------------------------------- comparison
def test_what_was_found_is_said(vit: Made, registry: Registry, writer: Any, tmp_path: Path) -> None:
    compared = export_onnx(tmp_path / "x.onnx", vit[1], info_of(registry, vit[1]))
    assert compared.startswith("run by onnxruntime: largest difference")


@pytest.mark.parametrize("apart", [False, True])
def test_without_a_runtime_tensors_are_compared(
    vit: Made,
    registry: Registry,
    writer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    apart: bool,
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    if apart:
        monkeypatch.setattr(onnx_export, "_LARGEST", 100)
    compared = export_onnx(tmp_path / "x.onnx", vit[1], info_of(registry, vit[1]))
    assert "its tensors are equal" in compared
    assert_same(tmp_path / "x.onnx", vit[1])


def changing(change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Change each model before it is written."""
    serialize = onnx.ModelProto.SerializeToString

    class Changed:
        def __init__(self, model: Any) -> None:
            self.model = model

        def __getattr__(self, name: str) -> Any:
            return getattr(self.model, name)

        def SerializeToString(self, **options: Any) -> bytes:
            change(self.model)
            return serialize(self.model, **options)  # type: ignore[no-any-return]

    made = onnx_export.backbone_graph
    monkeypatch.setattr(onnx_export, "backbone_graph", lambda *given: Changed(made(*given)))


def another_weight(model: Any) -> None:
    tensor = next(each for each in model.graph.initializer if each.name == "cls_token")
    tensor.raw_data = bytes(len(tensor.raw_data))


def another_network(model: Any) -> None:
    """As if a layer had been left out: tokens are taken before the last of the nodes."""
    names = {each.name for each in model.graph.output}
    node = next(each for each in model.graph.node if names & set(each.output))
    node.op_type, (node.input[0], *_) = "Neg", list(node.input)
    del node.input[1:], node.attribute[:]


def no_weight(model: Any) -> None:
    kept = [each for each in model.graph.initializer if each.name != "cls_token"]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


@pytest.mark.parametrize("change", [another_weight, another_network, no_weight])
def test_a_file_that_differs_is_refused(
    vit: Made,
    registry: Registry,
    writer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Any], None],
) -> None:
    changing(change, monkeypatch)
    with pytest.raises(CheckpointError, match="onnx"):
        export_onnx(tmp_path / "y.onnx", vit[1], info_of(registry, vit[1]))
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------- as a format
def test_converting(vit: Made, registry: Registry, writer: Any, tmp_path: Path) -> None:
    source = tmp_path / "x.safetensors"
    component, values = registry.values_of(vit[1].config)
    state = vit[1].state_dict()
    export_backbone(
        source,
        state,
        component=component,
        config=values,
        images=IMAGES,
        size=24,
        provenance={"run": "a test"},
    )
    done = convert_backbone(source, tmp_path / "y.onnx", registry=registry)
    assert (done.format, done.component) == ("onnx", component)
    assert "largest difference" in done.compared
    assert_computes(tmp_path / "y.onnx", vit[1])
    assert sorted(each.name for each in tmp_path.iterdir()) == ["x.safetensors", "y.onnx"]


def test_without_the_plugin_the_format_is_unknown_and_nothing_else(tmp_path: Path) -> None:
    known = Registry.load(block=["onnx"])
    assert set(formats(Registry.load())) - set(formats(known)) == {"onnx"}
    with pytest.raises(CheckpointError, match="does not say in which format; choose one of"):
        convert_backbone(tmp_path / "x.pth", tmp_path / "y.onnx", registry=known)


# --------------------------------------------------------------------------- refusals


def test_models_are_not_read_back(vit: Made, tmp_path: Path) -> None:
    whole = vit[0].read_bytes()
    path = tmp_path / "y.onnx"
    for size in (1, 100, len(whole) - 1, len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"ONNX model.*not read back as weights"):
            load_backbone(path)


@pytest.mark.parametrize("library", ["onnx", "onnxscript"])
def test_a_missing_library(
    vit: Made,
    registry: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    library: str,
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(CheckpointError, match=r"pip install 'dinov3-framework\[onnx\]'"):
        exported(registry, tmp_path / "y.onnx", vit[1])
    assert list(tmp_path.iterdir()) == []


class Pixels(Backbone):
    """Tokens are scaled pixels; the scale is in no state dict."""

    embed_dim, patch_size, in_chans = 2, 1, 2

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(2))
        self.register_buffer("scale", torch.ones(2), persistent=False)
        self.init_weights()

    def init_weights(self) -> None:
        nn.init.ones_(self.shift)
        nn.init.constant_(self.scale, 3.0)

    def forward_features(self, images: Any, masks: Any = None) -> Any:
        tokens = images.flatten(2).transpose(1, 2) * self.scale + self.shift
        return {
            "x_norm_clstoken": tokens[:, 0],
            "x_storage_tokens": tokens[:, :0],
            "x_norm_patchtokens": tokens,
        }


class Untraceable(Pixels):
    """Looks at its images, which a graph cannot."""

    def forward_features(self, images: Any, masks: Any = None) -> Any:
        return super().forward_features(images if images.sum().item() > 0 else -images)


def test_buffers_that_no_state_dict_has(registry: Registry, vit: Made, tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    with torch.device("meta"):
        filled = Pixels()
    filled.load_state_dict(Pixels().state_dict(), assign=True)
    export_onnx(path, filled, info_of(registry, vit[1]))
    assert_computes(path, Pixels())


def test_what_cannot_be_exported(
    registry: Registry, vit: Made, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    info = info_of(registry, vit[1])
    path = tmp_path / "x.onnx"
    path.write_bytes(b"before")
    made = backbone_of(registry, "vit", **VIT)

    def attempt(backbone: Backbone, target: Path = path, **options: Any) -> str:
        with pytest.raises(CheckpointError) as caught:
            export_onnx(target, backbone, info, **options)
        assert [each.name for each in tmp_path.iterdir()] == ["x.onnx"]
        assert path.read_bytes() == b"before"
        assert capfd.readouterr() == ("", "")
        return str(caught.value)

    assert "must be called something.onnx" in attempt(made, tmp_path / "x.bin")
    assert "opset must be 18 to" in attempt(made, opset=11)
    assert "Untraceable cannot be written as ONNX" in attempt(Untraceable())
    assert "norm1.bias: torch.float64" in attempt(backbone_of(registry, "vit", **VIT).double())
    with torch.device("meta"):
        empty = registry.build("backbone", "vit", in_chans=2, **VIT)
    assert "without values (on the meta device)" in attempt(empty)
    with torch.no_grad():
        made.norm.weight[1] = torch.nan  # type: ignore[union-attr, index]
    assert "norm.weight: 1 of 16 values" in attempt(made)


def test_a_failing_disk_leaves_what_was_there(
    apart: Made, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, backbone = apart
    before = sorted(each.name for each in tmp_path.iterdir())
    content = path.read_bytes()

    def failing(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_export, "compare", failing)
    other = backbone_of(registry, "vit", **VIT)
    nn.init.zeros_(other.cls_token)  # type: ignore[arg-type]
    for made in (backbone, other):
        with pytest.raises(CheckpointError, match="disk full"):
            exported(registry, path, made)
        assert sorted(each.name for each in tmp_path.iterdir()) == before
        assert path.read_bytes() == content
    assert_same(path, backbone)
