"""gsplat's CUDA kernels through the bridge: need a CUDA machine with jax, torch and gsplat (`pytest -m gpu`)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scenes

from renderer_bridge import gsplat_dlpack, rasterize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(gsplat_dlpack.unavailable() is not None, reason=str(gsplat_dlpack.unavailable())),
]

W, H = 200, 150


def _inputs(count=3000):
    arrays = (*scenes.random_scene(count, size=0.05), *scenes.cameras(2, W, H))
    return tuple(jnp.asarray(x) for x in arrays)


def _render(backend, *arrays, **options):
    return rasterize(*arrays, W, H, backend=backend, max_alpha=gsplat_dlpack.max_alpha(), **options)


@pytest.mark.parametrize("dlpack", ["callback", "eager"])
@pytest.mark.parametrize("scene", list(scenes.SCENES))
def test_gsplat_agrees_with_the_jax_back_end(scene, dlpack):
    arrays = tuple(jnp.asarray(x) for x in (*scenes.SCENES[scene](), *scenes.cameras(2, W, H)))
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(2, H, W, 3)), jnp.float32)

    def loss(backend, *arrays):
        image, alpha, _ = _render(backend, *arrays, dlpack=dlpack if backend == "gsplat" else "callback")
        return jnp.sum(weight * image), (image, alpha)

    ours, theirs = (
        jax.grad(lambda *a, b=b: loss(b, *a), argnums=range(7), has_aux=True)(*arrays) for b in ("jax", "gsplat")
    )
    for mine, other in zip(ours[1], theirs[1], strict=True):
        # A pixel in ten thousand may sit on a rounding edge of the 1/255 floor or of the stop.
        assert np.mean(np.abs(np.asarray(mine - other)) > 1e-4) < 1e-4
    for mine, other in zip(ours[0], theirs[0], strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-2, atol=5e-3 * float(jnp.abs(mine).max()))


def test_probes_agree_with_the_jax_back_end():
    arrays = _inputs()
    probe = jnp.zeros((2, 3000, 2))

    def gradients(backend):
        def loss(probe, absolute):
            return jnp.sum(_render(backend, *arrays, means2d_probe=probe, absgrad_probe=absolute)[0] ** 2)

        return jax.grad(loss, argnums=(0, 1))(probe, probe)

    for mine, other in zip(gradients("jax"), gradients("gsplat"), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-2, atol=5e-3 * float(jnp.abs(mine).max()))


def test_no_copy_and_no_transfer_to_the_host():
    arrays = _inputs()
    info = _render("jax", *arrays)[2]
    inputs = [info["means2d"], info["conics"], jnp.broadcast_to(arrays[4], (2, 3000, 3)), info["opacities"]]
    inputs += [info["radii"], info["depths"]]
    pointers = []

    def kernel(*arguments):
        pointers.append(arguments[0].data_ptr())
        return gsplat_dlpack.gsplat_kernel(*arguments)

    program = jax.jit(lambda *a: gsplat_dlpack.rasterize_tiles(*a, W, H, kernel=kernel))
    jax.block_until_ready(program(*inputs))
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(program(*inputs))
    assert pointers == [inputs[0].unsafe_buffer_pointer()] * 2


def test_under_scan_and_remat():
    arrays = _inputs()

    def by_scan(means):
        def step(total, camera):
            image = _render("gsplat", means, *arrays[1:5], *(x[None] for x in camera))[0]
            return total + jnp.sum(image**2), None

        return jax.lax.scan(jax.checkpoint(step), 0.0, arrays[5:])[0]

    expected = jax.grad(lambda m: jnp.sum(_render("gsplat", m, *arrays[1:])[0] ** 2))(arrays[0])
    ours = jax.jit(jax.grad(by_scan))(arrays[0])
    np.testing.assert_allclose(ours, expected, rtol=1e-2, atol=1e-3 * float(jnp.abs(expected).max()))


def test_memory_does_not_grow_from_call_to_call():
    import torch

    arrays = _inputs()
    program = jax.jit(jax.grad(lambda m: jnp.sum(_render("gsplat", m, *arrays[1:])[0] ** 2)))
    for _ in range(3):
        jax.block_until_ready(program(arrays[0]))
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        jax.block_until_ready(program(arrays[0]))
    assert torch.cuda.memory_allocated() <= before
