"""What estimates rest on, for a person to read."""

from __future__ import annotations

from dinov3_estimate import estimate as assumed
from dinov3_estimate.accelerators import TERA, Accelerator


def rows(accelerator: Accelerator) -> list[tuple[str, str]]:
    rates = accelerator.products
    return [
        (
            "matrix products",
            f"{assumed.PRODUCTS:.0%} of {rates['bf16'] / TERA:,.0f} (bf16), "
            f"{rates['fp32'] / TERA:,.0f} (fp32), {rates['fp8'] / TERA:,.0f} (fp8) TFLOP/s",
        ),
        (
            "other operations",
            f"{assumed.BANDWIDTH:.0%} of {accelerator.bandwidth / TERA:.2f} TB/s, nothing fused; "
            f"{assumed.KERNEL * 1e6:.0f} us to start each",
        ),
        (
            "messages",
            f"rings at {assumed.LINKS:.0%} of {accelerator.link / 1e9:.0f} GB/s in a machine, "
            f"{accelerator.network / 1e9:.0f} GB/s an accelerator between machines; "
            f"{assumed.MESSAGE * 1e6:.0f} us each and {assumed.HOP * 1e6:.0f} us a process",
        ),
        (
            "overlap",
            "messages of sharding and of the backward pass run beside up to "
            f"{assumed.HIDDEN:.0%} of the computing; others are waited for",
        ),
        (
            "memory",
            f"{assumed.FRAGMENTS:.0%} on top for fragments, {assumed.CONTEXT:g} GiB for CUDA, "
            "NCCL and cuBLAS; kernels' own scratch space is not seen",
        ),
        ("left aside", "reading images, observers, checkpoints, evaluation"),
        ("price", f"{accelerator.price:.2f} US dollars an hour and accelerator"),
    ]
