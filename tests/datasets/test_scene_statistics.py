"""Statistics of scenes: their numbers, the file that keeps them, the ranges they give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rasterio")

import tomli
from scenes_support import noise, scenes, write_scene

from dinov3_framework.errors import DataError


@pytest.fixture
def values(tmp_path: Path) -> np.ndarray:
    """Three bands of two scenes side by side, with a stripe without data."""
    found = np.stack([noise(64, 128, high=high, seed=high) for high in (100, 1000, 3000)])
    found[:, 10:20] = 0
    write_scene(tmp_path / "a.tif", found[:, :, :64], nodata=0)
    write_scene(tmp_path / "b.tif", found[:, :, 64:], nodata=0)
    return found


def test_statistics_are_those_of_all_values_with_data(tmp_path: Path, values: np.ndarray) -> None:
    rows = scenes(tmp_path, bits=12, min_valid=0.0).statistics()
    assert [row["band"] for row in rows] == [1, 2, 3]
    for row, band in zip(rows, values, strict=True):
        known = band[band > 0].astype(float)
        assert row["mean"] == pytest.approx(known.mean(), rel=1e-9)
        assert row["std"] == pytest.approx(known.std(), rel=1e-9)
        assert (row["min"], row["max"]) == (known.min(), known.max())
        assert row["percentile_2"] == np.percentile(known, 2)
        assert row["percentile_98"] == np.percentile(known, 98)
        assert row["valid"] == pytest.approx(54 / 64)


def test_a_sample_is_seeded(tmp_path: Path, values: np.ndarray) -> None:
    options = {"bits": 12, "statistics_windows": 4}
    rows = scenes(tmp_path, **options).statistics()
    assert rows == scenes(tmp_path, **options).statistics()
    assert rows != scenes(tmp_path, **options, statistics_seed=1).statistics()


def test_the_images_table_is_of_what_networks_see(tmp_path: Path, values: np.ndarray) -> None:
    dataset = scenes(
        tmp_path, bands=(3, 1), channels=2, band_low=(0.0, 50.0), band_high=(3e3, 90.0)
    )
    table = tomli.loads(dataset.images_table())["images"]
    assert table["channels"] == 2
    for place, (band, low, high) in enumerate([(2, 0, 3000), (0, 50, 90)]):
        known = values[band][values[band] > 0].astype(float)
        seen = np.rint(np.clip((known - low) / (high - low), 0, 1) * 255) / 255
        assert table["mean"][place] == pytest.approx(seen.mean(), abs=1e-4)
        assert table["std"][place] == pytest.approx(seen.std(), abs=1e-4)


def test_percentiles_are_gathered_once_and_kept(tmp_path: Path, values: np.ndarray) -> None:
    path = tmp_path / "kept" / "bands.json"
    options = {"range": "percentile", "statistics": str(path), "percentiles": (10.0, 90.0)}
    dataset = scenes(tmp_path, **options)
    kept = json.loads(path.read_text())
    for band in range(3):
        known = values[band][values[band] > 0]
        assert kept["low"][band] == np.percentile(known, 10)
        assert kept["high"][band] == np.percentile(known, 90)
    raw, valid = dataset.read(3)
    low, high = (np.array(kept[end])[:, None, None] for end in ("low", "high"))
    expected = np.where(valid, np.rint(np.clip((raw - low) / (high - low), 0, 1) * 255), 0)
    assert np.abs(dataset[3].image.numpy() - expected).max() <= 1  # halves, in float32
    # Other scenes get the same ranges; the file is left as it is.
    write_scene(tmp_path / "other" / "c.tif", noise(3, 16, 16, high=9))
    time = path.stat().st_mtime_ns
    other = scenes(tmp_path / "other", **options)
    assert path.stat().st_mtime_ns == time
    assert f"{kept['low'][2]:g} to {kept['high'][2]:g}" in other.describe()
    assert other.version() != scenes(tmp_path / "other").version()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda data: data.update(bands=[1, 2, 4]),
            r"is of the bands \[1, 2, 4\], not \[1, 2, 3\]",
        ),
        (lambda data: data.update(low=[1.0]), "has no 3 numbers as low"),
        (lambda data: data.update(low=["a", 1, 2]), "has no 3 numbers as low"),
        (lambda data: data.update(values="scaled"), "is of scaled values"),
        (lambda data: data.update(percentiles=[1.0, 99.0]), r"has the percentiles \[1.0, 99.0\]"),
        (lambda data: data.pop("max"), "lacks, or has besides, max"),
        (lambda data: data.update(format="mine"), "is not of the format"),
    ],
)
def test_a_file_of_something_else_is_refused(
    tmp_path: Path, values: np.ndarray, change: Any, message: str
) -> None:
    path = tmp_path / "bands.json"
    options = {"range": "percentile", "statistics": str(path)}
    scenes(tmp_path, **options)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(DataError, match=message):
        scenes(tmp_path, **options)


def test_files_that_are_none_and_places_that_cannot_be_written(
    tmp_path: Path, values: np.ndarray
) -> None:
    path = tmp_path / "bands.json"
    path.write_text("[1, 2")
    with pytest.raises(DataError, match=r"is no JSON: .*\n    remove the file"):
        scenes(tmp_path, range="percentile", statistics=str(path))
    with pytest.raises(DataError, match="cannot write statistics"):
        scenes(tmp_path, range="percentile", statistics=str(path / "bands.json"))


def test_a_band_of_one_value_is_black(tmp_path: Path) -> None:
    found = noise(3, 16, 16)
    found[1] = 7
    write_scene(tmp_path / "a.tif", found)
    options = {"range": "percentile", "statistics": str(tmp_path / "bands.json")}
    image = scenes(tmp_path, **options)[0].image
    assert not image[1].any()
    assert int(image[0].max()) == 255


def test_a_check_says_where_a_range_does_not_fit(tmp_path: Path) -> None:
    write_scene(tmp_path / "a.tif", noise(3, 32, 32, low=900, high=1000))
    notes = scenes(tmp_path).notes()
    assert len(notes) == 3
    assert notes[0].startswith("band 1 holds 9")
    assert "a fraction of 0 to 65535" in notes[0]
    (note, *_) = scenes(tmp_path, low=0.0, high=950.0).notes()
    assert "a fraction" in note
    (note, *_) = scenes(tmp_path, low=910.0, high=990.0).notes()
    assert "% of band 1 lie outside 910 to 990" in note
    assert scenes(tmp_path, low=900.0, high=1000.0).notes() == []
