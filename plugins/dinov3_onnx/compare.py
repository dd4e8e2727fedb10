"""Compare an ONNX file with the network that it was written from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov3_framework.data.inference import evaluating
from dinov3_framework.errors import CheckpointError, summarize_names
from dinov3_onnx.graph import Freedom
from dinov3_onnx.networks import INPUT, Exportable

# (images, rows and columns of the smallest sides) that a file is run with.
_SIZES = ((2, 3, 2), (1, 2, 5))


class Differs(CheckpointError):
    """A file that does not compute what its network does, or cannot be run."""


def compare(
    path: Path,
    network: Exportable,
    tensors: Mapping[str, Tensor],
    freedom: Freedom,
    tolerance: float,
) -> str:
    """Compare tensors bit by bit, and run the file; returns in a few words what was found.

    ``tensors`` are the network's as the file is to hold them, by the names in the file, on the CPU.
    Outputs may differ by ``tolerance`` of the largest of each. Without onnxruntime the file is not
    run but checked by onnx. Raises ``CheckpointError`` where it differs, ``Differs`` if in results.
    """
    import onnx

    model = onnx.load_model(path, load_external_data=False)
    wrong = [
        each.name
        for each in model.graph.initializer
        if each.name in tensors and _bytes(path, each) != data_of(tensors[each.name])
    ]
    if wrong:
        raise CheckpointError(
            f"{path} does not hold its tensors:{summarize_names('differ', wrong)}"
        )
    try:
        import onnxruntime
    except ImportError:
        onnx.checker.check_model(str(path))
        return "its tensors are equal; not run, since onnxruntime is not installed"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # none: errors are raised
    texts = []
    try:
        session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        for images in _images(network, freedom):
            found = session.run(None, {INPUT: images.numpy()})
            texts.append(_difference(path, network, tensors, images, found, tolerance))
    except Differs:
        raise
    except Exception as error:  # whatever the runtime stumbles over
        raise Differs(f"{path}: onnxruntime cannot run it: {error}") from error
    return f"run by onnxruntime: {'; '.join(texts)}"


def _difference(
    path: Path,
    network: Exportable,
    tensors: Mapping[str, Tensor],
    images: Tensor,
    found: list[Any],
    tolerance: float,
) -> str:
    """What the file made of images, beside what the network makes of them."""
    expected = _computed(network, tensors, images)
    difference = largest = 0.0
    for name, array, wanted in zip(network.outputs, found, expected, strict=False):
        given = torch.from_numpy(array)
        if given.shape != wanted.shape:
            raise Differs(
                f"{path} does not compute what the network does: {name} is {list(given.shape)}, "
                f"not {list(wanted.shape)}, of images {list(images.shape)}"
            )
        apart = float((given.double() - wanted.double()).abs().max())
        most = float(wanted.abs().max())
        difference, largest = max(difference, apart), max(largest, most)
        if not apart <= tolerance * most:
            raise Differs(
                f"{path} does not compute what the network does: {name} of images "
                f"{list(images.shape)} differs by {apart:.2g}, of values up to {most:.2g}"
            )
    height, width = images.shape[-2:]
    where = f"{len(images)} x {height} x {width} px"
    return f"largest difference {difference:.2g} of values up to {largest:.2g} at {where}"


def data_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes, of one on the CPU."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _bytes(path: Path, proto: Any) -> bytes | memoryview:
    place = {each.key: each.value for each in proto.external_data}
    if not place:
        return proto.raw_data  # type: ignore[no-any-return]
    with path.with_name(place["location"]).open("rb") as file:
        file.seek(int(place["offset"]))
        return file.read(int(place["length"]))


def _images(network: Exportable, freedom: Freedom) -> Iterator[Tensor]:
    """Images of two sizes, or of the one that the file is for."""
    generator = torch.Generator().manual_seed(0)
    channels = network.backbone.in_chans
    for batch, rows, columns in _SIZES if freedom.size is None else _SIZES[:1]:
        height, width = freedom.size or (rows * freedom.multiple, columns * freedom.multiple)
        images = freedom.batch or batch
        yield torch.randn(images, channels, height, width, generator=generator)


@torch.no_grad()
def _computed(network: Exportable, tensors: Mapping[str, Tensor], images: Tensor) -> list[Tensor]:
    """What the network puts out with the file's tensors, in float32 on the CPU."""
    named = [*network.named_parameters(), *network.named_buffers()]
    known = {name: network.file_name(name) for name, _ in named}
    given = {name: tensors[stored] for name, stored in known.items() if stored in tensors}
    with evaluating(network):
        return list(torch.func.functional_call(network, given, (images,), tie_weights=False))
