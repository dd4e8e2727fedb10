"""What accelerators can do: data sheets, and prices that are assumptions."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import frozen

from dinov3_framework.errors import UserError

GIGA, TERA = 1e9, 1e12
PER_MACHINE = 8  # accelerators that NVLink joins


@frozen
class Accelerator:
    """One accelerator with its links. Rates are those of data sheets, without sparsity."""

    title: str
    memory: float  # GiB that a program can have
    products: Mapping[str, float]  # floating-point operations a second of matrix products, by type
    bandwidth: float  # bytes a second of its memory
    link: float  # bytes a second to the others of its machine, one way
    network: float  # bytes a second to other machines, its share
    price: float  # assumed, US dollars an hour


def _rates(bf16: float, tf32: float, fp32: float, fp8: float) -> dict[str, float]:
    return {
        "bf16": bf16 * TERA,
        "fp16": bf16 * TERA,
        "tf32": tf32 * TERA,
        "fp32": fp32 * TERA,
        "fp8": fp8 * TERA,
    }


ACCELERATORS = {
    # It has no fp8: such products are calculated in bf16.
    "a100": Accelerator(
        "A100 SXM 80 GB",
        memory=79.1,
        products=_rates(312, 156, 19.5, 312),
        bandwidth=2.04 * TERA,
        link=300 * GIGA,
        network=25 * GIGA,
        price=1.8,
    ),
    "h100": Accelerator(
        "H100 SXM 80 GB",
        memory=79.1,
        products=_rates(989, 495, 67, 1979),
        bandwidth=3.35 * TERA,
        link=450 * GIGA,
        network=50 * GIGA,
        price=3.0,
    ),
    "h200": Accelerator(
        "H200 SXM 141 GB",
        memory=139.8,
        products=_rates(989, 495, 67, 1979),
        bandwidth=4.8 * TERA,
        link=450 * GIGA,
        network=50 * GIGA,
        price=3.5,
    ),
    "b200": Accelerator(
        "B200 SXM 180 GB",
        memory=178.3,
        products=_rates(2250, 1125, 75, 4500),
        bandwidth=7.7 * TERA,
        link=900 * GIGA,
        network=50 * GIGA,
        price=5.5,
    ),
}


def accelerator(name: str) -> Accelerator:
    """The accelerator called so; raises ``UserError`` for one that the table does not have."""
    found = ACCELERATORS.get(name.lower())
    if found is None:
        raise UserError(f"--accelerator {name}: unknown; there are {', '.join(ACCELERATORS)}")
    return found
