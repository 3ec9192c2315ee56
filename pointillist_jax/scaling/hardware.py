"""Datasheet figures of accelerators in machines of eight, for predictions: nothing here is measured."""

from __future__ import annotations

import dataclasses

from pointillist_jax.flops import PEAKS, Peak


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One device, and how it reaches the others.

    Attributes:
      peak: dense bf16 FLOP/s and bytes/s of its memory.
      memory: bytes.
      link: bytes/s to the others of its machine, each direction. network: to other machines, a device's own share.
      per_machine: devices that `link` joins.
      latency: seconds before the first byte of a collective, inside a machine and between machines (ours: what NCCL
        takes for small messages, rounded).
    """

    peak: Peak
    memory: float
    link: float
    network: float
    per_machine: int = 8
    latency: tuple[float, float] = (10e-6, 30e-6)


GIGA = 1e9
# NVIDIA's datasheets of the SXM modules; NVLink figures there count both directions. Network: one 200 Gbit/s port a GPU
# in DGX A100, one 400 Gbit/s port in DGX H100 and H200; the same is taken for H20.
HARDWARE = {
    "A100": Hardware(PEAKS["A100"], 80 * GIGA, 300 * GIGA, 25 * GIGA),
    "H100": Hardware(PEAKS["H100"], 80 * GIGA, 450 * GIGA, 50 * GIGA),
    "H200": Hardware(PEAKS["H200"], 141 * GIGA, 450 * GIGA, 50 * GIGA),
    "H20": Hardware(PEAKS["H20"], 96 * GIGA, 450 * GIGA, 50 * GIGA),
}
