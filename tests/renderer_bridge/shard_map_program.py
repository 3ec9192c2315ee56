"""Run by test_sharding.py in its own process with four fake CPU devices: each renders its own views.

Prints two JSON lines: largest differences to the single-device result, per back end; what an exception looks like.
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import scenes
import torch_ops

from renderer_bridge import rasterize
from renderer_bridge.torch_kernels import DirectKernel

W, H, G, C = 40, 32, 40, 4


def main() -> None:
    assert jax.device_count() == 4
    gaussians = tuple(jnp.asarray(x) for x in scenes.random_scene(G, size=0.15))
    cameras = tuple(jnp.asarray(x) for x in scenes.cameras(C, W, H))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec
    views = []

    class Recording(DirectKernel):
        def forward(self, *arguments):
            views.append(len(arguments[0].means2d))
            return super().forward(*arguments)

        def backward(self, *arguments):
            views.append(len(arguments[0].means2d))
            return super().backward(*arguments)

    class Failing(DirectKernel):
        def intersect(self, *arguments):
            raise ValueError("no more tiles")

    def loss(backend, kernel):
        def function(gaussians, cameras):
            image, _, _ = rasterize(*gaussians, *cameras, W, H, backend=backend, capacity=4096, _kernel=kernel)
            ramp = jnp.linspace(-1, 1, W * H * 3).reshape(1, H, W, 3)
            return jnp.sum(ramp * image), image

        return function

    def sharded(function):
        def local(gaussians, cameras):
            def total(gaussians):
                value, image = function(gaussians, cameras)
                return jax.lax.psum(value, "data"), image

            # The gradient of the replicated Gaussians comes out summed over the devices, or this would not type.
            (value, image), gradient = jax.value_and_grad(total, has_aux=True)(gaussians)
            return value, image, gradient

        return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P("data"), P())))

    (value, image), gradient = jax.jit(jax.value_and_grad(loss("jax", None), has_aux=True))(gaussians, cameras)
    report = {}
    for backend, k in (("jax", None), ("gsplat", Recording(torch_ops))):
        v, i, g = sharded(loss(backend, k))(gaussians, cameras)
        report[backend] = {
            "value": abs(float(v - value)) / abs(float(value)),
            "image": float(jnp.abs(i - image).max()),
            "gradient": max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(g, gradient, strict=True)),
        }
    report["views"] = sorted(views)
    print(json.dumps(report))

    try:
        jax.block_until_ready(sharded(loss("gsplat", Failing(torch_ops)))(gaussians, cameras))
    except Exception as error:
        print(json.dumps({"error": str(error)}))


if __name__ == "__main__":
    main()
