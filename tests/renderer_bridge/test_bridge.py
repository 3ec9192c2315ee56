"""The gsplat plumbing (buffer_callback, DLPack, custom rule) with a torch CPU compositor in the kernel's place."""

from __future__ import annotations

import functools
import inspect
import logging
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scenes
import torch
import torch_ops
import torch_wrapper

from renderer_bridge import RasterizeError, gsplat_dlpack, rasterize, render
from renderer_bridge.torch_kernels import AutogradKernel, DirectKernel

pytestmark = pytest.mark.usefixtures("on_cpu")

W, H, G = 40, 35, 60
DIRECT, AUTOGRAD = DirectKernel(torch_ops), AutogradKernel(torch_wrapper)
FORWARD, BACKWARD = ["intersect", "forward"], ["backward"]


@pytest.fixture
def on_cpu():
    """The stand-ins compute on the CPU, also on a machine whose default device is another."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


def _inputs(seed=0, cameras=2):
    arrays = (*scenes.random_scene(G, seed, size=0.15), *scenes.cameras(cameras, W, H))
    return tuple(jnp.asarray(x) for x in arrays)


class Counting(DirectKernel):
    """Records its calls and the addresses of what they got."""

    def __init__(self, fail=False):
        super().__init__(torch_ops)
        self.calls, self.images, self.pointers, self.fail = [], [], [], fail

    def _record(self, name, *tensors):
        self.calls.append(name)
        self.images.append(len(tensors[0]))
        self.pointers.append([x.data_ptr() for x in tensors])
        if self.fail:
            raise ValueError("no more tiles")

    def intersect(self, *arguments):
        self._record("intersect", *arguments[0], *arguments[1:3])
        return super().intersect(*arguments)

    def forward(self, *arguments):
        self._record("forward", *arguments[0])
        return super().forward(*arguments)

    def backward(self, *arguments):
        self._record("backward", *arguments[0], arguments[2], *arguments[5])
        return super().backward(*arguments)


def _bridge(*arrays, kernel=DIRECT, **options):
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


@functools.partial(jax.jit, static_argnames="kernel")
def _bridge_gradient(arrays, kernel=DIRECT):
    return jax.grad(lambda *a: _loss(_bridge, *a, kernel=kernel), argnums=range(7))(*arrays)


@pytest.fixture(scope="module")
def expected():
    return _native_pull(_inputs(), 1)


def _assert_gradients(mine, expected):
    for a, b in zip(mine, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4 * float(jnp.abs(b).max()))


# Eagerly, every operation around the kernel is compiled alone, which takes its time.
@pytest.mark.parametrize("kernel", [DIRECT, AUTOGRAD], ids=["direct", "autograd"])
@pytest.mark.parametrize("dlpack", ["callback", pytest.param("eager", marks=pytest.mark.slow)])
def test_values_and_gradients(expected, dlpack, kernel):
    arrays = _inputs()
    image, alpha, info = _bridge(*arrays, kernel=kernel, dlpack=dlpack)
    np.testing.assert_allclose(image, expected[0][0], atol=1e-5)
    np.testing.assert_allclose(alpha, expected[0][1], atol=1e-5)
    assert int(info["overflow"]) == 0
    assert info["backend"] == "gsplat"
    if dlpack == "callback":
        gradient = _bridge_gradient(arrays, kernel)
    else:  # cannot be compiled as a whole
        gradient = jax.grad(lambda *a: _loss(_bridge, *a, kernel=kernel, dlpack=dlpack), argnums=range(7))(*arrays)
    _assert_gradients(gradient, expected[1])


@pytest.mark.parametrize("kernel", [DIRECT, AUTOGRAD], ids=["direct", "autograd"])
def test_modes_backgrounds_and_probes(kernel):
    arrays = _inputs()
    probe = jnp.zeros((2, G, 2))
    background = jnp.asarray([[0.2, 0.4, 0.6], [1.0, 0.0, 0.5]])

    def loss(render, probe, absolute, background):
        return _loss(
            render, *arrays, render_mode="RGB+ED", backgrounds=background, means2d_probe=probe, absgrad_probe=absolute
        )

    mine, theirs = (
        jax.jit(jax.grad(functools.partial(loss, r), argnums=(0, 1, 2)))(probe, probe, background)
        for r in (functools.partial(_bridge, kernel=kernel), _native)
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


def test_vmap_over_cameras_is_one_call_with_folded_axes_and_keeps_each_view_s_lists():
    arrays = _inputs()
    kernel = Counting()

    def one(viewmat, K):
        return _bridge(*arrays[:5], viewmat[None], K[None], kernel=kernel)[0][0]

    image = jax.jit(jax.vmap(one))(*arrays[5:])
    assert (kernel.calls, kernel.images) == (FORWARD, [2, 2])
    (expected, _), gradients = _native_pull(arrays, 2)
    np.testing.assert_allclose(image, expected, atol=1e-5)
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(jax.vmap(one)(v, arrays[6]) ** 2)))(arrays[5])
    assert (kernel.calls, kernel.images) == (FORWARD + FORWARD + BACKWARD, [2] * 5)
    _assert_gradients([gradient], [gradients[5]])


def test_two_vmaps_of_several_cameras():
    """Stage two's shape: subjects × frames × cameras, where lists of every length stand side by side."""
    arrays = _inputs()
    kernel = Counting()
    shifts = jnp.asarray([[0.0, 0.3], [100.0, -0.4]])  # one of them leaves nothing to see

    def one(kernel, shift):
        return jnp.sum(_bridge(arrays[0] + shift, *arrays[1:], kernel=kernel)[0] ** 2)

    found = jax.jit(jax.vmap(jax.vmap(jax.grad(functools.partial(one, kernel)))))(shifts)
    assert (kernel.calls, kernel.images) == (FORWARD + BACKWARD, [8] * 3)
    alone = jax.jit(jax.grad(functools.partial(one, DIRECT)))
    np.testing.assert_allclose(found.ravel(), [alone(x) for x in shifts.ravel()], rtol=1e-3)


def test_one_forward_pass_serves_many_cotangents():
    """vmap repeats what was kept: each copy must stand for itself."""
    arrays = _inputs()
    kernel = Counting()
    bars = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, H, W, 3)), jnp.float32)

    def pull(kernel, bars, over):
        _, pullback = jax.vjp(lambda c: _bridge(*arrays[:4], c, *arrays[5:], kernel=kernel)[0], arrays[4])
        return over(pullback)(bars)[0]

    found = jax.jit(lambda bars: pull(kernel, bars, jax.vmap))(bars)
    assert kernel.calls == FORWARD + BACKWARD
    alone = jax.jit(lambda bar: pull(DIRECT, bar, lambda pullback: pullback))
    _assert_gradients(found, [alone(bar) for bar in bars])


@pytest.mark.parametrize("vmapped", [False, True])
def test_lists_that_do_not_fit_are_made_again(caplog, vmapped):
    inputs = _tile_inputs(_inputs())
    kernel = Counting()

    def loss(colors, capacity):
        def tiles(*inputs):
            return gsplat_dlpack.rasterize_tiles(*inputs, W, H, capacity=capacity, kernel=kernel)[0]

        arrays = (*inputs[:2], colors, *inputs[3:])
        image = jax.vmap(tiles)(*(x[:, None] for x in arrays)) if vmapped else tiles(*arrays)
        return jnp.sum(image**2)

    program = jax.jit(jax.grad(loss), static_argnums=1)
    with caplog.at_level(logging.WARNING, logger="renderer_bridge"):
        again = [program(inputs[2], 50) for _ in range(2)]
    assert kernel.calls == (FORWARD + FORWARD + BACKWARD) * 2
    assert len([r for r in caplog.records if "capacity=50" in r.getMessage()]) == 1
    kernel.calls.clear()
    kept = program(inputs[2], 1000)
    assert kernel.calls == FORWARD + BACKWARD
    assert float(jnp.abs(kept).max()) > 0
    _assert_gradients(again, [kept, kept])


def test_what_lies_behind_the_lists_is_never_read():
    """XLA's buffers hold anything. With vmapped elements of unequal length, too."""
    inputs = [torch.tensor(np.array(x)) for x in _tile_inputs(_inputs())]
    inputs = [x[:, None] for x in inputs]  # [E, C = 1, …]
    capacity = 400
    config = gsplat_dlpack._Config(
        width=W, height=H, absgrad=True, eager=False, synchronize=False, capacity=capacity, kernel=DIRECT
    )
    shapes = [(2, 1, H, W, 3), (2, 1, H, W, 1), (2, 1, H, W), (2, 1, 4, 3), (2, capacity)]
    kept = [torch.full(s, 1e9, dtype=torch.int32 if i > 1 else torch.float32) for i, s in enumerate(shapes)]
    gsplat_dlpack._forward(config, inputs, kept)
    assert (kept[4] == 10**9).any()
    bars = [torch.ones(shape) for shape in shapes[:2]]

    def backward(*kept):
        outputs = [torch.empty_like(x) for x in (*inputs[:4], inputs[0])]
        gsplat_dlpack._backward(config, [*inputs, *bars, *kept], outputs)
        return outputs

    for mine, again in zip(backward(*kept[1:]), backward(), strict=True):
        assert float(again.abs().max()) > 0
        torch.testing.assert_close(mine, again, rtol=1e-4, atol=1e-4 * float(again.abs().max()))


def test_channels_that_gsplat_has_not_compiled():
    """Six channels, which are padded to eight, are twice three."""
    arrays = _inputs()

    def gradient(colors):
        return jax.jit(jax.grad(lambda c: jnp.sum(_bridge(*arrays[:4], c, *arrays[5:])[0] ** 2)))(colors)

    three = gradient(arrays[4])
    np.testing.assert_allclose(gradient(jnp.tile(arrays[4], 2)), jnp.tile(three, 2), rtol=1e-4, atol=1e-4)
    with pytest.raises(RasterizeError, match="at most 512 channels but got 513; use backend='jax'"):
        _bridge(*arrays[:4], jnp.zeros((G, 513)), *arrays[5:])


def test_a_stand_in_is_called_as_gsplat_1_5_is():
    """Its parameters have the names and the order of the installed header's."""
    gsplat = pytest.importorskip("gsplat")
    header = pathlib.Path(gsplat.__file__).parent / "cuda" / "include" / "Ops.h"
    if not gsplat.__version__.startswith("1.5.") or not header.exists():
        pytest.skip("another gsplat")
    text = re.sub(r"//.*", "", header.read_text())
    for name in ("intersect_tile", "intersect_offset", "rasterize_to_pixels_3dgs_fwd", "rasterize_to_pixels_3dgs_bwd"):
        (parameters,) = re.findall(rf"\b{name}\(([^;]*)\);", text)
        names = [parameter.split()[-1] for parameter in parameters.split(",")]
        assert names == list(inspect.signature(getattr(torch_ops, name)).parameters)


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
    assert kernel.calls == FORWARD * 6
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
            return gsplat_dlpack.rasterize_tiles(*floats, *inputs[4:], W, H, capacity=1000, kernel=DIRECT, eager=eager)

        values, pullback = jax.vjp(tiles, *inputs[:4])
        return *values, *pullback(bars)

    bars = tuple(jnp.ones((2, H, W, channels)) for channels in (3, 1))
    compiled = jax.jit(pull, static_argnums=0)(False, inputs, bars)
    for eager, callback in zip(pull(True, inputs, bars), compiled, strict=True):
        assert float(np.abs(callback).max()) > 0
        np.testing.assert_allclose(eager, callback, atol=1e-6 * float(np.abs(callback).max()), rtol=1e-5)


def test_inputs_are_not_copied():
    """The tensors' addresses are the JAX buffers'."""
    kernel = Counting()
    inputs = _tile_inputs(_inputs())
    addresses = [x.unsafe_buffer_pointer() for x in inputs]
    tiles = functools.partial(gsplat_dlpack.rasterize_tiles, width=W, height=H, kernel=kernel, capacity=1000)
    jax.block_until_ready(jax.jit(tiles)(*inputs))
    tiles(*inputs, eager=True)
    assert kernel.pointers == [addresses, addresses[:4]] * 2


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


@pytest.mark.parametrize("kernel", [DIRECT, AUTOGRAD], ids=["direct", "autograd"])
def test_gaussians_nobody_sees_have_zero_gradients(kernel):
    arrays = _inputs()
    gradient = _bridge_gradient((arrays[0] + 100, *arrays[1:]), kernel)
    for x in gradient[:5]:
        assert np.all(np.asarray(x) == 0)


def test_inside_torch_s_inference_mode_gradients_are_the_same():
    arrays = _inputs()
    expected = _bridge_gradient(arrays, AUTOGRAD)
    with torch.inference_mode():
        _assert_gradients(_bridge_gradient(arrays, AUTOGRAD), expected)


def test_kernels_that_do_not_load_are_a_phrase(monkeypatch):
    """Without nvcc gsplat 1.5 leaves None in their place; a build that fails raises anything."""
    backend = type("module", (), {"_C": None})
    monkeypatch.setattr(gsplat_dlpack.importlib, "import_module", lambda name: backend)
    assert re.fullmatch(r"gsplat's CUDA kernels are not built \(install .*\)", gsplat_dlpack._unloadable())
    backend._C = object()
    assert gsplat_dlpack._unloadable() is None
    del backend._C  # a version that keeps them elsewhere
    assert gsplat_dlpack._unloadable() is None

    def fail(name):
        raise RuntimeError("ninja: build stopped\nand four pages more")

    monkeypatch.setattr(gsplat_dlpack.importlib, "import_module", fail)
    assert re.fullmatch(
        r"gsplat's CUDA kernels do not load: RuntimeError: ninja: build stopped \(install .*\)",
        gsplat_dlpack._unloadable(),
    )


def test_auto_takes_jax_for_float64(monkeypatch):
    monkeypatch.setattr(render, "_auto_backend", lambda: "gsplat")
    assert render._choose_backend("auto", None, jnp.float32) == "gsplat"
    assert render._choose_backend("auto", None, jnp.float64) == "jax"


def test_the_alpha_clamp_is_what_gsplat_says(monkeypatch):
    constants = type("module", (), {"MAX_ALPHA": 0.99})
    monkeypatch.setattr(gsplat_dlpack.importlib, "import_module", lambda name: constants)
    assert gsplat_dlpack.max_alpha() == 0.99
    del constants.MAX_ALPHA
    assert gsplat_dlpack.max_alpha() == 0.999
