"""Windows of GeoTIFF scenes: where they lie, what they hold, which are left out."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("rasterio")

from dinov3_datasets.scene_configs import GeotiffScenesConfig
from dinov3_datasets.scene_windows import Windows
from scenes_support import noise, scenes, write_scene

from dinov3_framework.configs import InvalidOption
from dinov3_framework.errors import CorruptSampleError, DataError
from dinov3_framework.testing import DatasetSuite


def names(dataset: Any) -> list[str]:
    return [dataset.name(index) for index in range(len(dataset))]


# --------------------------------------------------------------------------- the grid
def test_windows_cover_a_scene_and_end_where_it_does(tmp_path: Path) -> None:
    values = noise(3, 40, 35)
    write_scene(tmp_path / "a.tif", values)
    dataset = scenes(tmp_path, low=0.0, high=3000.0)
    places = [(row, column) for row in (0, 16, 24) for column in (0, 16, 19)]
    assert names(dataset) == [f"a.tif:{row},{column}" for row, column in places]
    for index, (row, column) in enumerate(places):
        image = dataset[index].image
        part = values[:, row : row + 16, column : column + 16]
        assert image.dtype == torch.uint8
        assert np.array_equal(image.numpy(), np.rint(part.astype(np.float32) * 0.085))
    assert dataset.describe() == (
        f"geotiff_scenes {tmp_path}: 9 windows of 16 x 16 of 1 scenes; bands 1 2 3; values 0 to "
        "3000 become 0 to 255"
    )


@pytest.mark.parametrize(("size", "starts"), [(16, [0]), (32, [0, 8, 16]), (33, [0, 8, 16, 17])])
def test_strides_overlap(tmp_path: Path, size: int, starts: list[int]) -> None:
    write_scene(tmp_path / "a.tif", noise(3, 16, size))
    assert names(scenes(tmp_path, stride=8)) == [f"a.tif:0,{start}" for start in starts]


def test_scenes_follow_one_another_by_name(tmp_path: Path) -> None:
    write_scene(tmp_path / "b" / "x.TIFF", noise(3, 16, 32, seed=1))
    write_scene(tmp_path / "a.tif", noise(3, 32, 16, seed=2))
    (tmp_path / "notes.txt").touch()
    every = ["a.tif:0,0", "a.tif:16,0", "b/x.TIFF:0,0", "b/x.TIFF:0,16"]
    assert names(scenes(tmp_path)) == every
    assert names(scenes(tmp_path, pattern="b/*")) == every[2:]
    assert names(scenes(tmp_path, scenes=("b/x.TIFF", "a.tif"))) == every[2:] + every[:2]
    assert names(scenes(tmp_path / "a.tif")) == every[:2]
    dataset = scenes(tmp_path)
    assert dataset.name(-1) == every[-1]
    assert len(list(dataset)) == 4  # ends by IndexError


def test_a_small_scene_is_padded(tmp_path: Path) -> None:
    values = noise(3, 12, 40)
    write_scene(tmp_path / "a.tif", values)
    dataset = scenes(tmp_path, low=0.0, high=3000.0)
    assert names(dataset) == ["a.tif:0,0", "a.tif:0,16", "a.tif:0,24"]
    image = dataset[1].image
    assert image.shape == (3, 16, 16)
    assert (image[:, :12] > 0).any()
    assert not image[:, 12:].any()
    assert "1 scenes are smaller and padded" in dataset.describe()
    with pytest.raises(DataError, match=r"no window of 16 x 16 .* has data on 0.8 of it"):
        scenes(tmp_path, min_valid=0.8)


# --------------------------------------------------------------------------- bands, values
def test_bands_are_chosen_by_number(tmp_path: Path) -> None:
    values = noise(13, 16, 16)
    write_scene(tmp_path / "a.tif", values, interleave="pixel")
    dataset = scenes(tmp_path, bands=(4, 3, 13), bits=12)
    expected = np.rint(values[[3, 2, 12]].astype(np.float32) * np.float32(255 / 4095))
    assert np.array_equal(dataset[0].image.numpy(), expected)
    assert scenes(tmp_path, channels=13)[0].image.shape == (13, 16, 16)
    assert scenes(tmp_path, channels=1, bands=(7,))[0].image.shape == (1, 16, 16)


def test_an_alpha_band_is_a_mask(tmp_path: Path) -> None:
    values = noise(4, 16, 16, high=255).astype(np.uint8)
    values[3] = 255
    values[3, :, :4] = 0
    write_scene(tmp_path / "a.tif", values, photometric="RGB", alpha="YES")
    image = scenes(tmp_path)[0].image.numpy()
    assert np.array_equal(image[:, :, 4:], values[:3, :, 4:])
    assert not image[:, :, :4].any()
    with pytest.raises(DataError, match=r"has 3 bands, images.channels is 4"):
        scenes(tmp_path, channels=4)
    assert scenes(tmp_path, channels=4, bands=(1, 2, 3, 4))[0].image.shape == (4, 16, 16)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "float32", "float64"])
def test_types_of_values(tmp_path: Path, dtype: str) -> None:
    values = np.arange(3 * 256).reshape(3, 16, 16) % 200
    write_scene(tmp_path / "a.tif", values.astype(dtype))
    image = scenes(tmp_path, low=-50.0, high=205.0)[0].image.numpy()
    assert np.array_equal(image, values + 50)


def test_values_of_8_and_16_bits_have_a_range_of_their_own(tmp_path: Path) -> None:
    eight = noise(3, 16, 16, high=255).astype(np.uint8)
    write_scene(tmp_path / "a.tif", eight)
    sixteen = noise(3, 16, 16, high=65535)
    write_scene(tmp_path / "b.tif", sixteen)
    dataset = scenes(tmp_path)
    assert np.array_equal(dataset[0].image.numpy(), eight)
    assert np.array_equal(dataset[1].image.numpy(), np.rint(sixteen / 257))
    write_scene(tmp_path / "c.tif", noise(3, 16, 16).astype(np.int16))
    with pytest.raises(DataError, match=r"c.tif holds int16: state the values that become 0"):
        scenes(tmp_path)


def test_each_band_may_have_a_range(tmp_path: Path) -> None:
    values = np.full((3, 16, 16), 100, dtype=np.int16)
    write_scene(tmp_path / "a.tif", values)
    dataset = scenes(tmp_path, band_low=(0.0, 100.0, -100.0), band_high=(100.0, 200.0, 300.0))
    assert dataset[0].image[:, 0, 0].tolist() == [255, 0, 128]
    assert "values by band (0 to 100, 100 to 200, -100 to 300)" in dataset.describe()
    with pytest.raises(DataError, match="have 2 and 2 numbers for 3 bands"):
        scenes(tmp_path, band_low=(0.0, 1.0), band_high=(2.0, 3.0))


def test_scale_and_offset_are_applied_on_request(tmp_path: Path) -> None:
    values = np.full((3, 16, 16), 5000, dtype=np.int16)
    tags = {"scales": (0.0001, 0.0001, 0.0002), "offsets": (0.0, -0.1, 0.0)}
    write_scene(tmp_path / "a.tif", values, **tags)
    stored = scenes(tmp_path, low=0.0, high=10000.0)
    assert stored[0].image[:, 0, 0].tolist() == [128, 128, 128]
    assert "1 scenes have a scale and offset, which are not applied" in stored.notes()[0]
    scaled = scenes(tmp_path, apply_scale=True, low=0.0, high=1.0)
    assert scaled[0].image[:, 0, 0].tolist() == [128, 102, 255]
    assert not any("scale" in note for note in scaled.notes())
    with pytest.raises(DataError, match="holds scaled values: state the values"):
        scenes(tmp_path, apply_scale=True)


# --------------------------------------------------------------------------- no data
def half_empty(dtype: str = "uint16", nodata: float = 0) -> np.ndarray:
    """Data right of column 40 of 64, and a hole of one band."""
    values = noise(3, 64, 64).astype(dtype)
    values[:, :, :40] = nodata
    values[1, 5, 60] = nodata
    return values


@pytest.mark.parametrize("overviews", [(), (2,), (2, 4)])
@pytest.mark.parametrize("kind", ["tag", "mask", "stated", "nan"])
def test_windows_without_enough_data_are_left_out(
    tmp_path: Path, kind: str, overviews: tuple[int, ...]
) -> None:
    tile = 32
    if kind == "nan":
        values, options = half_empty("float32", np.nan), {"low": 0.0, "high": 3000.0}
        write_scene(tmp_path / "a.tif", values, overviews=overviews)
    elif kind == "mask":
        values, options = half_empty(), {"bits": 12}
        write_scene(tmp_path / "a.tif", values, mask=values[0] > 0, overviews=overviews)
    else:
        values, options = half_empty(), {"bits": 12}
        tagged = {"nodata": 0} if kind == "tag" else {}
        options |= {"nodata": 0.0} if kind == "stated" else {}
        write_scene(tmp_path / "a.tif", values, overviews=overviews, **tagged)
    # Columns 0 to 31 have none, 16 to 47 a quarter, 32 to 63 three quarters.
    columns = {
        least: [
            int(name.rpartition(",")[2])
            for name in names(scenes(tmp_path, tile=tile, stride=16, min_valid=least, **options))
            if ":0," in name
        ]
        for least in (0.0, 0.01, 0.25, 0.26, 0.75)
    }
    assert columns == {
        0.0: [0, 16, 32], 0.01: [16, 32], 0.25: [16, 32], 0.26: [32], 0.75: [32],
    }  # fmt: skip
    dataset = scenes(tmp_path, tile=tile, **options)
    assert names(dataset) == ["a.tif:0,32", "a.tif:32,32"]
    assert "2 windows with data on less than 0.5 of them left out" in dataset.describe()
    with pytest.raises(DataError, match="lower tile or min_valid"):
        scenes(tmp_path, tile=tile, min_valid=0.76, **options)


def test_many_windows_with_few_left_out_are_those_that_counting_leaves(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    values = noise(2, 400, 460)
    for row, column in rng.integers(0, 400, (40, 2)):  # blots
        values[:, row : row + 50, column : column + 50] = 0
    expected = [
        f"a.tif:{row},{column}"
        for row in (*range(0, 336, 32), 336)
        for column in (*range(0, 396, 32), 396)
        if (values[:, row : row + 64, column : column + 64] > 0).any(0).mean() >= 0.7
    ]
    assert 20 < len(expected) < 150
    for overviews in ((), (2, 4, 8)):
        write_scene(tmp_path / "a.tif", values, nodata=0, overviews=overviews)
        dataset = scenes(tmp_path, channels=2, min_valid=0.7, tile=64, stride=32)
        assert names(dataset) == expected


def test_what_has_no_data_is_filled(tmp_path: Path) -> None:
    values = half_empty("int16", -9999)
    write_scene(tmp_path / "a.tif", values, nodata=-9999)
    options = {"tile": 64, "min_valid": 0.1, "low": -1000.0, "high": 3000.0}
    (sample,) = scenes(tmp_path, **options)
    gaps = torch.from_numpy(values == -9999)
    assert not sample.image[gaps].any()  # the hole of one band too
    assert int(sample.image[~gaps].min()) >= 64
    mean = {**options, "fill": "mean", "statistics": str(tmp_path / "bands.json")}
    dataset = scenes(tmp_path, **mean)
    means = [(values[band][values[band] != -9999].mean() + 1000) * 255 / 4000 for band in range(3)]
    filled = dataset[0].image
    assert torch.equal(filled[~gaps], sample.image[~gaps])
    for band in range(3):
        assert filled[band][gaps[band]].unique().tolist() == [round(means[band])]
    assert "no data becomes the mean" in dataset.describe()


# --------------------------------------------------------------------------- files
def test_scenes_that_cannot_be_opened_are_left_out_aloud(tmp_path: Path) -> None:
    write_scene(tmp_path / "good.tif", noise(3, 16, 16))
    (tmp_path / "bad.tif").write_bytes(b"II*\0 and no more")
    vrt = "<VRTDataset rasterXSize='16' rasterYSize='16'></VRTDataset>"
    (tmp_path / "virtual.tif").write_text(vrt)
    write_scene(tmp_path / "complex.tif", noise(3, 16, 16).astype(np.complex64))
    dataset = scenes(tmp_path)
    assert names(dataset) == ["good.tif:0,0"]
    assert "3 scenes that cannot be opened left out" in dataset.describe()
    notes = dataset.notes()
    assert [note.partition(":")[0] for note in notes[:3]] == [
        f"{name}.tif is left out" for name in ("bad", "complex", "virtual")
    ]
    assert "complex64" in notes[1]
    (tmp_path / "good.tif").unlink()
    with pytest.raises(DataError, match=r"not one of 3 scenes in .* can be opened: bad.tif: "):
        scenes(tmp_path)


def test_a_check_says_what_takes_long(tmp_path: Path) -> None:
    values = noise(3, 32, 80, high=255).astype(np.uint8)
    write_scene(tmp_path / "a.tif", values, tiled=False, blockxsize=80, blockysize=1)
    (note,) = scenes(tmp_path).notes()
    assert note.startswith("1 scenes are stored in whole rows")
    assert scenes(tmp_path, tile=32).notes() == []
    write_scene(tmp_path / "a.tif", values)
    assert scenes(tmp_path).notes() == []


def test_a_name_that_is_no_utf8_is_left_out(tmp_path: Path) -> None:
    write_scene(tmp_path / "good.tif", noise(3, 16, 16))
    try:
        os.link(tmp_path / "good.tif", tmp_path / os.fsdecode(b"caf\xe9.tif"))
    except OSError:
        pytest.skip("this file system demands UTF-8")
    dataset = scenes(tmp_path)
    assert names(dataset) == ["good.tif:0,0"]
    assert dataset.notes()[0].startswith("caf\\xe9.tif is left out: GDAL opens only names")


@pytest.mark.parametrize("nodata", [None, 0])
def test_a_truncated_scene_has_corrupt_windows(tmp_path: Path, nodata: Any) -> None:
    path = write_scene(tmp_path / "a.tif", noise(3, 96, 96), nodata=nodata, compress="none")
    os.truncate(path, path.stat().st_size - 3 * 32 * 32 * 2 * 2)
    dataset = scenes(tmp_path, tile=32)
    assert len(dataset) == 9
    assert dataset[0].image.any()
    with pytest.raises(CorruptSampleError, match=r"a\.tif:64,64: .*band"):
        dataset[8]
    assert dataset.statistics()[0]["max"] > 0  # of the others
    dataset.notes()
    path.unlink()
    assert dataset[0].image.any()  # it is open
    with pytest.raises(CorruptSampleError, match=r"a\.tif:0,0: "):
        pickle.loads(pickle.dumps(dataset))[0]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        scenes(tmp_path / "none")
    with pytest.raises(DataError, match=r"no files that end in .tif or .tiff in"):
        scenes(tmp_path)
    write_scene(tmp_path / "a.tif", noise(4, 16, 16))
    with pytest.raises(DataError, match=r"fit pattern = '\*.jp2'"):
        scenes(tmp_path, pattern="*.jp2")
    with pytest.raises(DataError, match=r"no scene 'b.tif' in"):
        scenes(tmp_path, scenes=("a.tif", "b.tif"))
    with pytest.raises(DataError, match=r"a.tif has 4 bands, images.channels is 3\n.*bands = \["):
        scenes(tmp_path)
    with pytest.raises(DataError, match=r"bands names 2 bands, images.channels is 3"):
        scenes(tmp_path, bands=(1, 2))
    with pytest.raises(DataError, match=r"a.tif has 4 bands, bands names 5"):
        scenes(tmp_path, bands=(1, 2, 5))


def test_a_missing_library_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(DataError, match=r"pip install 'dinov3-framework\[geo\]'"):
        scenes(tmp_path)


def test_more_scenes_than_are_held_open(tmp_path: Path) -> None:
    for number in range(5):
        write_scene(tmp_path / f"{number}.tif", np.full((3, 16, 16), number * 10, np.uint8))
    dataset = scenes(tmp_path, max_open=2)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for index in (0, 1, 2, 3, 4, 0, 3):
        assert int(dataset[index].image.max()) == index * 10
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_forked_workers_open_scenes_of_their_own(tmp_path: Path) -> None:
    values = noise(3, 64, 512, high=255).astype(np.uint8)
    write_scene(tmp_path / "a.tif", values)
    dataset = scenes(tmp_path)
    expected = [dataset[index].image for index in range(len(dataset))]  # open in this process
    loader = DataLoader(dataset, None, num_workers=2, multiprocessing_context="fork")
    found = [sample.image for sample in loader]
    assert len(found) == 128
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_version_tells_what_is_seen(tmp_path: Path) -> None:
    path = write_scene(tmp_path / "a.tif", half_empty(), nodata=0)
    datasets = [
        scenes(tmp_path),
        scenes(tmp_path, bands=(3, 2, 1)),
        scenes(tmp_path, stride=8),
        scenes(tmp_path, min_valid=0.9),
    ]
    assert len({each.digest() for each in datasets}) == 4
    seen = {each.version() for each in datasets}
    seen.add(scenes(tmp_path, bits=12).version())
    seen.add(scenes(tmp_path, nodata=7.0).version())
    digest = scenes(tmp_path).digest()
    assert scenes(tmp_path).version() in seen
    os.utime(path, ns=(1, 1))
    seen.add(scenes(tmp_path).version())
    assert len(seen) == 7
    assert scenes(tmp_path).digest() == digest


def test_a_million_windows_take_little_memory() -> None:
    sizes = [(512 * 1000, 512 * 500)] * 2
    whole = Windows(sizes, 512, 512, [None, None])
    part = Windows(sizes, 512, 512, [None, np.arange(0, 500_000, 2)])
    assert (len(whole), len(part)) == (1_000_000, 750_000)
    assert len(pickle.dumps(whole)) < 10_000
    assert len(pickle.dumps(part)) < 5 * len(part)
    assert whole[999_999] == (1, (slice(511_488, 512_000), slice(255_488, 256_000)))
    assert part[500_001] == (1, (slice(0, 512), slice(1024, 1536)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 0}, "above 0"),
        ({"bands": (0, 1)}, "count from 1"),
        ({"bands": ()}, "at least one band"),
        ({"low": 1.0}, "low and high go together"),
        ({"band_high": (1.0,)}, "band_low and band_high go together"),
        ({"band_low": (1.0,), "band_high": (1.0, 2.0)}, "has 1 numbers, band_high 2"),
        ({"low": 1.0, "high": 1.0}, "not below high"),
        ({"bits": 12, "low": 0.0, "high": 1.0}, "state the range once"),
        ({"bits": 33}, "1 to 32"),
        ({"range": "percentile"}, "needs a file to keep statistics in"),
        ({"fill": "mean"}, "needs a file to keep statistics in"),
        ({"range": "percentile", "bits": 8, "statistics": "x"}, "goes without bits"),
        ({"percentiles": (98.0, 2.0)}, "two increasing numbers"),
        ({"scenes": ("a.tif",), "pattern": "*"}, "in place of pattern"),
        ({"min_valid": 1.5}, "0..1"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        GeotiffScenesConfig(root="scenes", **options)


class TestGeotiffScenes(DatasetSuite):
    @pytest.fixture(autouse=True)
    def _scenes(self, tmp_path: Path) -> None:
        write_scene(tmp_path / "a.tif", half_empty(), nodata=0)
        write_scene(tmp_path / "b.tif", noise(3, 20, 40, seed=1))
        self.config = GeotiffScenesConfig(root=str(tmp_path), tile=16, min_valid=0.1, bits=12)
