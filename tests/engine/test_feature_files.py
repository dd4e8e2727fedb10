"""Tensors written piece by piece are what the usual libraries read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from dinov3_features.files import TensorFile, TensorSpec, tensor_bytes, write_npy, write_safetensors
from safetensors import safe_open

from dinov3_framework.errors import OutputError

TENSORS = {
    "class": torch.randn(5, 3).bfloat16(),
    "half": torch.randn(3, 1).half(),
    "grids": torch.arange(10).view(5, 2),
    "empty": torch.empty(0, 4),
    "turned": torch.randn(4, 2).T,
}


def write(path: Path) -> Path:
    specs = {name: TensorSpec.of(tensor) for name, tensor in TENSORS.items()}
    write_safetensors(
        path,
        specs,
        # In pieces of a row each.
        lambda name: (tensor_bytes(row) for row in TENSORS[name]),
        {"b": "2", "a": "ä"},
    )
    return path


def test_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    with safe_open(write(tmp_path / "a.safetensors"), "pt") as file:
        assert file.metadata() == {"a": "ä", "b": "2"}
        assert set(file.keys()) == set(TENSORS)
        for name, tensor in TENSORS.items():
            assert torch.equal(file.get_tensor(name), tensor)
    assert (tmp_path / "a.safetensors").read_bytes() == write(tmp_path / "b").read_bytes()


def test_pieces_are_read_back(tmp_path: Path) -> None:
    file = TensorFile.opened(write(tmp_path / "a"))
    assert file.metadata["b"] == "2"
    for name, tensor in TENSORS.items():
        assert file.specs[name] == TensorSpec.of(tensor)
        assert b"".join(file.chunks(name)) == tensor_bytes(tensor)
    assert torch.equal(file.tensor("grids"), TENSORS["grids"])


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_file_that_is_cut_is_noticed(tmp_path: Path, kept: int) -> None:
    data = write(tmp_path / "a").read_bytes()
    (tmp_path / "cut").write_bytes(data[:kept])
    with pytest.raises(OutputError, match=r"cut is damaged .* delete it and run again"):
        TensorFile.opened(tmp_path / "cut")


def test_numpy_reads_what_was_written(tmp_path: Path) -> None:
    for name in ("half", "grids", "empty", "turned"):
        tensor = TENSORS[name]
        path = tmp_path / f"{name}.npy"
        write_npy(path, TensorSpec.of(tensor), (tensor_bytes(row) for row in tensor))
        array = np.load(path, mmap_mode="r")
        assert array.dtype == tensor.numpy().dtype
        np.testing.assert_array_equal(array, tensor.numpy())


def test_pieces_that_do_not_add_up(tmp_path: Path) -> None:
    spec = TensorSpec("F32", (2, 2))
    with pytest.raises(RuntimeError, match="8 bytes came for a tensor of 16"):
        write_npy(tmp_path / "a.npy", spec, [b"12345678"])
