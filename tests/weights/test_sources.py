"""Weights are read the same out of every container, and nothing in a file is run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dinov3_framework.errors import CheckpointError
from dinov3_framework.weights._files import OpenWeights, open_weights


def tensors() -> dict[str, Tensor]:
    return {
        "embed.weight": torch.arange(24.0).reshape(6, 4),
        "embed.bias": torch.arange(6).to(torch.bfloat16),
        "scale": torch.tensor(3.0, dtype=torch.float64),
        "none": torch.zeros(0, 4),
    }


def write_safetensors(folder: Path) -> Path:
    save_file(tensors(), folder / "x.safetensors", {"made": "here"})
    return folder / "x.safetensors"


def write_pth(folder: Path) -> Path:
    torch.save(tensors(), folder / "x.pth")
    return folder / "x.pth"


def write_legacy(folder: Path) -> Path:
    torch.save(tensors(), folder / "x.pt", _use_new_zipfile_serialization=False)
    return folder / "x.pt"


def write_compressed(folder: Path) -> Path:
    stored = write_pth(folder)
    path = folder / "repacked.pth"
    with (
        zipfile.ZipFile(stored) as before,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as after,
    ):
        for name in before.namelist():
            after.writestr(name, before.read(name))
    return path


def write_misnamed_pth(folder: Path) -> Path:
    return write_pth(folder).rename(folder / "pickle.safetensors")


def write_misnamed_safetensors(folder: Path) -> Path:
    return write_safetensors(folder).rename(folder / "no_pickle.pth")


def write_folder(folder: Path) -> Path:
    inside = folder / "model"
    inside.mkdir()
    (inside / "config.json").write_text(json.dumps({"model_type": "dinov3_vit"}))
    write_safetensors(folder).rename(inside / "model.safetensors")
    return inside


def write_bin_folder(folder: Path) -> Path:
    inside = folder / "model"
    inside.mkdir()
    (inside / "config.json").write_text(json.dumps({"architecture": "vit_small"}))
    write_pth(folder).rename(inside / "pytorch_model.bin")
    return inside


def write_shards(
    folder: Path, shards: Mapping[str, list[str]], places: Mapping[str, str] | None = None
) -> Path:
    """A folder whose files hold the named tensors, and an index that says so (or ``places``)."""
    folder.mkdir(exist_ok=True)
    for file, names in shards.items():
        save_file({name: tensors()[name] for name in names}, folder / file)
    index = {"weight_map": places or {n: file for file, names in shards.items() for n in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_sharded_folder(folder: Path) -> Path:
    first, *others = tensors()
    return write_shards(folder / "model", {"a.safetensors": [first], "b.safetensors": others})


WRITERS = [value for name, value in sorted(globals().items()) if name.startswith("write_")]
CONTAINERS = [each for each in WRITERS if each is not write_shards]


@pytest.mark.parametrize("write", CONTAINERS)
def test_every_container_gives_the_same_tensors(tmp_path: Path, write: Any) -> None:
    expected = tensors()
    with open_weights(write(tmp_path)) as source:
        assert source.shapes == {name: tuple(t.shape) for name, t in expected.items()}
        for name, tensor in expected.items():
            torch.testing.assert_close(source.read(name), tensor, rtol=0, atol=0)
        with pytest.raises(CheckpointError, match="no tensor 'absent'"):
            source.read("absent")


@pytest.mark.parametrize("write", [write_safetensors, write_pth, write_legacy])
def test_what_was_read_does_not_depend_on_the_file(tmp_path: Path, write: Any) -> None:
    path = write(tmp_path)
    with open_weights(path) as source:
        whole = source.read("embed.weight")
        with path.open("r+b") as stream:
            stream.write(b"\xff" * path.stat().st_size)
            stream.flush()
            os.fsync(stream.fileno())
        torch.testing.assert_close(whole, tensors()["embed.weight"])
    whole.zero_()  # writable memory of its own


@pytest.mark.parametrize("write", [write_safetensors, write_pth, write_legacy])
def test_tensors_are_on_the_cpu_wherever_others_are_made(tmp_path: Path, write: Any) -> None:
    path = write(tmp_path)
    with torch.device("meta"), open_weights(path) as source:
        whole = source.read("embed.weight")
    assert whole.sum() == 276


def test_what_stands_beside_the_tensors(tmp_path: Path) -> None:
    with open_weights(write_safetensors(tmp_path)) as source:
        assert source.description == "a safetensors file"
        assert source.metadata == {"made": "here"}
        assert source.settings == source.preprocessor == {}
    folder = write_folder(tmp_path)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    with open_weights(folder) as source:
        assert source.description == "a Hugging Face folder"
        assert source.settings == {"model_type": "dinov3_vit"}
        assert source.preprocessor == {"image_mean": [0.5]}
    (folder / "config.json").write_text('{"architecture": "vit"}')
    with open_weights(folder) as source:
        assert source.description == "a timm folder"
    (folder / "config.json").unlink()
    with open_weights(folder) as source:
        assert (source.description, source.settings) == ("a folder of weights", {})


def test_an_open_clip_folder(tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {}}')
    with open_weights(tmp_path) as source:
        assert source.settings == {"model_cfg": {}}
        assert len(source.shapes) == 4


@pytest.mark.parametrize(
    ("file", "shard"),
    [
        ("model.fp16.safetensors", None),
        ("pytorch_model.fp16.bin", None),
        ("model.safetensors.index.fp16.json", "model.fp16-00001-of-00001.safetensors"),
        ("pytorch_model.bin.index.fp16.json", "pytorch_model.fp16-00001-of-00001.bin"),
    ],
)
def test_a_variant_alone_is_taken_aloud(tmp_path: Path, file: str, shard: str | None) -> None:
    """As transformers saves with ``variant="fp16"``; the plain weights go first."""

    def write(path: Path, values: dict[str, Tensor]) -> None:
        save_file(values, path) if path.suffix == ".safetensors" else torch.save(values, path)

    write(tmp_path / (shard or file), tensors())
    if shard is not None:
        places = dict.fromkeys(tensors(), shard)
        (tmp_path / file).write_text(json.dumps({"weight_map": places}))
    with open_weights(tmp_path) as source:
        assert source.read("scale") == 3
        assert any(file in note for note in source.notes)
    write(tmp_path / "model.bf16.safetensors", tensors())
    with pytest.raises(CheckpointError, match="several variants, bf16, fp16"):
        open_weights(tmp_path).__enter__()
    write(tmp_path / "pytorch_model.bin", {"plain": torch.ones(1)})
    with open_weights(tmp_path) as source:
        assert list(source.shapes) == ["plain"]
        assert not source.notes


# --------------------------------------------------------------------------- names
def opened_names(path: Path, content: Any) -> OpenWeights:
    torch.save(content, path)
    with open_weights(path) as source:
        return source


def test_dicts_in_dicts_become_dotted_names(tmp_path: Path) -> None:
    one = torch.ones(1)
    content = {
        "teacher": {"backbone.x": one, "head": {"y": nn.Parameter(one)}},
        "epoch": 3,
        "best": None,
        "args": {"lr": 0.1, "betas": [0.9, 0.99]},
        "optimizer": {"state": {0: {"exp_avg": one}}, "param_groups": [{"params": [0]}]},
        "by_number": {0: one},
    }
    source = opened_names(tmp_path / "x.pth", content)
    assert list(source.shapes) == ["teacher.backbone.x", "teacher.head.y"]


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("_orig_mod.blocks.0._checkpoint_wrapped_module.w", "blocks.0.w"),
        ("module.norm.bias", "norm.bias"),
        ("teacher.module._fsdp_wrapped_module.x", "teacher.x"),
        ("my_module.x", "my_module.x"),
        ("submodule.module", "submodule.module"),
    ],
)
def test_wrappers_leave_no_trace_in_names(tmp_path: Path, stored: str, name: str) -> None:
    assert list(opened_names(tmp_path / "x.pth", {stored: torch.ones(2)}).shapes) == [name]
    save_file({stored: torch.ones(2)}, tmp_path / "x.safetensors")
    with open_weights(tmp_path / "x.safetensors") as source:
        assert list(source.shapes) == [name]
        assert source.read(name).sum() == 2


@pytest.mark.parametrize(
    "content",
    [
        {"module.x": torch.ones(1), "x": torch.ones(1)},
        {"a.x": torch.ones(1), "a": {"x": torch.ones(1)}},
    ],
)
def test_names_that_collide(tmp_path: Path, content: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"two tensors are called '(a\.)?x'"):
        opened_names(tmp_path / "x.pth", content)


# --------------------------------------------------------------------------- shards
def test_shards_stay_in_their_folder(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "outside.safetensors")
    for place in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "..", 3):
        folder = write_shards(tmp_path / "model", {}, {"scale": place})  # type: ignore[dict-item]
        with pytest.raises(CheckpointError, match=r"'scale' lies at .*, not in this folder"):
            open_weights(folder).__enter__()


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_links_out_of_the_folder_are_not_followed(tmp_path: Path, suffix: str) -> None:
    """But for Hugging Face's cache, where each file is a link to a blob of the same model."""
    outside = write_pth(tmp_path) if suffix == "bin" else write_safetensors(tmp_path)
    folder = tmp_path / "folder"
    cache = tmp_path / "models--facebook--dinov3"
    snapshot = cache / "snapshots/0123"
    for each in (folder, snapshot, cache / "blobs"):
        each.mkdir(parents=True)
    index = {"weight_map": dict.fromkeys(tensors(), f"shard.{suffix}")}
    name = "pytorch_model.bin" if suffix == "bin" else "model.safetensors"
    for each in (folder, snapshot):
        (each / f"{name}.index.json").write_text(json.dumps(index))
        (each / f"shard.{suffix}").symlink_to(outside)
        with pytest.raises(CheckpointError, match=r"shard\.\w+ is a link that leads out"):
            open_weights(each).__enter__()
    (snapshot / f"shard.{suffix}").unlink()
    (snapshot / f"shard.{suffix}").symlink_to("../../blobs/abc")
    outside.rename(cache / "blobs/abc")
    (tmp_path / "linked").symlink_to(snapshot)
    for shared in (False, True):
        if shared:  # with other models of the cache, as huggingface_hub 2 does
            (tmp_path / "blobs/ab").mkdir(parents=True)
            (cache / "blobs/abc").rename(tmp_path / "blobs/ab/abc")
            (cache / "blobs/abc").symlink_to("../../blobs/ab/abc")
        for each in (snapshot, tmp_path / "linked"):
            with open_weights(each) as source:
                assert source.read("scale") == 3


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    folder = write_sharded_folder(tmp_path)
    (folder / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names b\.safetensors, which is not there"):
        open_weights(folder).__enter__()


@pytest.mark.parametrize("held", [["scale"], ["scale", "none", "embed.bias"]])
def test_shards_hold_what_the_index_says(tmp_path: Path, held: list[str]) -> None:
    places = dict.fromkeys(("scale", "none"), "a.safetensors")
    folder = write_shards(tmp_path, {"a.safetensors": held}, places)
    with pytest.raises(CheckpointError, match=r"does not hold what .*index\.json says: 1 tensors"):
        open_weights(folder).__enter__()


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_an_index_without_shards(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="names no shards"):
        open_weights(tmp_path).__enter__()


def test_sharded_checkpoints_are_told_from_other_folders(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"\x80\x02.")
    (tmp_path / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a sharded checkpoint"):
        open_weights(tmp_path).__enter__()


# --------------------------------------------------------------------------- lightness
@pytest.mark.slow
def test_weights_open_without_the_libraries_of_recipes(tmp_path: Path) -> None:
    """With torch and attrs alone, and without safetensors as long as no such file is opened."""
    path, needs = write_pth(tmp_path), write_safetensors(tmp_path)
    script = (
        "import sys\n"
        "for name in ('pluggy', 'cattrs', 'rich', 'PIL', 'safetensors'): sys.modules[name] = None\n"
        "from dinov3_framework.errors import CheckpointError\n"
        "from dinov3_framework.weights import downloads\n"
        "from dinov3_framework.weights._files import open_weights\n"
        f"with open_weights({str(path)!r}) as source: print(source.read('scale').item())\n"
        f"try: open_weights({str(needs)!r}).__enter__()\n"
        "except CheckpointError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("3.0\n")
    assert "pip install safetensors" in done.stdout
