"""How long a step takes, by what it does: data sheets, and assumptions, each a constant here."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import frozen

from dinov3_estimate.tally import PER_MACHINE, Message, Product, Tally
from dinov3_framework.contracts.running import Rows
from dinov3_framework.errors import UserError

GIGA, TERA = 1e9, 1e12
# Shares of the data sheet's rates that are reached.
PRODUCTS, BANDWIDTH, LINKS = 0.65, 0.75, 0.8
KERNEL = 6e-6  # seconds in which the host starts one operation
MESSAGE, HOP = 20e-6, 1e-6  # seconds that a message takes at least: itself, and for each process
HIDDEN = 0.8  # share of the computing during which messages of sharding may run
# Memory beside tensors: fragments of the allocator, and what CUDA, NCCL and cuBLAS take.
FRAGMENTS, CONTEXT = 0.08, 1.5  # a share, GiB


# --------------------------------------------------------------------------- accelerators
@frozen
class Accelerator:
    """One accelerator with its links. Rates are those of data sheets, without sparsity."""

    title: str
    memory: float  # GiB that a program can have
    products: Mapping[str, float]  # floating-point operations a second of matrix products, by type
    bandwidth: float  # bytes a second of its memory
    link: float  # bytes a second to the others of its machine, one way
    network: float  # bytes a second to other machines, its share
    price: float | None  # assumed, US dollars an hour; None where there is no usual one


def _rates(bf16: float, tf32: float, fp32: float, fp8: float) -> dict[str, float]:
    rates = {"bf16": bf16, "fp16": bf16, "tf32": tf32, "fp32": fp32, "fp8": fp8}
    return {dtype: rate * TERA for dtype, rate in rates.items()}


_HOPPER = _rates(989, 495, 67, 1979)
# GB/s one way: PCIe of 16 lanes by generation, and Ethernet of 25 Gb/s, which is assumed.
_PCIE3, _PCIE4, _PCIE5, _LAN = 15.8, 31.5, 63, 3.1
_TURING = _rates(8.1, 8.1, 8.1, 8.1) | {"fp16": 65 * TERA}  # bf16 and tf32 are as slow as fp32
_TABLE = (
    # name, title, memory, products, bandwidth (TB/s), link, network (GB/s), price
    # Without fp8 (A100, A10, T4), such products are calculated in bf16.
    ("a100", "A100 SXM 80 GB", 79.1, _rates(312, 156, 19.5, 312), 2.04, 300, 25, 1.8),
    ("h100", "H100 SXM 80 GB", 79.1, _HOPPER, 3.35, 450, 50, 3.0),
    ("h200", "H200 SXM 141 GB", 139.8, _HOPPER, 4.8, 450, 50, 3.5),
    ("b200", "B200 SXM 180 GB", 178.3, _rates(2250, 1125, 75, 4500), 7.7, 900, 50, 5.5),
    # NVIDIA's data sheets of L40S, L4, A10 and T4, and its white papers on the Ada and the RTX
    # Blackwell architecture for the RTX cards: products that accumulate in fp32, as torch's do.
    # Memory is what torch finds there in all.
    ("rtx4090", "RTX 4090 24 GB", 23.5, _rates(165, 83, 83, 330), 1.01, _PCIE4, _LAN, None),
    ("rtx5090", "RTX 5090 32 GB", 31.3, _rates(209, 105, 105, 419), 1.79, _PCIE5, _LAN, None),
    ("l40s", "L40S 48 GB", 44.4, _rates(362, 183, 91.6, 733), 0.864, _PCIE4, _LAN, None),
    ("l4", "L4 24 GB", 22.0, _rates(121, 60, 30.3, 242), 0.3, _PCIE4, _LAN, None),
    ("a10", "A10 24 GB", 22.0, _rates(125, 62.5, 31.2, 125), 0.6, _PCIE4, _LAN, None),
    ("t4", "T4 16 GB", 14.6, _TURING, 0.3, _PCIE3, _LAN, None),
)
ACCELERATORS = {
    name: Accelerator(title, memory, products, bandwidth * TERA, link * GIGA, network * GIGA, price)
    for name, title, memory, products, bandwidth, link, network, price in _TABLE
}


def accelerator(name: str) -> Accelerator:
    """The accelerator called so; raises ``UserError`` for one that the table does not have."""
    found = ACCELERATORS.get(name.lower())
    if found is None:
        raise UserError(f"--accelerator {name}: unknown; there are {', '.join(ACCELERATORS)}")
    return found


# --------------------------------------------------------------------------- time
@frozen
class StepTime:
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


def step_time(tally: Tally, accelerator: Accelerator) -> StepTime:
    """How long the step that ``tally`` counted takes."""
    bandwidth = BANDWIDTH * accelerator.bandwidth
    times = {True: 0.0, False: 0.0}
    for message, count in tally.messages.items():
        times[message.can_hide] += count * message_time(message, accelerator)
    return StepTime(
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


def assumptions(accelerator: Accelerator) -> Rows:
    """What estimates rest on, for a person to read."""
    rates = accelerator.products
    rows = [
        (
            "matrix products",
            f"{PRODUCTS:.0%} of {rates['bf16'] / TERA:,.0f} (bf16), "
            f"{rates['fp32'] / TERA:,.0f} (fp32), {rates['fp8'] / TERA:,.0f} (fp8) TFLOP/s",
        ),
        (
            "other operations",
            f"{BANDWIDTH:.0%} of {accelerator.bandwidth / TERA:.2f} TB/s, nothing fused; "
            f"{KERNEL * 1e6:.0f} us to start each",
        ),
        (
            "messages",
            f"rings at {LINKS:.0%} of {accelerator.link / GIGA:.0f} GB/s in a machine, "
            f"{accelerator.network / GIGA:.0f} GB/s an accelerator between machines; "
            f"{MESSAGE * 1e6:.0f} us each and {HOP * 1e6:.0f} us a process",
        ),
        (
            "overlap",
            "messages of sharding and of the backward pass run beside up to "
            f"{HIDDEN:.0%} of the computing; others are waited for",
        ),
        (
            "memory",
            f"{FRAGMENTS:.0%} on top for fragments, {CONTEXT:g} GiB for CUDA, "
            "NCCL and cuBLAS; kernels' own scratch space is not seen",
        ),
        ("left aside", "reading images, observers, checkpoints, evaluation"),
    ]
    if accelerator.price is not None:
        rows.append(("price", f"{accelerator.price:.2f} US dollars an hour and accelerator"))
    return rows
