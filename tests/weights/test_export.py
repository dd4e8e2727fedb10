"""Exported backbones load on their own, with nothing lost on the way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from disks import small_disk
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_backbone import GRAY, Tiny, TinyConfig, build, export, pictures, tiny_registry

from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.errors import CheckpointError
from dinov3_framework.parallel.state_dicts import full_state_dict, official_name
from dinov3_framework.registry import Registry
from dinov3_framework.weights.export import export_backbone
from dinov3_framework.weights.loading import load_backbone


@pytest.fixture
def registry() -> Registry:
    return tiny_registry()


def test_round_trip(tmp_path: Path, registry: Registry) -> None:
    values = {"embed_dim": 5, "scales": [0.5, 3.0], "in_chans": 1}
    backbone = build(registry, **values)
    path = export(tmp_path / "exports" / "tiny.safetensors", backbone, GRAY, **values)
    loaded = load_backbone(path, registry=registry)
    assert isinstance(loaded.backbone, Tiny)
    assert loaded.backbone.scales == (0.5, 3.0)
    assert not loaded.backbone.training
    assert (loaded.images, loaded.size) == (GRAY, 16)
    assert loaded.provenance == {"run": "a test", "iterations": "7"}
    wanted = backbone.state_dict()
    assert loaded.backbone.state_dict().keys() == wanted.keys()
    for name, tensor in loaded.backbone.state_dict().items():
        assert torch.equal(tensor, wanted[name])
    images = pictures(channels=1)
    with torch.no_grad():
        expected = backbone((images / 255 - 0.25) / 0.5)
    torch.testing.assert_close(loaded.features(images), expected)


def test_the_file_explains_itself(tmp_path: Path, registry: Registry) -> None:
    path = export(tmp_path / "tiny.safetensors", build(registry), scales=[1.0, 2.0])
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == {"proj.weight", "proj.bias", "offset"}
    assert metadata["dinov3_backbone"] == "1"
    assert metadata["component"] == "tiny"
    assert json.loads(metadata["config"]) == {"scales": [1.0, 2.0]}
    assert json.loads(metadata["images"])["mean"] == [0.485, 0.456, 0.406]
    assert metadata["size"] == "16"
    assert metadata["format"] == "pt"
    assert set(load_file(path)) == {"proj.weight", "proj.bias", "offset"}


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, registry: Registry) -> None:
    backbone = build(registry)
    state = full_state_dict(backbone)
    turned = dict(reversed(state.items()))
    texts = set()
    for number, each in enumerate([state, turned, state, turned]):
        path = export(tmp_path / f"{number}", backbone, state=each, embed_dim=6)
        texts.add(path.read_bytes())
    assert len(texts) == 1  # safetensors alone orders six keys at random: once in 720 by chance


def test_views_and_shared_tensors_are_stored_whole(tmp_path: Path, registry: Registry) -> None:
    backbone = build(registry)
    weight = backbone.proj.weight.detach()
    offset = torch.arange(12.0)[::2]
    state = {"proj.weight": weight.transpose(2, 3).transpose(2, 3), "proj.bias": offset}
    loaded = load_file(export(tmp_path / "x", backbone, state=state | {"offset": offset}))
    assert torch.equal(loaded["proj.weight"], weight)
    assert torch.equal(loaded["offset"], offset)
    assert torch.equal(loaded["proj.bias"], offset)


def test_exporting_again_replaces_whole_files(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = export(tmp_path / "x", build(registry))
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dinov3_framework.weights.export.write_tensor_file", fail)
    with pytest.raises(CheckpointError, match=r"cannot write .*disk full .*MiB free"):
        export(path, build(registry, embed_dim=9), embed_dim=9)
    monkeypatch.undo()
    assert path.read_bytes() == before
    export(path, build(registry, embed_dim=9), embed_dim=9)
    assert [each.name for each in tmp_path.iterdir()] == ["x"]
    assert load_backbone(path, registry=registry).backbone.embed_dim == 9


@pytest.mark.parametrize("kind", ["tmpfs", "limit"])
def test_disk_full(tmp_path: Path, registry: Registry, kind: str) -> None:
    folder = tmp_path / "disk"
    with small_disk(folder, kind):
        path = export(folder / "x", build(registry))
        before = path.read_bytes()
        with pytest.raises(CheckpointError, match=r"cannot write .*disk full .*MiB free"):
            export(path, build(registry), state={"w": torch.ones(1_000_000)})
        assert path.read_bytes() == before
        assert [each.name for each in folder.iterdir()] == ["x"]


def test_loading_takes_no_second_copy(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built on the meta device: init_weights is not called and no storage allocated before."""
    path = export(tmp_path / "x", build(registry))

    def refuse(_: Tiny) -> None:
        raise RuntimeError("initialized for nothing")

    monkeypatch.setattr(Tiny, "init_weights", refuse)
    devices = []
    made = Tiny.__init__

    def spy(self: Tiny, settings: TinyConfig) -> None:
        made(self, settings)
        devices.append({tensor.device.type for tensor in self.state_dict().values()})

    monkeypatch.setattr(Tiny, "__init__", spy)
    loaded = load_backbone(path, registry=registry)
    assert devices == [{"meta"}]
    # Not a mapping of the file, which would change or crash with it.
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert loaded.features(pictures()).isfinite().all()


def test_buffers_that_no_file_holds_are_computed(tmp_path: Path, registry: Registry) -> None:
    backbone = build(registry, hidden_buffer=True)
    path = export(tmp_path / "x", backbone, hidden_buffer=True)
    state = torch.random.get_rng_state()
    loaded = load_backbone(path, registry=registry)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert loaded.backbone.hidden.tolist() == [3.0] * 6  # type: ignore[union-attr,operator]
    assert torch.equal(loaded.backbone.proj.weight, backbone.proj.weight)  # type: ignore[union-attr]


def test_official_names() -> None:
    wrapped = "_orig_mod.blocks.0._checkpoint_wrapped_module._fsdp_wrapped_module.attn.weight"
    assert official_name(wrapped) == "blocks.0.attn.weight"


# --------------------------------------------------------------------- a first-party backbone
VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "in_chans": 1}


def export_vit(path: Path, registry: Registry) -> Backbone:
    torch.manual_seed(0)
    backbone: Backbone = registry.build("backbone", "vit", **VIT)
    backbone.init_weights()
    export_backbone(
        path,
        full_state_dict(backbone),
        component="vit",
        config=VIT,
        images=GRAY,
        size=28,
        provenance={},
    )
    return backbone.eval()


def test_vision_transformer(tmp_path: Path) -> None:
    registry = Registry.load()
    path = tmp_path / "vit.safetensors"
    backbone = export_vit(path, registry)
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
    assert "rope_embed.periods" in names
    assert any(name.endswith("bias_mask") for name in names)
    images = pictures(2, channels=1, size=28)
    with torch.no_grad():
        expected = backbone((images / 255 - 0.25) / 0.5)
    torch.testing.assert_close(load_backbone(path, registry=registry).features(images), expected)


@pytest.mark.slow
def test_without_torchvision(tmp_path: Path) -> None:
    path = tmp_path / "vit.safetensors"
    export_vit(path, Registry.load())
    code = """
import sys
sys.modules["torchvision"] = None  # as if it were not installed
import torch
from dinov3_framework import load_backbone
print(load_backbone(sys.argv[1]).features(torch.zeros(1, 40, 30, dtype=torch.uint8)).shape)
"""
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.stdout == "torch.Size([1, 32])\n", done.stderr
