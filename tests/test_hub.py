"""Published backbones through torch.hub, where there are torch, numpy and attrs alone."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dinov3_framework import SATELLITE_IMAGES, WEB_IMAGES, CheckpointError, Registry
from dinov3_framework.weights import formats
from dinov3_framework.weights.export import export_backbone

ROOT = Path(__file__).parents[1]
NAMES = {
    "dinov3_vits16": 21_601_152,
    "dinov3_vits16plus": 28_697_472,
    "dinov3_vitb16": 85_669_632,
    "dinov3_vitl16": 303_154_176,
    "dinov3_vitl16plus": 403_915_776,
    "dinov3_vith16plus": 840_633_600,
    "dinov3_vit7b16": 6_716_043_264,
    "dinov3_convnext_tiny": 27_820_128,
    "dinov3_convnext_small": 49_454_688,
    "dinov3_convnext_base": 87_566_464,
    "dinov3_convnext_large": 196_230_336,
}


@pytest.fixture(scope="module")
def hub() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hubconf", ROOT / "hubconf.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(name: str, **values: Any) -> Any:
    return torch.hub.load(str(ROOT), name, source="local", **values)


def saved(tmp_path: Path, backbone: Any, file: str = "w.pth") -> Path:
    torch.save(backbone.state_dict(), tmp_path / file)
    return tmp_path / file


def test_every_published_backbone_has_an_entry_point(hub: ModuleType) -> None:
    entries = {name for name in vars(hub) if callable(getattr(hub, name)) and name[0] != "_"}
    heads = {
        "dinov3_vit7b16_lc",
        "dinov3_vit7b16_ms",
        "dinov3_vit7b16_dd",
        "dinov3_vitl16_chmv2",
    }
    assert entries == NAMES.keys() | heads == Registry.load().published.keys()
    for name in entries:
        assert "weights" in (getattr(hub, name).__doc__ or "")


@pytest.mark.parametrize("name", NAMES)
def test_entry_points_build_the_published_sizes(hub: ModuleType, name: str) -> None:
    with torch.device("meta"):
        backbone = getattr(hub, name)(pretrained=False)
    assert sum(parameter.numel() for parameter in backbone.parameters()) == NAMES[name]
    assert not backbone.training


def test_the_classifier_on_vit_7b(hub: ModuleType) -> None:
    with torch.device("meta"):
        whole = hub.dinov3_vit7b16_lc(pretrained=False)
        logits = whole(torch.empty(2, 3, 32, 32))
    assert logits.shape == (2, 1000)
    assert sum(p.numel() for p in whole.parameters()) == NAMES["dinov3_vit7b16"] + 8_193_000
    assert {name.partition(".")[0] for name in whole.state_dict()} == {"backbone", "linear_head"}


def test_it_sees_the_class_token_and_the_mean_patch() -> None:
    small = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    model = load("dinov3_vit7b16_lc", pretrained=False, classes=5, **small)
    assert 0.005 < float(model.linear_head.weight.detach().std()) < 0.02, (
        "drawn, not left as it was"
    )
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        tokens = model.backbone.forward_features(images)
        seen = [tokens["x_norm_clstoken"], tokens["x_norm_patchtokens"].mean(1)]
        head = model.linear_head
        expected = torch.cat(seen, 1) @ head.weight.T + head.bias
        torch.testing.assert_close(model(images), expected)


def test_the_classifier_from_its_files(tmp_path: Path) -> None:
    """The head as it is published; the backbone a small one that says that it is a ViT-7B."""
    values = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    backbone = load("dinov3_vit7b16", pretrained=False, **values)
    weights = tmp_path / "backbone.safetensors"
    export_backbone(
        weights,
        backbone.state_dict(),
        component="vit_7b",
        config=values,
        images=WEB_IMAGES,
        size=224,
        provenance={},
    )
    head = torch.nn.Linear(64, 1000)
    path = tmp_path / "head.pth"
    torch.save(head.state_dict(), path)
    given = {"weights": path, "backbone_weights": weights}
    model = load("dinov3_vit7b16_lc", **given)
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        tokens = backbone.forward_features(images)
        seen = [tokens["x_norm_clstoken"], tokens["x_norm_patchtokens"].mean(1)]
        torch.testing.assert_close(model(images), head(torch.cat(seen, 1)))
    assert not model.training
    torch.save(torch.nn.Linear(32, 1000).state_dict(), path)
    with pytest.raises(CheckpointError, match=r"of another shape:\s+weight: \[1000, 32\]"):
        load("dinov3_vit7b16_lc", **given)
    torch.save(backbone.state_dict(), path)
    with pytest.raises(CheckpointError, match="holds no head of a known kind"):
        load("dinov3_vit7b16_lc", **given)


def test_weights_by_path_are_loaded_strictly(tmp_path: Path) -> None:
    backbone = load("dinov3_vits16", pretrained=False)
    path = saved(tmp_path, backbone)
    again = load("dinov3_vits16", weights=str(path), drop_path_rate=0.1)
    images = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        assert torch.equal(again(images), backbone(images))
    assert again.images == WEB_IMAGES
    assert again.config.drop_path_rate == 0.1
    state = backbone.state_dict()
    torch.save({k: v for k, v in state.items() if k != "blocks.3.ls1.gamma"}, path)
    with pytest.raises(CheckpointError, match=r"missing from the file:\n    blocks\.3\.ls1\.gamma"):
        load("dinov3_vits16", weights=path)


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, load("dinov3_convnext_tiny", pretrained=False))
    with pytest.raises(CheckpointError, match=r"another backbone .*ConvNeXt.*, not DINOv3's ViT-S"):
        load("dinov3_vits16", weights=path)
    with pytest.raises(CheckpointError, match=r"another backbone than dinov3_convnext_small"):
        load("dinov3_convnext_small", weights=path)


def test_hashes_in_names_are_compared(tmp_path: Path) -> None:
    path = saved(tmp_path, load("dinov3_vits16", pretrained=False))
    digits = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    right = path.rename(tmp_path / f"dinov3_vits16_pretrain_lvd1689m-{digits}.pth")
    load("dinov3_vits16", weights=right, check_hash=True)
    wrong = right.rename(tmp_path / "dinov3_vits16_pretrain_lvd1689m-08c60483.pth")
    load("dinov3_vits16", weights=wrong)
    with pytest.raises(CheckpointError, match="begins with"):
        load("dinov3_vits16", weights=wrong, check_hash=True)
    plain = wrong.rename(tmp_path / "plain.pth")
    with pytest.raises(CheckpointError, match="no hash in its name"):
        load("dinov3_vits16", weights=plain, check_hash=True)


@pytest.mark.parametrize("name", ["LVD1689M", "lvd1689m", None])
def test_training_sets_by_name_come_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    backbone = load("dinov3_vits16", pretrained=False)
    saved(cache, backbone, "dinov3_vits16_pretrain_lvd1689m-08c60483.pth")
    again = load("dinov3_vits16", weights=name)
    assert torch.equal(again.norm.bias, backbone.norm.bias)
    with pytest.raises(CheckpointError, match=r"no file SAT493M; .*training set \(LVD1689M\)"):
        load("dinov3_vits16", weights="SAT493M")


def test_satellite_weights_have_norms_and_images_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: ModuleType
) -> None:
    with torch.device("meta"):
        web = hub.dinov3_vitl16(pretrained=False)
        satellite = hub.dinov3_vitl16(pretrained=False, weights="SAT493M")
        huge = hub.dinov3_vit7b16(pretrained=False, weights="SAT493M")
    assert not any("local_cls_norm" in name for name in web.state_dict())
    for backbone in (satellite, huge):
        assert "local_cls_norm.weight" in backbone.state_dict()
        assert backbone.images == SATELLITE_IMAGES
    assert web.images == WEB_IMAGES


# --------------------------------------------------------------------------- nothing more
def distributions(*names: str) -> Iterator[metadata.Distribution]:
    """Distributions and all that they require."""
    waiting, seen = list(names), set()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # for another platform
        yield found
        for requirement in found.requires or ():
            if "extra ==" not in requirement:
                waiting.append(re.split(r"[ ;<>=!~\[(]", requirement, maxsplit=1)[0])


@pytest.fixture
def bare_python(tmp_path: Path) -> Path:
    """A virtual environment with torch, numpy and attrs and what these need, and nothing more."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    for found in distributions("torch", "numpy", "attrs"):
        for file in found.files or ():
            top = file.parts[0]
            source = Path(str(found.locate_file(top)))
            if top not in ("..", "__pycache__", "bin") and not (site / top).exists():
                (site / top).symlink_to(source)
    return venv / "bin" / "python"


@pytest.mark.slow
def test_torch_numpy_and_attrs_are_enough(tmp_path: Path, bare_python: Path) -> None:
    script = textwrap.dedent(
        f"""
        import importlib.util, sys, torch
        for name in ("torchvision", "pluggy", "cattrs", "tomli", "safetensors", "rich", "PIL",
                     "dinov3_framework", "matplotlib", "submitit"):
            assert importlib.util.find_spec(name) is None, name
        def load(name, **values):
            return torch.hub.load({str(ROOT)!r}, name, source="local", **values)
        images = torch.randn(1, 3, 64, 64)
        for name in ("dinov3_vits16", "dinov3_convnext_tiny"):
            backbone = load(name, pretrained=False)
            torch.save(backbone.state_dict(), "weights.pth")
            again = load(name, weights="weights.pth")
            with torch.no_grad():
                assert torch.equal(again(images), backbone(images))
                tokens = again.forward_features(images)["x_norm_patchtokens"]
                layers = again.get_intermediate_layers(images, n=2, reshape=True)
            print(name, tokens.shape[1], len(layers))
        small = dict(embed_dim=32, depth=24, num_heads=2)
        depth = load("dinov3_vitl16_chmv2", pretrained=False, **small)
        with torch.no_grad():
            print("depth", *depth(images).shape[-2:])
        with torch.device("meta"):
            segmenter = load("dinov3_vit7b16_ms", pretrained=False)
            print("masks", *segmenter.predict(images.to("meta"))["pred_masks"].shape[-3:])
        """
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [bare_python, "-c", script],
        cwd=tmp_path,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "dinov3_vits16",
        "16",
        "2",
        "dinov3_convnext_tiny",
        "4",
        "2",
        "depth",
        "64",
        "64",
        "masks",
        "100",
        "512",
        "512",
    ]


def test_the_page_on_weights_has_them_all(hub: ModuleType) -> None:
    page = (ROOT / "docs" / "weights.md").read_text("utf-8")
    registry = Registry.load()
    for name, parameters in NAMES.items():
        published = registry.published[name]
        component = registry.of_config(published.files["LVD1689M"].config).component.name
        sets = ", ".join(published.files)
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        assert row.startswith(f"| `{name}` | `{component}` | {parameters:,} |")
        assert row.endswith(f"| {sets} |")
    for format in formats(registry):
        assert f"\n| `{format}` | " in page
