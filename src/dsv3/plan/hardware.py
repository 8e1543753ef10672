"""Machines: peak products, memory, bandwidth, links, draw and price of one device, with where it is from.

Bytes and FLOP/s are decimal (1 GB = 1e9), dense (no sparsity), one direction a link. A GPU's memory is the
vendor's figure taken as 1e9 bytes a GB, a little less than its driver shows; a PC's modules are GiB.
Prices are assumptions but the H800's, which is the report's: change them with ``--usd-hour``. Node watts are
the whole node's greatest draw divided by its GPUs, so energy is an upper bound without cooling.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv3.common.errors import UserError, nearest

GB, GIB = 10**9, 2**30


@dataclass(frozen=True)
class Hardware:
    """One device. ``nvlink`` and ``network``: bytes a second each way; ``domain``: devices NVLink joins.

    A CPU has no figure for products or links: it is planned by memory and bandwidth alone.
    """

    name: str
    memory: float
    bandwidth: float
    source: str
    bf16: float | None = None
    fp8: float | None = None
    nvlink: float = 0.0
    network: float = 0.0
    domain: int = 1
    node_watts: float = 0.0
    usd_hour: float = 0.0


HARDWARE = {
    machine.name: machine
    for machine in (
        Hardware(
            "h800", 80 * GB, 3.35e12, bf16=989.4e12, fp8=1978.9e12, nvlink=160 * GB, network=50 * GB,
            domain=8, node_watts=10_200 / 8, usd_hour=2.0,
            source="products, memory: NVIDIA H100 data sheet (the same chip); links, price: report 3.2.2, 1",
        ),
        Hardware(
            "h100", 80 * GB, 3.35e12, bf16=989.4e12, fp8=1978.9e12, nvlink=450 * GB, network=50 * GB,
            domain=8, node_watts=10_200 / 8, usd_hour=2.5,
            source="NVIDIA H100 SXM and DGX H100 data sheets; price assumed",
        ),
        Hardware(
            "h200", 141 * GB, 4.8e12, bf16=989.4e12, fp8=1978.9e12, nvlink=450 * GB, network=50 * GB,
            domain=8, node_watts=10_200 / 8, usd_hour=3.0,
            source="NVIDIA H200 SXM and DGX H200 data sheets; price assumed",
        ),
        Hardware(
            "b200", 180 * GB, 8.0e12, bf16=2250e12, fp8=4500e12, nvlink=900 * GB, network=50 * GB,
            domain=8, node_watts=14_300 / 8, usd_hour=4.5,
            source="NVIDIA DGX B200 data sheet; price assumed",
        ),
        Hardware(
            "gb200", 186 * GB, 8.0e12, bf16=2500e12, fp8=5000e12, nvlink=900 * GB, network=50 * GB,
            domain=72, node_watts=120_000 / 72, usd_hour=5.0,
            source="NVIDIA GB200 NVL72 data sheet; price assumed",
        ),
        Hardware(
            "pc-384", 384 * GIB, 307.2e9, source="workstation, 8 channels of DDR5-4800, 8 modules of 48 GiB",
        ),
        Hardware(
            "server-768", 768 * GIB, 614.4e9, source="server, 12 channels of DDR5-6400, 12 modules of 64 GiB",
        ),
    )
}  # fmt: skip


def hardware(name: str, products: bool = True) -> Hardware:
    """The machine of that name. ``products``: refuse one without figures for matrix products."""
    known = [key for key, machine in HARDWARE.items() if machine.bf16 or not products]
    if name not in known:
        raise UserError(f"hardware ({name}) is unknown{nearest(name, known)}; there are {', '.join(known)}")
    return HARDWARE[name]
