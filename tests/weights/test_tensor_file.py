"""Files that are written one tensor at a time are those of the safetensors library."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dinov3_framework.weights.tensor_file import write_array_file, write_tensor_file

TENSORS = {
    "weight": torch.arange(6.0).view(2, 3),
    "half": torch.arange(3).to(torch.bfloat16),
    "count": torch.tensor(7),
    "empty": torch.zeros(0, 4),
    "flag": torch.tensor([True, False, True]),
    "Größe": torch.ones(1, dtype=torch.float16),
}
SPECS = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def test_the_library_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensor_file(path, SPECS, TENSORS.items(), {"format": "pt", "a": "1"})
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "a": "1"}


def test_the_order_of_tensors_does_not_matter(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    write_tensor_file(first, SPECS, TENSORS.items(), {"b": "2", "a": "1"})
    write_tensor_file(second, SPECS, reversed(TENSORS.items()), {"a": "1", "b": "2"})
    assert first.read_bytes() == second.read_bytes()


def test_tensors_may_come_in_pieces(tmp_path: Path) -> None:
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    tensors = {"a": torch.randn(5, 3).bfloat16(), "b": torch.arange(8).view(4, 2).T}
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_tensor_file(whole, specs, tensors.items(), {})
    rows = [("a", tensors["a"][:2]), ("b", tensors["b"][:1]), ("b", tensors["b"][1:])]
    write_tensor_file(pieces, specs, [*rows, ("a", tensors["a"][2:])], {})
    assert whole.read_bytes() == pieces.read_bytes()
    with pytest.raises(ValueError, match="never given: a"):
        write_tensor_file(pieces, specs, rows, {})


@pytest.mark.parametrize(
    "tensor",
    [torch.randn(3, 1).half(), torch.arange(10).view(5, 2), torch.empty(0, 4), torch.randn(4, 2).T],
    ids=["half", "integers", "empty", "turned"],
)
def test_numpy_reads_arrays_that_came_in_pieces(tmp_path: Path, tensor: torch.Tensor) -> None:
    path = tmp_path / "a.npy"
    write_array_file(path, tensor.dtype, tuple(tensor.shape), tensor.split(1))
    array = np.load(path, mmap_mode="r")
    assert array.dtype == tensor.numpy().dtype
    np.testing.assert_array_equal(array, tensor.numpy())


def test_pieces_of_an_array_that_do_not_add_up(tmp_path: Path) -> None:
    for pieces in ([torch.ones(1, 2)], [torch.ones(3, 2)], [torch.ones(2, 1)] * 2):
        with pytest.raises(ValueError, match=r"\[2, 2\]"):
            write_array_file(tmp_path / "a.npy", torch.float32, (2, 2), pieces)


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    view = torch.arange(12.0).view(3, 4).T[1:3]
    write_tensor_file(tmp_path / "x", {"v": (view.dtype, (2, 3))}, [("v", view)], {})
    assert torch.equal(load_file(tmp_path / "x")["v"], view)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([("a", torch.ones(2))], "never given: b"),
        ([("a", torch.ones(2)), ("a", torch.ones(2))], "comes twice"),
        ([("c", torch.ones(2))], "not announced"),
        ([("a", torch.ones(3))], r"'a' is torch.float32 \[3\], not"),
        ([("a", torch.ones(2).half())], r"'a' is torch.float16 \[2\], not"),
    ],
)
def test_what_was_not_announced_is_refused(
    tmp_path: Path, given: list[tuple[str, torch.Tensor]], message: str
) -> None:
    specs = {"a": (torch.float32, (2,)), "b": (torch.float32, (1,))}
    with pytest.raises(ValueError, match=message):
        write_tensor_file(tmp_path / "x", specs, given, {})


def test_a_disk_that_is_too_small_says_so_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        assert size > 4 * 10**6
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    asked = []

    def tensors() -> object:
        asked.append(1)
        yield "a", torch.ones(10**6)

    with pytest.raises(OSError, match="No space"):
        write_tensor_file(
            tmp_path / "x",
            {"a": (torch.float32, (10**6,))},
            tensors(),  # type: ignore[arg-type]
            {},
        )
    assert not asked
