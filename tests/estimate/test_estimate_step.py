"""A simulated step does what a real one does, and counts what it takes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from attrs import evolve
from dinov3_estimate.command import estimate
from dinov3_estimate.ledger import ACTIVATIONS, BATCH, GRADIENTS, OPTIMIZER, TEMPORARY
from dinov3_estimate.report import sections
from dinov3_estimate.simulated import SimulatedRank
from dinov3_estimate.step import Estimate, simulate
from dinov3_estimate.timing import ACCELERATORS, step_time
from dinov3_losses.koleo import KoLeoLoss
from dinov3_ssl.simulation import hidden_patches
from dinov3_vit.transformer import VisionTransformer
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from trainer_support import pretrain, steps, trainer

from dinov3_framework import LossResult, RecipeError, StepOutputs, UserError

NO_MASKS = ('drop=["losses.ibot"]', "augmentation.masking.probability=0.0")
GRAM = ("losses.gram.use=gram", "augmentation.anchor_size=28")
BF16 = "parallel.param_dtype=bf16"


@cache
def estimated(*overrides: str, world: int = 1) -> Estimate:
    return simulate(pretrain(*overrides), SimulatedRank(world), granularity=1)


def batch_rows(found: Estimate) -> dict[str, str]:
    """What the report says of the largest step's batch."""
    return dict(found.largest.batch.rows)


@pytest.fixture(scope="module")
def alone() -> Estimate:
    return estimated()


@pytest.fixture(scope="module")
def of_two() -> Estimate:
    return estimated(BF16, world=2)


def parameters_of(part: str) -> int:
    return sum(
        p.numel() for p in pretrain().method.prepare().blueprint.student()[part].parameters()
    )


def _raw(formula: Callable[..., int]) -> Callable[..., int]:
    """A formula of torch's, which takes tensors, so marked that it is given tensors."""

    def of_tensors(*args: Any, **kwargs: Any) -> int:
        return formula(*args, **kwargs)

    of_tensors._get_raw = True  # type: ignore[attr-defined]
    return of_tensors


# --------------------------------------------------------------------------- work
def test_flops_are_those_of_a_real_step(alone: Estimate, tmp_path: Path) -> None:
    """By torch's own counter, which has to be told the CPU's name of attention."""
    aten = torch.ops.aten
    pairs = (
        ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention"),
        (
            "_scaled_dot_product_flash_attention_for_cpu_backward",
            "_scaled_dot_product_flash_attention_backward",
        ),
    )
    attention = {
        getattr(aten, here): _raw(flop_registry[getattr(aten, elsewhere)])
        for here, elsewhere in pairs
    }
    counter = FlopCounterMode(display=False, custom_mapping=attention)
    with trainer(tmp_path) as ours, counter:
        steps(ours, 1)
    assert sum(alone.tally.flops().values()) == counter.get_total_flops() > 0
    assert alone.tally.flops().keys() == {"fp32"}
    assert alone.sections == {}


def test_micro_batches_add_up() -> None:
    one = estimated(*NO_MASKS)
    four = estimated(*NO_MASKS, "accumulation_steps=4", "batch_size=48")
    assert sum(four.tally.flops().values()) == 4 * sum(one.tally.flops().values())
    assert four.tally.kernels > 3 * one.tally.kernels
    # Gradients of those before are there, and activations of one alone.
    assert one.peak.total < four.peak.total < 1.3 * one.peak.total
    # Besides, the sums of its metrics.
    more = four.peak.bytes[ACTIVATIONS] - one.peak.bytes[ACTIVATIONS]
    assert 0 <= more < 0.01 * one.peak.total


def test_products_are_counted_by_type(of_two: Estimate) -> None:
    flops = of_two.tally.flops()
    assert list(flops) == ["bf16", "fp32"]  # the losses calculate in float32
    assert flops["fp32"] < 0.01 * flops["bf16"]


def test_tokens(alone: Estimate) -> None:
    # 28 and 14 px in patches of 7, one class and one storage token; 2 global and 2 local crops.
    student, teacher = 12 * (2 * (16 + 2) + 2 * (4 + 2)), 12 * 2 * (16 + 2)
    assert batch_rows(alone)["tokens of the student"] == f"{student}, {student} a process"
    assert batch_rows(alone)["tokens of the teacher"] == f"{teacher}, {teacher} a process"
    assert "tokens of the anchors" not in batch_rows(alone)


# --------------------------------------------------------------------------- memory
def test_what_there_is_between_steps(alone: Estimate) -> None:
    parts = pretrain().method.prepare()
    student = parts.blueprint.student()
    count = sum(parameter.numel() for parameter in student.parameters())
    buffers = sum(b.numel() * b.element_size() for b in student.buffers())
    tensors = len(list(student.parameters()))
    assert alone.parameters == {
        "student": (count, count),
        "teacher": (count, count),
    }
    rest = alone.rest.bytes
    assert rest["student"] == rest["teacher"] == 4 * count + buffers
    assert rest[OPTIMIZER] == 8 * count + 4 * tensors  # and a step counter each
    assert rest[GRADIENTS] == rest[BATCH] == rest[TEMPORARY] == 0
    # What backbones keep: tables of RoPE, of the teacher's sizes.
    assert rest[ACTIVATIONS] < 2**14


def test_shards(alone: Estimate, of_two: Estimate) -> None:
    whole, held = of_two.parameters["student"]
    assert whole == alone.parameters["student"][0]
    assert whole / 2 <= held < 0.52 * whole
    for kind in ("student", "teacher", OPTIMIZER):
        assert of_two.rest.bytes[kind] < 0.6 * alone.rest.bytes[kind]


def test_gradients_of_a_unit_are_whole_before_they_are_reduced() -> None:
    # A head so wide that it decides where the peak is.
    wide = ("losses.dino.head.hidden_dim=2000", 'drop=["losses.ibot", "losses.koleo"]')
    found = estimated(BF16, *wide, world=8)
    whole, held = found.parameters["student"]
    assert found.peak.when.startswith("backward")
    # In bf16 as they come and in float32 as they are reduced.
    assert found.peak.bytes[TEMPORARY] == pytest.approx((2 + 4) * whole, rel=0.03)
    assert found.peak.bytes["student"] == pytest.approx(4 * held, rel=0.01)


def test_an_allocators_blocks() -> None:
    rough = simulate(pretrain(), SimulatedRank(1), granularity=512)
    exact = estimated()
    assert exact.rest.total < rough.rest.total
    assert all(size % 512 == 0 for size in rough.peak.bytes.values())


def test_anchors_have_memory_of_their_own() -> None:
    found = estimated(*GRAM)
    backbone = parameters_of("backbone")
    assert found.parameters["anchors"] == (backbone, backbone)
    assert found.rest.bytes["anchors"] > 4 * backbone
    assert batch_rows(found)["tokens of the anchors"] == f"{12 * 36}, {12 * 36} a process"


@pytest.mark.parametrize("tokens", ["masked", "unmasked"])
def test_gram_on_some_of_the_patches(tokens: str) -> None:
    found = estimated(
        *GRAM,
        "losses.gram.image_level=false",
        f"losses.gram.tokens={tokens}",
        "losses.gram.compute_stats=true",
        world=2,
    )
    assert found.sections == {}


# --------------------------------------------------------------------------- messages
def test_messages(of_two: Estimate) -> None:
    sent: Counter[str] = Counter()
    for message, count in of_two.tally.messages.items():
        assert (message.processes, message.machines) == (2, 1)
        sent[message.name] += count
    # Two blocks, the rest of the backbone, two heads: each is reduced once; gathered for the
    # student's and the teacher's forward pass, and for the backward pass.
    assert sent["reduce_scatter"] == 5
    assert sent["all_gather"] == 3 * 5
    reduced = sum(
        count * message.bytes
        for message, count in of_two.tally.messages.items()
        if message.name == "reduce_scatter"
    )
    whole, _ = of_two.parameters["student"]
    assert 4 * whole <= reduced < 4.1 * whole  # float32, and padding of what is odd


def test_alone_there_is_nobody_to_talk_to() -> None:
    assert all(m.processes == 1 for m in estimated(BF16).tally.messages)


def test_a_loss_that_gathers_is_seen() -> None:
    distributed = estimated("losses.koleo.distributed=true", world=4)
    local = estimated(world=4)
    extra = distributed.tally.messages - local.tally.messages
    # 2 crops of 3 images of width 32 from each of 4 processes, and the gradient of all of them.
    assert {(message.name, message.bytes) for message in extra} == {
        ("all_gather", 4 * 2 * 3 * 32 * 4),
        ("all_reduce", 4 * 2 * 3 * 32 * 4),
    }


# --------------------------------------------------------------------------- batches
def test_the_fullest_micro_batch_is_simulated() -> None:
    found = estimated("accumulation_steps=2", world=2)
    task = pretrain("accumulation_steps=2")
    augmentation = task.method.prepare().augmentation
    counts = []
    for micro in range(2):
        for rank in range(2):
            first = 3 * (2 * micro + rank)
            rows = [*range(first, first + 3), *range(12 + first, 12 + first + 3)]
            masks = augmentation.masks(rows=rows, total=24, seed=task.config.seed, step=0)
            counts.append(int(masks.sum()))
    hidden = hidden_patches(augmentation, found.layout, task.config.seed)
    assert hidden is not None
    assert hidden.fullest == max(counts)
    assert hidden.mean == pytest.approx(sum(counts) / 4)
    assert batch_rows(found)["masked patches"].startswith(f"{max(counts)} in the fullest")


def test_without_masks() -> None:
    found = estimated(*NO_MASKS)
    assert "masked patches" not in batch_rows(found)
    parts = pretrain(*NO_MASKS).method.prepare()
    assert hidden_patches(parts.augmentation, found.layout, 0) is None


# --------------------------------------------------------------------------- resolutions
SMALL = "{ratio=0.75, global_size=28, local_size=14}"
LARGE = "{ratio=0.25, global_size=56, local_size=14}"


def test_each_resolution_is_simulated() -> None:
    sizes = 'drop=["augmentation.global_size"]'
    both = estimated(sizes, f"augmentation.resolutions=[{SMALL}, {LARGE}]")
    alone = {size: estimated(f"augmentation.global_size={size}") for size in (28, 56)}
    assert [one.batch.share for one in both.steps] == [0.75, 0.25]
    for one, size in zip(both.steps, (28, 56), strict=True):
        assert f"global {size}" in one.batch.name
        assert one.batch.rows == alone[size].largest.batch.rows
        assert one.tally == alone[size].tally
        # The tables of RoPE of a resolution are still there in the next one.
        assert one.peak.total == pytest.approx(alone[size].peak.total, rel=0.01)
    assert both.peak == both.steps[1].peak
    flops = [sum(alone[size].tally.flops().values()) for size in (28, 56)]
    assert both.flops == 0.75 * flops[0] + 0.25 * flops[1]


def test_times_are_means_by_share() -> None:
    both = estimated(
        'drop=["augmentation.global_size"]', f"augmentation.resolutions=[{SMALL}, {LARGE}]"
    )
    h100 = ACCELERATORS["h100"]
    slow = evolve(h100, products=dict.fromkeys(h100.products, 1e9))
    steps = [step_time(one.tally, slow).step for one in both.steps]
    mean = 0.75 * steps[0] + 0.25 * steps[1]
    assert steps[0] != steps[1]
    report = sections(both.config, {"": both}, slow)
    assert dict(report["estimated on H100 SXM 80 GB"])["step"].startswith(f"{mean * 1e3:.1f} ms")
    assert [label for label, _ in report["sorts of steps"]] == [
        "global 28, local 14",
        "global 56, local 14",
        "of these",
    ]


def test_an_anchor_that_begins_later_is_there() -> None:
    """And what it begins with is not copied in the step that is simulated."""
    assert estimated(*GRAM, "losses.gram.anchor.start=3").tally == estimated(*GRAM).tally


# --------------------------------------------------------------------------- float8
def test_products_in_float8() -> None:
    """Forward, and the gradients of tokens; those of weights stay in bfloat16."""
    whole = "backbone.drop_path_rate=0.0"  # all images pass all blocks
    fp8, plain = estimated(BF16, whole, "parallel.fp8=on"), estimated(BF16, whole)
    assert sum(fp8.tally.flops().values()) == sum(plain.tally.flops().values())
    layers = sum(
        parameter.numel()
        for name, parameter in pretrain().method.prepare().blueprint.backbone.named_parameters()
        if name.startswith("blocks.") and parameter.ndim == 2
    )
    tokens = 12 * (2 * (2 * (16 + 2) + 2 * (4 + 2)) + 2 * (16 + 2))
    assert fp8.tally.flops()["fp8"] == 2 * layers * tokens


def test_widths_that_float8_cannot_multiply() -> None:
    with pytest.raises(RecipeError, match="no multiples of 16"):
        estimate(pretrain(BF16, "parallel.fp8=on", "backbone.embed_dim=24"), 1)


# --------------------------------------------------------------------------- what cannot be
def test_a_loss_that_asks_for_values_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = estimated()

    def forward(self: KoLeoLoss, step: StepOutputs) -> LossResult:
        cls = step.student["global"].cls
        return LossResult(cls[cls > 0].sum())

    monkeypatch.setattr(KoLeoLoss, "forward", forward)
    found = simulate(pretrain(), SimulatedRank(1))
    ((label, text),) = found.sections["left out"]
    assert label == "losses.koleo"
    assert "nonzero" in text
    assert 0 < sum(found.tally.flops().values()) <= sum(plain.tally.flops().values())


def test_a_backbone_that_asks_for_values_cannot_be_estimated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = VisionTransformer.forward_features

    def asking(self: VisionTransformer, images: Any, masks: Any = None) -> Any:
        first = images[0] if isinstance(images, list) else images
        if not math.isfinite(first.sum().item()):
            raise ValueError
        return original(self, images, masks)

    monkeypatch.setattr(VisionTransformer, "forward_features", asking)
    with pytest.raises(UserError, match=r"cannot be estimated: .*_local_scalar"):
        simulate(pretrain(), SimulatedRank(1))
    assert not dist.is_initialized()


# --------------------------------------------------------------------------- afterwards
def test_nothing_is_left_behind(tmp_path: Path) -> None:
    """A real run in the same process goes as if there had been no estimate."""
    resize = torch.UntypedStorage.resize_
    simulate(pretrain(BF16), SimulatedRank(1))
    assert not dist.is_initialized()
    assert torch.UntypedStorage.resize_ is resize
    with trainer(tmp_path / "after", BF16) as ours:
        (figures,) = steps(ours, 1)
    assert math.isfinite(figures["loss"])


def test_convnext_can_be_estimated() -> None:
    found = estimated(
        "backbone={use='convnext', depths=[1, 1, 1, 1], dims=[8, 8, 16, 16]}",
        "augmentation.global_size=64",
        "augmentation.local_size=32",
        'drop=["losses.ibot"]',
        world=2,
    )
    assert found.sections == {}
    assert found.peak.bytes[ACTIVATIONS] > 0
