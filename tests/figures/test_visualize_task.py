"""The task ``visualize``: what it refuses, and the files it leaves."""

from __future__ import annotations

import base64
import errno
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dinov3_figures.maps import BACKDROP
from dinov3_figures.task import file_stems
from figures_support import read_png
from PIL import Image
from visualize_support import (
    SIZES,
    LastOnlyConfig,
    PixelsConfig,
    ScenesConfig,
    registry,
    settings,
    spec,
    subject_mask,
    task,
)

from dinov3_framework import WEB_IMAGES, DataError, InvalidOption, OutputError, RecipeError
from dinov3_framework.testing import TaskSuite


class Page(HTMLParser):
    """What a browser would find in the page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def decoded(source: str | None) -> np.ndarray:
    """The pixels [H, W, 3] of a data URI."""
    _, _, content = str(source).partition("base64,")
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("visualize") / "out"
    task().run(folder)
    return folder


# --------------------------------------------------------------------------- files
def test_the_files(output: Path) -> None:
    stems = [f"dir_{i}_scene_{i}" for i in range(4)]
    files = sorted(str(path.relative_to(output)) for path in output.rglob("*") if path.is_file())
    expected = [f"figures/{name}.png" for name in [*stems, "overview"]]
    assert files == [*expected, "index.html", "results.json"]


def test_a_picture_shows_image_and_maps_at_their_aspect(output: Path) -> None:
    picture = read_png(output / "figures" / "dir_0_scene_0.png")
    height, width = picture.shape[:2]
    assert 640 <= width <= 1900
    assert 300 <= height <= 1500
    # The gray backdrop of the foreground's map has the outline of the image, 48 x 32.
    rows, columns = np.nonzero((picture == BACKDROP).all(-1))
    aspect = np.ptp(columns) / np.ptp(rows)
    assert aspect == pytest.approx(48 / 32, rel=0.05)
    assert (picture[[0, -1]] == 255).all()  # nothing is cut off
    assert (picture[:, [0, -1]] == 255).all()


def test_the_overview_holds_every_image(output: Path) -> None:
    picture = read_png(output / "figures" / "overview.png")
    assert 640 <= picture.shape[1] <= 1600
    assert picture.shape[0] > 4 * 75
    assert (picture[[0, -1]] == 255).all()
    assert (picture[:, [0, -1]] == 255).all()


def test_the_results(output: Path) -> None:
    results = json.loads((output / "results.json").read_text())
    assert results["backbone"] == {"backbone": "pixels", "weights": "random, seed 0"}
    assert results["layer"] == 1
    assert results["dataset"] == "scenes, 4 images"
    for index, (found, (height, width)) in enumerate(zip(results["images"], SIZES, strict=True)):
        assert found["name"] == f"dir {index}/scene&{index}.png"
        assert found["label"] == ("tops", "shoes")[index % 2]
        assert (output / found["figure"]).is_file()
        assert found["seen"] == {"width": width, "height": height}
        assert found["patches"] == {"columns": width // 4, "rows": height // 4}
        assert found["foreground"]["share"] == pytest.approx(
            float(subject_mask(height, width).float().mean()), abs=1e-6
        )
        assert 0.5 < found["explained"][0] <= 1
        center, typical = found["marked"]
        assert (center["column"], center["row"]) == (width // 8, height // 8)
        assert subject_mask(height, width)[typical["row"], typical["column"]]
        assert typical["why"] == "foreground"
        assert 0 < found["page_similarity_error"] < 0.05


def test_equal_recipes_give_equal_bytes(output: Path, tmp_path: Path) -> None:
    task().run(tmp_path)
    for path in output.rglob("*.*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / path.relative_to(output)).read_bytes(), path


# --------------------------------------------------------------------------- the page
def test_the_page_needs_nothing_else(output: Path) -> None:
    page = Page(output / "index.html")
    sources = [image["src"] for image in page.all("img")]
    assert len(sources) == 4 * 5
    assert all(str(source).startswith("data:image/") for source in sources)
    assert not page.all("link")
    assert all("src" not in script for script in page.all("script"))
    (policy,) = (m["content"] for m in page.all("meta") if "http-equiv" in m)
    assert "default-src 'none'" in str(policy)
    assert not re.search(r"https?://", (output / "index.html").read_text("utf-8"))
    for link in page.all("a"):
        assert (output / str(link["href"])).is_file()


def test_the_page_says_what_is_seen(output: Path) -> None:
    page = Page(output / "index.html")
    for text in ("random, seed 0", "scenes, 4 images", "dir 3/scene&3.png", "shoes", "approximate"):
        assert text in page.text
    alts = [str(image["alt"]) for image in page.all("img")]
    assert alts[0] == "dir 0/scene&0.png: image, 48 x 32 px"
    assert len(set(alts)) == len(alts)


def test_the_page_s_maps_are_pixels_of_patches(output: Path) -> None:
    images = Page(output / "index.html").all("img")
    assert decoded(images[0]["src"]).shape == (32, 48, 3)
    front = decoded(images[2]["src"])
    assert front.shape == (8, 12, 3)
    assert np.array_equal((front != BACKDROP).any(-1), subject_mask(32, 48).numpy())
    # Where the marked patch is, its similarity has the last color of the scale.
    similarity = decoded(images[3]["src"])
    assert tuple(similarity[4, 6]) == (253, 231, 37)


def test_the_page_s_codes_give_the_similarities(output: Path) -> None:
    page = Page(output / "index.html")
    section = page.all("section")[1]  # the first holds the facts
    rows, columns = map(int, str(section["data-grid"]).split(","))
    weights = np.array(str(section["data-weights"]).split(","), dtype=float)
    raw = base64.b64decode(str(section["data-values"]))
    values = np.frombuffer(raw, dtype=np.int8).reshape(rows * columns, len(weights)).astype(float)
    start = int(str(section["data-start"]))
    assert start == 4 * columns + 6
    cosines = ((values * weights) @ values[start]).reshape(rows, columns)
    found = json.loads((output / "results.json").read_text())["images"][0]["marked"][0]
    assert cosines[4, 6] == pytest.approx(1, abs=0.05)
    assert cosines.mean() == pytest.approx(found["mean_similarity"], abs=0.02)
    assert len(base64.b64decode(str(section["data-colors"]))) == 3 * 256


def test_a_page_without_similarities_needs_no_script(tmp_path: Path) -> None:
    task(maps=("pca",), dataset=ScenesConfig(count=13)).run(tmp_path)
    page = Page(tmp_path / "index.html")
    assert not page.all("script")
    assert len(page.all("img")) == 2 * 8
    assert "approximate" not in page.text
    images = json.loads((tmp_path / "results.json").read_text())["images"]
    assert all(image["marked"] == [] and "page_similarity_error" not in image for image in images)


def test_many_images_get_a_list(tmp_path: Path) -> None:
    task(maps=("pca",), count=13, dataset=ScenesConfig(count=13)).run(tmp_path)
    page = Page(tmp_path / "index.html")
    targets = [str(a["href"]) for a in page.all("a") if str(a["href"]).startswith("#")]
    assert targets == [f"#{section['id']}" for section in page.all("section")[1:]]
    assert len(targets) == 13


# --------------------------------------------------------------------------- kinds of images
@pytest.mark.parametrize(
    ("channels", "note"),
    [(1, "48 x 32 px"), (2, "channel 1 of 2"), (4, "1-3 of 4"), (13, "channels 1-3 of 13")],
)
def test_any_number_of_channels(channels: int, note: str, tmp_path: Path) -> None:
    task(images=spec(channels), count=1).run(tmp_path)
    image = Page(tmp_path / "index.html").all("img")[0]
    assert str(image["alt"]).endswith(note)
    shown = decoded(image["src"])
    assert shown.shape == (32, 48, 3)
    assert shown[8:20, 8:20].mean() > shown[:8].mean() + 100


def test_a_dark_subject_is_found_as_well(tmp_path: Path) -> None:
    task(dataset=ScenesConfig(bright=False)).run(tmp_path)
    for found, size in zip(
        json.loads((tmp_path / "results.json").read_text())["images"], SIZES, strict=True
    ):
        expected = float(subject_mask(*size).float().mean())
        assert found["foreground"]["share"] == pytest.approx(expected, abs=1e-6)


def test_a_backbone_without_layers(tmp_path: Path) -> None:
    task(backbone=LastOnlyConfig(), count=1, pca="image").run(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["layer"] == 2


# --------------------------------------------------------------------------- checks
def test_the_contract_of_tasks() -> None:
    TaskSuite.check(settings(), registry=registry())


def test_the_check_reports(tmp_path: Path) -> None:
    report = task(size=30, side="longer", names=("dir 1/*",), maps=("pca",)).check(3)
    assert ("parameters", "1") in report.sections["backbone"]
    assert report.sections["data"] == [
        ("dataset", "scenes, 4 images"),
        ("images", "1"),
        ("size", "longer side 30 px, rounded to patches of 4 px"),
    ]
    assert report.sections["maps"] == [
        ("maps", "pca"),
        ("layer", "1, the last"),
        ("principal components", "of all images together"),
        ("processes", "3"),
    ]
    assert not report.missing


def test_data_that_are_not_here_are_missing_and_not_wrong(tmp_path: Path) -> None:
    absent = task(dataset=ScenesConfig(there=False))
    assert absent.check(1).missing == ["scenes: not on this machine"]
    assert task(dataset=ScenesConfig(count=0)).check(1).missing
    with pytest.raises(DataError, match="not on this machine"):
        absent.run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": None, "images": None}, "there is no backbone to look at"),
        ({"size": 3}, "size: 3 px is less than one patch of 4 px"),
        ({"layer": 2}, r"layer: is 2, the backbone has 2\n.*0 to 1, or of -2 to -1"),
        ({"layer": -3}, "layer: is -3"),
        ({"backbone": LastOnlyConfig(), "layer": 0}, "LastOnly gives its last layer alone"),
        ({"points": (), "typical": 0}, "points: there is no patch to be similar to"),
        ({"names": ("nobody",)}, "no sample is named 'nobody'"),
        ({"backbone": PixelsConfig(in_chans=1)}, "in_chans: is 1, but images.channels is 3"),
    ],
)
def test_recipes_that_cannot_work(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        task(**options).check(1)
    with pytest.raises(RecipeError, match=message):
        task(**options).run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"points": ((0.5, 1.01),)},
        {"points": ((0.5, 0.5), (0.5, 0.5))},
        {"maps": ()},
        {"maps": ("pca", "pca")},
        {"typical": 3},
        {"typical": -1},
        {"count": 0},
        {"size": 0},
        {"names": ()},
        {"names": ("",)},
    ],
)
def test_values_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match=next(iter(options))):
        settings(**options)
    assert settings(images=WEB_IMAGES).points == ((0.5, 0.5),)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "figures").write_text("a file where the folder should be")
    with pytest.raises(OutputError, match="figures"):
        task(count=1).run(tmp_path)
    assert not (tmp_path / "results.json").exists()


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    def full(self: Figure, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OutputError, match=r"scene_0\.png cannot be written: disk full") as caught:
        task(count=1).run(tmp_path)
    assert "\n" not in str(caught.value)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


# --------------------------------------------------------------------------- names of files
def test_file_names_are_plain_and_differ() -> None:
    names = ["a/b c.jpg", "a/b c.PNG", "A_b-c.png", "Überall.png", "../..", "x" * 300 + ".png", "7"]
    stems = file_stems(names, taken=["overview"])
    assert stems[:4] == ["a_b_c", "a_b_c-2", "A_b-c", "berall"]
    assert stems[4:] == ["image", "x" * 100, "7"]
    assert file_stems(["overview.jpg", "OVERVIEW.png"], taken=["overview"]) == [
        "overview-2",
        "OVERVIEW-3",
    ]
