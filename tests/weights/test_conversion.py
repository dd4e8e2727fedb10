"""Weights from any format into any other, checked with the libraries that the files are for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov3_framework import (
    SATELLITE_IMAGES,
    WEB_IMAGES,
    CheckpointError,
    Registry,
    load_backbone,
)
from dinov3_framework.weights import formats
from dinov3_framework.weights.convert import convert_backbone
from dinov3_framework.weights.export import export_backbone

SMALL_VIT: dict[str, Any] = {
    "patch_size": 4,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "pos_embed_rope_rescale_coords": 2.0,
}
SMALL_CONVNEXT: dict[str, Any] = {"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32]}
FOLDERS = ("huggingface", "timm", "checkpoint")


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.load()


def seeded(backbone: Any, seed: int = 0) -> Any:
    """A backbone in which every parameter matters, and none of its outputs explodes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("gamma"):
                parameter.copy_(0.5 + 0.1 * noise)
            elif parameter.ndim == 1 and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            elif parameter.ndim > 1 and name.endswith("weight"):
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            elif not name.endswith("mask_token"):
                parameter.copy_(0.1 * noise)
        for module in backbone.modules():
            if hasattr(module, "bias_mask"):
                module.bias.mul_(module.bias_mask)
    return backbone.eval()


def exported(
    registry: Registry, path: Path, name: str, images: Any = WEB_IMAGES, **values: Any
) -> Any:
    """A backbone, written to ``path`` in this framework's own format."""
    backbone = seeded(registry.build("backbone", name, **values))
    export_backbone(
        path,
        backbone.state_dict(),
        component=name,
        config=values,
        images=images,
        size=16 * backbone.patch_size,
        provenance={"made": "by a test"},
    )
    return backbone


def tokens(backbone: Any, side: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, backbone.in_chans, side, side + 32, generator=generator)
    with torch.no_grad():
        output = backbone.forward_features(images)
    return output["x_norm_clstoken"], output["x_norm_patchtokens"]


def assert_same(first: Any, second: Any) -> None:
    for ours, theirs in zip(tokens(first), tokens(second), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=0)


CHAINS = [
    ("vit", SMALL_VIT, ["meta", "huggingface", "reference", "checkpoint", "dinov3_framework"]),
    (
        "vit",
        SMALL_VIT | {"ffn_layer": "swiglu", "n_storage_tokens": 0, "qkv_bias": False},
        ["huggingface", "meta", "checkpoint", "reference"],
    ),
    (
        "convnext",
        SMALL_CONVNEXT,
        ["meta", "huggingface", "timm", "reference", "checkpoint", "dinov3_framework"],
    ),
]


@pytest.mark.parametrize(("name", "values", "chain"), CHAINS, ids=["vit", "swiglu", "convnext"])
def test_a_chain_of_formats_ends_with_the_same_bits(
    tmp_path: Path, registry: Registry, name: str, values: dict[str, Any], chain: list[str]
) -> None:
    source = tmp_path / "start.safetensors"
    backbone = exported(registry, source, name, **values)
    for step, format in enumerate(chain):
        target = tmp_path / f"{step}.{format}"
        done = convert_backbone(source, target, format, images=WEB_IMAGES, registry=registry)
        assert (done.format, done.lost) == (format, ())
        assert target.is_dir() == (format in FOLDERS)
        loaded = load_backbone(target, images=WEB_IMAGES, registry=registry)
        state = backbone.state_dict()
        assert loaded.backbone.state_dict().keys() == state.keys()
        for key, value in loaded.backbone.state_dict().items():
            assert torch.equal(value, state[key]), f"{format}: {key}"
        assert_same(backbone, loaded.backbone)
        assert loaded.images == WEB_IMAGES
        source = target
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("vit", SMALL_VIT),
        ("vit", SMALL_VIT | {"ffn_layer": "swiglu64", "qkv_bias": False}),
        ("convnext", SMALL_CONVNEXT),
    ],
    ids=["vit", "vit_swiglu", "convnext"],
)
def test_transformers_reads_what_is_written_for_it(
    tmp_path: Path, registry: Registry, name: str, values: dict[str, Any]
) -> None:
    from transformers import AutoModel

    backbone = exported(registry, tmp_path / "x.safetensors", name, **values)
    folder = tmp_path / "folder"
    convert_backbone(tmp_path / "x.safetensors", folder, "huggingface", registry=registry)
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))

    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 64, 96, generator=generator)
    with torch.no_grad():
        output = model.eval()(images)
    cls, patches = tokens(backbone)
    torch.testing.assert_close(output.pooler_output, cls, rtol=1e-4, atol=1e-5)
    theirs = output.last_hidden_state[:, -patches.shape[1] :]
    torch.testing.assert_close(theirs, patches, rtol=1e-4, atol=1e-5)

    model.save_pretrained(tmp_path / "again")
    again = load_backbone(tmp_path / "again", images=WEB_IMAGES, registry=registry)
    assert_same(backbone, again.backbone)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_small", "vit_small_plus", "convnext_tiny"])
def test_timm_reads_what_is_written_for_it(tmp_path: Path, registry: Registry, name: str) -> None:
    import timm

    backbone = exported(registry, tmp_path / "x.safetensors", name)
    folder = tmp_path / "folder"
    convert_backbone(tmp_path / "x.safetensors", folder, "timm", registry=registry)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 64, 96, generator=generator)
    with torch.no_grad():
        features = model.forward_features(images)
    cls, patches = tokens(backbone)
    if name == "convnext_tiny":
        with torch.no_grad():
            pooled = model.forward_head(features, pre_logits=True)
        torch.testing.assert_close(pooled, cls, rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(features[:, 0], cls, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(features[:, -patches.shape[1] :], patches, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------- what is found
@pytest.mark.parametrize("names", ["", "teacher.backbone.", "model.teacher.backbone."])
@pytest.mark.parametrize("wrapper", ["", "_orig_mod.", "_fsdp_wrapped_module."])
def test_the_teacher_is_found_in_training_checkpoints(
    tmp_path: Path, registry: Registry, names: str, wrapper: str
) -> None:
    backbone = seeded(registry.build("backbone", "vit", **SMALL_VIT))
    content = {f"{names}{wrapper}{k}": v for k, v in backbone.state_dict().items()}
    content |= {f"{names.replace('backbone', 'dino_head') or 'head.'}mlp.0.weight": torch.ones(2)}
    if names:
        student = seeded(registry.build("backbone", "vit", **SMALL_VIT), seed=7)
        content |= {
            f"{names.replace('teacher', 'student')}{k}": v for k, v in student.state_dict().items()
        }
    else:
        content.pop("head.mlp.0.weight")
    torch.save(content, tmp_path / "x.pth")
    loaded = load_backbone(tmp_path / "x.pth", images=WEB_IMAGES, registry=registry)
    assert_same(backbone, loaded.backbone)
    if names:
        loaded = load_backbone(
            tmp_path / "x.pth", network="student", images=WEB_IMAGES, registry=registry
        )
        assert_same(student, loaded.backbone)


def test_a_nested_teacher_is_found(tmp_path: Path, registry: Registry) -> None:
    backbone = seeded(registry.build("backbone", "convnext", **SMALL_CONVNEXT))
    teacher = {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
    torch.save({"teacher": teacher, "iteration": 7, "args": None}, tmp_path / "x.pth")
    loaded = load_backbone(tmp_path / "x.pth", images=WEB_IMAGES, registry=registry)
    assert_same(backbone, loaded.backbone)
    with pytest.raises(CheckpointError, match=r"holds no student, only .teacher\.backbone."):
        load_backbone(tmp_path / "x.pth", network="student", registry=registry)


def test_two_backbones_without_a_role_are_refused(tmp_path: Path, registry: Registry) -> None:
    state = registry.build("backbone", "vit", **SMALL_VIT).state_dict()
    content = {f"{which}.{k}": v for which in ("first", "second") for k, v in state.items()}
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="holds 2 backbones, 'first', 'second'"):
        load_backbone(tmp_path / "x.pth", registry=registry)


@pytest.mark.parametrize("fault", ["missing", "extra", "shape", "nan"])
def test_a_state_dict_that_is_not_exact_is_refused(
    tmp_path: Path, registry: Registry, fault: str
) -> None:
    state = dict(seeded(registry.build("backbone", "vit", **SMALL_VIT)).state_dict())
    name = "blocks.1.mlp.fc1.bias"
    if fault == "missing":
        del state[name]
    elif fault == "extra":
        state["blocks.1.mlp.fc9.bias"] = torch.ones(3)
    elif fault == "shape":
        state[name] = torch.ones(5)
    else:
        state[name] = state[name] * float("nan")
    torch.save(state, tmp_path / "x.pth")
    where = "fc9" if fault == "extra" else "fc1"
    with pytest.raises(CheckpointError, match=rf"blocks\.1\.mlp\.{where}\.bias"):
        load_backbone(tmp_path / "x.pth", images=WEB_IMAGES, registry=registry)


def test_a_buffer_that_was_never_set_is_mended(tmp_path: Path, registry: Registry) -> None:
    backbone = seeded(registry.build("backbone", "vit", **SMALL_VIT))
    state = dict(backbone.state_dict())
    state["blocks.0.attn.qkv.bias_mask"] = state["blocks.0.attn.qkv.bias_mask"] * float("nan")
    torch.save(state, tmp_path / "x.pth")
    loaded = load_backbone(tmp_path / "x.pth", images=WEB_IMAGES, registry=registry)
    assert_same(backbone, loaded.backbone)


# --------------------------------------------------------------------------- images
SATELLITE_NAMES = ["dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth", "renamed-eadcf0ff.pth"]


@pytest.fixture(scope="module")
def large_shapes(registry: Registry) -> dict[str, Tensor]:
    """A ViT-L's state dict that takes no room: every value is the same zero."""
    with torch.device("meta"):
        backbone = registry.build("backbone", "vit_large")
    state = {k: torch.zeros(()).expand(v.shape) for k, v in backbone.state_dict().items()}
    periods = registry.build("backbone", "vit", **SMALL_VIT | {"embed_dim": 128}).state_dict()
    state["rope_embed.periods"] = periods["rope_embed.periods"]
    return state


@pytest.mark.parametrize(
    ("file", "untied", "expected", "told"),
    [
        ("dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth", False, WEB_IMAGES, False),
        ("weights.pth", True, SATELLITE_IMAGES, False),
        ("weights.pth", False, WEB_IMAGES, False),
        *[(name, True, SATELLITE_IMAGES, False) for name in SATELLITE_NAMES],
    ],
)
def test_images_follow_from_the_weights(
    tmp_path: Path,
    registry: Registry,
    large_shapes: dict[str, Tensor],
    caplog: pytest.LogCaptureFixture,
    file: str,
    untied: bool,
    expected: Any,
    told: bool,
) -> None:
    from dinov3_framework import describe_backbone

    state = dict(large_shapes)
    if untied:
        state |= {f"local_cls_norm.{k}": state[f"norm.{k}"] for k in ("weight", "bias")}
    torch.save(state, tmp_path / file)
    found = describe_backbone(tmp_path / file, registry=registry)
    assert found.component == "vit_large"
    assert found.images == expected
    assert ("assuming photographs" in caplog.text) == told
    given = describe_backbone(tmp_path / file, images=SATELLITE_IMAGES, registry=registry)
    assert given.images == SATELLITE_IMAGES


def test_images_that_nothing_tells_are_said(
    tmp_path: Path, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(registry.build("backbone", "vit", **SMALL_VIT).state_dict(), tmp_path / "x.pth")
    load_backbone(tmp_path / "x.pth", registry=registry)
    assert "assuming photographs" in caplog.text
    five = registry.build("backbone", "vit", **SMALL_VIT, in_chans=5).state_dict()
    torch.save(five, tmp_path / "y.pth")
    with pytest.raises(CheckpointError, match="takes 5 channels, and nothing says how"):
        load_backbone(tmp_path / "y.pth", registry=registry)


def test_what_no_file_says_is_said_of_backbones_that_are_not_published(
    tmp_path: Path, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.pth"
    torch.save(registry.build("backbone", "vit_small").state_dict(), path)
    load_backbone(path, registry=registry)
    assert not caplog.text
    # The size of a published one, yet another network: its norms may have another epsilon.
    torch.save(registry.build("backbone", "vit_small", n_storage_tokens=0).state_dict(), path)
    load_backbone(path, images=WEB_IMAGES, registry=registry)
    assert "not exactly a published backbone" in caplog.text
    assert "epsilon of its norms" in caplog.text


def test_folders_keep_the_images(tmp_path: Path, registry: Registry) -> None:
    exported(registry, tmp_path / "x.safetensors", "vit", SATELLITE_IMAGES, **SMALL_VIT)
    for format in ("huggingface", "checkpoint", "dinov3_framework"):
        convert_backbone(tmp_path / "x.safetensors", tmp_path / format, format, registry=registry)
        assert load_backbone(tmp_path / format, registry=registry).images == SATELLITE_IMAGES
    settings = json.loads((tmp_path / "huggingface/preprocessor_config.json").read_text())
    assert settings["image_mean"] == list(SATELLITE_IMAGES.mean)


# --------------------------------------------------------------------------- refusals
def test_formats_have_names(registry: Registry) -> None:
    known = {"dinov3_framework", "meta", "reference", "checkpoint", "huggingface", "timm", "onnx"}
    assert set(formats(registry)) == known


def test_conversions_that_cannot_be(tmp_path: Path, registry: Registry) -> None:
    source = tmp_path / "x.safetensors"
    exported(registry, source, "vit", **SMALL_VIT | {"norm_layer": "rmsnorm"})
    before = sorted(tmp_path.iterdir())
    for target, format, message in [
        ("y", None, "does not say in which format"),
        ("y", "keras", "there is no format 'keras'; choose one of checkpoint"),
        ("y", "huggingface", "cannot be written as huggingface"),
        ("y", "timm", "cannot be written as timm"),
        ("x.safetensors", "meta", "is there already"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            convert_backbone(source, tmp_path / target, format, registry=registry)
        assert sorted(tmp_path.iterdir()) == before


def test_a_target_is_replaced_only_on_demand_and_as_a_whole(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "x.safetensors", tmp_path / "folder"
    exported(registry, source, "vit", **SMALL_VIT)
    convert_backbone(source, target, "huggingface", registry=registry)
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dinov3_framework.weights.export.write_tensor_file", full)
    with pytest.raises(CheckpointError, match="disk full"):
        convert_backbone(source, target, "huggingface", overwrite=True, registry=registry)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    convert_backbone(source, target, "meta", overwrite=True, registry=registry)
    assert target.is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "x.safetensors"]


def test_a_conversion_that_does_not_come_back_is_refused(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "x.safetensors"
    exported(registry, source, "vit", **SMALL_VIT)

    from dinov3_framework import Renamed

    def wrong(self: Any, tensor: Tensor, initial: Any) -> dict[str, Tensor]:
        return {self.name: tensor + 1 if "norm" in self.name else tensor}

    monkeypatch.setattr(Renamed, "write", wrong)
    with pytest.raises(CheckpointError, match=r"does not give back what went in(.|\n)*differ"):
        convert_backbone(source, tmp_path / "y.pth", registry=registry)
    assert not (tmp_path / "y.pth").exists()


def test_parameters_change_their_type_and_buffers_do_not(
    tmp_path: Path, registry: Registry
) -> None:
    source = tmp_path / "x.safetensors"
    exported(registry, source, "vit", **SMALL_VIT)
    convert_backbone(source, tmp_path / "y.pth", dtype=torch.bfloat16, registry=registry)
    backbone = load_backbone(tmp_path / "y.pth", images=WEB_IMAGES, registry=registry).backbone
    assert backbone.norm.weight.dtype == torch.bfloat16
    assert backbone.rope_embed.periods.dtype == torch.float32
    again = load_backbone(
        tmp_path / "y.pth", images=WEB_IMAGES, dtype=torch.float32, registry=registry
    )
    assert again.backbone.norm.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("name", "values"), [("vit", SMALL_VIT), ("convnext", SMALL_CONVNEXT)])
def test_config_json_names_the_type_of_the_tensors(
    tmp_path: Path, registry: Registry, name: str, values: dict[str, Any], dtype: str
) -> None:
    """As transformers writes it, which by default loads what the key says."""
    from transformers import AutoModel

    exported(registry, tmp_path / "x.safetensors", name, **values)
    folder = tmp_path / "folder"
    convert_backbone(
        tmp_path / "x.safetensors",
        folder,
        "huggingface",
        dtype=getattr(torch, dtype),
        registry=registry,
    )
    model = AutoModel.from_pretrained(folder)
    assert model.dtype == getattr(torch, dtype)
    model.save_pretrained(tmp_path / "again")
    ours, theirs = (
        json.loads((p / "config.json").read_text()) for p in (folder, tmp_path / "again")
    )
    keys = ("dtype", "torch_dtype")
    assert [ours.get(key) for key in keys] == [theirs.get(key) for key in keys] == [dtype, None]
