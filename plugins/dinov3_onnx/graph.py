"""Trace a backbone into a graph of ONNX operators, its weights left out.

The graph follows from the backbone's structure alone, so it is traced on the meta device: nothing
is computed and no weight is copied, whatever the backbone's size, precision and device.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn

from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.errors import CheckpointError

MISSING_LIBRARY = "install it with: pip install 'dinov3-framework[onnx]'"
# torchlib's operators begin here; older graphs would be rewritten, which may fail.
OLDEST_OPSET = 18

INPUT = "images"
CLASS, PATCHES, STORAGE = "x_norm_clstoken", "x_norm_patchtokens", "x_storage_tokens"

# Sample images: every number another one, and none 1, so that the trace takes none for a constant.
_BATCH, _ROWS, _COLUMNS = 2, 5, 7

_TALKATIVE = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


def backbone_graph(backbone: Backbone, opset: int | None) -> Any:
    """An ``onnx.ModelProto`` whose nodes use ``backbone``'s tensors by their own names.

    Its input is ``images``, float32 [batch, C, height, width]; its outputs are ``x_norm_clstoken``
    [batch, D], ``x_norm_patchtokens`` [batch, patches, D] and, where there are storage tokens,
    ``x_storage_tokens`` [batch, R, D]. Batch, height and width are free; sides must be multiples of
    the patch size. All is computed in float32. The tensors are to be added as initializers.
    Raises ``CheckpointError`` where a library is missing and for a backbone that cannot be traced.
    """
    _check(opset)
    import onnx_ir as ir

    try:
        with _quiet(), torch.no_grad():
            model = _traced(Tokens(_without_weights(backbone)), backbone, opset)
            _widen(model)
            _simplify(model)
    except Exception as error:  # whatever torch.export stumbles over
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{type(backbone).__name__} cannot be written as ONNX: torch.export does not follow "
            f"its forward_features with free batch, height and width: {reason}"
        ) from error
    proto = ir.to_proto(model)
    _name_axes(proto.graph)
    return proto


def _check(opset: int | None) -> None:
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            f"writing ONNX needs the libraries onnx and onnxscript\n{MISSING_LIBRARY}"
        ) from error
    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not OLDEST_OPSET <= opset <= newest:
        raise CheckpointError(
            f"opset must be {OLDEST_OPSET} to {newest} (the newest that the installed onnx knows), "
            f"is {opset}"
        )


class Tokens(nn.Module):
    """A backbone whose output is a tuple of the tokens that it has."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.backbone.forward_features(images)
        storage = features[STORAGE]
        some = storage is not None and storage.shape[1] > 0
        return (features[CLASS], features[PATCHES], *([storage] if some else []))


def _without_weights(backbone: Backbone) -> Backbone:
    """A twin in eval mode whose tensors are float32 on the meta device."""

    def bare(tensor: Tensor) -> Tensor:
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        return torch.empty_like(tensor, dtype=dtype, device="meta")

    # Found in the memo, tensors are not copied.
    memo: dict[int, Any] = {id(t): nn.Parameter(bare(t), False) for t in backbone.parameters()}
    memo |= {id(t): bare(t) for t in backbone.buffers()}
    return copy.deepcopy(backbone, memo).eval()


# --------------------------------------------------------------------------- tracing
def _traced(module: Tokens, backbone: Backbone, opset: int | None) -> Any:
    """An ``onnx_ir.Model`` whose inputs are the images and every tensor of the backbone."""
    patch = backbone.patch_size
    images = torch.empty(_BATCH, backbone.in_chans, _ROWS * patch, _COLUMNS * patch, device="meta")
    sides = [torch.export.Dim(name) for name in ("rows", "columns")]
    height, width = sides if patch == 1 else [patch * side for side in sides]
    free = {INPUT: {0: torch.export.Dim("batch"), 2: height, 3: width}}
    traced = torch.export.export(module, (images,), dynamic_shapes=free)
    # Simplified here rather than by the exporter, which would fold and merge weights.
    program = torch.onnx.export(
        traced, (images,), dynamo=True, opset_version=opset, optimize=False, verbose=False
    )
    if program is None:
        raise TypeError("torch.onnx.export gave no program")
    model = program.model
    _name_values(model, backbone)
    return model


def _name_values(model: Any, backbone: Backbone) -> None:
    """Give inputs, outputs and weights the names that they have in the file."""
    graph = model.graph
    owned = {
        f"backbone.{name}": name
        for named in (backbone.named_parameters, backbone.named_buffers)
        for name, _ in named(remove_duplicate=False)
    }
    outputs = [CLASS, PATCHES, STORAGE][: len(graph.outputs)]
    reserved = {INPUT, *outputs, *owned.values()}
    for node in graph.all_nodes():
        for value in node.outputs:
            if value.name in reserved:
                value.name = f"{node.op_type}_{value.name}"
    for name in [name for name in graph.initializers if name in owned]:
        # An input for now: what has no value cannot be folded into something else.
        value = graph.initializers.pop(name)
        value.const_value = None
        value.name = owned[name]
        graph.inputs.append(value)
    for value, name in zip([graph.inputs[0], *graph.outputs], [INPUT, *outputs], strict=True):
        value.name = name


def _widen(model: Any) -> None:
    """Make half precisions float32: on the CPU, runtimes lack their operators."""
    import onnx_ir as ir

    half = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
    graph = model.graph
    for node in graph.all_nodes():
        to = node.attributes.get("to")
        if node.op_type == "Cast" and to is not None and to.as_int() in half:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
        for value in node.outputs:
            if value.dtype in half:
                value.dtype = ir.DataType.FLOAT
    for value in graph.initializers.values():
        if value.dtype in half:
            value.const_value = ir.tensor(
                value.const_value.numpy().astype("float32"), name=value.name
            )
            value.dtype = ir.DataType.FLOAT


def _simplify(model: Any) -> None:
    """Fold what is constant but the weights, and drop what the trace tells of its making."""
    from onnxscript import optimizer

    graph = model.graph
    weights = list(graph.inputs[1:])
    optimizer.optimize(model)
    for value in weights:
        graph.inputs.remove(value)
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*graph.inputs, *graph.outputs, *graph.initializers.values()]:
        value.metadata_props.clear()
    model.metadata_props.clear()
    graph.metadata_props.clear()


def _name_axes(graph: Any) -> None:
    """Call free axes what they are; the trace has symbols of its own for them."""
    del graph.value_info[:]
    free = {INPUT: {0: "batch", 2: "height", 3: "width"}, PATCHES: {0: "batch", 1: "patches"}}
    for value in [*graph.input, *graph.output]:
        dims = value.type.tensor_type.shape.dim
        for axis, name in free.get(value.name, {0: "batch"}).items():
            dims[axis].dim_param = name


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' reports of their progress from the console."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        # A trace that fails is printed, too: handlers of logs keep the stream that they have.
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
