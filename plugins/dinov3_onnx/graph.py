"""Trace a network into a graph of ONNX operators, its weights left out.

The graph follows from the network's structure alone, so it is traced without values: nothing is
computed and no weight is copied, whatever the network's size, precision and device.
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
from attrs import frozen
from torch import Tensor, nn

from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.errors import CheckpointError
from dinov3_onnx.networks import INPUT, Exportable, Tokens

MISSING_LIBRARY = "install it with: pip install 'dinov3-framework[onnx]'"
# torchlib's operators begin here; older graphs would be rewritten, which may fail.
OLDEST_OPSET = 18

# Sample images: every number another one, and none 1, so that the trace takes none for a constant.
_BATCH, _ROWS, _COLUMNS = 2, 5, 7

_TALKATIVE = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


@frozen
class Freedom:
    """Which images a graph is for."""

    multiple: int  # pixels that sides are multiples of
    size: tuple[int, int] | None = None  # height and width, where the graph is for these alone
    batch: int | None = None  # images, where the graph is for so many alone

    def __str__(self) -> str:
        batch = "any batch" if self.batch is None else f"batches of {self.batch}"
        if self.size is not None:
            return f"{batch}, images of {self.size[0]} x {self.size[1]} px"
        return f"{batch}, sides that are multiples of {self.multiple} px"

    def images(self, channels: int, device: str) -> Tensor:
        """A sample without values."""
        height, width = self.size or (_ROWS * self.multiple, _COLUMNS * self.multiple)
        batch = _BATCH if self.batch is None else self.batch
        return torch.empty(batch, channels, height, width, device=device)

    def dims(self) -> dict[int, Any]:
        """The free axes of images, as torch.export takes them."""
        free = {} if self.batch is not None else {0: torch.export.Dim("batch")}
        if self.size is not None:
            return free
        sides = [torch.export.Dim(name) for name in ("rows", "columns")]
        height, width = sides if self.multiple == 1 else [self.multiple * side for side in sides]
        return {**free, 2: height, 3: width}


def backbone_graph(backbone: Backbone, opset: int | None) -> Any:
    """An ``onnx.ModelProto`` whose nodes use ``backbone``'s tensors by their own names.

    Its input is ``images``, float32 [batch, C, height, width]; its outputs are ``x_norm_clstoken``
    [batch, D], ``x_norm_patchtokens`` [batch, patches, D] and, where there are storage tokens,
    ``x_storage_tokens`` [batch, R, D]. Batch, height and width are free; sides must be multiples of
    the patch size. All is computed in float32. The tensors are to be added as initializers.
    Raises ``CheckpointError`` where a library is missing and for a backbone that cannot be traced.
    """
    try:
        return graph_of(Tokens(backbone), Freedom(backbone.patch_size), opset)
    except Untraceable as error:
        raise CheckpointError(
            f"{type(backbone).__name__} cannot be written as ONNX: torch.export does not follow "
            f"its forward_features with free batch, height and width: {error}"
        ) from error


class Untraceable(Exception):
    """What torch.export does not follow."""


def graph_of(network: Exportable, freedom: Freedom, opset: int | None) -> Any:
    """The ``onnx.ModelProto`` of a network for such images; its tensors are inputs by their names.

    Raises ``Untraceable``, and ``CheckpointError`` where a library is missing.
    """
    _check(opset)
    import onnx_ir as ir

    try:
        with _quiet(), torch.no_grad():
            model = _traced(_without_weights(network), freedom, opset)
            _divide_as_python(model)
            _widen(model)
            _simplify(model)
    except Exception as error:  # whatever torch.export stumbles over
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise Untraceable(reason) from error
    proto = ir.to_proto(model)
    _name_axes(proto.graph, network, freedom)
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


def _without_weights(network: Exportable) -> Exportable:
    """A twin in eval mode whose tensors are float32 and hold nothing, nor take memory.

    On the CPU they have addresses, which nobody writes to.
    """

    def bare(tensor: Tensor) -> Tensor:
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        return torch.empty_like(tensor, dtype=dtype, device=network.traced_on)

    # Found in the memo, tensors are not copied.
    memo: dict[int, Any] = {id(t): nn.Parameter(bare(t), False) for t in network.parameters()}
    memo |= {id(t): bare(t) for t in network.buffers()}
    return copy.deepcopy(network, memo).eval()


# --------------------------------------------------------------------------- tracing
def _traced(network: Exportable, freedom: Freedom, opset: int | None) -> Any:
    """An ``onnx_ir.Model`` whose inputs are the images and every tensor of the network."""
    images = freedom.images(network.backbone.in_chans, network.traced_on)
    traced = torch.export.export(network, (images,), dynamic_shapes={INPUT: freedom.dims()})
    # Simplified here rather than by the exporter, which would fold and merge weights.
    program = torch.onnx.export(
        traced, (images,), dynamo=True, opset_version=opset, optimize=False, verbose=False
    )
    if program is None:
        raise TypeError("torch.onnx.export gave no program")
    model = program.model
    _name_values(model, network)
    return model


def _name_values(model: Any, network: Exportable) -> None:
    """Give inputs, outputs and weights the names that they have in the file."""
    graph = model.graph
    owned = {
        name: network.file_name(name)
        for named in (network.named_parameters, network.named_buffers)
        for name, _ in named(remove_duplicate=False)
    }
    outputs = list(network.outputs)[: len(graph.outputs)]
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


def _divide_as_python(model: Any) -> None:
    """Round quotients of sizes down, as ``//`` does.

    torch 2.14 writes ``//`` of sizes as ONNX's Div, which rounds towards 0: of ``-(-side // 16)``
    one patch would be missing. Without its remainder a number is divided alike by both.
    """
    import onnx_ir as ir

    graph = model.graph
    for node in list(graph.all_nodes()):
        origin = node.metadata_props.get("pkg.torch.onnx.fx_node", "")
        if node.op_type != "Div" or "target=operator.floordiv" not in origin:
            continue
        value, divisor = node.inputs
        remainder = ir.Node("", "Mod", [value, divisor])
        whole = ir.Node("", "Sub", [value, remainder.outputs[0]])
        for new in (remainder, whole):
            new.outputs[0].dtype, new.outputs[0].shape = value.dtype, value.shape
            graph.insert_before(node, new)
        node.replace_input_with(0, whole.outputs[0])


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


def _name_axes(graph: Any, network: Exportable, freedom: Freedom) -> None:
    """Call free axes what they are; the trace has symbols of its own for them."""
    del graph.value_info[:]
    for value in [*graph.input, *graph.output]:
        names = ("batch", "channels", "height", "width")
        if value.name != INPUT:
            names = network.outputs[value.name]
        for name, dim in zip(names, value.type.tensor_type.shape.dim, strict=False):
            if not dim.HasField("dim_value"):
                dim.dim_param = name


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
