"""Compare an ONNX file with the backbone that it was written from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.data.inference import evaluating
from dinov3_framework.errors import CheckpointError, summarize_names
from dinov3_onnx.graph import INPUT, Tokens

# Of the largest output. What a backbone computes in half precision the file computes in float32.
_TOLERANCE = 0.05


def compare(path: Path, backbone: Backbone, tensors: Mapping[str, Tensor]) -> str:
    """Compare tensors bit by bit, and run the file; returns in a few words what was found.

    ``tensors`` are the backbone's as the file is to hold them, on the CPU. Without onnxruntime the
    file is not run but checked by onnx. Raises ``CheckpointError`` where it differs.
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
    expected = _tokens(backbone, tensors, images := _images(backbone))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        found = session.run(None, {INPUT: images.numpy()})
    except Exception as error:  # whatever the runtime stumbles over
        raise CheckpointError(f"{path}: onnxruntime cannot run it: {error}") from error
    pairs = zip(map(torch.from_numpy, found), expected, strict=True)
    difference = max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
    largest = max(float(tokens.abs().max()) for tokens in expected)
    text = f"largest difference {difference:.2g} of values up to {largest:.2g}"
    if not difference <= _TOLERANCE * largest:
        raise CheckpointError(f"{path} does not compute what the backbone does: {text}")
    return f"run by onnxruntime: {text}"


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


def _images(backbone: Backbone) -> Tensor:
    rows, columns = 3 * backbone.patch_size, 2 * backbone.patch_size
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, backbone.in_chans, rows, columns, generator=generator)


@torch.no_grad()
def _tokens(backbone: Backbone, tensors: Mapping[str, Tensor], images: Tensor) -> list[Tensor]:
    """What the backbone puts out with the file's tensors, in float32 on the CPU."""
    given = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    with evaluating(backbone):
        return list(
            torch.func.functional_call(Tokens(backbone), given, (images,), tie_weights=False)
        )
