"""Features of images in every form that people have them in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import features_support
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_backbone import GRAY, build, export, pictures, tiny_registry

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.data.images import normalize
from dinov3_framework.errors import DataError, UserError
from dinov3_framework.registry import Registry
from dinov3_framework.weights.loaded import LoadedBackbone
from dinov3_framework.weights.loading import load_backbone


@pytest.fixture
def registry() -> Registry:
    return tiny_registry()


@pytest.fixture
def loaded(tmp_path: Path, registry: Registry) -> LoadedBackbone:
    return load_backbone(export(tmp_path / "rgb", build(registry)), registry=registry)


@pytest.fixture
def gray(tmp_path: Path, registry: Registry) -> LoadedBackbone:
    path = export(tmp_path / "gray", build(registry, in_chans=1), GRAY)
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


def test_it_shows_itself_in_a_few_lines(vit: LoadedBackbone, gray: LoadedBackbone) -> None:
    text = repr(gray)
    assert len(text.splitlines()) <= 3
    assert gray.name in text
    parameters = sum(p.numel() for p in gray.backbone.parameters())
    assert f"{parameters:,} parameters" in text
    assert f"{gray.backbone.embed_dim} wide" in text
    assert f"a patch every {gray.backbone.patch_size} px, 1 channels" in text
    assert len(repr(LoadedBackbone(LastLayerAlone(), ImagesConfig(), 16, {})).splitlines()) <= 3
    assert len(repr(vit).splitlines()) <= 3


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


def test_channels(tmp_path: Path, loaded: LoadedBackbone, gray: LoadedBackbone) -> None:
    flat = pictures(1, channels=1)[0]
    rgb = flat.expand(3, 16, 16)
    torch.testing.assert_close(loaded.features(flat), loaded.features(rgb))
    torch.testing.assert_close(gray.features(flat), gray.features(rgb.contiguous()))
    array = flat[0].numpy()
    torch.testing.assert_close(gray.features(array), gray.features(flat))
    color = Image.fromarray(pictures(1)[0].permute(1, 2, 0).numpy())
    color.save(tmp_path / "color.png")
    expected = torch.from_numpy(np.array(color.convert("L")))[None]
    torch.testing.assert_close(gray.features(tmp_path / "color.png"), gray.features(expected))
    deep = Image.fromarray(array.astype(np.uint16) * 257)
    torch.testing.assert_close(gray.features(deep), gray.features(flat))


def test_other_channels(tmp_path: Path, registry: Registry) -> None:
    five = ImagesConfig(channels=5, mean=(0.5,) * 5, std=(0.5,) * 5)
    path = export(tmp_path / "x", build(registry, in_chans=5), five)
    loaded = load_backbone(path, registry=registry)
    assert loaded.features(pictures(2, channels=5)).shape == (2, 6)
    with pytest.raises(DataError, match="3 channels, the backbone takes 5"):
        loaded.features(pictures(1))
    with pytest.raises(DataError, match="has 3 bands"):
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
        (Image.new("F", (16, 16)), "give the range of its values"),
    ],
)
def test_what_is_no_image(loaded: LoadedBackbone, wrong: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        loaded.features(wrong)
    with pytest.raises(DataError, match="at least 1"):
        loaded.features(pictures(1), batch_size=0)


# --------------------------------------------------------------------------- all outputs
@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> LoadedBackbone:
    return load_backbone(features_support.export(tmp_path_factory.mktemp("vit") / "w"))


def test_outputs_of_layers(vit: LoadedBackbone) -> None:
    images = pictures(5, size=32)
    outputs = ("class", "mean_patch", "patches", "storage")
    found = vit.extract(images, outputs, layers=(0, -1), batch_size=2)
    assert set(found) == {f"layer{layer}.{name}" for layer in (0, 2) for name in outputs}
    pixels = normalize(images, vit.images)
    with torch.no_grad():
        layers = vit.backbone.get_intermediate_layers(
            pixels, n=[0, 2], return_class_token=True, return_extra_tokens=True
        )
    for layer, (patches, cls, storage) in zip((0, 2), layers, strict=True):
        torch.testing.assert_close(found[f"layer{layer}.class"], cls)
        torch.testing.assert_close(found[f"layer{layer}.storage"], storage)
        torch.testing.assert_close(found[f"layer{layer}.mean_patch"], patches.mean(1))
        torch.testing.assert_close(found[f"layer{layer}.patches"].flatten(1, 2), patches)
    assert found["layer0.patches"].shape == (5, 4, 4, 16)
    torch.testing.assert_close(found["layer2.class"], vit.features(images))


def test_the_final_norm_can_be_left_out(vit: LoadedBackbone) -> None:
    images = pictures(2, size=32)
    with_norm, without = (vit.extract(images, norm=norm)["class"] for norm in (True, False))
    with torch.no_grad():
        torch.testing.assert_close(vit.backbone.norm(without), with_norm)  # type: ignore[operator]
    assert not torch.allclose(with_norm, without)


def test_fits(vit: LoadedBackbone) -> None:
    images = [pictures(1, size=32)[0], pictures(1, size=48)[0, :, :20], pictures(1, size=32)[0]]
    for fit in ("crop", "squash"):
        assert vit.extract(images, ["patches"], fit=fit, size=24)["patches"].shape == (3, 3, 3, 16)
    padded = vit.extract(images, ["class", "patches"], fit="pad")
    assert [tuple(grid.shape) for grid in padded["patches"]] == [
        (4, 4, 16),
        (3, 6, 16),
        (4, 4, 16),
    ]
    torch.testing.assert_close(padded["patches"][0], padded["patches"][2])
    assert padded["class"].shape == (3, 16)
    native = vit.extract(images[0], ["patches"], fit="native")["patches"]
    torch.testing.assert_close(native[0], padded["patches"][0])
    with pytest.raises(DataError, match="20 x 48 pixels"):
        vit.extract(images, fit="native")


def test_no_images_give_no_rows(vit: LoadedBackbone) -> None:
    found = vit.extract([], ["class", "patches"], layers=[0, 1])
    assert found["layer0.class"].shape == (0, 16)
    assert found["layer1.patches"].shape == (0, 4, 4, 16)
    assert vit.extract([], ["patches"], fit="pad")["patches"] == []


def test_the_transform_is_what_features_sees(vit: LoadedBackbone) -> None:
    images = [pictures(1, size=50)[0], pictures(1, size=41)[0].permute(1, 2, 0).numpy()]
    pixels = torch.stack([vit.transform()(image) for image in images])
    assert pixels.shape == (2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(vit.backbone(pixels), vit.features(images))
    assert vit.transform(16, "squash")(images[0]).shape == (3, 16, 16)
    assert vit.transform(fit="pad")(images[1]).shape == (3, 48, 48)
    with pytest.raises(DataError, match="no multiple of the backbone's patch size 8"):
        vit.transform(20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outputs": ["cls"]}, "outputs are some of class, mean_patch, patches, storage"),
        ({"outputs": []}, "outputs are some of"),
        ({"layers": [3]}, r"this backbone has 0 to 2 \(or -3 to -1\)"),
        ({"layers": [2, -1]}, "twice"),
        ({"layers": []}, "at least one"),
        ({"fit": "stretch"}, "fit: is 'stretch'; one of crop"),
    ],
)
def test_wrong_choices(vit: LoadedBackbone, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        vit.extract(pictures(1), **options)


class LastLayerAlone(Backbone):
    """A third party's, with what the contract demands and no more."""

    embed_dim, patch_size, in_chans, n_layers = 6, 4, 3, 2

    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Conv2d(3, 6, 4, stride=4)

    def init_weights(self) -> None:
        self.proj.reset_parameters()

    def forward_features(self, images: Any, masks: Any = None) -> dict[str, torch.Tensor]:
        patches = self.proj(images).flatten(2).transpose(1, 2)
        cls = patches.mean(1)
        return {
            "x_norm_clstoken": cls,
            "x_norm_patchtokens": patches,
            "x_storage_tokens": patches[:, :0],
        }


def test_a_backbone_of_somebody_else() -> None:
    loaded = LoadedBackbone(LastLayerAlone(), ImagesConfig(), 16, {})
    found = loaded.extract(pictures(3), ["class", "mean_patch", "patches"])
    assert found["patches"].shape == (3, 4, 4, 6)
    torch.testing.assert_close(found["mean_patch"], found["class"])
    with pytest.raises(UserError, match="gives its last layer after the norm alone"):
        loaded.extract(pictures(3), layers=[0])
    with pytest.raises(DataError, match="no storage tokens"):
        loaded.extract(pictures(3), ["storage"])
