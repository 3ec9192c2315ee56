"""The gsplat plumbing (buffer_callback, DLPack, custom rule) with a torch CPU compositor in the kernel's place."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scenes
import torch_compositor

from renderer_bridge import RasterizeError, gsplat_dlpack, rasterize

W, H, G = 40, 35, 60


def _inputs(seed=0, cameras=2):
    arrays = (*scenes.random_scene(G, seed, size=0.15), *scenes.cameras(cameras, W, H))
    return tuple(jnp.asarray(x) for x in arrays)


class Counting:
    """A kernel that records its calls; hashable by identity, as a static configuration must be."""

    def __init__(self, fail=False):
        self.calls, self.pointers, self.fail = [], [], fail

    def __call__(self, *arguments):
        self.calls.append(tuple(arguments[0].shape))
        self.pointers.append(arguments[0].data_ptr())
        if self.fail:
            raise ValueError("no more tiles")
        return torch_compositor.kernel(*arguments)


def _bridge(*arrays, kernel=torch_compositor.kernel, **options):
    return rasterize(*arrays, W, H, backend="gsplat", _kernel=kernel, **options)


def _loss(render, *arrays, **options):
    image, alpha, _ = render(*arrays, **options)
    ramp = np.linspace(-1, 1, image.size, dtype=np.float32).reshape(image.shape)
    return jnp.sum(ramp * image) + jnp.sum(alpha**2)


def _native(*arrays, **options):
    return rasterize(*arrays, W, H, backend="jax", capacity=8192, **options)


@jax.jit
def _native_pull(arrays, power):
    """(image, alpha) of the JAX back end and the gradients of `_loss` (power 1) or of the sum of squares (power 2).

    One compiled program is what all tests of this file compare with.
    """
    (image, alpha), pullback = jax.vjp(lambda *a: _native(*a)[:2], *arrays)
    ramp = np.linspace(-1, 1, image.size, dtype=np.float32).reshape(image.shape)
    bars = jnp.where(power == 1, ramp, 2 * image), jnp.where(power == 1, 2 * alpha, 0)
    return (image, alpha), pullback(bars)


@jax.jit
def _bridge_gradient(arrays):
    return jax.grad(lambda *a: _loss(_bridge, *a), argnums=range(7))(*arrays)


@pytest.fixture(scope="module")
def expected():
    return _native_pull(_inputs(), 1)


def _assert_gradients(mine, expected):
    for a, b in zip(mine, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4 * float(jnp.abs(b).max()))


# Eagerly, every operation around the kernel is compiled alone, which takes its time.
@pytest.mark.parametrize("dlpack", ["callback", pytest.param("eager", marks=pytest.mark.slow)])
def test_values_and_gradients(expected, dlpack):
    arrays = _inputs()
    image, alpha, info = _bridge(*arrays, dlpack=dlpack)
    np.testing.assert_allclose(image, expected[0][0], atol=1e-5)
    np.testing.assert_allclose(alpha, expected[0][1], atol=1e-5)
    assert int(info["overflow"]) == 0
    assert info["backend"] == "gsplat"
    if dlpack == "callback":
        gradient = _bridge_gradient(arrays)
    else:  # cannot be compiled as a whole
        gradient = jax.grad(lambda *a: _loss(_bridge, *a, dlpack=dlpack), argnums=range(7))(*arrays)
    _assert_gradients(gradient, expected[1])


def test_modes_backgrounds_and_probes():
    arrays = _inputs()
    probe = jnp.zeros((2, G, 2))
    background = jnp.asarray([[0.2, 0.4, 0.6], [1.0, 0.0, 0.5]])

    def loss(render, probe, absolute, background):
        return _loss(
            render, *arrays, render_mode="RGB+ED", backgrounds=background, means2d_probe=probe, absgrad_probe=absolute
        )

    mine, theirs = (
        jax.jit(jax.grad(functools.partial(loss, r), argnums=(0, 1, 2)))(probe, probe, background)
        for r in (_bridge, _native)
    )
    _assert_gradients(mine, theirs)
    assert float(jnp.abs(mine[1]).max()) > 0


def test_under_jit_scan_and_remat():
    arrays = _inputs()

    def by_scan(*arrays):
        def step(total, camera):
            return total + jnp.sum(_bridge(*arrays[:5], *(x[None] for x in camera))[0] ** 2), None

        return jax.lax.scan(step, 0.0, arrays[5:])[0]

    reference = _native_pull(arrays, 2)[1]
    for function in (by_scan, jax.checkpoint(by_scan)):
        _assert_gradients(jax.jit(jax.grad(function, argnums=range(7)))(*arrays), reference)


def test_vmap_over_cameras_is_one_call_with_folded_axes():
    arrays = _inputs()
    kernel = Counting()

    def one(viewmat, K):
        return _bridge(*arrays[:5], viewmat[None], K[None], kernel=kernel)[0][0]

    image = jax.jit(jax.vmap(one))(*arrays[5:])
    assert kernel.calls == [(2, G, 2)]
    (expected, _), gradients = _native_pull(arrays, 2)
    np.testing.assert_allclose(image, expected, atol=1e-5)
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(jax.vmap(one)(v, arrays[6]) ** 2)))(arrays[5])
    assert kernel.calls == [(2, G, 2)] * 3  # the backward pass renders again
    _assert_gradients([gradient], [gradients[5]])


def test_compiles_once_per_static_configuration():
    kernel = Counting()
    traces = []

    @jax.jit
    def program(*arrays):
        traces.append(1)
        return _bridge(*arrays, kernel=kernel)[0]

    before = gsplat_dlpack._callback.cache_info().misses
    for seed in range(3):
        program(*_inputs(seed))
        # A second program of the same configuration meets the same callback object.
        _bridge(*_inputs(seed), kernel=kernel)
    assert len(traces) == 1
    assert len(kernel.calls) == 6
    assert gsplat_dlpack._callback.cache_info().misses == before + 1


def test_an_exception_in_the_kernel_is_a_sentence_and_the_next_call_works():
    kernel = Counting(fail=True)
    with pytest.raises(Exception, match=r"tile rasterisation kernel failed .* ValueError: no more tiles"):
        jax.block_until_ready(jax.jit(lambda *a: _bridge(*a, kernel=kernel)[0])(*_inputs()))
    kernel.fail = False
    assert np.isfinite(_bridge(*_inputs(), kernel=kernel)[0]).all()


def _tile_inputs(arrays):
    info = _bridge(*arrays)[2]
    colors = jnp.asarray(np.tile(arrays[4], (2, 1, 1)))
    return [info["means2d"], info["conics"], colors, info["opacities"], info["radii"], info["depths"]]


def test_eager_path_around_the_kernel_agrees_with_the_callback():
    inputs = _tile_inputs(_inputs())

    def pull(eager, inputs, bars):
        def tiles(*floats):
            return gsplat_dlpack.rasterize_tiles(
                *floats, *inputs[4:], W, H, kernel=torch_compositor.kernel, eager=eager
            )

        values, pullback = jax.vjp(tiles, *inputs[:4])
        return *values, *pullback(bars)

    bars = tuple(jnp.ones((2, H, W, channels)) for channels in (3, 1))
    compiled = jax.jit(pull, static_argnums=0)(False, inputs, bars)
    for eager, callback in zip(pull(True, inputs, bars), compiled, strict=True):
        assert float(np.abs(callback).max()) > 0
        np.testing.assert_allclose(eager, callback, atol=1e-6 * float(np.abs(callback).max()), rtol=1e-5)


def test_inputs_are_not_copied():
    """The tensor's address is the JAX buffer's."""
    arrays = _inputs()
    kernel = Counting()
    inputs = _tile_inputs(arrays)
    program = jax.jit(lambda *a: gsplat_dlpack.rasterize_tiles(*a, W, H, kernel=kernel))
    jax.block_until_ready(program(*inputs))
    assert kernel.pointers == [inputs[0].unsafe_buffer_pointer()]
    gsplat_dlpack.rasterize_tiles(*inputs, W, H, kernel=kernel, eager=True)
    assert kernel.pointers[1] == inputs[0].unsafe_buffer_pointer()


def test_inputs_stay_what_they_were():
    arrays = _inputs()
    before = [np.array(x) for x in arrays]
    jax.block_until_ready(_bridge_gradient(arrays))
    for array, copy in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_eager_path_inside_jit_is_refused():
    with pytest.raises(RasterizeError, match="dlpack='eager' cannot run inside jit"):
        jax.jit(lambda *a: _bridge(*a, dlpack="eager")[0])(*_inputs())


def test_float64_is_refused_with_the_remedy():
    with jax.enable_x64(True):
        arrays = tuple(x.astype(jnp.float64) for x in _inputs())
        with pytest.raises(RasterizeError, match="float32 but got float64; use backend='jax'"):
            _bridge(*arrays)


def test_gaussians_nobody_sees_have_zero_gradients():
    arrays = _inputs()
    gradient = _bridge_gradient((arrays[0] + 100, *arrays[1:]))
    for x in gradient[:5]:
        assert np.all(np.asarray(x) == 0)
