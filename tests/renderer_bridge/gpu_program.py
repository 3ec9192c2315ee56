"""Run by test_gpu_program.py: what XLA's GPU compiler makes of the gsplat back end, for four GPUs that are not there.

Each renders its own view of replicated Gaussians, forward and backward. Prints one JSON line.
"""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import torch_ops
from jax._src import compiler
from jax.sharding import NamedSharding, PartitionSpec

from pointillist_jax.scaling.gpu_programs import gpu_devices
from renderer_bridge import rasterize
from renderer_bridge.torch_kernels import DirectKernel

G, SIDE, GPUS = 10_000, 256, 4
CAPACITY = 8 * G
_INSTRUCTION = re.compile(r"= (?:\([^=]*?\)|\S+) ([\w-]+)\(")


def main() -> None:
    leave_callbacks_out()
    mesh = jax.make_mesh((GPUS,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=gpu_devices(GPUS))
    whole, by_view = PartitionSpec(), PartitionSpec("data")

    def local(gaussians, cameras, target):
        def loss(gaussians):
            image, _, _ = rasterize(
                *gaussians, *cameras, SIDE, SIDE, backend="gsplat", capacity=CAPACITY, _kernel=DirectKernel(torch_ops)
            )
            return jax.lax.psum(jnp.sum((image - target) ** 2), "data")

        return jax.value_and_grad(loss)(gaussians)

    def abstract(spec, *shapes):
        sharding = NamedSharding(mesh, spec)
        return tuple(jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding) for shape in shapes)

    step = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(whole, by_view, by_view), out_specs=(whole, whole)))
    compiled = step.lower(
        abstract(whole, (G, 3), (G, 4), (G, 3), (G,), (G, 3)),
        abstract(by_view, (GPUS, 4, 4), (GPUS, 3, 3)),
        *abstract(by_view, (GPUS, SIDE, SIDE, 3)),
    ).compile()
    text = compiled.as_text()
    entry = text[text.index("\nENTRY") :]
    report = {
        "callbacks": len(re.findall(r'custom_call_target="xla_buffer_python_gpu_callback"', text)),
        "custom_calls": text.count("custom_call_target="),
        "kinds": sorted(set(_INSTRUCTION.findall(text))),
        "host_memory": "S(5)" in text,
        "kernels": sum(kind in ("fusion", "reduce", "custom-call") for kind in _INSTRUCTION.findall(entry)),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }
    print(json.dumps(report))


def leave_callbacks_out() -> None:
    """A compiler without a device takes no Python functions. The program only refers to them by number."""
    compile_and_load = compiler.backend_compile_and_load

    def without(backend, module, executable_devices, options, host_callbacks):
        assert len(host_callbacks) == 2
        return compile_and_load(backend, module, executable_devices, options, [])

    compiler.backend_compile_and_load = without


if __name__ == "__main__":
    main()
