"""How much memory a step takes, coarsely and at once; ``--rehearse`` says it well, in seconds.

What autograd keeps of one image is counted on the meta device and multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dinov3_framework.contracts.losses import STUDENT_VIEWS
from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.parallel import ParallelConfig
from dinov3_framework.runtime.processes import memory_for_process, pick_device
from dinov3_ssl.configs import StudentTrainingConfig
from dinov3_ssl.networks import Blueprint
from dinov3_ssl.preflight import Parts

_ADAM = 4 * 4  # bytes of a parameter that learns: itself, its gradient, two moments
_LOGITS = 4  # copies of a projector's output that a loss makes on its way, in float32
# Of what a block keeps: products, convolutions and attention, beside its input.
_SELECTIVE = 0.4
_FEW = 32  # inputs; twice as many are compared with them
_HIDDEN = 0.15  # of all patches, by masks as published: half of the crops, a tenth to a half


def memory_rows(
    config: StudentTrainingConfig,
    parts: Parts,
    world_size: int,
    elsewhere: bool,
    frozen: Sequence[nn.Module] = (),
) -> Iterator[tuple[str, str]]:
    """What a check shows of it; ``elsewhere``: the processes are not on this machine.

    ``frozen`` networks are held as well.
    """
    own = _networks(config.parallel, parts.blueprint, frozen, world_size)
    try:
        each = _image(config.parallel, parts)
    except (RuntimeError, NotImplementedError, TypeError):
        return  # a network that computes with values says nothing without them
    share = world_size * config.accumulation_steps
    images = -(-config.batch_size // share)
    yield "of a process", f"about {_gib(own + images * each)}, {_gib(each)} of it for each image"
    if elsewhere:
        return
    device = pick_device(config.parallel.device)
    there = memory_for_process(device, world_size)
    if there is None or own + images * each <= there:
        return
    fitting = int((there - own) // each) if each else 0
    if fitting < 1:
        mend = "take more processes, or a smaller backbone, smaller crops, or fewer prototypes"
    else:
        images = config.batch_size // world_size
        steps = next(n for n in range(1, images + 1) if images % n == 0 and images // n <= fitting)
        mend = f"try accumulation_steps = {steps}, or a smaller batch_size"
    yield "note", f"this device ({device.type}) has {_gib(there)} for it: {mend}"


def _networks(
    parallel: ParallelConfig, blueprint: Blueprint, frozen: Sequence[nn.Module], world_size: int
) -> float:
    """Bytes of student, moving average, anchors and ``frozen`` that a process holds."""
    backbone = _count(blueprint.backbone)
    student = backbone + sum(map(_count, blueprint.projectors.values()))
    whole = [*frozen, *map(blueprint.anchor_backbone, blueprint.anchors)]
    held = student * (_ADAM + 4) + sum(map(_count, whole)) * 4
    return held / max(world_size // parallel.replicas, 1)


def _gib(bytes_: float) -> str:
    return f"{bytes_ / 2**30:,.3g} GiB"


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _image(parallel: ParallelConfig, parts: Parts) -> float:
    """Bytes that one image takes with all its crops, for the backward pass."""
    blueprint, total = parts.blueprint, 0.0
    backbone, views = blueprint.backbone, parts.augmentation.views
    seen = {name: views[name] for name in STUDENT_VIEWS if name in views}
    for view in seen.values():
        total += view.crops * _kept(backbone, parallel, view.size)
    if parallel.param_dtype == "bf16":
        total /= 2
    for name, projector in blueprint.projectors.items():
        needs = parts.losses[name].needs
        row = _saved(projector, backbone.embed_dim) + _LOGITS * 4 * _outputs(projector, backbone)
        for need in needs:
            network, _, rest = need.partition(".")
            read = seen.get(rest.partition(".")[0])
            if network == "student" and read is not None:
                patches = (read.size // backbone.patch_size) ** 2
                hidden = _HIDDEN * patches if "masks" in needs else patches
                total += read.crops * row * (hidden if need.endswith("patches") else 1)
    return total


def _kept(backbone: Backbone, parallel: ParallelConfig, size: int) -> float:
    """Bytes that the backward pass needs of one image of ``size`` pixels, in float32."""
    whole = _saved(backbone.forward_features, backbone.in_chans, size, size)
    blocks = len(list(backbone.blocks_to_shard()))
    if parallel.checkpointing == "none" or not blocks:
        return whole
    patches = [(size // info.stride) ** 2 * info.channels for info in backbone.feature_info]
    inputs = 4 * blocks * sum(patches) / len(patches)
    part = _SELECTIVE if parallel.checkpointing == "selective" else 0.0
    return inputs + part * whole + whole / blocks


def _outputs(projector: nn.Module, backbone: Backbone) -> int:
    return int(projector(torch.empty(1, backbone.embed_dim, device="meta")).numel())


def _saved(forward: Callable[[Tensor], Any], *shape: int) -> float:
    """Bytes that autograd keeps of one input of a shape, beside what it keeps of any number."""
    # Of many, for drop path leaves out a share of them.
    few, many = (
        _all_saved(forward, torch.empty(n, *shape, device="meta")) for n in (_FEW, 2 * _FEW)
    )
    return (many - few) / _FEW


def _all_saved(forward: Callable[[Tensor], Any], inputs: Tensor) -> float:
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        _ = forward(inputs)  # kept: the storage of one that is gone may be given to another
    return float(sum(each.untyped_storage().nbytes() for each in kept.values()))
