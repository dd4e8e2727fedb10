"""Pixels that are predicted in windows, at several scales and mirrored."""

from __future__ import annotations

import string
from typing import Any

import pytest
import torch
from dense_support import Drawn, pixel_model, straightforward
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinov3_framework.data.bilinear import bilinear_rows
from dinov3_framework.data.dense import DensePredictor, dense_predictions, dense_problems
from dinov3_framework.data.dense_config import DenseInferenceConfig
from dinov3_framework.data.dense_views import Windows, view_size
from dinov3_framework.errors import DataError

IMAGE = torch.randint(
    0, 256, (3, 45, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)
)
SLIDE: dict[str, Any] = {"mode": "slide", "window": 16, "stride": 11}


def scores(model: Any, image: torch.Tensor, size: tuple[int, int], **options: Any) -> torch.Tensor:
    predictor = DensePredictor(model, DenseInferenceConfig(**options), "it")
    return torch.cat(list(predictor.strips(predictor.views(image), size)), dim=1)


@pytest.mark.parametrize("strip", [300, 2**22])
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "whole predictions"])
@pytest.mark.parametrize("kind", ["mask", "map"])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((45, 70), {}),
        ((45, 70), {"resize": 32}),
        ((45, 70), SLIDE),
        ((45, 70), {**SLIDE, "resize": 24}),
        ((13, 70), SLIDE),  # lower than a window
        ((9, 11), {**SLIDE, "stride": 9}),  # smaller in both ways
        ((45, 70), {**SLIDE, "resize": 33, "scales": (0.9, 1.0, 1.3), "flip": True}),
        ((70, 31), {**SLIDE, "batch_size": 1, "flip": True}),
    ],
    ids=str,
)
def test_scores_are_those_of_whole_accumulators(
    shape: tuple[int, int],
    options: dict[str, Any],
    kind: str,
    rows: bool,
    strip: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many rows are made at a time, and whatever the size of the truth."""
    monkeypatch.setattr("dinov3_framework.data.dense._STRIP", strip)
    model, image = pixel_model(kind, rows), IMAGE.repeat(1, 2, 1)[:, : shape[0], : shape[1]]
    config = DenseInferenceConfig(**options)
    predictor = DensePredictor(model, config, "it")
    for size in (shape, (shape[0] * 2 - 7, shape[1] // 2 + 1)):
        views = predictor.views(image)
        window = config.window
        if window is not None and window > max(shape):
            window = min(shape)
        wanted = straightforward(
            model, views, size, window=window, stride=config.stride or 1, flip=config.flip
        )
        found = scores(model, image, size, **options)
        if kind == "mask" and (len(views) == 1 and not config.flip):
            found = found.softmax(0)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
        predicted = predictor.predict(views, size)
        assert predicted.shape == size
        if kind == "map":
            torch.testing.assert_close(predicted.double(), wanted[0], rtol=1e-5, atol=1e-5)
        else:
            assert predicted.dtype == torch.int64
            chosen = wanted.gather(0, predicted[None])[0]
            torch.testing.assert_close(chosen, wanted.amax(0), rtol=1e-5, atol=1e-5)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that is made."""

    values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        made = [each.numel() for each in tree_leaves(found) if isinstance(each, torch.Tensor)]
        self.values = max([self.values, *made])
        return found


@pytest.mark.parametrize("options", [SLIDE, {"scales": (1.0, 1.5), "flip": True}], ids=str)
def test_scores_of_a_whole_image_are_never_there(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor is nearly as large as all classes at the size of the image."""
    monkeypatch.setattr("dinov3_framework.data.dense._STRIP", 2**14)
    model = pixel_model(classes=string.ascii_letters)
    predictor = DensePredictor(model, DenseInferenceConfig(**options), "it")
    image, size = IMAGE.repeat(1, 4, 4), (180, 280)
    views = predictor.views(image)
    with Largest() as largest:
        predictor.labels(views, size)
    assert largest.values < len(string.ascii_letters) * size[0] * size[1] / 4


def test_some_rows_of_a_resize() -> None:
    maps = torch.randn(2, 3, 7, 5, generator=torch.Generator().manual_seed(0))
    for size in ((7, 5), (7, 9), (40, 5), (41, 13), (3, 4), (1, 1)):
        whole = torch.nn.functional.interpolate(maps, size, mode="bilinear", align_corners=False)
        for start, stop in ((0, 1), (size[0] - 1, size[0]), (size[0] // 3, size[0])):
            found = bilinear_rows(maps, size, start, stop)
            torch.testing.assert_close(found, whole[:, :, start:stop])


def test_windows_are_where_the_reference_has_them() -> None:
    """A step of 341 pixels, the last pulled back to the edge (dinov3/eval/segmentation)."""
    windows = Windows.on(512, 683, 512, 341)
    assert (windows.tops, windows.lefts) == ([0], [0, 171])
    windows = Windows.on(1024, 2048, 512, 341)
    assert windows.tops == [0, 341, 512]
    assert windows.lefts == [0, 341, 682, 1023, 1364, 1536]
    assert windows.count == 18
    # Smaller than a window both ways: squares of the shorter side, or all of the image.
    small = Windows.on(832, 870, 896, 596)
    assert (small.height, small.width, small.lefts) == (832, 832, [0, 38])
    assert Windows.on(100, 800, 896, 596) == Windows(100, 800, [0], [0])


def test_sizes_of_views_are_those_of_the_reference() -> None:
    """At 0.9 of 896 the shorter side is 806, rounded up to 832; at 1.1 it is 985."""
    config = DenseInferenceConfig(resize=896)
    assert view_size(480, 640, config, 1.0) == (896, 1195)
    assert view_size(480, 640, config, 0.9) == (832, 1109)
    assert view_size(640, 480, config, 1.1) == (1313, 985)
    both = DenseInferenceConfig(resize=64, side="both")
    assert view_size(480, 640, both, 1.0) == (64, 64)
    longer = DenseInferenceConfig(resize=64, side="longer")
    assert view_size(480, 640, longer, 1.0) == (48, 64)
    assert view_size(481, 639, DenseInferenceConfig(), 1.0) == (481, 639)


def test_calls_are_counted_and_spent() -> None:
    model = pixel_model()
    config = DenseInferenceConfig(**SLIDE, flip=True, scales=(1.0, 1.5), batch_size=3)
    predictor = DensePredictor(model, config, "it")
    views = predictor.views(IMAGE)
    predictor.labels(views, (20, 30))
    assert model.backbone.n_calls == predictor.calls(views) > 20
    predictor.spend(2)
    assert model.backbone.n_calls == predictor.calls(views) + 2


@pytest.mark.parametrize("dtype", [torch.uint16, torch.float32])
def test_images_of_other_types(dtype: torch.dtype) -> None:
    model = pixel_model()
    whole = {torch.uint16: 257, torch.float32: 1 / 255}[dtype]
    image = (IMAGE.double() * whole).to(dtype)
    predictor = DensePredictor(model, DenseInferenceConfig(resize=32), "it")
    found, wanted = predictor.views(image)[0], predictor.views(IMAGE)[0]
    assert found.dtype == torch.float32
    assert (found - wanted).abs().max() < 0.02  # of rounding to 8 bits


def test_a_dataset_is_predicted_once() -> None:
    model, dataset = pixel_model(), Drawn([(20, 30), (33, 17), (16, 16)])
    config = DenseInferenceConfig(**SLIDE)
    found = list(dense_predictions(model, dataset, config, "it", workers=2))
    assert [each.name for each in found] == ["folder/0.png", "folder/1.png", "folder/2.png"]
    predictor = DensePredictor(model, config, "it")
    for each, size in zip(found, dataset.sizes, strict=True):
        views = predictor.views(dataset[each.index].image)
        assert each.image_size == size
        assert each.prediction is not None
        assert torch.equal(each.prediction, predictor.labels(views, size))
        assert torch.equal(each.targets["it"], dataset[each.index].targets["it"])


def skips_first(name: str) -> bool:
    return name == "folder/0.png"


def test_what_is_skipped_is_read_and_not_predicted() -> None:
    model, dataset = pixel_model(), Drawn([(20, 30), (33, 17)])
    config = DenseInferenceConfig()
    found = list(dense_predictions(model, dataset, config, "it", skip=skips_first))
    assert [each.prediction is None for each in found] == [True, False]
    assert model.backbone.n_calls == 1
    assert "it" in found[0].targets


def test_mistakes_are_named() -> None:
    def complaint(**options: Any) -> str:
        config = DenseInferenceConfig(**options)
        size = options.pop("size", None)
        return " ".join(map(str, dense_problems(pixel_model(size=size), config, "it")))

    assert "nothing says how large windows" in complaint(mode="slide")
    assert "no multiple of the backbone's patch size 4" in complaint(mode="slide", window=18)
    (problem,) = dense_problems(pixel_model(), DenseInferenceConfig(), "depth")
    assert problem.where == "target"
    with pytest.raises(DataError, match="channels"):
        DensePredictor(pixel_model(), DenseInferenceConfig(), "it").views(IMAGE[:2])
    thin = DenseInferenceConfig(resize=512)
    with pytest.raises(DataError, match="2 x 560 pixels would be resized to 512 x 143360"):
        DensePredictor(pixel_model(), thin, "it").views(IMAGE[:, :2].repeat(1, 1, 8))
    for wrong in ({"window": 4}, {"mode": "slide", "window": 4, "stride": 5}, {"scales": ()}):
        with pytest.raises(ValueError, match=r"window|stride|scales"):
            DenseInferenceConfig(**wrong)  # type: ignore[arg-type]
