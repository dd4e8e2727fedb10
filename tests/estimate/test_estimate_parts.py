"""The parts of an estimate on their own: ledger, recorder, times, what is suggested."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from attrs import evolve
from dinov3_estimate.ledger import (
    ACTIVATIONS,
    BATCH,
    GATHERED,
    GRADIENTS,
    TEMPORARY,
    Ledger,
    Moment,
)
from dinov3_estimate.recorder import OpRecorder
from dinov3_estimate.report import sections
from dinov3_estimate.simulated import SimulatedRank
from dinov3_estimate.step import Estimate, simulate
from dinov3_estimate.suggestions import suggestions
from dinov3_estimate.tally import Message, Product, Tally
from dinov3_estimate.timing import (
    ACCELERATORS,
    HIDDEN,
    HOP,
    KERNEL,
    LINKS,
    MESSAGE,
    PRODUCTS,
    Accelerator,
    StepTime,
    accelerator,
    message_time,
    needed,
    step_time,
)
from trainer_support import pretrain

from dinov3_framework import UserError

GIB = 2**30
BF16 = "parallel.param_dtype=bf16"


def floats(count: int) -> torch.Tensor:
    return torch.zeros(count)


# --------------------------------------------------------------------------- the ledger
def test_storages_come_and_go() -> None:
    ledger = Ledger()
    kept, passing = floats(10), floats(20)
    ledger.note(kept, ACTIVATIONS, "first")
    ledger.note(passing, TEMPORARY, "second")
    ledger.note(passing[5:], TEMPORARY, "a view")
    del passing
    ledger.note(kept, TEMPORARY, "known already")
    assert ledger.now().bytes[ACTIVATIONS] == ledger.now().total == 40
    assert (ledger.peak().total, ledger.peak().when) == (120, "second")
    assert ledger.peak().bytes[TEMPORARY] == 80


def test_a_kind_that_is_known_later_holds_for_the_peak() -> None:
    ledger = Ledger()
    tensor = floats(10)
    ledger.note(tensor, TEMPORARY, "made")
    ledger.assign([tensor], GRADIENTS)
    assert ledger.peak().bytes[GRADIENTS] == 40
    assert ledger.peak().bytes[TEMPORARY] == 0
    assert ledger.kind_of(tensor.view(2, 5)) is GRADIENTS
    assert ledger.kind_of(floats(1)) is None


def test_sizes_are_rounded_up() -> None:
    ledger = Ledger(granularity=512)
    small, large = floats(1), floats(129)
    ledger.assign([small, large], BATCH)
    assert ledger.now().bytes[BATCH] == 512 + 1024
    ledger.forget_peak()
    assert ledger.peak().total == 512 + 1024


# --------------------------------------------------------------------------- the recorder
def test_what_is_made_is_named_by_the_phase() -> None:
    with OpRecorder() as recorder:
        recorder.phase = "forward"
        weight = torch.ones(4, requires_grad=True)
        out = (weight * weight).sum()
        recorder.phase = "backward"
        out.backward()
        held = recorder.ledger.now().bytes
    assert held[ACTIVATIONS] == 16 + 4  # the weight and the sum
    assert held[TEMPORARY] == 16  # its gradient, which nobody has named
    assert held[GATHERED] == 0


def test_what_sharding_gathers_is_known_by_its_operations() -> None:
    gathered, parts = floats(12).view(2, 6), [floats(4).view(2, 2), floats(8).view(2, 4)]
    with OpRecorder() as recorder:
        torch.ops.fsdp.split_with_sizes_copy(gathered, [2, 4], dim=1, out=parts)
        assert recorder.ledger.now().bytes[GATHERED] == 48
        parts[0].untyped_storage().resize_(0)
        assert recorder.ledger.now().bytes[GATHERED] == 32
        parts[0].untyped_storage().resize_(16)
        assert recorder.ledger.now().bytes[GATHERED] == 48


def test_views_and_fresh_memory_are_no_work() -> None:
    with OpRecorder() as recorder:
        tensor = torch.empty(3, 4)
        tensor.t()[1:].detach()
        assert recorder.tally.kernels == recorder.tally.moved == 0
        tensor.add_(1)
        assert (recorder.tally.kernels, recorder.tally.moved) == (1, 2 * 48)
        tensor @ torch.empty(4, 5, dtype=torch.float32)
    assert recorder.tally.products == {Product("fp32", 2 * 3 * 4 * 5, 48 + 80 + 60): 1}


def test_tallies_add_up() -> None:
    one = Tally(kernels=2, moved=3)
    one.products[Product("bf16", 10, 1)] = 4
    total = Tally()
    total.add(one)
    total.add(one, times=3)
    assert (total.kernels, total.moved, total.flops()) == (8, 12, {"bf16": 160})


# --------------------------------------------------------------------------- time
@pytest.fixture
def machine() -> Accelerator:
    return Accelerator(
        "round numbers",
        memory=80,
        products={"bf16": 1e12, "fp32": 1e11},
        bandwidth=1e9,
        link=4e8,
        network=1e8,
        price=1,
    )


@pytest.mark.parametrize(
    ("name", "processes", "machines", "bytes_", "seconds"),
    [
        ("all_gather", 8, 1, 4e8, 7 / 8 / LINKS),
        ("all_reduce", 8, 1, 4e8, 2 * 7 / 8 / LINKS),
        ("all_gather", 2, 2, 1e8, 1 / 2 / LINKS),  # one process a machine: one network link
        ("all_gather", 4, 2, 2e8, 3 / 4 / LINKS),  # two: two links
        ("all_gather", 16, 2, 4e8, 15 / 16 / LINKS),  # eight: more than NVLink has
        ("all_gather", 1, 1, 1e9, -MESSAGE - HOP),
    ],
)
def test_messages_take_time(
    name: str,
    processes: int,
    machines: int,
    bytes_: float,
    seconds: float,
    machine: Accelerator,
) -> None:
    message = Message(name, int(bytes_), processes, machines, in_backward=False)
    expected = MESSAGE + processes * HOP + seconds
    assert message_time(message, machine) == pytest.approx(expected)


def test_a_product_takes_the_longer_of_computing_and_reading(machine: Accelerator) -> None:
    tally = Tally()
    tally.products[Product("bf16", 10**12, 1)] = 2
    assert step_time(tally, machine).products == pytest.approx(2 / PRODUCTS)
    tally.products = type(tally.products)({Product("bf16", 1, 75 * 10**7): 1})
    assert step_time(tally, machine).products == pytest.approx(1)
    tally.products = type(tally.products)({Product("fp64", 10**11, 1): 1})
    assert step_time(tally, machine).products == pytest.approx(1 / PRODUCTS)


def test_a_host_that_cannot_keep_up(machine: Accelerator) -> None:
    spent = step_time(Tally(kernels=1000, moved=1), machine)
    assert spent.computing == spent.step == pytest.approx(1000 * KERNEL)


def test_messages_of_sharding_hide_behind_computing() -> None:
    spent = StepTime(products=6, memory=4, host=1, hideable=5, waiting=1)
    assert spent.step == 10 + 1
    spent = evolve(spent, hideable=12)
    assert spent.step == pytest.approx(10 + 1 + 12 - 10 * HIDDEN)


def test_which_messages_can_hide() -> None:
    assert Message("all_gather", 1, 2, 1, in_backward=False).can_hide
    assert Message("all_reduce", 1, 2, 1, in_backward=True).can_hide
    assert not Message("all_reduce", 1, 2, 1, in_backward=False).can_hide  # Sinkhorn-Knopp


# --------------------------------------------------------------------------- suggestions
@pytest.fixture(scope="module")
def found() -> Estimate:
    return simulate(pretrain(), SimulatedRank(1))


def large(found: Estimate, *, trained: float = 0, **gib: float) -> Estimate:
    """The same with so much memory in use at the peak, by kind, and so much that is trained."""
    bytes_ = Counter({name.replace("_", " "): int(size * GIB) for name, size in gib.items()})
    steps = [evolve(found.largest, peak=Moment(bytes_, "forward"))]
    return evolve(found, steps=steps, trained_bytes=int(trained * GIB))


def test_what_does_not_fit_gets_suggestions(found: Estimate) -> None:
    def report(estimate: Estimate) -> dict[str, dict[str, str]]:
        told = sections(estimate.config, {"": estimate}, ACCELERATORS["h100"])
        return {title: dict(rows) for title, rows in told.items()}

    crowded = report(large(found, activations=100, student=2, trained=2))
    verdicts = crowded["memory needed"]
    wanted = needed(102 * GIB)
    assert f"{wanted:.1f} of 79.1 GiB: does NOT fit" in verdicts["H100 SXM 80 GB"]
    assert "fits, " in verdicts["H200 SXM 141 GB"]
    assert crowded["what would help"] == {
        'parallel.checkpointing = "full"': "about 80.0 GiB less",
        'parallel.checkpointing = "selective"': "about 40.0 GiB less",
        "twice the accumulation_steps": "about 48.0 GiB less",
        'parallel.param_dtype = "bf16"': "about 50.0 GiB less",
        "twice the processes, for the same batch_size": "about 51.0 GiB less",
    }
    assert report(found)["what would help"] == {}


def test_only_what_can_be_had_is_suggested(found: Estimate) -> None:
    config = pretrain(BF16, "parallel.checkpointing=full").config
    single = evolve(found.layout, batch_size=1)
    full = large(found, optimizer_state=100, activations=1)
    crowded = evolve(full, layout=single, config=config)
    assert [each.what for each in suggestions(crowded)] == [
        "twice the processes, for the same batch_size"
    ]
    several = pretrain(BF16, "parallel.checkpointing=full", "parallel.replicas=2").config
    of_several = {each.what: each.saves for each in suggestions(evolve(crowded, config=several))}
    assert of_several["half of parallel.replicas"] == 50 * GIB


def test_accelerators_are_found_by_name() -> None:
    assert accelerator("H100") is ACCELERATORS["h100"]
    with pytest.raises(UserError, match="--accelerator tpu: unknown; there are a100, h100"):
        accelerator("tpu")
