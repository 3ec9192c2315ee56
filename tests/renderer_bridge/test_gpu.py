"""gsplat's CUDA kernels through the bridge: need a CUDA machine with jax, torch and gsplat (`pytest -m gpu`)."""

from __future__ import annotations

import collections
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scenes

from renderer_bridge import gsplat_dlpack, rasterize
from renderer_bridge.torch_kernels import gsplat_kernel

pytestmark = pytest.mark.gpu

W, H = 200, 150


@pytest.fixture(autouse=True)
def _gsplat():
    # Here and not when the tests are collected: asking loads, and may have to compile, gsplat's kernels.
    if (reason := gsplat_dlpack.unavailable()) is not None:
        pytest.skip(reason)


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
        # A pixel in ten thousand may sit on a rounding edge of the 1/255 floor or of the stop. The terms of a long
        # needle's sigma are a thousand times their sum: gsplat, built with fast arithmetic, rounds it to 5e-4.
        doubtful = 1e-3 if scene == "needles" else 1e-4
        assert np.mean(np.abs(np.asarray(mine - other)) > 1e-4) < doubtful
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


def test_the_whole_path_agrees_with_gsplat_s_own_rasterization():
    """Projection, spherical harmonics, compensation, depth and background are JAX here and CUDA there."""
    import gsplat
    import torch

    means, quats, scales, opacities, _ = scenes.random_scene(3000, size=0.05)
    rng = np.random.default_rng(0)
    coefficients = rng.normal(0, 0.3, (3000, 16, 3)).astype(np.float32)
    arrays = (means, quats, scales, opacities, coefficients, *scenes.cameras(2, W, H))
    backgrounds = np.asarray([[0.2, 0.4, 0.6], [1.0, 0.0, 0.5]], np.float32)
    weight = rng.normal(size=(2, H, W, 4)).astype(np.float32)
    options = {"sh_degree": 3, "rasterize_mode": "antialiased", "render_mode": "RGB+ED"}

    def loss(*six):
        image, alpha, _ = _render("gsplat", *six, jnp.asarray(arrays[6]), backgrounds=backgrounds, **options)
        return jnp.sum(weight * image), (image, alpha)

    gradients, (image, alpha) = jax.jit(jax.grad(loss, argnums=range(6), has_aux=True))(*map(jnp.asarray, arrays[:6]))
    leaves = [torch.tensor(x, device="cuda", requires_grad=True) for x in arrays[:6]]
    K, behind, bar = (torch.tensor(x, device="cuda") for x in (arrays[6], backgrounds, weight))
    theirs, their_alpha, _ = gsplat.rasterization(
        *leaves[:5], leaves[5], K, W, H, backgrounds=behind, packed=False, **options
    )
    expected = torch.autograd.grad((theirs * bar).sum(), leaves)
    difference = np.abs(np.asarray(image) - theirs.detach().cpu().numpy())
    # Expected depth is a quotient: where next to nothing was seen it means nothing.
    seen = np.asarray(alpha)[..., 0] > 0.01
    assert np.mean(difference[..., :3] > 1e-4) < 1e-3
    assert np.mean(difference[..., 3][seen] > 1e-3) < 1e-3
    assert np.mean(np.abs(np.asarray(alpha) - their_alpha.detach().cpu().numpy()) > 1e-4) < 1e-3
    gradients, expected = ([np.asarray(x) for x in g] for g in (gradients, [x.cpu() for x in expected]))
    for mine, other in zip(gradients, expected, strict=True):
        if other.shape == (2, 4, 4):  # torch's inverse sees the last row too, which is no variable
            mine, other = mine[:, :3], other[:, :3]
        np.testing.assert_allclose(mine, other, rtol=2e-2, atol=1e-2 * np.abs(other).max())


def _tile_step():
    """A jitted forward and backward pass over the tiles alone, its arguments, and the addresses that torch saw."""
    arrays = _inputs()
    info = _render("jax", *arrays)[2]
    inputs = [info["means2d"], info["conics"], jnp.broadcast_to(arrays[4], (2, 3000, 3)), info["opacities"]]
    inputs += [info["radii"], info["depths"]]
    bars = [jnp.ones((2, H, W, 3)), jnp.ones((2, H, W, 1))]
    addresses = collections.defaultdict(list)
    inner = gsplat_kernel()

    class Kernel:
        resumes = inner.resumes

        def intersect(self, *a):
            addresses["intersect"].append([x.data_ptr() for x in (*a[0], *a[1:3])])
            return inner.intersect(*a)

        def forward(self, *a):
            addresses["forward"].append([x.data_ptr() for x in a[0]])
            return inner.forward(*a)

        def backward(self, *a):
            addresses["backward"].append([x.data_ptr() for x in (*a[0], *a[5])])
            return inner.backward(*a)

    kernel = Kernel()

    @jax.jit
    def step(inputs, bars):
        def tiles(*floats):
            return gsplat_dlpack.rasterize_tiles(*floats, *inputs[4:], W, H, capacity=100_000, kernel=kernel)

        values, pullback = jax.vjp(tiles, *inputs[:4])
        return values, pullback(tuple(bars))

    return step, inputs, bars, addresses


def test_torch_works_on_jax_s_own_buffers():
    step, inputs, bars, addresses = _tile_step()
    jax.block_until_ready(step(inputs, bars))
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(step(inputs, bars))
    of_inputs, of_bars = ([x.unsafe_buffer_pointer() for x in group] for group in (inputs, bars))
    assert all(found == of_inputs for found in addresses["intersect"])
    assert all(found == of_inputs[:4] for found in addresses["forward"])
    assert addresses["backward"] == [of_inputs[:4] + of_bars] * 2


def test_only_the_number_of_intersections_reaches_the_host(tmp_path):
    """By the profiler, which also sees torch's copies."""
    from torch.profiler import ProfilerActivity, profile

    step, inputs, bars, _ = _tile_step()
    results = jax.block_until_ready(step(inputs, bars))
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        jax.block_until_ready(step(inputs, bars))
    profiled.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)  # or the profiler saw nothing
    copied = collections.defaultdict(list)
    for event in events:
        if event.get("cat") == "gpu_memcpy":
            copied[event["name"].split(" (")[0]].append(event["args"]["bytes"])
    assert sum(copied["Memcpy DtoH"]) <= 8 * (1 if gsplat_kernel().resumes else 2)
    assert sum(copied["Memcpy HtoD"]) == 0
    outputs = sum(x.nbytes for x in jax.tree.leaves(results)) + 4 * (100_000 + 2 * H * W + 2 * 11 * 13)
    assert sum(copied["Memcpy DtoD"]) <= outputs


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
