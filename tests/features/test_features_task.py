"""The task ``features``: files that hold what the backbone says, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from disks import small_disk
from features_support import (
    DEPTH,
    DIM,
    PATCH,
    SIZE,
    STORAGE,
    export,
    files,
    folder,
    noise,
    rows,
    task,
    tensors,
)
from PIL import Image
from safetensors import safe_open

from dinov3_framework import load_backbone
from dinov3_framework.cli import main
from dinov3_framework.errors import DataError, OutputError, RecipeError

ALL = ("class", "mean_patch", "patches", "storage")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("weights") / "w.safetensors")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("photographs"), corrupt=(2, 5))


READABLE = [0, 1, 3, 4, 6, 7, 8, 9]


def paths(root: Path) -> list[Path]:
    return sorted(root.rglob("*.png"))


# --------------------------------------------------------------------------- what is written
def test_all_outputs_of_two_layers(weights: Path, photographs: Path, tmp_path: Path) -> None:
    task(photographs, weights, outputs=ALL, layers=(0, -1)).run(tmp_path)
    found = tensors(tmp_path)
    readable = [paths(photographs)[index] for index in READABLE]
    expected = load_backbone(weights).extract(readable, ALL, layers=(0, 2))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)
    grid = SIZE // PATCH
    assert found["layer2.patches"].shape == (8, grid, grid, DIM)
    assert found["layer0.storage"].shape == (8, STORAGE, DIM)

    index = rows(tmp_path / "index.csv")
    assert [row["row"] for row in index] == [str(place) for place in range(8)]
    assert [row["path"] for row in index][:4] == [
        "a/000.png",
        "a/001.png",
        "a/003.png",
        "a/004.png",
    ]
    assert [row["label"] for row in index] == list("00001111")
    assert [row["class"] for row in index] == list("aaaabbbb")
    assert (index[1]["height"], index[1]["width"]) == ("38", "45")
    assert {(row["grid_height"], row["grid_width"]) for row in index} == {(str(grid), str(grid))}
    skipped = rows(tmp_path / "skipped.csv")
    assert [(row["index"], row["path"]) for row in skipped] == [
        ("2", "a/002.png"),
        ("5", "b/005.png"),
    ]
    assert all("identify" in row["reason"] for row in skipped)

    results = json.loads((tmp_path / "results.json").read_text())
    assert results["images"] == 8
    assert results["skipped"] == 2
    assert results["files"] == ["features.safetensors"]
    assert results["tensors"]["layer0.class"] == {"dtype": "F32", "shape": [8, DIM]}
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"features.safetensors", "index.csv", "skipped.csv", "results.json"}


def test_odd_names_are_escaped_in_tables(weights: Path, tmp_path: Path) -> None:
    folder(tmp_path / "images", corrupt=(2,))
    first, second, broken = paths(tmp_path / "images")[:3]
    first.rename(os.fsdecode(b"%s/caf\xe9.png" % os.fsencode(first.parent)))
    second.rename(first.with_name("d\x1b[2J.png"))
    broken.rename(first.with_name("e\n.png"))
    task(tmp_path / "images", weights).run(tmp_path / "run")
    found = [row["path"] for row in rows(tmp_path / "run" / "index.csv")]
    assert {r"a/caf\xe9.png", r"a/d\x1b[2J.png"} <= set(found)
    (skipped,) = (tmp_path / "run" / "skipped.csv").read_text().splitlines()[1:]
    assert r"a/e\n.png" in skipped


def test_what_the_file_says_of_itself(weights: Path, photographs: Path, tmp_path: Path) -> None:
    task(photographs, weights, layers=(-2,), norm=False).run(tmp_path)
    with safe_open(tmp_path / "features.safetensors", "pt") as file:
        said = {key: json.loads(value) for key, value in file.metadata().items() if key != "format"}
        assert file.keys() == ["class"], "the names of a single layer have no prefix"
    assert said["layers"] == [DEPTH - 2]
    assert said["fit"] == "crop"
    assert said["size"] == SIZE
    assert said["norm"] is False
    assert said["backbone"]["weights"] == str(weights)


def test_the_grid_is_the_images(weights: Path, tmp_path: Path) -> None:
    """A patch's features move with it: rows are along the height."""
    root = tmp_path / "images"
    root.mkdir()
    dark = np.zeros((SIZE, SIZE, 3), np.uint8)
    dark[:PATCH] = 255
    Image.fromarray(dark).save(root / "a.png")
    task(root, weights, outputs=("patches", "mean_patch"), layers=(0,)).run(tmp_path / "out")
    found = tensors(tmp_path / "out")
    grid = found["patches"][0]
    along_rows = (grid[0] - grid[1]).abs().mean()
    along_columns = (grid[0, 0] - grid[0, 1]).abs().mean()
    assert along_rows > 3 * along_columns
    torch.testing.assert_close(found["mean_patch"][0], grid.mean((0, 1)))


def test_padded_grids_differ_and_are_easily_read(
    weights: Path, photographs: Path, tmp_path: Path
) -> None:
    task(photographs, weights, outputs=("class", "patches"), fit="pad").run(tmp_path)
    found = tensors(tmp_path)
    assert found["offsets"].dtype == torch.int64
    index = rows(tmp_path / "index.csv")
    readable = [paths(photographs)[place] for place in READABLE]
    expected = load_backbone(weights).extract(readable, ("class", "patches"), fit="pad")
    torch.testing.assert_close(found["class"], expected["class"])
    for place, row in enumerate(index):
        height, width = found["grids"][place].tolist()
        assert (height, width) == (-(-int(row["height"]) // PATCH), -(-int(row["width"]) // PATCH))
        assert (str(height), str(width)) == (row["grid_height"], row["grid_width"])
        start, stop = found["offsets"][place : place + 2]
        patches = found["patches"][start:stop].reshape(height, width, -1)
        torch.testing.assert_close(patches, expected["patches"][place])
    assert found["offsets"][-1] == len(found["patches"])


def test_numpy_files(weights: Path, photographs: Path, tmp_path: Path) -> None:
    task(photographs, weights, outputs=ALL, fit="pad").run(tmp_path / "one")
    options = {"outputs": ALL, "fit": "pad", "format": "npy", "dtype": "fp16"}
    task(photographs, weights, **options).run(tmp_path / "npy")
    for name, tensor in tensors(tmp_path / "one").items():
        array = np.load(tmp_path / "npy" / f"features.{name}.npy")
        wanted = tensor if tensor.dtype == torch.int64 else tensor.half()
        np.testing.assert_array_equal(array, wanted.numpy())
    written = json.loads((tmp_path / "npy" / "results.json").read_text())["files"]
    assert sorted(written) == sorted(path.name for path in (tmp_path / "npy").glob("*.npy"))


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_types(weights: Path, photographs: Path, tmp_path: Path, name: str, dtype: Any) -> None:
    task(photographs, weights).run(tmp_path / "fp32")
    task(photographs, weights, dtype=name).run(tmp_path / name)
    expected = tensors(tmp_path / "fp32")["class"].to(dtype)
    assert torch.equal(tensors(tmp_path / name)["class"], expected)


def test_bfloat16_on_the_way(weights: Path, photographs: Path, tmp_path: Path) -> None:
    task(photographs, weights).run(tmp_path / "fp32")
    task(photographs, weights, parallel={"param_dtype": "bf16"}).run(tmp_path / "bf16")
    exact, rounded = (tensors(tmp_path / name)["class"] for name in ("fp32", "bf16"))
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0.1)


def test_parts_that_stay(weights: Path, photographs: Path, tmp_path: Path) -> None:
    options = {"outputs": ("class", "patches"), "fit": "pad"}
    task(photographs, weights, **options).run(tmp_path / "one")
    task(photographs, weights, merge=False, **options).run(tmp_path / "parts")
    whole = tensors(tmp_path / "one")
    index = rows(tmp_path / "parts" / "index.csv")
    assert len(index) == 8
    for row, merged in zip(index, rows(tmp_path / "one" / "index.csv"), strict=True):
        assert row["path"] == merged["path"]
        place = int(row["row"])
        with safe_open(tmp_path / "parts" / "features" / row["file"], "pt") as part:
            assert torch.equal(part.get_tensor("class")[place], whole["class"][int(merged["row"])])
            start, stop = part.get_tensor("offsets")[place : place + 2]
            patches = part.get_tensor("patches")[start:stop]
        first, last = whole["offsets"][int(merged["row"]) :][:2]
        assert torch.equal(patches, whole["patches"][first:last])


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_other_channels(tmp_path: Path, channels: int) -> None:
    root = tmp_path / "images"
    root.mkdir()
    arrays = [noise(40, 36, channels, seed) for seed in range(5)]
    for seed, array in enumerate(arrays):
        np.save(root / f"{seed}.npy", array)
    np.save(root / "9.npy", noise(40, 36, channels + 1, 0))
    weights = export(tmp_path / "w.safetensors", channels)
    task(root, weights, outputs=("class", "patches")).run(tmp_path / "out")
    expected = load_backbone(weights).extract(arrays, ("class", "patches"))
    found = tensors(tmp_path / "out")
    torch.testing.assert_close(found["class"], expected["class"])
    torch.testing.assert_close(found["patches"], expected["patches"])
    assert [row["path"] for row in rows(tmp_path / "out" / "skipped.csv")] == ["9.npy"]


def test_a_backbone_as_it_is_initialized(photographs: Path, tmp_path: Path) -> None:
    backbone = {"use": "vit", "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    task(photographs, None, backbone=backbone, size=16).run(tmp_path)
    assert tensors(tmp_path)["class"].shape == (8, 16)
    with pytest.raises(RecipeError, match="size: crop needs one"):
        task(photographs, None, backbone=backbone).check(1)


def test_workers_and_parts_change_nothing(weights: Path, photographs: Path, tmp_path: Path) -> None:
    task(photographs, weights, fit="pad", outputs=ALL).run(tmp_path / "one")
    task(photographs, weights, fit="pad", outputs=ALL, workers=2).run(tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    task(photographs, weights, fit="pad", outputs=ALL, rows_per_part=100).run(tmp_path / "three")
    for name, tensor in tensors(tmp_path / "one").items():
        torch.testing.assert_close(tensors(tmp_path / "three")[name], tensor)
    assert (tmp_path / "one" / "index.csv").read_bytes() == (
        tmp_path / "three" / "index.csv"
    ).read_bytes()


# --------------------------------------------------------------------------- going on
def test_a_part_that_is_there_is_not_made_again(
    weights: Path, photographs: Path, tmp_path: Path
) -> None:
    task(photographs, weights).run(tmp_path / "whole")
    output = tmp_path / "out"
    task(photographs, weights, merge=False).run(output)
    parts = sorted((output / "features").glob("part-*"))
    assert len(parts) == 3
    parts[1].unlink()
    # What a killed run leaves beside whole parts.
    (output / "features" / ".part-00001.safetensors.0abc0abc").write_bytes(b"half")
    (output / ".features.safetensors.0abc0abc").write_bytes(b"half")
    before = parts[2].stat().st_ino
    task(photographs, weights, merge=False).run(output)
    assert parts[1].exists()
    assert parts[2].stat().st_ino == before
    assert not list(output.rglob(".*.0abc0abc"))
    task(photographs, weights).run(output)
    assert files(output) == files(tmp_path / "whole")
    assert not (output / "features").exists()


def test_parts_of_other_images_or_weights_are_refused(tmp_path: Path) -> None:
    weights, root = export(tmp_path / "w.safetensors"), folder(tmp_path / "images")
    task(root, weights, merge=False).run(tmp_path / "out")
    Image.fromarray(noise(32, 32, 3, 0)).save(root / "a" / "more.png")
    with pytest.raises(OutputError, match="before images and the images' names changed"):
        task(root, weights, merge=False).run(tmp_path / "out")
    (root / "a" / "more.png").unlink()
    export(weights, embed_dim=32)
    with pytest.raises(OutputError, match="before weights changed; choose another --output-dir"):
        task(root, weights, merge=False).run(tmp_path / "out")


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_damaged_part_is_named(
    weights: Path, photographs: Path, tmp_path: Path, kept: int
) -> None:
    task(photographs, weights, merge=False).run(tmp_path)
    part = tmp_path / "features" / "part-00001.safetensors"
    part.write_bytes(part.read_bytes()[:kept])
    with pytest.raises(OutputError, match=r"part-00001.safetensors is damaged .* run again"):
        task(photographs, weights, merge=False).run(tmp_path)


# --------------------------------------------------------------------------- what is refused
class Wrong(NamedTuple):
    options: dict[str, Any]
    message: str


@pytest.mark.parametrize(
    "wrong",
    [
        Wrong({"format": "npy", "dtype": "bf16"}, "dtype: NumPy files know no bf16"),
        Wrong({"format": "npy", "merge": False}, "merge: parts are safetensors"),
        Wrong({"size": 20}, "size: 20 px are no multiple of .* 8\n    take 16 or 24"),
        Wrong({"fit": "native", "size": 16}, "size: native images keep their own size"),
        Wrong({"layers": (3,)}, r"layers: layers are \[3\], this backbone has 0 to 2"),
        Wrong({"layers": (2, -1)}, "layers: .* twice"),
        Wrong({"layers": ()}, "layers"),
        Wrong({"outputs": ()}, "outputs"),
        Wrong({"outputs": ("class", "class")}, "outputs"),
        Wrong({"outputs": ("cls",)}, "outputs"),
        Wrong({"parallel": {"compile": True}}, "parallel.compile: is for training runs"),
        Wrong({"parallel": {"checkpointing": "full"}}, "parallel.checkpointing: is for training"),
        Wrong({"parallel": {"fp8": "emulated"}}, "parallel.fp8: is for training runs"),
        Wrong(
            {"parallel": {"replicas": 2}}, "parallel.replicas: every process .*\n.*sharded = true"
        ),
        Wrong(
            {"parallel": {"replicas": 2}, "sharded": True}, "parallel.replicas: 1 process cannot"
        ),
    ],
    ids=lambda wrong: wrong.message.partition(":")[0],
)
def test_recipes_that_cannot_work(weights: Path, photographs: Path, wrong: Wrong) -> None:
    with pytest.raises(RecipeError, match=wrong.message):
        task(photographs, weights, **wrong.options).check(1)


def test_outputs_that_a_backbone_does_not_have(photographs: Path, tmp_path: Path) -> None:
    weights = export(tmp_path / "w.safetensors", n_storage_tokens=0)
    with pytest.raises(RecipeError, match="outputs: this backbone has no storage tokens"):
        task(photographs, weights, outputs=("storage",)).check(1)


def test_a_native_image_that_does_not_fit(weights: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    for index in range(4):
        Image.fromarray(noise(32, 24 + (index == 2), 3, index)).save(root / f"{index}.png")
    wanted = r"2.png: 32 x 25 pixels .* resize it to 32 x 24 or 32"
    native = task(root, weights, fit="native")
    with pytest.raises(DataError, match=wanted):
        native.check(1)
    with pytest.raises(DataError, match=wanted):
        native.run(tmp_path / "out")
    (root / "2.png").unlink()
    task(root, weights, fit="native", outputs=("patches",)).run(tmp_path / "other")
    assert tensors(tmp_path / "other")["grids"].tolist() == [[4, 3]] * 3


def test_features_that_are_not_finite(weights: Path, photographs: Path, tmp_path: Path) -> None:
    loaded = load_backbone(weights)
    state = dict(loaded.backbone.state_dict())
    state["norm.weight"] = state["norm.weight"] * 1e6
    broken = tmp_path / "w.safetensors"
    shutil.copy(weights, broken)
    from safetensors.torch import save_file

    with safe_open(weights, "pt") as file:
        save_file(state, broken, file.metadata())
    with pytest.raises(DataError, match=r'beyond fp16; take dtype = "bf16" or "fp32"'):
        task(photographs, broken, dtype="fp16").run(tmp_path / "out")
    task(photographs, broken, dtype="bf16").run(tmp_path / "other")


def test_nothing_readable(weights: Path, tmp_path: Path) -> None:
    root = folder(tmp_path / "images", 3, corrupt=(0, 1, 2))
    with pytest.raises(DataError, match=r"none of 3 images can be read, the first: a/000.png: "):
        task(root, weights).run(tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize("kind", ["tmpfs", "limit"])
def test_a_full_disk(photographs: Path, tmp_path: Path, kind: str) -> None:
    """Each image gives 24 x 24 x 256 values, 0.6 MB."""
    weights = export(tmp_path / "w.safetensors", embed_dim=256, depth=1)
    filling = {"outputs": ("patches",), "size": 192, "rows_per_part": 9}
    with small_disk(tmp_path / "disk", kind):
        output = tmp_path / "disk" / "out"
        with pytest.raises(OutputError, match=r"part-00000.*disk full.*make room and run again"):
            task(photographs, weights, **filling).run(output)
        assert [path.name for path in (output / "features").iterdir()] == ["plan.json"]


# --------------------------------------------------------------------------- the check
def test_the_check_says_what_will_come(weights: Path, photographs: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    planned = task(photographs, weights, outputs=ALL, fit="pad", output_dir=str(tmp_path / "out"))
    report = planned.check(2)
    images, features = dict(report.sections["images"]), dict(report.sections["features"])
    assert "10 images" in images["dataset"]
    assert images["sizes"] == "30 x 40 to 46 x 40 px (of 10 looked at, 2 unreadable)"
    assert images["fit"] == "pad, each image's own size"
    assert features["class"] == f"[{DIM}] fp32"
    assert features["patches"] == f"[4, 5, {DIM}] to [6, 5, {DIM}] fp32"
    assert features["storage"] == f"[{STORAGE}, {DIM}] fp32"
    assert "MiB, twice that while parts are merged" in features["size"]
    assert features["free"].endswith(f"at {tmp_path / 'out'}")
    assert not report.missing
    assert sorted(tmp_path.iterdir()) == before


def test_a_disk_that_is_too_small_is_known_before(
    weights: Path, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10 images of 2 x (4 x 4 + 1) x 16 values of 4 bytes, once and twice."""
    options = {"outputs": ("class", "patches"), "output_dir": str(tmp_path)}
    needed = 10 * 17 * 16 * 4
    usage = type(shutil.disk_usage(tmp_path))
    for free, merge, fits in (
        (2 * needed, True, True),
        (2 * needed - 1, True, False),
        (needed, False, True),
        (needed - 1, False, False),
    ):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage(10**9, 0, free))
        checked = task(photographs, weights, merge=merge, **options)
        if fits:
            checked.check(1)
        else:
            with pytest.raises(OutputError, match=r"the features need about .* are free"):
                checked.check(1)


def test_images_that_are_not_here_are_missing_and_not_wrong(weights: Path, tmp_path: Path) -> None:
    absent = task(tmp_path / "nowhere", weights)
    (lack,) = absent.check(1).missing
    assert "does not exist" in lack
    with pytest.raises(DataError, match="does not exist"):
        absent.run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_overwrite_makes_them_anew(
    weights: Path, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["features", f"weights={weights}", f"dataset.root={photographs}", "workers=0"]
    assert main([*words, "format=npy", "outputs=['patches']"]) == 0
    output = Path("runs/features-w")
    (output / "features.mine.npy").touch()
    assert main([*words, "size=16"]) == 2  # another recipe's
    assert main([*words, "size=16", "--overwrite"]) == 0
    assert json.loads((output / "results.json").read_text())["size"] == 16
    assert {path.name for path in output.glob("features*")} == {
        "features.mine.npy",
        "features.safetensors",
    }
