"""The task ``index``: what it writes, says and refuses."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from dinov3_datasets.configs import FashionMnistConfig, IndexConfig
from dinov3_datasets.imagenet_configs import Imagenet1kConfig, Imagenet22kConfig
from dinov3_datasets.index_arrays import save_array
from disks import small_disk
from imagenet_support import jpeg, published_index, write_tar, write_tree
from run_support import run_here

from dinov3_framework import ExitCode, OutputError, RecipeError, Registry
from dinov3_framework.testing import TaskSuite

RECIPE = Path(__file__).parents[2] / "recipes" / "index.toml"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "imagenet")


class TestContract(TaskSuite):
    @pytest.fixture(autouse=True)
    def _config(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        root = write_tree(tmp_path_factory.mktemp("imagenet"))
        self.config = IndexConfig(dataset=Imagenet1kConfig(root=str(root)))


def test_a_run_writes_the_index_and_says_so(tree: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = run_here(output, f"dataset.root={tree}", "dataset.split=val", recipe=RECIPE)
    assert done.returncode == ExitCode.OK, done.stderr
    expected = published_index(tree, tmp_path / "theirs", "val")
    assert {path.name: path.read_bytes() for path in (tree / "extra").iterdir()} == expected
    written = json.loads((output / "results.json").read_text())["written"]
    assert sorted(written) == sorted(str(tree / "extra" / name) for name in expected)
    log = (output / "run.log").read_text()
    assert "4 images of 3 classes" in log
    assert all(f"Written: {path}" in log for path in written)


def test_an_index_is_replaced_only_if_asked(tree: Path, tmp_path: Path) -> None:
    words = [f"dataset.root={tree}"]
    assert run_here(tmp_path / "one", *words, recipe=RECIPE).returncode == ExitCode.OK
    entries = tree / "extra" / "entries-TRAIN.npy"
    before = entries.read_bytes()
    (tree / "train" / "n01443537" / "n01443537_8.JPEG").write_bytes(jpeg())
    refused = run_here(tmp_path / "two", *words, recipe=RECIPE)
    assert refused.returncode == ExitCode.WRONG_INPUT
    assert "there already" in refused.stderr
    assert "replace=true" in refused.stderr
    assert entries.read_bytes() == before
    assert not (tmp_path / "two").exists()
    again = [*words, "replace=true", "--overwrite"]
    assert run_here(tmp_path / "one", *again, recipe=RECIPE).returncode == ExitCode.OK
    assert entries.read_bytes() != before


def test_each_dataset_has_a_folder_for_its_run() -> None:
    one = IndexConfig(dataset=Imagenet1kConfig(root="data/imagenet", split="val"))
    assert one.run_name("index") == "index-imagenet-val"
    assert IndexConfig(dataset=Imagenet22kConfig(root="tars")).run_name("index") == "index-tars"


def test_a_check_lists_the_files_and_writes_none(tree: Path, tmp_path: Path) -> None:
    done = run_here(tmp_path / "run", f"dataset.root={tree}", "--check", recipe=RECIPE)
    assert done.returncode == ExitCode.OK
    for name in ("class-ids", "class-names", "entries"):
        assert str(tree / "extra" / f"{name}-TRAIN.npy") in done.stdout
    assert not (tree / "extra").exists()


@pytest.mark.parametrize("what", ["root", "class folder", "tar"])
def test_data_that_are_not_as_they_should_be(tree: Path, tmp_path: Path, what: str) -> None:
    words = {
        "root": [f"dataset.root={tmp_path / 'nowhere'}"],
        "class folder": [f"dataset.root={tree}"],
        "tar": ["dataset.use=imagenet_22k", f"dataset.root={tmp_path / 'tars'}"],
    }
    shutil.rmtree(tree / "train" / "n01443537")
    (tree / "train" / "n01443537").mkdir()
    tar = write_tar(tmp_path / "tars" / "n1.tar", [("n1_1.JPEG", jpeg())])
    tar.write_bytes(tar.read_bytes()[:700])
    done = run_here(tmp_path / "run", *words[what], recipe=RECIPE)
    assert done.returncode == ExitCode.WRONG_INPUT
    assert "Traceback" not in done.stderr
    assert {"root": "does not exist", "class folder": "no image", "tar": "n1.tar is damaged"}[
        what
    ] in done.stderr
    assert not (tree / "extra").exists()
    assert not (tmp_path / "tars" / "extra").exists()


def test_a_dataset_without_an_index() -> None:
    config = IndexConfig(dataset=FashionMnistConfig())
    with pytest.raises(RecipeError, match="fashion_mnist has no index"):
        Registry.load().build(config, registry=Registry.load()).check(1)


def test_a_full_disk_leaves_the_index_that_was_there(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "limit"):
        path = save_array(tmp_path / "disk" / "entries.npy", np.arange(3))
        with pytest.raises(OutputError, match=r"entries\.npy cannot be written"):
            save_array(path, np.zeros(4 << 20, np.uint8))
    assert os.listdir(path.parent) == ["entries.npy"]
    assert np.load(path).tolist() == [0, 1, 2]
