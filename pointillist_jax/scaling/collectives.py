"""The collectives of a compiled program: which, over which mesh axes, how many bytes, how often a step.

XLA prints them as text; loops count by their trip counts. Bytes are of one device.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from pointillist_jax.files import UserError

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "f16": 2, "bf16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4,
          "f64": 8, "s64": 8, "u64": 8}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction of a compiled program.

    Attributes:
      kind: of `KINDS`.
      axes: mesh axes on which the devices of a group differ, in the mesh's order.
      group: devices that take part together. spread: the farthest two of them are apart, by their numbers in the mesh.
      payload: bytes of one device: what an all-reduce sums, what an all-gather ends with, what a reduce-scatter begins
        with, what the others send and keep.
      elements: numbers in the payload.
      times: executions in one run of the program.
      where: its JAX operation (`op_name`).
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    spread: int
    payload: int
    elements: int
    times: int
    where: str

    @property
    def bytes(self) -> int:
        """Payload of all executions."""
        return self.times * self.payload

    @property
    def wire(self) -> float:
        """Bytes a device sends in all executions, by the ring algorithms (all but its own part, twice to reduce)."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return factor * self.bytes


def collectives(program: str, mesh: Mapping[str, int]) -> list[Collective]:
    """All collectives of a compiled program that cross devices.

    Args:
      program: `compiled.as_text()`.
      mesh: size by axis, in the order in which devices are numbered (`Mesh.shape` of `sharding.make_mesh`).

    Raises:
      UserError: device groups in a form that is not known here, or a loop without a known trip count around one.
    """
    bodies, entry = _computations(program)
    runs = _executions(bodies, entry)
    found = []
    for name, lines in bodies.items():
        for line in lines:
            match = re.search(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(", line)
            if not match or not runs.get(name):
                continue
            if math.isnan(runs[name]):
                raise UserError(f"a {match[2]} stands in a loop whose length XLA does not know: {line.strip()[:200]}")
            groups = _groups(line, math.prod(mesh.values()))
            if groups.shape[1] < 2:
                continue
            payload, elements = _size(match[1], match[2], started=f"{match[2]}-start(" in line, group=groups.shape[1])
            where = re.search(r'op_name="([^"]*)"', line)
            axes, spread = _axes(groups, mesh), int((groups.max(1) - groups.min(1)).max())
            found.append(
                Collective(match[2], axes, groups.shape[1], spread, payload, elements, int(runs[name]),
                           where[1] if where else "")
            )  # fmt: skip
    return found


def inventory(found: Iterable[Collective]) -> dict[str, dict[str, int]]:
    """{"all-reduce over data+fsdp": {"count", "bytes"}} of one run, largest first."""
    table: dict[str, dict[str, int]] = collections.defaultdict(lambda: {"count": 0, "bytes": 0})
    for one in found:
        row = table[f"{one.kind} over {'+'.join(one.axes)}"]
        row["count"] += one.times
        row["bytes"] += one.bytes
    return dict(sorted(table.items(), key=lambda item: -item[1]["bytes"]))


def _computations(program: str) -> tuple[dict[str, list[str]], str]:
    """Lines by computation, and the entry's name."""
    bodies: dict[str, list[str]] = {}
    entry, lines = "", None
    for line in program.splitlines():
        if lines is None:
            if match := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                lines = bodies.setdefault(match[2], [])
                entry = match[2] if match[1] else entry
        elif line.startswith("}"):
            lines = None
        else:
            lines.append(line)
    return bodies, entry


def _executions(bodies: Mapping[str, Sequence[str]], entry: str) -> dict[str, float]:
    """How often each computation runs; NaN where a loop's length is not known."""
    runs: dict[str, float] = collections.defaultdict(float)

    def visit(name: str, times: float) -> None:
        runs[name] += times
        for line in bodies.get(name, ()):
            for called, factor in _calls(line):
                visit(called, times * factor)

    visit(entry, 1.0)
    return runs


def _calls(line: str) -> Iterator[tuple[str, float]]:
    """(computation, executions) that an instruction starts. Both branches of a condition count, an upper bound."""
    if match := re.search(r"body=%?([\w.\-]+)", line):
        count = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
        yield match[1], float(count[1]) if count else math.nan
    elif re.search(r" (?:call|async-start|fusion)\(", line):
        for name in re.findall(r"(?:to_apply|calls)=%?([\w.\-]+)", line):
            yield name, 1.0
    elif match := re.search(r"branch_computations=\{([^}]*)\}", line):
        for name in match[1].split(","):
            yield name.strip().lstrip("%"), 1.0
    else:
        for name in re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line):
            yield name, 1.0


def _size(shape: str, kind: str, *, started: bool, group: int) -> tuple[int, int]:
    """(bytes, elements) of the payload, from the printed type of the result."""
    parts = [
        (_BYTES[dtype], math.prod(map(int, filter(None, sizes.split(",")))))
        for dtype, sizes in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape)
        if not (started and (dtype, sizes) == ("u32", ""))  # A context.
    ]
    if started and kind != "all-reduce":
        parts = parts[len(parts) // 2 :]  # (operands…, results…, contexts…)
    scale = group if kind == "reduce-scatter" else 1
    return scale * sum(size * number for size, number in parts), scale * sum(number for _, number in parts)


def _groups(line: str, devices: int) -> np.ndarray:
    """[groups, members] numbers of devices, from any of the forms that XLA prints."""
    if match := re.search(r"source_target_pairs=\{(.*?)\}\}?[,\s]", line + " "):
        pairs = np.array([int(n) for n in re.findall(r"\d+", match[1])]).reshape(-1, 2)
        return pairs[pairs[:, 0] != pairs[:, 1]] if len(pairs) else np.zeros((0, 1), int)
    if match := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", line):
        rows = [[int(n) for n in row.split(",")] for row in re.findall(r"\{([\d,]+)\}", match[1])]
        return np.array(rows or [range(devices)])
    # [groups,members]<=[sizes]T(permutation): numbers in order, transposed, cut.
    iota = r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?"
    if match := re.search(rf"replica_groups={iota}", line):
        return _order(match[2] or str(devices), match[3]).reshape(*map(int, match[1].split(",")))
    # mesh['axis_0'=4,'axis_1'=2], device_ids=([4,2]T(1,0)) {'axis_1'}
    if match := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\)?)\))? \{(.*?)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", match[2] or "")
        numbers = _order(order[1], order[2]) if order else np.arange(math.prod(sizes.values()))
        named = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", match[3])
        if named and not any(before for _, before, _ in named):
            names = list(sizes)
            moved = [names.index(name) for name, _, _ in named]
            grid = numbers.reshape(*sizes.values())
            kept = [i for i in range(len(names)) if i not in moved]
            return grid.transpose(*kept, *moved).reshape(-1, math.prod(sizes[name] for name, _, _ in named))
    raise UserError(f"the device groups of this collective have an unknown form: {line.strip()[:300]}")


def _order(sizes: str, permutation: str | None) -> np.ndarray:
    grid = np.arange(math.prod(map(int, sizes.split(",")))).reshape(*map(int, sizes.split(",")))
    return (grid.transpose(*map(int, permutation.split(","))) if permutation else grid).ravel()


def _axes(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes on which devices of one group differ."""
    places = np.stack(np.unravel_index(groups, tuple(mesh.values())))  # [axis, group, member]
    differs = (places != places[:, :, :1]).any((1, 2))
    return tuple(itertools.compress(mesh, differs))
