"""How long a training step should take: arithmetic, memory traffic and collectives against a device's datasheet.

The model, so that it can be doubted:
  compute     FLOPs of a device / (peak · utilisation), or its memory traffic / bandwidth if that is longer;
  collective  bytes a device sends (ring algorithms) / the slowest link the group spans + latency;
  exposed     collectives over `tensor` and `context` wait for their input and are waited for, so they add up; those
              over `data` and `fsdp` (gradients, gathered weights) can run beside the arithmetic;
  at best     max(compute, beside) + exposed;
  at worst    compute + beside + exposed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from pointillist_jax.scaling.collectives import Collective
from pointillist_jax.scaling.hardware import Hardware

# What wide products reach of a datasheet's peak when nothing else is in the way (facts/jax.md, performance references).
UTILISATION = 0.5
BESIDE = frozenset({"data", "fsdp"})


@dataclasses.dataclass(frozen=True)
class StepCost:
    """What one device does in one step.

    Attributes:
      flops: of its products. traffic: bytes to and from its memory.
      collectives: of the compiled program.
    """

    flops: float
    traffic: float
    collectives: tuple[Collective, ...] = ()


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Predicted seconds of a step (module docstring)."""

    compute: float
    beside: float
    exposed: float

    @property
    def best(self) -> float:
        return max(self.compute, self.beside) + self.exposed

    @property
    def worst(self) -> float:
        return self.compute + self.beside + self.exposed

    @property
    def middle(self) -> float:
        """Half of what can be hidden is: the figure that tables show."""
        return (self.best + self.worst) / 2


def step_time(cost: StepCost, hardware: Hardware, utilisation: float = UTILISATION) -> StepTime:
    compute = max(cost.flops / (hardware.peak.flops * utilisation), cost.traffic / hardware.peak.bandwidth)
    beside = [one for one in cost.collectives if BESIDE.issuperset(one.axes)]
    exposed = [one for one in cost.collectives if not BESIDE.issuperset(one.axes)]
    return StepTime(compute, communication(beside, hardware), communication(exposed, hardware))


def communication(found: Iterable[Collective], hardware: Hardware) -> float:
    """Seconds of collectives one after another."""
    total = 0.0
    for one in found:
        # Devices are numbered machine by machine: a group that reaches this far leaves the machine.
        far = one.spread >= hardware.per_machine
        rounds = one.times * (2 if one.kind == "all-reduce" else 1) * math.log2(one.group)
        total += one.wire / (hardware.network if far else hardware.link) + rounds * hardware.latency[far]
    return total
