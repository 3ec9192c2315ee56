"""What cannot be rendered is refused by a sentence; what can be defined has a defined result."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scenes

from renderer_bridge import RasterizeError, estimate_capacity, gsplat_dlpack, rasterize
from renderer_bridge.torch_kernels import DirectKernel

W, H = 40, 33
NAMES = ("means", "quats", "scales", "opacities", "colors", "viewmats", "Ks")


def _inputs(count=20):
    return dict(zip(NAMES, (*scenes.random_scene(count, size=0.2), *scenes.cameras(2, W, H)), strict=True))


def _render(width=W, height=H, backend="jax", **changes):
    options = {k: changes.pop(k) for k in list(changes) if k not in NAMES}
    options.setdefault("capacity", 4096)
    return rasterize(**{**_inputs(), **changes}, width=width, height=height, backend=backend, **options)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"means": np.zeros((20, 2), np.float32)}, r"means has shape \(20, 2\); expected \(20, 3\)"),
        ({"means": np.float32(1)}, "means has shape"),
        ({"quats": np.ones((19, 4), np.float32)}, r"quats has shape \(19, 4\); expected \(20, 4\)"),
        ({"scales": np.ones((20, 1), np.float32)}, "scales has shape"),
        ({"opacities": np.ones((20, 1), np.float32)}, "opacities has shape"),
        ({"colors": np.ones((19, 3), np.float32)}, "colors has shape"),
        ({"colors": np.ones((3, 20, 3), np.float32)}, "colors has shape"),
        ({"viewmats": np.eye(4, dtype=np.float32)}, "viewmats has shape"),
        ({"viewmats": np.zeros((0, 4, 4), np.float32), "Ks": np.zeros((0, 3, 3), np.float32)}, "no cameras"),
        ({"Ks": np.ones((1, 3, 3), np.float32)}, "Ks has shape"),
        ({"backgrounds": np.ones((2, 4), np.float32)}, "backgrounds has shape"),
        ({"means2d_probe": np.ones((20, 2), np.float32)}, "means2d_probe has shape"),
        ({"means": np.zeros((20, 3), np.int32)}, "means has dtype int32; expected float32"),
        ({"colors": np.zeros((20, 3), np.float16)}, "colors has dtype float16"),
        ({"means": "no"}, "means is not an array"),
        ({"sh_degree": 4}, "sh_degree is 4"),
        ({"sh_degree": 1}, "with sh_degree=1 expected"),
        ({"sh_degree": 2, "colors": np.zeros((20, 4, 3), np.float32)}, "K ≥ 9"),
        ({"render_mode": "BGR"}, "render_mode is 'BGR'; expected one of"),
        ({"rasterize_mode": "fast"}, "rasterize_mode"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
        ({"dlpack": "pickle"}, "dlpack"),
        ({"width": -1}, "width is -1"),
        ({"height": 2.5}, "height is 2.5"),
        ({"eps2d": -0.1}, "eps2d"),
        ({"capacity": 0}, "capacity is 0"),
        ({"capacity": 1.5}, "capacity is 1.5"),
        ({"capacity": True}, "capacity is True"),
        ({"max_alpha": 1.0}, "max_alpha is 1.0"),
        ({"means": None}, "means is None"),
        ({"colors": None}, "colors is None"),
        ({"near_plane": np.nan}, "near_plane is nan"),
        ({"near_plane": "x"}, "near_plane is 'x'"),
        ({"far_plane": -1}, "far_plane is -1, not beyond near_plane, 0.01"),
        ({"eps2d": np.inf}, "eps2d is inf"),
        ({"radius_clip": "a"}, "radius_clip is 'a'"),
        ({"sh_degree": 1.0}, "sh_degree is 1.0"),
        ({"sh_degree": np.array([1])}, "sh_degree is array"),
        ({"max_alpha": "x"}, "max_alpha is 'x'"),
        ({"means": "no", "render_mode": "D"}, "means is not an array"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_wrong_arguments_are_named(changes, sentence):
    with pytest.raises(RasterizeError, match=sentence):
        _render(**changes)


def _spoiled(name, value, row=7):
    array = _inputs()[name].copy()
    array[row] = value
    return {name: array}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (_spoiled("scales", -0.1), "scales has negative values .* first in row 7"),
        (_spoiled("scales", np.nan), "scales has NaN or Inf"),
        (_spoiled("means", np.inf), "means has NaN or Inf in 1 row"),
        (_spoiled("quats", 0), "quats has a zero quaternion"),
        (_spoiled("opacities", 1.5), "opacities has values outside"),
        (_spoiled("opacities", np.nan), "opacities has NaN"),
        (_spoiled("viewmats", np.nan, 1), "viewmats has NaN"),
        (_spoiled("Ks", -np.eye(3), 1), "focal length"),
        (_spoiled("scales", 1e20), "scales has values that no scene has"),
        (_spoiled("means", -1e20), "means has values that no scene has"),
        (_spoiled("quats", 1e-39), "quats has a zero quaternion"),
        (_spoiled("colors", np.nan), "colors has NaN or Inf in 1 row.* first in row 7"),
        ({"backgrounds": np.full(3, np.inf, np.float32)}, "backgrounds has NaN or Inf"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_wrong_values_are_refused_outside_jit(changes, sentence):
    with pytest.raises(RasterizeError, match=sentence):
        _render(**changes)


@functools.partial(jax.jit, static_argnames=("sh_degree",))
def _program(arrays, sh_degree=None):
    def loss(arrays):
        image, _, info = rasterize(**arrays, width=W, height=H, backend="jax", sh_degree=sh_degree)
        return jnp.sum(image**2), (image, info["invalid"], info["radii"])

    return jax.grad(loss, has_aux=True)(arrays)


@pytest.mark.parametrize("sh_degree", [None, 1])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scales", -0.1),
        ("scales", np.nan),
        ("scales", 1e12),  # finite, but its square on the image plane is not
        ("scales", 1e20),
        ("means", np.inf),
        ("means", 1e36),
        ("quats", 0),
        ("opacities", np.nan),
        ("colors", np.nan),
    ],
)
def test_inside_jit_such_gaussians_are_left_out_and_counted(name, value, sh_degree):
    good = _inputs()
    if sh_degree is not None:
        good["colors"] = np.random.default_rng(0).normal(0, 0.3, (20, 4, 3)).astype(np.float32)
    bad = {**good, name: good[name].copy()}
    bad[name][7] = value
    keep = np.arange(20) != 7

    gradients, (image, invalid, _) = _program(bad, sh_degree)
    assert int(invalid) == 1
    masked = {**good, "opacities": np.where(keep, good["opacities"], 0).astype(np.float32)}
    np.testing.assert_allclose(image, _program(masked, sh_degree)[1][0], atol=1e-6)
    for name, gradient in gradients.items():
        assert np.isfinite(gradient).all(), name
        if name in NAMES[:5]:
            assert np.all(np.asarray(gradient)[7] == 0), name


@pytest.mark.parametrize("sh_degree", [None, 1])
def test_the_colour_of_a_masked_gaussian_may_be_anything(sh_degree):
    inputs = _inputs()
    if sh_degree is not None:
        inputs["colors"] = np.zeros((20, 4, 3), np.float32)
    inputs["opacities"][7] = 0
    expected = _program(inputs, sh_degree)
    spoiled = inputs["colors"].copy()  # JAX may still be reading the original
    spoiled[7] = np.nan
    gradients, (image, invalid, radii) = _program({**inputs, "colors": spoiled}, sh_degree)
    assert int(invalid) == 0
    jax.tree.map(np.testing.assert_array_equal, (gradients, (image, invalid, radii)), expected)


@pytest.mark.parametrize("name", ["viewmats", "Ks"])
def test_inside_jit_the_picture_of_a_camera_that_is_not_finite_is_nan(name):
    good = _inputs()
    _, (expected, _, _) = _program(good)
    _, (image, invalid, _) = _program({**good, **_spoiled(name, np.nan, 1)})
    assert int(invalid) == 0  # the Gaussians are not to blame
    np.testing.assert_array_equal(image[0], expected[0])
    assert np.isnan(image[1]).all()


@pytest.mark.parametrize("length", [1e-30, 1e-19, 3e20, 8e37])
def test_quaternions_have_any_length(length):
    inputs = _inputs()
    unit = inputs["quats"] / np.linalg.norm(inputs["quats"], axis=1, keepdims=True)
    image, _, info = _render(quats=unit * np.float32(length))
    assert int(info["invalid"]) == 0
    np.testing.assert_allclose(image, _render()[0], atol=1e-5)


def test_without_a_blur_gaussians_too_small_for_float32_have_finite_gradients():
    inputs = _inputs()
    inputs["scales"][7] = 1e-10

    @jax.jit
    def gradients(inputs):
        return jax.grad(lambda x: jnp.sum(rasterize(**x, width=W, height=H, backend="jax", eps2d=0.0)[0]))(inputs)

    for name, gradient in gradients(inputs).items():
        assert np.isfinite(gradient).all(), name


def test_depth_needs_no_colours():
    spoiled = np.full((20, 3), np.nan, np.float32)
    for mode in ("D", "ED"):
        expected = _render(render_mode=mode)[0]
        for options in ({"colors": None}, {"colors": spoiled}, {"colors": None, "sh_degree": 1}):
            np.testing.assert_array_equal(_render(render_mode=mode, backgrounds=np.ones(3), **options)[0], expected)


def test_a_degree_may_be_an_array_s_element():
    coefficients = np.random.default_rng(0).normal(0, 0.3, (20, 4, 3)).astype(np.float32)
    plain = _render(colors=coefficients, sh_degree=1)[0]
    np.testing.assert_array_equal(_render(colors=coefficients, sh_degree=np.int32(1))[0], plain)
    np.testing.assert_array_equal(_render(colors=coefficients, sh_degree=jnp.int32(1))[0], plain)


def test_gaussians_behind_and_at_the_camera_are_culled_with_zero_gradients():
    inputs = _inputs()
    viewmats = np.tile(np.eye(4, dtype=np.float32), (2, 1, 1))
    inputs["means"][:, 2] = np.linspace(-3, 3, 20)
    inputs["means"][3] = 0  # in the camera's centre
    inputs["means"][4] = (0.1, 0, 0)  # at z = 0

    gradients, (_, _, radii) = _program({**inputs, "viewmats": viewmats})
    gradient = gradients["means"]
    behind = inputs["means"][:, 2] < 0.01
    assert behind.sum() >= 10
    assert np.all(np.asarray(radii)[:, behind] == 0)
    assert np.all(np.asarray(gradient)[behind] == 0)
    assert np.isfinite(gradient).all()
    assert np.abs(np.asarray(gradient)[~behind]).max() > 0


@pytest.mark.parametrize("backend", ["jax", "gsplat"])
def test_zero_gaussians_show_the_background(backend):
    inputs = {k: v[:0] if k in NAMES[:5] else v for k, v in _inputs().items()}
    background = np.asarray([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], np.float32)

    def program(background):
        return rasterize(
            **inputs, width=W, height=H, backgrounds=background, backend=backend, _kernel=DirectKernel(None)
        )

    image, alpha, info = program(background)
    np.testing.assert_array_equal(image, np.broadcast_to(background[:, None, None], (2, H, W, 3)))
    assert float(jnp.abs(alpha).max()) == 0
    assert int(info["intersections"]) == 0
    gradient = jax.grad(lambda b: jnp.sum(program(b)[0]))(jnp.asarray(background))
    np.testing.assert_allclose(gradient, W * H)


@pytest.mark.parametrize("size", [(0, H), (W, 0), (0, 0)], ids=str)
def test_an_image_without_area_is_empty(size):
    image, alpha, _ = _render(width=size[0], height=size[1])
    assert image.shape == (2, size[1], size[0], 3)
    assert alpha.shape == (2, size[1], size[0], 1)


def test_gaussians_nobody_sees():
    inputs = _inputs()
    image, alpha, info = _render(means=inputs["means"] + np.float32(100))
    assert int(info["intersections"]) == 0
    assert float(jnp.abs(image).max()) == float(jnp.abs(alpha).max()) == 0


def test_non_contiguous_and_read_only_arrays():
    inputs = _inputs()
    strided = {}
    for name, value in inputs.items():
        wide = np.zeros((*value.shape[:-1], value.shape[-1] * 2), value.dtype)
        wide[..., ::2] = value
        strided[name] = wide[..., ::2]
        strided[name].flags.writeable = False
        assert value.ndim == 1 or not strided[name].flags.c_contiguous
    np.testing.assert_array_equal(_render(**strided)[0], _render()[0])


def test_gsplat_that_cannot_run_is_an_error_with_the_remedy():
    if gsplat_dlpack.unavailable() is None:
        pytest.skip("gsplat and CUDA are here")
    with pytest.raises(RasterizeError, match=r"backend='gsplat' cannot run: .* \(.*install.*\); or use backend='jax'"):
        _render(backend="gsplat")


def test_estimate_capacity_inside_jit_is_refused():
    inputs = {k: v for k, v in _inputs().items() if k != "colors"}
    with pytest.raises(RasterizeError, match="estimate_capacity needs values"):
        jax.jit(lambda x: estimate_capacity(**x, width=W, height=H))(inputs)
