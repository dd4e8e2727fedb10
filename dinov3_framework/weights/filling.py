"""Official tensors out of a recognised file, and a backbone filled with them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dinov3_framework.contracts.layouts import Rule
from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.errors import CheckpointError, summarize_names
from dinov3_framework.parallel.state_dicts import put
from dinov3_framework.weights.recognition import Recognised


def check_fit(recognised: Recognised, backbone: nn.Module) -> list[Rule]:
    """The rules of a file for ``backbone`` (its tensors may be on the meta device).

    Raises ``CheckpointError`` unless every tensor of the file is used, and every one that is
    wanted is there in its shape.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items()}
    rules = list(recognised.rules(list(shapes)))
    wanted = {
        name: shape for rule in rules for name, shape in rule.stored(shapes[rule.official]).items()
    }
    given = recognised.content.shapes
    complaints = [
        summarize_names("missing from the file", wanted.keys() - given.keys()),
        summarize_names("in the file but not in the backbone", given.keys() - wanted.keys()),
        summarize_names(
            "of another shape",
            [
                f"{name}: {list(given[name])} in the file, {list(wanted[name])} in the backbone"
                for name in given.keys() & wanted.keys()
                if tuple(given[name]) != tuple(wanted[name])
            ],
        ),
    ]
    if any(complaints):
        name = type(recognised.config).__name__.removesuffix("Config")
        raise CheckpointError(
            f"{recognised.path} does not fit the backbone {name} that it seems to hold:"
            + "".join(complaints)
        )
    return rules


def official_tensors(recognised: Recognised, backbone: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of ``backbone``'s state dict out of the file, one at a time, on the CPU.

    ``backbone`` gives names and shapes (and, for what the file leaves out, initial values); it may
    be on the meta device and is left alone. Raises ``CheckpointError`` where the two do not fit,
    before anything is read, and for parameters that are not finite, after everything was. A buffer
    that is not finite was saved before it was ever set, and gets the value that belongs there.
    """
    rules = check_fit(recognised, backbone)
    shapes = {name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items()}
    left_out = [rule.official for rule in rules if not rule.stored(shapes[rule.official])]
    initial = initial_values(backbone, left_out)
    buffers = {name for name, _ in backbone.named_buffers(remove_duplicate=False)}
    bad = []
    for rule in rules:
        name = rule.official
        tensor = rule.read(shapes[name], recognised.content.read)
        if tensor is None:
            tensor = initial[name]
        elif tensor.is_floating_point() and not tensor.isfinite().all():
            if name in buffers:
                tensor = initial_values(backbone, [name])[name]
            else:
                count = int((~tensor.isfinite()).sum())
                bad.append(f"{name}: {count:,} of {tensor.numel():,} values")
        yield name, tensor
    if bad:
        raise CheckpointError(f"{recognised.path}:{summarize_names('with NaN or inf', bad)}")


def initial_values(backbone: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """What ``init_weights`` gives to some tensors, on the CPU, at the cost of those alone.

    For values that do not depend on chance: whatever else it would draw stays without memory.
    """
    wanted = set(names)
    if not wanted:
        return {}
    twin = copy.deepcopy(backbone).to("meta")
    tensors = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
    for name in wanted:
        _replace(twin, name, torch.empty_like(tensors[name], device="cpu"))
    with torch.random.fork_rng(devices=[]):
        twin.init_weights()  # type: ignore[operator]
    tensors = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
    return {name: tensors[name].detach() for name in wanted}


def _replace(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, last = name.rpartition(".")
    owner = module.get_submodule(path)
    if last in owner._parameters:
        setattr(owner, last, nn.Parameter(tensor, requires_grad=False))
    else:
        owner._buffers[last] = tensor


def fill(
    backbone: Backbone,
    recognised: Recognised,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Backbone:
    """Give a backbone on the meta device the file's tensors; strictly, with one copy in memory.

    ``dtype`` is that of the parameters, by default the file's. Raises ``CheckpointError`` as
    :func:`official_tensors` does; the backbone is of no use afterwards.
    """
    parameters = {name for name, _ in backbone.named_parameters(remove_duplicate=False)}

    def placed(name: str, tensor: Tensor) -> Tensor:
        cast = dtype if name in parameters and tensor.is_floating_point() else None
        return tensor.to(device, cast)

    loaded = {name: placed(name, tensor) for name, tensor in official_tensors(recognised, backbone)}
    computed = _computed_buffers(backbone, loaded)
    backbone.load_state_dict(loaded, strict=True, assign=True)
    for name, tensor in computed.items():
        _replace(backbone, name, tensor.to(device))
    _require_whole(recognised, backbone)
    return backbone


def fill_placed(backbone: nn.Module, blueprint: nn.Module, recognised: Recognised) -> None:
    """Give a backbone that is allocated, whole or sharded, the file's tensors.

    ``blueprint`` is the same backbone, whole, on the meta device. Every process reads the file for
    itself, one tensor at a time, and keeps its shard alone; no process talks to another.
    """
    state = backbone.state_dict()
    for name, tensor in official_tensors(recognised, blueprint):
        put(state[name], tensor)
    buffers = dict(backbone.named_buffers())
    for name, tensor in _computed_buffers(blueprint, state).items():
        put(buffers[name], tensor)


def _computed_buffers(backbone: nn.Module, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Buffers that no file holds: only the backbone knows their values."""
    return initial_values(
        backbone, [name for name, _ in backbone.named_buffers() if name not in state]
    )


def _require_whole(recognised: Recognised, backbone: nn.Module) -> None:
    tensors = [*backbone.named_parameters(), *backbone.named_buffers()]
    empty = [name for name, tensor in tensors if tensor.is_meta]
    bad = [
        name
        for name, tensor in tensors
        if not tensor.is_meta and tensor.is_floating_point() and not tensor.isfinite().all()
    ]
    if empty or bad:
        raise CheckpointError(
            f"{recognised.path}: nothing gave a value to"
            + summarize_names("left empty", empty)
            + summarize_names("without a finite value", bad)
        )
