"""The task ``inspect``: its numbers are those of the files, its page stands alone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from dinov3_reports import InspectConfig
from dinov3_reports.inspect_task import Inspect
from dinov3_reports.moments import image_moments, merge
from PIL import Image
from reports_support import EMPTY, SCRIPT, Page, make_images
from run_support import HERE, run_here, two_processes
from torchvision import tv_tensors

from dinov3_framework import (
    Component,
    CorruptSampleError,
    DataError,
    Dataset,
    DatasetConfig,
    ImagesConfig,
    RecipeError,
    Registry,
    Sample,
    StreamDataset,
    Target,
    config,
    option,
)
from dinov3_framework.recipes.structure import structure_component
from dinov3_framework.testing import TaskSuite

RECIPE = HERE.parents[1] / "recipes" / "inspect.toml"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    root = tmp_path_factory.mktemp("images") / "data"
    return root, make_images(root)


def words(root: Path) -> list[str]:
    classes = json.dumps(["a", SCRIPT, EMPTY])
    return [f"data={root}", f"dataset.classes={classes}", "workers=0"]


@pytest.fixture(scope="module")
def output(
    images: tuple[Path, dict[str, np.ndarray]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("inspect") / "out"
    done = run_here(folder, *words(images[0]), recipe=RECIPE)
    assert done.returncode == 0, done.stderr
    return folder


def results(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "results.json").read_text())
    return found


# --------------------------------------------------------------------------- numbers
def test_means_and_deviations_are_numpys(
    images: tuple[Path, dict[str, np.ndarray]], output: Path
) -> None:
    every = list(images[1].values())
    flat = np.concatenate([pixels.reshape(-1, 3) for pixels in every])
    found = results(output)["images"]
    assert found["mean"] == pytest.approx(flat.mean(0), abs=1e-6)
    assert found["std"] == pytest.approx(flat.std(0), abs=1e-6)
    means = np.stack([pixels.mean((0, 1)) for pixels in every])
    squares = np.stack([(pixels**2).mean((0, 1)) for pixels in every])
    assert found["mean_by_image"] == pytest.approx(means.mean(0), abs=1e-6)
    by_image = np.sqrt(squares.mean(0) - means.mean(0) ** 2)
    assert found["std_by_image"] == pytest.approx(by_image, abs=1e-6)
    page = Page(output / "report.html")
    for value in [*flat.mean(0), *flat.std(0)]:
        assert f"{value:.4f}" in page.text


def test_moments_of_parts_are_those_of_the_whole() -> None:
    values = torch.rand(2, 50, 60, dtype=torch.float64) * 1e-3 + 1e3
    whole = merge(image_moments(part) for part in values.split([1, 7, 42], dim=1))
    assert whole.count == 3000
    assert whole.mean == pytest.approx(values.mean((1, 2)).numpy(), rel=1e-12)
    assert whole.std == pytest.approx(values.numpy().std((1, 2)), rel=1e-6)


def test_classes_are_counted_and_empty_ones_named(output: Path) -> None:
    found = results(output)["classes"]["label"]
    assert found["counts"] == {"a": 8, SCRIPT: 2, EMPTY: 0}
    assert found["empty"] == [EMPTY]
    assert found["imbalance"] == 4
    assert EMPTY in Page(output / "report.html").text


def test_unreadable_files_are_listed(
    images: tuple[Path, dict[str, np.ndarray]], output: Path
) -> None:
    lines = (output / "unreadable.txt").read_text().splitlines()
    names = [line.partition("\t")[0] for line in lines]
    assert names == [str(images[0] / "a" / name) for name in ("half.png", "nothing.jpg")]
    assert all(line.partition("\t")[2] for line in lines)
    found = results(output)
    assert (found["samples"], found["looked_at"], found["readable"]) == (12, 12, 10)
    assert [each["name"] for each in found["unreadable"]] == names
    assert "half.png" in Page(output / "report.html").text


def test_sizes_and_repeated_images(output: Path) -> None:
    found = results(output)
    assert found["sizes"]["width"] == {"min": 30, "median": 32, "max": 200}
    assert found["sizes"]["aspect_ratio"]["max"] == 40
    assert found["repeated"] == [["a/again.bmp", f"{SCRIPT}/0.png"]]
    text = Page(output / "report.html").text
    assert "DIFFERENT CLASSES" in text
    assert "a/wide.png" in text


# --------------------------------------------------------------------------- the page
def test_the_page_stands_alone_and_names_are_inert(output: Path) -> None:
    page = Page(output / "report.html")
    page.assert_stands_alone()
    assert SCRIPT in page.text
    assert len(page.all("img")) == 2 + 10  # two charts and the contact sheet
    assert len(page.source) < 3e6


def test_workers_change_no_byte(
    images: tuple[Path, dict[str, np.ndarray]], output: Path, tmp_path: Path
) -> None:
    done = run_here(tmp_path / "out", *words(images[0])[:-1], "workers=2", recipe=RECIPE)
    assert done.returncode == 0, done.stderr
    for name in ("report.html", "unreadable.txt", "results.json"):
        assert (tmp_path / "out" / name).read_bytes() == (output / name).read_bytes(), name


def test_images_are_upright_and_odd_names_printable(tmp_path: Path) -> None:
    folder = tmp_path / "images" / os.fsdecode(b"caf\xe9 $x_1$")
    folder.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (40, 90), "red").save(folder / "turned.jpg", exif=exif)
    (folder / "bad\x1b[31m.png").write_bytes(b"no image")
    done = run_here(tmp_path / "out", f"data={tmp_path / 'images'}", "workers=0", recipe=RECIPE)
    assert done.returncode == 0, done.stderr
    sizes = results(tmp_path / "out")["sizes"]
    assert (sizes["width"]["max"], sizes["height"]["max"]) == (90, 40)
    page = Page(tmp_path / "out" / "report.html")
    assert r"caf\xe9 $x_1$/turned.jpg, 90 x 40 px" in page.text
    assert r"bad\x1b[31m.png" in page.text
    assert r"bad\x1b[31m.png" in (tmp_path / "out" / "unreadable.txt").read_text()


@pytest.mark.slow
def test_processes_share_the_work(
    images: tuple[Path, dict[str, np.ndarray]], output: Path, tmp_path: Path
) -> None:
    done = two_processes(tmp_path / "out", *words(images[0]), recipe=RECIPE)
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "out") == results(output)


def test_crops_of_a_trainings_recipe(tmp_path: Path) -> None:
    tiny = HERE / "tiny.toml"
    given = (f"training={tiny}", "recipe.dataset.split=test", "limit=40", "workers=0", "shown=5")
    done = run_here(tmp_path / "out", *given, recipe=RECIPE)
    assert done.returncode == 0, done.stderr
    assert "40 of 1,000, chosen by seed 0" in done.stdout
    found = results(tmp_path / "out")
    assert (found["samples"], found["looked_at"]) == (1000, 40)
    assert found["images"]["channels"] == 1
    page = Page(tmp_path / "out" / "report.html")
    assert "2 global of 28 px, 2 local of 14 px" in page.text
    assert len(page.all("img")) == 1 + 5 + 12
    # The run's own recipe holds all of the training's: it runs again without the file.
    again = run_here(tmp_path / "again", recipe=tmp_path / "out" / "recipe.toml")
    assert again.returncode == 0, again.stderr
    assert results(tmp_path / "again") == found


def test_another_seed_looks_at_other_samples(tmp_path: Path) -> None:
    means = set()
    for seed in (0, 1):
        output = tmp_path / str(seed)
        given = ("dataset.use=fashion_mnist", "limit=20", "workers=0", f"seed={seed}")
        assert run_here(output, *given, recipe=RECIPE).returncode == 0
        means.add(results(output)["images"]["mean"][0])
    assert len(means) == 2


# --------------------------------------------------------------------------- starting
def test_a_check_writes_nothing(images: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    done = run_here(tmp_path / "out", *words(images[0]), "--check", recipe=RECIPE)
    assert done.returncode == 0, done.stderr
    assert "12 images, 3 classes" in done.stdout
    assert not (tmp_path / "out").exists()


def test_overwriting(images: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    folder, given = tmp_path / "out", words(images[0])
    assert run_here(folder, *given, recipe=RECIPE).returncode == 0
    (folder / "mine.txt").write_text("kept")
    assert run_here(folder, *given, "shown=3", recipe=RECIPE).returncode == 2
    assert run_here(folder, *given, "shown=3", "--overwrite", recipe=RECIPE).returncode == 0
    assert len(Page(folder / "report.html").all("img")) == 2 + 3
    assert (folder / "mine.txt").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "data=FOLDER"),
        (("data=nowhere",), "does not exist"),
        ((f"training={HERE / 'tiny_evaluate.toml'}",), "no dataset of its own"),
        (("data=.", "limit=0"), "limit"),
    ],
)
def test_what_is_refused(given: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = run_here(tmp_path / "out", *given, recipe=RECIPE)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_of_which_nothing_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"garbage")
    given = (f"data={tmp_path / 'images'}", "workers=0")
    done = run_here(tmp_path / "out", *given, recipe=RECIPE)
    assert done.returncode == 2
    assert "none of 1 samples" in done.stderr
    assert "a.jpg" in done.stderr


# --------------------------------------------------------------------------- any dataset
@config
class BandsConfig(DatasetConfig):
    """Images of five bands."""

    size: int = option("pixels", default=12)


class Bands(Dataset):
    """Masks, objects and statistics; the second sample cannot be read."""

    targets: ClassVar = {
        "mask": Target("mask", classes=("ground", "tree", "water"), ignore_index=255),
        "things": Target("class", n_classes=4, per_object=True),
    }

    def __init__(self, config: BandsConfig, *, channels: int) -> None:
        self.config, self.channels = config, channels

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Sample:
        if index == 1:
            raise CorruptSampleError("scene 1", "half a file")
        size = self.config.size
        image = torch.arange(self.channels, dtype=torch.uint8)[:, None, None] * 10 + index
        mask = torch.zeros(size, size, dtype=torch.uint8)
        mask[0, :3], mask[1, :2] = 1, 255
        things = torch.tensor([3, 3, 1] if index == 0 else [])
        return Sample(
            image.expand(-1, size, size),
            {"mask": tv_tensors.Mask(mask), "things": things},
        )

    def statistics(self) -> dict[str, list[float]]:
        return {"mean": [1.25, 2.5, 3, 4, 5], "p99": [7.75, 2, 3, 4, 5]}


@config
class EndlessConfig(DatasetConfig):
    """A stream."""


class Endless(StreamDataset):
    """Ever brighter images, one of which cannot be read."""

    targets: ClassVar = {"label": Target("class", classes=("even", "odd"))}

    def __init__(self, config: EndlessConfig, *, channels: int) -> None:
        self.channels = channels

    def open(
        self, *, part: int, parts: int, seed: int, state: Any = None
    ) -> Iterator[tuple[Any, Any]]:
        place = part
        while True:
            if place == 3:
                yield CorruptSampleError("third.jpg", "half a file"), place
            else:
                image = torch.full((self.channels, 8, 8), place, dtype=torch.uint8)
                yield Sample(image, {"label": place % 2}), place
            place += parts

    def describe(self) -> str:
        return "endless"


def registry() -> Registry:
    made = Registry()
    for kind, name, given, factory in (
        ("dataset", "bands", BandsConfig, Bands),
        ("dataset", "endless", EndlessConfig, Endless),
        ("task", "inspect", InspectConfig, Inspect),
    ):
        made.add(kind, Component(name, given, factory), "tests", "tests")
    return made


def task(**values: Any) -> Inspect:
    return Inspect(InspectConfig(**{"workers": 0, **values}), registry=registry())


def test_bands_masks_and_objects(tmp_path: Path) -> None:
    five = ImagesConfig(channels=5, mean=(0.5,) * 5, std=(0.5,) * 5)
    task(dataset=BandsConfig(), images=five).run(tmp_path)
    found = results(tmp_path)
    assert found["classes"]["mask"]["counts"] == {"ground": 3 * 139, "tree": 9, "water": 0}
    assert found["classes"]["mask"]["counted"] == "pixels"
    assert found["classes"]["things"]["counts"] == {"0": 0, "1": 1, "2": 0, "3": 2}
    means = [(10 * band + 5 / 3) / 255 for band in range(5)]
    assert found["images"]["mean"] == pytest.approx(means, abs=1e-6)
    assert found["blank"] == ["0", "2", "3"]
    text = Page(tmp_path / "report.html").text
    assert "1.25" in text  # of the dataset's own statistics
    assert "7.75" in text


def test_the_first_samples_of_a_stream(tmp_path: Path) -> None:
    task(dataset=EndlessConfig(), limit=10).run(tmp_path)
    found = results(tmp_path)
    assert (found["samples"], found["looked_at"], found["readable"]) == (None, 10, 9)
    assert found["classes"]["label"]["counts"] == {"even": 5, "odd": 4}
    mean = np.mean([0, 1, 2, 4, 5, 6, 7, 8, 9]) / 255
    assert found["images"]["mean"] == pytest.approx([mean] * 3, abs=1e-6)
    assert (tmp_path / "unreadable.txt").read_text() == "third.jpg\thalf a file\n"


def test_all_of_a_stream_cannot_be_looked_at() -> None:
    with pytest.raises(RecipeError, match="has no end"):
        task(dataset=EndlessConfig(), limit=None).check(1)


def test_run_without_a_check_refuses_as_well(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to look at"):
        task().run(tmp_path)
    assert not list(tmp_path.iterdir())


class TestInspect(TaskSuite):
    config = structure_component(
        Registry.load(),
        "task",
        "inspect",
        {
            "dataset": {"use": "fashion_mnist"},
            "augmentation": {"use": "multi_crop", "global_size": 28, "local_size": 14},
            "patch_size": 7,
        },
    )
