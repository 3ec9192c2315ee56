"""`rasterize` on the JAX back end: end to end against float64 references, modes, transformations, capacity, probes.

Nearly all the time here is XLA's compiling, so whatever is not about shapes uses the same ones: G Gaussians, two
cameras, `CAPACITY`. One forward and one gradient program then serve most of the tests.
"""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scenes
import torch
import torch_compositor

from renderer_bridge import estimate_capacity, rasterize, render

W, H, G = 64, 48, 300
CAPACITY = 2048  # what `rasterize` measures and rounds up for the default scene, so that both share a program
ARGS = ("means", "quats", "scales", "opacities", "colors", "viewmats", "Ks", "backgrounds")


def _inputs(count=G, cameras=2, sh=None, seed=0, size=0.08, dtype=np.float32):
    means, quats, scales, opacities, colors = scenes.random_scene(count, seed, size=size)
    if sh is not None:
        colors = np.random.default_rng(seed).normal(0, 0.3, (count, 16, 3))
    viewmats, Ks = scenes.cameras(cameras, W, H)
    backgrounds = np.random.default_rng(seed).uniform(size=(cameras, 3))
    return tuple(jnp.asarray(x, dtype) for x in (means, quats, scales, opacities, colors, viewmats, Ks, backgrounds))


def _rasterize(*arrays, **options):
    *arrays, backgrounds = arrays
    options.setdefault("capacity", CAPACITY)
    return rasterize(*arrays, W, H, backgrounds=backgrounds, backend="jax", **options)


@jax.jit
def _pull(arrays, image_bar):
    """Image and the pullback of `image_bar` to every input."""
    image, pullback = jax.vjp(lambda *a: _rasterize(*a)[0], *arrays)
    return image, pullback(image_bar)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sh_degree": 3, "render_mode": "RGB+ED", "rasterize_mode": "antialiased"},
        pytest.param({"render_mode": "D"}, marks=pytest.mark.slow),
    ],
    ids=lambda o: "-".join(map(str, o.values())) or "plain",
)
def test_finite_differences_of_every_input(options):
    """Central differences along random directions, float64; every input incl. Ks, viewmats and backgrounds."""
    with jax.enable_x64(True):
        arrays = _inputs(count=60, size=0.12, sh=options.get("sh_degree"), dtype=np.float64)

        # One program for the slopes and the differences: compiling it takes longer than running it twenty times.
        @jax.jit
        @functools.partial(jax.value_and_grad, argnums=range(8))
        def both(*arrays):
            image, alpha, _ = _rasterize(*arrays, **options)
            rng = np.random.default_rng(1)
            return sum(jnp.sum(rng.normal(size=x.shape) * x) for x in (image, alpha))

        def loss(*arrays):
            return both(*arrays)[0]

        gradients = both(*arrays)[1]
        rng = np.random.default_rng(2)
        for i, name in enumerate(ARGS):
            if name == "backgrounds" and options.get("render_mode") in ("D", "ED"):
                assert np.all(gradients[i] == 0)  # depth has background 0
                continue
            if name == "colors" and options.get("render_mode") in ("D", "ED"):
                assert np.all(gradients[i] == 0)
                continue
            direction = rng.normal(size=arrays[i].shape)
            if name == "viewmats":
                direction[:, 3] = 0
            if name == "Ks":
                direction *= np.asarray([[1, 0, 1], [0, 1, 1], [0, 0, 0]])
            step = 1e-7 if name != "Ks" else 1e-5
            # NumPy: every operation that JAX does alone is a program to compile.
            plus, minus = (
                loss(*arrays[:i], np.asarray(arrays[i]) + sign * step * direction, *arrays[i + 1 :]) for sign in (1, -1)
            )
            expected = float(plus - minus) / (2 * step)
            analytic = float(np.sum(np.asarray(gradients[i]) * direction))
            assert abs(expected) > 1e-3, name  # a zero slope would test nothing
            assert analytic == pytest.approx(expected, rel=2e-4, abs=2e-4), name


def test_end_to_end_against_gsplat_projection_and_dense_compositor():
    """World to image in float64 by gsplat's reference projection and the torch compositor; float32 here."""
    reference = pytest.importorskip("gsplat.cuda._torch_impl", reason="gsplat is not installed")
    arrays = _inputs(size=0.06)
    leaves = [torch.tensor(np.asarray(x)).double().requires_grad_(True) for x in arrays]
    means, quats, scales, opacities, colors, viewmats, Ks, backgrounds = leaves
    covars, _ = reference._quat_scale_to_covar_preci(quats, scales, compute_preci=False)
    _, means2d, depths, conics, _ = reference._fully_fused_projection(means, covars, viewmats, Ks, W, H)
    with torch.no_grad():
        inverse = torch.linalg.inv(torch.stack([conics[..., :2], conics[..., 1:]], -2))
        extent = torch.sqrt(2 * torch.log(255 * opacities.clamp(min=1 / 255))).clamp(max=3.33)
        radii = torch.ceil(extent[:, None] * torch.diagonal(inverse, dim1=-2, dim2=-1).sqrt()).int()
        radii[:, opacities < 1 / 255] = 0
    detached = [x.detach() for x in (means2d, conics, colors.expand(2, -1, -1), opacities.expand(2, -1))]
    rng = np.random.default_rng(0)
    bar = rng.normal(size=(2, H, W, 3))

    def cotangents(doubtful):
        image_bar = torch.tensor(bar) * ~doubtful[..., None]
        return image_bar, -(image_bar * backgrounds.detach()[:, None, None]).sum(-1, keepdim=True)

    image, alpha, doubtful, gradients = torch_compositor.oracle(*detached, radii, depths.detach(), W, H, cotangents)
    image = image + (1 - alpha) * backgrounds.detach()[:, None, None]
    certain = ~doubtful.numpy()
    image_bar = cotangents(doubtful)[0]
    surrogate = (means2d * gradients[0]).sum() + (conics * gradients[1]).sum()
    surrogate = surrogate + (colors * gradients[2]).sum() + (opacities * gradients[3]).sum()
    surrogate = surrogate + (backgrounds * (image_bar * (1 - alpha)).sum((1, 2))).sum()
    expected = torch.autograd.grad(surrogate, leaves)

    ours, mine = _pull(arrays, jnp.asarray(image_bar.numpy(), jnp.float32))
    np.testing.assert_allclose(np.asarray(ours)[certain], image.numpy()[certain], atol=1e-5)
    for name, a, b in zip(ARGS, mine, expected, strict=True):
        a, b = np.array(a), b.numpy()
        if name == "Ks":
            a[:, 0, 1] = a[:, 1, 0] = b[:, 0, 1] = b[:, 1, 0] = 0  # the reference reads the skew
        error = np.abs(a - b).max() / np.abs(b).max()
        assert error < 1e-4, (name, error)


def test_input_order_does_not_matter():
    arrays = _inputs()
    order = np.random.default_rng(0).permutation(G)
    shuffled = tuple(x[order] for x in arrays[:5]) + arrays[5:]
    first, second = _rasterize(*arrays), _rasterize(*shuffled)
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])


def test_equal_depths_blend_in_input_order():
    means = jnp.zeros((2, 3))
    arrays = (means, jnp.tile(jnp.array([1.0, 0, 0, 0]), (2, 1)), jnp.full((2, 3), 0.3), jnp.array([0.9, 0.9]))
    colors = jnp.array([[1.0, 0, 0], [0, 1.0, 0]])
    viewmats, Ks = (jnp.asarray(x) for x in scenes.cameras(1, W, H))
    image, _, _ = rasterize(*arrays, colors, viewmats, Ks, W, H, backend="jax", capacity=CAPACITY)
    swapped, _, _ = rasterize(*arrays, colors[::-1], viewmats, Ks, W, H, backend="jax", capacity=CAPACITY)
    peak = np.unravel_index(np.argmax(image.sum(-1)), image.shape[:3])
    assert image[peak][0] > 5 * image[peak][1]
    assert swapped[peak][1] > 5 * swapped[peak][0]


def test_cameras_render_as_if_alone():
    arrays = _inputs()
    together = _rasterize(*arrays)
    for c in range(2):
        alone = _rasterize(*arrays[:5], *(x[c : c + 1] for x in arrays[5:]))
        np.testing.assert_allclose(together[0][c], alone[0][0], atol=2e-6)


def test_zero_opacity_masks_a_gaussian():
    arrays = list(_inputs())
    keep = np.arange(G) % 3 > 0
    # Without them: two of the others follow in their place, moved far behind the cameras.
    rows = np.concatenate([np.flatnonzero(keep), np.flatnonzero(keep)[: G - keep.sum()]])
    subset = [x[rows] for x in arrays[:5]]
    subset[0] = jnp.where(np.arange(G)[:, None] < keep.sum(), subset[0], -1000.0)
    subset = _rasterize(*subset, *arrays[5:])[0]
    arrays[3] = jnp.where(keep, arrays[3], 0.0)
    masked, gradients = _pull(tuple(arrays), jnp.ones_like(subset))
    np.testing.assert_allclose(masked, subset, atol=2e-6)
    assert float(jnp.abs(masked - _rasterize(*_inputs())[0]).max()) > 0.01
    for gradient in gradients[:5]:
        assert np.all(np.asarray(gradient)[~keep] == 0)
        assert np.isfinite(np.asarray(gradient)).all()


def test_depth_modes_and_backgrounds():
    arrays = _inputs()
    rgb, alpha, info = _rasterize(*arrays)
    both = _rasterize(*arrays, render_mode="RGB+ED")[0]
    accumulated = _rasterize(*arrays, render_mode="D")[0]
    np.testing.assert_allclose(both[..., :3], rgb, atol=1e-6)
    np.testing.assert_allclose(both[..., 3:] * jnp.maximum(alpha, 1e-10), accumulated, rtol=1e-5, atol=1e-5)
    covered = np.asarray(alpha[..., 0]) > 0.5
    depth = np.asarray(both[..., 3])[covered]
    assert depth.min() >= float(info["depths"].min()) - 1e-4
    assert depth.max() <= float(info["depths"].max()) + 1e-4
    black = _rasterize(*arrays[:-1], jnp.zeros_like(arrays[-1]))[0]
    np.testing.assert_allclose(rgb, black + (1 - alpha) * arrays[-1][:, None, None], atol=1e-6)


def test_sh_degree_0_equals_plain_colours():
    arrays = list(_inputs())
    plain = _rasterize(*arrays)[0]
    arrays[4] = ((arrays[4] - 0.5) / 0.28209479177387814)[:, None, :]
    np.testing.assert_allclose(_rasterize(*arrays, sh_degree=0)[0], plain, atol=2e-6)


def test_colours_per_camera():
    arrays = list(_inputs())
    per_camera = jnp.stack([arrays[4], 1 - arrays[4]])
    image = _rasterize(*arrays[:4], per_camera, *arrays[5:])[0]
    for c in range(2):
        np.testing.assert_allclose(image[c], _rasterize(*arrays[:4], per_camera[c], *arrays[5:])[0][c], atol=1e-6)


@pytest.mark.parametrize("channels", [1, pytest.param(7, marks=pytest.mark.slow), 40])
def test_any_number_of_channels(channels):
    arrays = _inputs()
    features = jnp.asarray(np.random.default_rng(0).normal(size=(G, channels)), jnp.float32)
    image = rasterize(*arrays[:4], features, *arrays[5:7], W, H, backend="jax", capacity=CAPACITY)[0]
    assert image.shape == (2, H, W, channels)
    one = _rasterize(*arrays[:4], jnp.repeat(features[:, -1:], 3, 1), *arrays[5:7], jnp.zeros((2, 3)))[0]
    np.testing.assert_allclose(image[..., -1:], one[..., 1:2], atol=1e-5)


def test_jit_vmap_scan_remat_agree_with_a_plain_call():
    arrays = _inputs()

    def loss(means, viewmats, Ks, backgrounds):
        return jnp.sum(_rasterize(means, *arrays[1:5], viewmats, Ks, backgrounds)[0] ** 2)

    image = _rasterize(*arrays)[0]
    plain, gradient = jnp.sum(image**2), _pull(arrays, 2 * image)[1][0]
    per_camera = tuple(x[:, None] for x in arrays[5:])

    def by_vmap(means):
        return jnp.sum(jax.vmap(loss, in_axes=(None, 0, 0, 0))(means, *per_camera))

    def by_scan(means):
        return jax.lax.scan(lambda total, camera: (total + loss(means, *camera), None), 0.0, per_camera)[0]

    def by_remat(means):
        return jax.checkpoint(loss)(means, *arrays[5:])

    for function in (by_vmap, by_scan, by_remat):
        value, slope = jax.jit(jax.value_and_grad(function))(arrays[0])
        assert float(value) == pytest.approx(float(plain), rel=1e-5)
        np.testing.assert_allclose(slope, gradient, rtol=1e-3, atol=1e-4 * float(jnp.abs(gradient).max()))


def test_all_that_is_returned_leaves_transformations():
    arrays = _inputs()
    expected = _rasterize(*arrays)
    *gaussians, viewmats, Ks, backgrounds = arrays

    def one_camera(viewmat, K, background):
        return _rasterize(*gaussians, viewmat[None], K[None], background[None])

    def body(_, camera):
        return None, one_camera(*camera)

    jitted = jax.jit(_rasterize)(*arrays)
    remat = jax.checkpoint(_rasterize)(*arrays)
    vmapped = jax.vmap(one_camera)(viewmats, Ks, backgrounds)
    _, scanned = jax.lax.scan(body, None, (viewmats, Ks, backgrounds))
    for found in (jitted, remat, vmapped, scanned):
        assert found[2]["backend"] == "jax"
        assert found[2].keys() == expected[2].keys()
    for found in (jitted, remat):
        np.testing.assert_array_equal(found[2]["radii"], expected[2]["radii"])
        assert int(found[2]["tile_width"]) == expected[2]["tile_width"] == 4
    for found in (vmapped, scanned):
        np.testing.assert_allclose(found[0][:, 0], expected[0], atol=1e-6)
        np.testing.assert_array_equal(found[2]["overflow"], 0)


def test_memory_is_linear_in_intersections():
    """Far more of them than the picture has pixels, and twelve bytes apiece."""
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in _inputs()]

    def temporaries(capacity):
        gradient = jax.jit(jax.grad(lambda *a: jnp.sum(_rasterize(*a, capacity=capacity)[0] ** 2), argnums=range(7)))
        return gradient.lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    million, three = temporaries(1_000_000), temporaries(3_000_000)
    assert million < 40 * 1_000_000
    assert three == pytest.approx(3 * million, rel=0.1)


def test_it_lowers_for_every_platform():
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in _inputs()]
    for platform in ("cpu", "cuda", "rocm", "tpu"):
        function = jax.jit(jax.grad(lambda *a: jnp.sum(_rasterize(*a)[0]), argnums=range(8)))
        text = function.trace(*arrays).lower(lowering_platforms=(platform,)).as_text()
        assert "stablehlo.while" in text


def test_one_program_per_static_configuration():
    _rasterize(*_inputs())
    before = render._render_jitted._cache_size()
    for seed in range(3):
        _rasterize(*_inputs(seed=seed))
        _rasterize(*(np.asarray(x) for x in _inputs(seed=seed)), near_plane=0.01)
    assert render._render_jitted._cache_size() == before


def test_capacity_too_small_is_counted_and_a_larger_one_is_exact():
    arrays = _inputs()
    exact, _, info = _rasterize(*arrays, capacity=None)
    total = int(info["intersections"])
    assert info["capacity"] == CAPACITY  # or this file compiles everything twice: adapt the constant
    assert int(info["overflow"]) == 0
    assert info["capacity"] >= total == int(info["tiles_per_gauss"].sum())
    short, _, short_info = _rasterize(*arrays, capacity=total // 2)
    assert int(short_info["overflow"]) == total - total // 2
    assert float(jnp.abs(short - exact).max()) > 0.01
    just, _, just_info = _rasterize(*arrays, capacity=total)
    assert int(just_info["overflow"]) == 0
    np.testing.assert_array_equal(just, exact)


def test_capacity_inside_jit_defaults_to_a_generous_bound():
    arrays = _inputs()
    info = {}

    @jax.jit
    def program(*arrays):
        image, _, details = _rasterize(*arrays, capacity=None)
        info["capacity"] = details["capacity"]
        return image, details["overflow"]

    image, overflow = program(*arrays)
    assert int(overflow) == 0
    np.testing.assert_allclose(image, _rasterize(*arrays)[0], atol=1e-6)
    assert info["capacity"] >= 8 * 2 * G


def test_capacity_is_measured_under_an_eager_gradient():
    arrays = _inputs(size=0.4)  # every Gaussian covers many tiles

    def loss(means):
        image, _, info = _rasterize(means, *arrays[1:], capacity=None)
        return jnp.sum(image), info

    # The forward half of the gradient is where the values must be known.
    _, _, info = jax.vjp(loss, arrays[0], has_aux=True)
    assert info["capacity"] >= int(info["intersections"]) > CAPACITY
    assert int(info["overflow"]) == 0


def test_estimate_capacity_bounds_the_scene():
    arrays = _inputs()
    total = int(_rasterize(*arrays)[2]["intersections"])
    estimate = estimate_capacity(*arrays[:4], *arrays[5:7], W, H)
    assert 1.25 * total <= max(estimate, 1.25 * 1024)
    assert estimate <= max(2 * total, 1280)


def test_absurdly_many_intersections_are_an_error_and_not_a_wrapped_count():
    count = 3000
    arrays = _inputs(count)
    viewmats, Ks = (jnp.asarray(x) for x in scenes.cameras(1, 16384, 16384))
    with pytest.raises(ValueError, match="2·10⁹"):
        rasterize(
            0.1 * arrays[0],
            arrays[1],
            jnp.full((count, 3), 30.0),
            *arrays[3:5],
            viewmats,
            Ks,
            16384,
            16384,
            backend="jax",
        )


def test_probes_give_mean_and_absolute_gradients():
    arrays = _inputs()
    probe = jnp.zeros((2, G, 2))
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.normal(size=(2, H, W, 3)), jnp.float32)

    def loss(probe, absolute):
        image = _rasterize(*arrays, means2d_probe=probe, absgrad_probe=absolute)[0]
        return jnp.sum(weight * image)

    mean_gradient, absolute_gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(probe, probe)
    info = _rasterize(*arrays)[2]
    colors = jnp.broadcast_to(arrays[4], (2, G, 3))
    inputs = [torch.tensor(np.asarray(x)) for x in (info["means2d"], info["conics"], colors, info["opacities"])]
    inputs = [x.double() for x in inputs]
    inputs[0].requires_grad_(True)
    image, alpha = torch_compositor.kernel(
        *inputs, *(torch.tensor(np.asarray(info[name])) for name in ("radii", "depths")), W, H, True
    )
    image = image + (1 - alpha) * torch.tensor(np.asarray(arrays[-1])).double()[:, None, None]
    (expected,) = torch.autograd.grad((torch.tensor(np.asarray(weight)) * image).sum(), inputs[0])
    scale = float(expected.abs().max())
    np.testing.assert_allclose(mean_gradient, expected.numpy(), atol=1e-4 * scale)
    np.testing.assert_allclose(absolute_gradient, inputs[0].absgrad.numpy(), atol=1e-4 * scale)
    assert np.all(np.asarray(absolute_gradient) >= np.abs(np.asarray(mean_gradient)) - 1e-4 * scale)


def test_auto_backend_is_logged_once(caplog):
    render._auto_backend.cache_clear()
    arrays = _inputs()
    with caplog.at_level(logging.INFO, logger="renderer_bridge"):
        for _ in range(2):
            info = rasterize(*arrays[:7], W, H, backgrounds=arrays[7], capacity=CAPACITY)[2]
    lines = [record for record in caplog.records if "backend" in record.message]
    assert len(lines) == 1
    assert info["backend"] in lines[0].getMessage()
