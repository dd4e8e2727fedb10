"""Features of images in every form that people have them in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_backbone import GREY, build, export, pictures, tiny_registry

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.engine.export import load_backbone
from dinov3_framework.engine.loaded_backbone import LoadedBackbone
from dinov3_framework.errors import DataError
from dinov3_framework.registry import Registry


@pytest.fixture
def registry() -> Registry:
    return tiny_registry()


@pytest.fixture
def loaded(tmp_path: Path, registry: Registry) -> LoadedBackbone:
    return load_backbone(export(tmp_path / "rgb", build(registry)), registry=registry)


@pytest.fixture
def grey(tmp_path: Path, registry: Registry) -> LoadedBackbone:
    path = export(tmp_path / "grey", build(registry, in_chans=1), GREY)
    return load_backbone(path, registry=registry)


def test_every_form_of_an_image(tmp_path: Path, loaded: LoadedBackbone) -> None:
    tensor = pictures(1)[0]
    array = tensor.permute(1, 2, 0).numpy()
    picture = Image.fromarray(array)
    picture.save(tmp_path / "a.png")
    forms = [tensor, array, picture, tmp_path / "a.png", str(tmp_path / "a.png")]
    expected = loaded.features(tensor)
    assert expected.shape == (1, 6)
    assert expected.dtype == torch.float32
    assert not expected.requires_grad
    for form in forms:
        assert torch.equal(loaded.features(form), expected)
    together = loaded.features(forms, batch_size=2)
    torch.testing.assert_close(together, expected.expand(5, 6))
    assert loaded.features([]).shape == (0, 6)


def test_batches_and_modes(loaded: LoadedBackbone) -> None:
    images = pictures(7)
    whole = loaded.features(images)
    assert whole.shape == (7, 6)
    torch.testing.assert_close(loaded.features(images, batch_size=3), whole)
    torch.testing.assert_close(loaded.features(list(images)), whole)
    loaded.backbone.train()  # dropout must not act, and training goes on afterwards
    torch.testing.assert_close(loaded.features(images), whole)
    assert loaded.backbone.training
    assert loaded.backbone.drop.training  # type: ignore[union-attr]


def test_sizes(loaded: LoadedBackbone) -> None:
    big = pictures(2, size=40)
    assert not torch.equal(loaded.features(big), loaded.features(big, size=40))
    assert loaded.features([big[0], pictures(1)[0]], size=24).shape == (2, 6)
    for size in (18, 0, 3):
        with pytest.raises(DataError, match=r"no multiple of the backbone's patch size 4; take"):
            loaded.features(big, size=size)


def test_channels(tmp_path: Path, loaded: LoadedBackbone, grey: LoadedBackbone) -> None:
    flat = pictures(1, channels=1)[0]
    rgb = flat.expand(3, 16, 16)
    torch.testing.assert_close(loaded.features(flat), loaded.features(rgb))
    torch.testing.assert_close(grey.features(flat), grey.features(rgb.contiguous()))
    array = flat[0].numpy()
    torch.testing.assert_close(grey.features(array), grey.features(flat))
    color = Image.fromarray(pictures(1)[0].permute(1, 2, 0).numpy())
    color.save(tmp_path / "color.png")
    expected = torch.from_numpy(np.array(color.convert("L")))[None]
    torch.testing.assert_close(grey.features(tmp_path / "color.png"), grey.features(expected))
    deep = Image.fromarray(array.astype(np.uint16) * 256)
    torch.testing.assert_close(grey.features(deep), grey.features(flat))


def test_other_channels(tmp_path: Path, registry: Registry) -> None:
    five = ImagesConfig(channels=5, mean=(0.5,) * 5, std=(0.5,) * 5)
    path = export(tmp_path / "x", build(registry, in_chans=5), five)
    loaded = load_backbone(path, registry=registry)
    assert loaded.features(pictures(2, channels=5)).shape == (2, 6)
    with pytest.raises(DataError, match="3 channels, the backbone takes 5"):
        loaded.features(pictures(1))
    with pytest.raises(DataError, match="give a uint8 tensor"):
        loaded.features(Image.new("RGB", (16, 16)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.rand(3, 16, 16), r"uint8 \[C, H, W\], is float32 \[3, 16, 16\]"),
        (torch.zeros(16, 16, dtype=torch.uint8), r"is uint8 \[16, 16\]"),
        (np.zeros((16, 16, 3)), r"uint8 \[H, W, C\] or \[H, W\], is float64"),
        (3, "is int"),
        ("absent.png", "there is no image absent.png"),
        (__file__, "cannot be read as an image"),
        (Image.new("F", (16, 16)), "more than 16 bits"),
    ],
)
def test_what_is_no_image(loaded: LoadedBackbone, wrong: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        loaded.features(wrong)
    with pytest.raises(DataError, match="at least 1"):
        loaded.features(pictures(1), batch_size=0)
