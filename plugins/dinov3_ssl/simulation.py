"""Batches as large as real ones, without images: what an estimate of a step is given."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor, empty, int64, uint8
from torch import bool as torch_bool
from torch._subclasses.fake_tensor import FakeTensorMode

from dinov3_framework.contracts.data import Augmentation
from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.data.loader import Layout
from dinov3_framework.training.simulation import SimulatedBatch
from dinov3_ssl.batches import CropBatch
from dinov3_ssl.configs import StudentTrainingConfig
from dinov3_ssl.preflight import Parts


def simulated_batches(
    config: StudentTrainingConfig, parts: Parts, layout: Layout, shown: int, teacher: Backbone
) -> Iterator[SimulatedBatch]:
    """A batch of each resolution; ``shown`` images are those that the teacher sees."""
    backbone = parts.blueprint.backbone
    for variant in parts.augmentation.variants():
        hidden = hidden_patches(variant, layout, config.seed)
        fullest = None if hidden is None else hidden.fullest
        tokens = tokens_of(parts, variant, teacher)
        rows = []
        if hidden is not None:
            text = f"{hidden.fullest:,} in the fullest micro-batch of all processes, as here"
            rows.append(("masked patches", f"{text}; {hidden.mean:,.0f} on average"))
        images = {"student": layout.per_micro_batch, "teacher": shown}
        for network, each in tokens.items():
            own = each * images.get(network, layout.per_micro_batch) * layout.accumulation_steps
            if each:
                text = f"{each * config.batch_size:,}, {own:,} a process"
                rows.append((f"tokens of the {network}", text))
        yield SimulatedBatch(
            name=", ".join(f"{name} {view.size}" for name, view in variant.views.items()),
            share=variant.share,
            make=partial(
                simulated_batch,
                variant,
                shown,
                layout.per_micro_batch,
                config.images.channels,
                backbone.patch_size,
                fullest,
            ),
            iteration=iteration_with_all_anchors(config, parts),
            rows=rows,
        )


def iteration_with_all_anchors(config: StudentTrainingConfig, parts: Parts) -> int:
    """The first iteration at which every anchor has begun before."""
    begins = (anchor.config.start for anchor in parts.blueprint.anchors.values())
    first = max((start + 1 for start in begins if start is not None), default=0)
    return min(first, config.iterations - 1)


@frozen
class Hidden:
    """How many patches the masks of a micro-batch hide."""

    mean: float
    fullest: int  # of the process and micro-batch that has most to do


def hidden_patches(augmentation: Augmentation, layout: Layout, seed: int) -> Hidden | None:
    """Count over the processes and micro-batches of the first step; None without masks."""
    if not augmentation.makes_masks:
        return None
    crops, size = augmentation.views["global"].crops, layout.batch_size
    total = crops * size
    masks = augmentation.masks(rows=range(total), total=total, seed=seed, step=0)
    by_image = masks.sum(1).view(crops, size).sum(0)
    shares = [
        evolve(layout, rank=rank).places(0, micro)
        for rank in range(layout.world_size)
        for micro in range(layout.accumulation_steps)
    ]
    each = torch.stack([by_image[places.start : places.stop].sum() for places in shares])
    return Hidden(each.double().mean().item(), int(each.max()))


def simulated_batch(
    augmentation: Augmentation,
    images: int,
    seen: int,
    channels: int,
    patch_size: int,
    hidden: int | None,
) -> CropBatch:
    """Make one process's micro-batch; to be called where tensors have no values.

    Crops are of ``images``, masks of the images that the student has ``seen``.
    """
    crops = {
        name: empty(view.crops, images, channels, view.size, view.size, dtype=uint8)
        for name, view in augmentation.views.items()
    }
    masks: Tensor | None = None
    masked: Tensor | None = None
    if hidden is not None:
        view = augmentation.views["global"]
        patches = (view.size // patch_size) ** 2
        masks = empty(view.crops, seen, patches, dtype=torch_bool)
        masked = empty(hidden, dtype=int64)
    return CropBatch(crops, masks, (), masked)


def tokens_of(parts: Parts, augmentation: Augmentation, teacher: Any) -> dict[str, int]:
    """Count the tokens that the backbones put out for one image, over all crops, by network.

    ``augmentation`` is one of the variants, ``teacher`` the backbone that the student learns
    from, on the meta device.
    """
    views = augmentation.views
    needs = set().union(*(loss.needs for loss in parts.losses.values()))
    parted = [need.split(".") for need in needs]
    seen = {
        network: {n[1] for n in parted if n[0] == network} for network in ("student", "teacher")
    }
    if "teacher" in views:
        seen["teacher"] = {"teacher" if name == "global" else name for name in seen["teacher"]}

    def of_view(name: str, backbone: Any) -> int:
        view = views[name]
        image = torch.empty(1, backbone.in_chans, view.size, view.size, device="meta")
        return int(view.crops * backbone.forward_features(image)["x_prenorm"].shape[1])

    blueprint = parts.blueprint
    # Fake besides being on the meta device, so that who asks for values says so in one way.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        return {
            "student": sum(of_view(name, blueprint.backbone) for name in seen["student"]),
            "teacher": sum(of_view(name, teacher) for name in seen["teacher"]),
            "anchors": sum(
                of_view(anchor.view, blueprint.anchor_backbone(name))
                for name, anchor in blueprint.anchors.items()
            ),
        }
