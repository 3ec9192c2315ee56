"""Meshes that are worth a try for so many devices."""

from __future__ import annotations

import math
import re

from pointillist_jax.configs import Config
from pointillist_jax.sharding import mesh_sizes

# Ways of `tensor` and `context` that are tried: their traffic stays inside a machine of eight.
INSIDE = (2, 4, 8)


def meshes_of(count: int, config: Config, stage: str, given: str = "") -> list[str]:
    """Meshes of so many devices that the model divides over: those given, or all that are worth a try."""
    if given:
        return [mesh for mesh in given.split(";") if takes(mesh, count) and _fits(mesh, count, config)]
    tried = [f"data:{count}"]
    tried += [f"data:{count // n},fsdp:{n}" for n in sorted({8, min(count, 64)}) if count > 1 and count % n == 0]
    if stage == "one":
        # Eight ways are worth a compilation where few devices leave no other choice.
        inside = [n for n in INSIDE if count % n == 0 and (n < 8 or count <= 16)]
        tried += [f"data:{count // n},{axis}:{n}" for axis in ("tensor", "context") for n in inside]
        tried += (
            [f"data:{count // 8},fsdp:4,tensor:2", f"data:{count // 8},tensor:2,context:4"] if count % 8 == 0 else []
        )
    return [mesh for mesh in dict.fromkeys(tried) if _fits(mesh, count, config)]


def takes(mesh: str, count: int) -> bool:
    """Whether a mesh in words (`sharding.mesh_sizes`) is one of so many devices. Raises UserError for what is none."""
    named = math.prod(map(int, re.findall(r":(\d{1,6})", mesh)))
    mesh_sizes(mesh, named)
    return named == count or ("data" not in mesh and count % named == 0)


def _fits(mesh: str, count: int, config: Config) -> bool:
    sizes, model = mesh_sizes(mesh, count), config.model
    heads = math.gcd(model.heads, model.num_kv_heads)
    return not (
        heads % (sizes["tensor"] * sizes["context"])
        or model.width % sizes["fsdp"]
        or model.mlp_width % sizes["tensor"]
        or (model.window // 4) % sizes["context"]
    )


def powers(count: int) -> list[int]:
    """1, 2, 4 … and the count itself."""
    return sorted({2**n for n in range(count.bit_length()) if 2**n <= count} | {count})
