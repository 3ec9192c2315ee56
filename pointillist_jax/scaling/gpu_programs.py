"""Programs of XLA's GPU compiler, made on a machine that has no GPU.

JAX's CUDA plugin compiles for a GPU that is only described to it, however many and in however many machines. The
programs cannot run here, but they say what a device holds and which collectives it takes part in, as on the real mesh.
Kernels are not tuned, because that needs the device: workspaces of tuned ones are not counted. Attention is `chunked`,
because cuDNN's plans are made on the device as well.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import jax
from jax.experimental import topologies

from pointillist_jax.files import UserError

PER_MACHINE = 8
# What the compiler asks about a device: NVIDIA's H100 SXM, from its datasheet and the CUDA programming guide's table of
# compute capability 9.0. Only kernels depend on these figures.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  clock_rate_ghz: 1.98
  l2_cache_size: 52428800
  memory_bandwidth: 3350000000000
  device_memory_size: 85899345920
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# Its own folder, which only processes that compile look into: without a GPU the plugin complains in every program.
FOLDER = Path("outputs/gpu_compiler")
INSTALL = (
    f"pip install --upgrade --no-deps --target {FOLDER} jax-cuda12-plugin=={jax.__version__} "
    f"jax-cuda12-pjrt=={jax.__version__}"
)


def has_gpu_compiler() -> bool:
    """Whether JAX's CUDA plugin lies in `FOLDER` or in this environment, with GPUs or without."""
    if (FOLDER / "jax_plugins").is_dir():
        return True
    found = importlib.util.find_spec("jax_plugins") is not None
    return found and any(importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (12, 13))


def require_gpu_compiler() -> None:
    """Raises UserError, with how to get it, if `has_gpu_compiler` says no."""
    if not has_gpu_compiler():
        raise UserError(f"XLA's GPU compiler is not installed: {INSTALL}, or take --compiler=cpu.")


def environment() -> dict[str, str]:
    """Variables of a process that is to call `gpu_devices`, to be set before it starts."""
    untuned = "--xla_gpu_autotune_level=0"
    path = [str(FOLDER.resolve())] if FOLDER.is_dir() else []
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, [*path, os.environ.get("PYTHONPATH")])),
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {untuned}".strip(),
    }


def gpu_devices(count: int) -> list[jax.Device]:
    """So many H100 in machines of eight: a mesh of them can be compiled for.

    Raises:
      UserError: the plugin is missing, or too old to compile without a GPU.
    """
    require_gpu_compiler()
    machines = max(count // PER_MACHINE, 1)
    try:
        described = topologies.get_topology_desc(
            platform="cuda", target_config=H100, topology=f"{machines}x1x{count // machines}"
        )
    except (NotImplementedError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"XLA's GPU compiler does not work without a GPU here ({reason}): {INSTALL}.") from None
    return list(described.devices)
