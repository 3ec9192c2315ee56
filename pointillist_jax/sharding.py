"""Device meshes and the one table that says how arrays lie on them (DESIGN §10).

A parameter names its axes logically (`nn.with_logical_partitioning`); `RULES` maps the names to mesh axes. The same
train step then runs on one device or many: only the mesh changes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from pointillist_jax.files import UserError
from pointillist_jax.peers import join_job

AXES = ("data", "fsdp", "tensor", "context")

# Logical axis → mesh axis. A tuple shards one array axis over several mesh axes; None keeps it whole on every device.
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", ("data", "fsdp")),  # fsdp devices also hold different examples: only their parameters are sliced.
    ("length", "context"),  # Positions of a window.
    ("embed", "fsdp"),  # The width of every weight matrix: gathered where it is used.
    ("vocab", "tensor"),
    ("table_embed", None),  # A table sliced on both axes makes `table[tokens]` gather it whole (facts/jax.md).
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("head_dim", None),
    ("layers", None),
    ("norm", None),
)


def make_mesh(text: str = "", devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh from a flag such as "data:2,fsdp:4".

    Args:
      text: sizes by axis name; an axis left out has size 1, but `data` takes all devices that are left.
      devices: all of this job's by default.

    Raises:
      UserError: an unknown or repeated axis, or sizes that do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = tuple(mesh_sizes(text, len(devices)).values())
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def mesh_sizes(text: str, devices: int) -> dict[str, int]:
    """Size by axis of `make_mesh(text)` over so many devices; raises as it does."""
    sizes = dict.fromkeys(AXES, 1)
    named: set[str] = set()
    for part in filter(None, text.replace(" ", "").split(",")):
        match = re.fullmatch(r"(\w+):(\d{1,6})", part)
        if not match or match[1] not in sizes or match[1] in named or int(match[2]) == 0:
            raise UserError(f"--mesh={text}: {part!r} is no <axis>:<size>; axes are {', '.join(AXES)}, each once.")
        named.add(match[1])
        sizes[match[1]] = int(match[2])
    total = math.prod(sizes.values())
    if "data" not in named and devices % total == 0:
        sizes["data"] = devices // total
        total = devices
    if total != devices:
        raise UserError(
            f"--mesh={text} asks for {total} devices, but there are {devices}: choose sizes whose product divides "
            "that, or leave `data` out."
        )
    return sizes


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh of devices that need not be there, for shapes and shardings; an axis left out has size 1."""
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def shardings_for(abstract: Any, mesh: Mesh) -> Any:
    """NamedShardings for a pytree of abstract values, as `jax.eval_shape` of a Linen `init` or of a train state gives.

    Values boxed by `nn.with_logical_partitioning` follow `RULES`; others are replicated. The result has the structure
    of `nn.unbox(abstract)`.

    Raises:
      UserError: an axis that does not divide by the mesh axes it is sharded over.
    """

    def one(path, value) -> NamedSharding:
        if not isinstance(value, nn.LogicallyPartitioned):
            return NamedSharding(mesh, PartitionSpec())
        spec = nn.logical_to_mesh_axes(value.names, RULES)
        for size, logical, axes in zip(value.value.shape, value.names, spec, strict=True):
            parts = math.prod(mesh.shape[axis] for axis in _as_tuple(axes))
            if size % parts:
                raise UserError(
                    f"{jax.tree_util.keystr(path)}: its axis {logical!r} of size {size} does not divide into {parts} "
                    f"parts over mesh axes {axes}: make those smaller."
                )
        return NamedSharding(mesh, spec)

    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree_util.tree_map_with_path(one, abstract, is_leaf=is_box)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of a batch's arrays [B, ...]: the first axis over `data` and `fsdp`."""
    return NamedSharding(mesh, nn.logical_to_mesh_axes(("batch",), RULES))


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Lays `x` out on the mesh in use by its logical axes (`RULES`); nothing happens without a mesh.

    An entry may be several logical axes, whose mesh axes are then joined. An axis that does not divide stays whole.
    """
    return jax.lax.with_sharding_constraint(x, logical_spec(x.shape, *axes)) if is_shared() else x


def is_shared() -> bool:
    """Whether arrays here lie on several devices: there is a mesh, and no `shard_map` that cuts along all of it."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(size > 1 for axis, size in mesh.shape.items() if axis not in mesh.manual_axes)


def logical_spec(shape: Sequence[int], *axes: str | tuple[str, ...] | None) -> PartitionSpec:
    """Over which axes of the mesh in use an array lies, from its logical axes (as `constrain` takes them)."""
    cut = [_mesh_axes(names) if parts_of(size, names) > 1 else None for size, names in zip(shape, axes, strict=True)]
    return PartitionSpec(*cut)


def parts_of(size: int, names: str | tuple[str, ...] | None) -> int:
    """Into how many parts the mesh in use cuts an array axis of `size` (`constrain`); 1 if it does not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    parts = math.prod(mesh.shape[axis] for axis in _mesh_axes(names))
    return 1 if size % parts else parts


def _mesh_axes(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    # Inside a `shard_map` arrays are cut along its axes already.
    manual = jax.sharding.get_abstract_mesh().manual_axes
    axes = (axis for name in _as_tuple(names) for axis in _as_tuple(dict(RULES)[name]))
    return tuple(axis for axis in axes if axis not in manual)


def batch_share(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """(index, count): which part of every batch this process reads, of how many.

    Processes that only differ on `tensor` or `context` hold the same examples, so they have to read the same part.

    Args:
      process: index of another process, for tests.

    Raises:
      UserError: this process shares some examples, but not all, with another one.
    """
    process = jax.process_index() if process is None else process
    ids = np.vectorize(lambda device: device.process_index)(mesh.devices).reshape(_batch_parts(mesh), -1)
    held = {i: tuple(np.flatnonzero((ids == i).any(axis=1)).tolist()) for i in set(ids.ravel().tolist())}
    parts = sorted(set(held.values()))
    if sum(map(len, parts)) != len(ids) or len(set(map(len, parts))) > 1:
        raise UserError(
            f"the mesh {dict(mesh.shape)} gives processes overlapping parts of a batch: choose tensor × context so "
            "that it divides the devices of one process or is a multiple of them."
        )
    return parts.index(held[process]), len(parts)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's part of a batch (`batch_share`; NumPy [B / count, ...]) → global arrays on the mesh."""
    sharding = batch_sharding(mesh)
    count = batch_share(mesh)[1] if jax.process_count() > 1 else 1

    def one(x):
        x = np.asarray(x)
        size = x.shape[0] * count
        require_share(size, mesh)
        return jax.make_array_from_process_local_data(sharding, x, (size, *x.shape[1:]))

    return jax.tree.map(one, batch)


def require_share(batch: int, mesh: Mesh) -> None:
    """Raises UserError for a batch of examples that does not divide over the devices that are to share it."""
    if batch % (parts := _batch_parts(mesh)):
        raise UserError(
            f"a batch of {batch} does not divide over data × fsdp = {parts} devices: change the batch size or the mesh."
        )


def _batch_parts(mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in ("data", "fsdp"))


def start_processes(
    coordinator: str, num_processes: int | None = None, process_id: int | None = None, lost_after: float = 30
) -> None:
    """Joins this process to the others of a job. Call it before anything else asks JAX for devices.

    When another process is lost from then on, this one ends with a sentence and exit code 75 (`peers`).

    Args:
      coordinator: "host:port" of process 0; "auto" takes all from SLURM, Kubernetes, Open MPI or a TPU pod; "" is a
        job of one process.
      num_processes, process_id: needed with an explicit coordinator.
      lost_after: seconds without a sign of life after which another process counts as lost.

    Raises:
      UserError: a coordinator without the numbers, or numbers without a coordinator.
    """
    given = num_processes is not None and process_id is not None
    if not coordinator:
        if num_processes is not None or process_id is not None:
            raise UserError("--num_processes and --process_id need --coordinator=<host:port of process 0>.")
        return
    if coordinator != "auto" and not given:
        raise UserError(f"--coordinator={coordinator} needs --num_processes and --process_id as well.")
    # CPU devices of different processes can only talk through gloo; other platforms ignore it.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    join_job(None if coordinator == "auto" else coordinator, num_processes, process_id, lost_after)


def _as_tuple(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else axes
