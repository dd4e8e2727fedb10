"""From what a step does to how long it takes: a few assumptions, each a constant here."""

from __future__ import annotations

from attrs import frozen

from dinov3_estimate.accelerators import PER_MACHINE, Accelerator
from dinov3_estimate.tally import Message, Product, Tally

# Shares of the data sheet's rates that are reached.
PRODUCTS, BANDWIDTH, LINKS = 0.65, 0.75, 0.8
KERNEL = 6e-6  # seconds in which the host starts one operation
MESSAGE, HOP = 20e-6, 1e-6  # seconds that a message takes at least: itself, and for each process
HIDDEN = 0.8  # share of the computing during which messages of sharding may run
# Memory beside tensors: fragments of the allocator, and what CUDA, NCCL and cuBLAS take.
FRAGMENTS, CONTEXT = 0.08, 1.5  # a share, GiB


@frozen
class Estimate:
    """Seconds of one step on one kind of accelerator."""

    products: float
    memory: float  # operations that are no products
    host: float  # what starting all operations takes, in which the accelerator may wait
    hideable: float  # messages during which computing goes on
    waiting: float  # messages that are waited for

    @property
    def computing(self) -> float:
        return max(self.products + self.memory, self.host)

    @property
    def exposed(self) -> float:
        """The part of the messages that adds to the step."""
        return self.waiting + max(0.0, self.hideable - HIDDEN * self.computing)

    @property
    def step(self) -> float:
        return self.computing + self.exposed


def estimate(tally: Tally, accelerator: Accelerator) -> Estimate:
    """How long the step that ``tally`` counted takes."""
    bandwidth = BANDWIDTH * accelerator.bandwidth
    times = {True: 0.0, False: 0.0}
    for message, count in tally.messages.items():
        times[message.can_hide] += count * message_time(message, accelerator)
    return Estimate(
        products=sum(n * _product(p, accelerator, bandwidth) for p, n in tally.products.items()),
        memory=tally.moved / bandwidth,
        host=tally.kernels * KERNEL,
        hideable=times[True],
        waiting=times[False],
    )


def _product(product: Product, accelerator: Accelerator, bandwidth: float) -> float:
    # float64 is rare and slow: like float32 here, whose rate is no more than twice as high.
    rate = accelerator.products.get(product.dtype, accelerator.products["fp32"])
    return max(product.flops / (PRODUCTS * rate), product.bytes / bandwidth)


def message_time(message: Message, accelerator: Accelerator) -> float:
    """Seconds of one message: latency, and its bytes over the narrowest place of the ring."""
    if message.processes == 1:
        return 0.0
    width = accelerator.link
    if message.machines > 1:
        # All of a machine's processes that take part send through their own network links: shares
        # of the ring's messages, but what each has for others itself.
        beside = min(message.processes / message.machines, PER_MACHINE)
        beside = 1 if message.name == "all_to_all" else beside
        width = min(width, beside * accelerator.network)
    return MESSAGE + message.processes * HOP + message.wire_bytes / (LINKS * width)


def needed(peak: int) -> float:
    """GiB of an accelerator's memory that a step takes whose tensors take ``peak`` bytes."""
    return (1 + FRAGMENTS) * peak / 2**30 + CONTEXT
