"""The task ``predict``: what it writes of anybody's images, by which head, and what it refuses."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from dinov3_predict import PredictConfig, predict
from PIL import Image
from predict_support import CLASSES, RECIPE, Page, backbone, files, photos, table, trained
from run_support import run_here

from dinov3_framework import Model
from dinov3_framework.data.dense import DensePredictor
from dinov3_framework.data.dense_config import DenseInferenceConfig
from dinov3_framework.data.pictures import read_image
from dinov3_framework.errors import CheckpointError
from dinov3_framework.testing import TaskSuite
from dinov3_framework.weights.heads import load_head
from dinov3_framework.weights.loading import load_backbone

NAMES = ["china.jpg", "ein Bild ü #1.png", "sub folder/a/b.webp", "sub folder/b.JPG"]
SIZES = [(96, 80), (64, 96), (71, 61), (80, 48)]
STEMS = ["china", "ein Bild ü #1", "sub folder/a/b", "sub folder/b"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("heads")


@pytest.fixture(scope="module")
def mask(root: Path) -> Path:
    return trained(root, "mask")


@pytest.fixture(scope="module")
def depth(root: Path) -> Path:
    return trained(root, "map")


@pytest.fixture(scope="module")
def images(root: Path) -> Path:
    return photos(root / "photos")


def ran(output: Path, *words: object, code: int = 0) -> str:
    """A run to its end; what it says of what went wrong."""
    done = run_here(output, *map(str, words), "workers=0", recipe=RECIPE)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


class TestContract(TaskSuite):
    @pytest.fixture(autouse=True)
    def _given(self, mask: Path, images: Path) -> None:
        self.config = PredictConfig(weights=str(mask), images=str(images))


# --------------------------------------------------------------------------- kinds of targets
def test_masks(mask: Path, images: Path, tmp_path: Path) -> None:
    ran(tmp_path, f"weights={mask}", f"images={images}", 'formats=["png", "npy"]')
    assert files(tmp_path).keys() == {
        "predictions/predictions.json",
        *(f"predictions/{stem}.{form}" for stem in STEMS for form in ("png", "npy")),
        *(f"overlays/{stem}.jpg" for stem in STEMS),
    }
    rows = table(tmp_path)
    assert [row["image"] for row in rows] == NAMES
    assert [(int(row["width"]), int(row["height"])) for row in rows] == SIZES
    for row, stem, size in zip(rows, STEMS, SIZES, strict=True):
        with Image.open(tmp_path / "predictions" / f"{stem}.png") as picture:
            assert (picture.mode, picture.size) == ("P", size)
            ids = np.array(picture)
        assert np.array_equal(ids, np.load(tmp_path / "predictions" / f"{stem}.npy"))
        shares = [float(row.get(f"share of {name}", 0)) for name in CLASSES]
        assert shares == pytest.approx([float((ids == i).mean()) for i in range(3)], abs=1e-6)
        with Image.open(tmp_path / "overlays" / f"{stem}.jpg") as sheet:
            assert sheet.width > size[0]  # the names of classes beside it
            assert sheet.height >= size[1]
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["predicted"], results["skipped"]) == (4, 0)


def test_masks_are_those_of_the_predictor(mask: Path, images: Path) -> None:
    loaded = load_backbone(mask.parent / "backbone.safetensors")
    head = load_head(mask, loaded.backbone).head
    model = Model(loaded.backbone, loaded.images, head, 32)
    config = DenseInferenceConfig(resize=32, mode="slide", window=32)
    predictor = DensePredictor(model, config, "mask")
    found = dict(predict(str(mask), str(images)))
    assert list(found) == NAMES
    for name in NAMES:
        image = read_image(images / name, 3)
        views = predictor.views(image)
        assert torch.equal(found[name], predictor.labels(views, (image.shape[1], image.shape[2])))


def test_depth(depth: Path, images: Path, tmp_path: Path) -> None:
    ran(tmp_path, f"weights={depth}", f"images={images}", 'formats=["npy", "png"]')
    for row, stem in zip(table(tmp_path), STEMS, strict=True):
        values = np.load(tmp_path / "predictions" / f"{stem}.npy")
        with Image.open(tmp_path / "predictions" / f"{stem}.png") as picture:
            assert np.abs(np.array(picture) * 1e-3 - values).max() < 0.51e-3
        found = [float(row[f"{name} (m)"]) for name in ("min", "mean", "max")]
        expected = [values.min(), values.mean(dtype=np.float64), values.max()]
        assert found == pytest.approx(expected, rel=1e-5)


def test_depth_beyond_what_png_holds_is_said(depth: Path, images: Path, tmp_path: Path) -> None:
    words = (f"weights={depth}", f"images={images}")
    said = ran(tmp_path / "small", *words, "png_scale=1e-6")
    assert "PNG files of 4 images are cut off at 0 or 0.065535 m; set png_scale" in said
    assert "cut off" in Page(tmp_path / "small" / "report.html").text
    assert "cut off" not in ran(tmp_path / "usual", *words)


def test_classes(root: Path, images: Path, tmp_path: Path) -> None:
    head = trained(root, "class")
    ran(tmp_path, f"weights={head}", f"images={images}", "batch_size=3")
    rows = table(tmp_path)
    assert [row["image"] for row in rows] == NAMES
    assert [(int(row["width"]), int(row["height"])) for row in rows] == SIZES
    for row in rows:
        assert {row["class 1"], row["class 2"]} == {"cat", "dog"}
        first, second = float(row["probability 1"]), float(row["probability 2"])
        assert first >= second
        assert first + second == pytest.approx(1, abs=1e-5)
    page = Page(tmp_path / "report.html")
    assert len(page.images) == 4
    assert f"{rows[0]['class 1']} {100 * float(rows[0]['probability 1']):.1f} %" in page.text
    assert not files(tmp_path)
    said = ran(tmp_path / "x", f"weights={head}", f"images={images}", "inference.flip=true", code=2)
    assert "inference: is for masks and maps" in said


# --------------------------------------------------------------------------- the page
def test_the_page_stands_alone_and_shows_every_image(
    mask: Path, images: Path, tmp_path: Path
) -> None:
    ran(tmp_path, f"weights={mask}", f"images={images}")
    page = Page(tmp_path / "report.html")
    assert len(page.images) == 8  # each as it is, and drawn over
    for alt, source in page.images.items():
        kind, data = source.split(",", 1)
        assert kind in ("data:image/jpeg;base64", "data:image/png;base64"), alt
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert max(picture.size) <= 448
            picture.load()
    assert not {"script", "link", "b"} & set(page.tags)
    for text in (*NAMES, CLASSES[0], "shorter side 32 px", str(mask), "hash of the weights"):
        assert text in page.text


def test_large_images_are_small_on_the_page(mask: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (1500, 30), "red").save(tmp_path / "in" / "a.png")
    ran(tmp_path / "out", f"weights={mask}", f"images={tmp_path / 'in'}")
    with Image.open(tmp_path / "out" / "predictions" / "a.png") as picture:
        assert picture.size == (1500, 30)
    for source in Page(tmp_path / "out" / "report.html").images.values():
        with Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) as picture:
            assert picture.size == (448, 9)


def test_the_page_says_what_it_leaves_out(mask: Path, images: Path, tmp_path: Path) -> None:
    ran(tmp_path, f"weights={mask}", f"images={images}", "report_images=1", "overlays=false")
    page = Page(tmp_path / "report.html")
    assert {alt.split(",")[0] for alt in page.images} == {"china.jpg"}
    assert "3 more images are in predictions.csv" in page.text
    assert len(table(tmp_path)) == 4
    assert not (tmp_path / "overlays").exists()


# --------------------------------------------------------------------------- images
def test_an_image_a_pattern_and_a_list(mask: Path, images: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    lines = [images / NAMES[3], "", images / NAMES[0], images / NAMES[3]]
    listed.write_text("\n".join(map(str, lines)) + "\n")
    for place, names in {
        images / NAMES[1]: [NAMES[1]],
        images / "sub*" / "**" / "*.[wJ]*": ["a/b.webp", "b.JPG"],
        listed: [NAMES[3], NAMES[0]],
    }.items():
        assert [name for name, _ in predict(str(mask), str(place))] == names


def test_two_images_that_differ_in_their_suffix(mask: Path, images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, source in (("a.jpg", NAMES[0]), ("a.png", NAMES[1])):
        (folder / name).write_bytes((images / source).read_bytes())
    ran(tmp_path / "out", f"weights={mask}", f"images={folder}")
    for name, size in (("a.jpg", SIZES[0]), ("a.png", SIZES[1])):
        with Image.open(tmp_path / "out" / "predictions" / f"{name}.png") as picture:
            assert picture.size == size
        assert (tmp_path / "out" / "overlays" / f"{name}.jpg").is_file()


def test_images_of_every_depth_of_bits_and_gray(mask: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    gray = np.linspace(0, 65_535, 40 * 48).reshape(40, 48).astype(np.uint16)
    Image.fromarray(gray).save(folder / "16.png")
    Image.fromarray((gray >> 8).astype(np.uint8)).save(folder / "8.png")
    Image.fromarray((gray >> 8).astype(np.uint8)).convert("RGBA").save(folder / "alpha.png")
    ran(tmp_path / "out", f"weights={mask}", f"images={folder}", 'formats=["npy"]')
    found = {path.stem: np.load(path) for path in (tmp_path / "out").rglob("*.npy")}
    assert found.keys() == {"16", "8", "alpha"}
    assert np.array_equal(found["8"], found["alpha"])
    assert (found["16"] == found["8"]).mean() > 0.9


def test_what_cannot_be_read_is_left_out_and_named(
    mask: Path, images: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    content = (images / NAMES[0]).read_bytes()
    (folder / "good.jpg").write_bytes(content)
    (folder / "cut.jpg").write_bytes(content[:900])
    (folder / "text.png").write_text("no picture")
    said = ran(tmp_path / "out", f"weights={mask}", f"images={folder}")
    assert "2 of 3 samples left out" in said
    assert [row["image"] for row in table(tmp_path / "out")] == ["good.jpg"]
    assert [row["image"] for row in table(tmp_path / "out", "skipped.csv")] == [
        "cut.jpg",
        "text.png",
    ]
    assert "2 of 3 images unreadable: cut.jpg, text.png" in Page(tmp_path / "out/report.html").text
    (folder / "good.jpg").write_bytes(content[:900])
    said = ran(tmp_path / "none", f"weights={mask}", f"images={folder}", code=2)
    assert "none of 3 samples can be decoded" in said


def test_an_image_too_thin_to_be_resized_is_left_out(
    mask: Path, images: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "good.jpg").write_bytes((images / NAMES[0]).read_bytes())
    Image.new("RGB", (5000, 2), "red").save(folder / "thin.png")
    ran(tmp_path / "out", f"weights={mask}", f"images={folder}")
    (row,) = table(tmp_path / "out", "skipped.csv")
    assert row["image"] == "thin.png"
    assert "2 x 5000 pixels would be resized to 32 x 80000" in row["reason"]


@pytest.mark.parametrize(
    ("place", "complaint"),
    [
        ("empty", "holds no images"),
        ("nowhere/*.jpg", "is no image, folder, pattern"),
        ("words.txt", r"words.txt is not in UTF-8"),
    ],
)
def test_no_images(place: str, complaint: str, mask: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "words.txt").write_bytes(b"\xff\xfe\x00")
    said = ran(tmp_path / "out", f"weights={mask}", f"images={tmp_path / place}", code=2)
    assert complaint in said
    assert not (tmp_path / "out").exists()


def test_links_that_lead_back_are_followed_once(mask: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jpg").write_bytes((images / NAMES[0]).read_bytes())
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert [name for name, _ in predict(str(mask), str(tmp_path))] == ["a/x.jpg"]


# --------------------------------------------------------------------------- heads
def test_a_tuned_backbone_is_that_of_the_run(root: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    run = trained(tmp_path / "there", "mask", "tune_backbone=true")
    tuned = str(run / "exports" / "backbone.safetensors")
    (tmp_path / "there" / "backbone.safetensors").unlink()
    found = dict(predict(str(run), str(images)))
    again = dict(predict(str(run / "exports" / "head.safetensors"), str(images), backbone=tuned))
    assert found.keys() == again.keys()
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_a_head_without_its_backbone_says_how_to_give_it(images: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    run = trained(tmp_path / "there", "mask")
    moved = (tmp_path / "there" / "backbone.safetensors").rename(tmp_path / "moved.safetensors")
    words = (f"weights={run}", f"images={images}")
    said = ran(tmp_path / "out", *words, code=2)
    assert "backbone" in said
    assert "backbone.safetensors, which is not here" in said
    assert "was trained on" not in ran(tmp_path / "out", *words, f"backbone={moved}")
    other = backbone(tmp_path / "other.safetensors", seed=1)
    said = ran(tmp_path / "other", *words, f"backbone={other}")
    assert f"not on {other}" in said


def test_a_published_head_names_the_backbone_that_it_lacks(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> Path:
        raise CheckpointError("cannot be reached")

    monkeypatch.setattr("dinov3_framework.weights.locations.fetch_weights", refused)
    said = ran(tmp_path, "weights=dinov3_vitl16_chmv2", f"images={images}", code=2)
    assert "the backbone under dinov3_vitl16_chmv2 as backbone=PATH" in said


def test_wrong_options_are_refused_before_anything_is_written(
    mask: Path, depth: Path, images: Path, tmp_path: Path
) -> None:
    for words, complaint in {
        (f"weights={mask}", "target=depth"): "the head predicts mask (mask, 3 classes)",
        (f"weights={depth}", "colormap=rainbows"): "'rainbows' is no color map",
        (f"weights={mask}", "inference.mode=slide", "inference.window=20"): "patch size 8",
        (f"weights={mask}", "formats=[]"): "must name at least one",
        (f"weights={mask}", "alpha=1.5"): "alpha",
        (f"weights={mask}", "dataset.use=squares"): "has no effect where images are given",
        (f"weights={tmp_path / 'nothing'}",): "there is no file",
    }.items():
        said = ran(tmp_path / "out", *words, f"images={images}", code=2)
        assert complaint in said
    assert "images: are missing" in ran(tmp_path / "out", f"weights={mask}", code=2)
    assert not (tmp_path / "out").exists()


def test_a_check_says_what_will_be_written(mask: Path, images: Path, tmp_path: Path) -> None:
    done = run_here(
        tmp_path / "out", f"weights={mask}", f"images={images}", "--check", recipe=RECIPE
    )
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    for text in ("4 images", "china.jpg, 96 x 80 px", "32 px, every 21 px", "class ids, 8 bits"):
        assert text in shown
    assert not (tmp_path / "out").exists()
