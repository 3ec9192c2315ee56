"""Projection and spherical harmonics against gsplat's own CPU-capable reference functions."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scenes
import torch

from renderer_bridge import binning, projection, sh

reference = pytest.importorskip("gsplat.cuda._torch_impl", reason="gsplat is not installed")

WIDTH, HEIGHT = 90, 70


def _inputs(dtype):
    means, quats, scales, opacities, _ = scenes.random_scene(500, seed=3, size=0.1)
    means = means * 3  # some behind the camera, some far outside the image, where the Jacobian is clamped
    return [np.asarray(x, dtype) for x in (means, quats, scales, opacities, *scenes.cameras(3, WIDTH, HEIGHT))]


@functools.partial(jax.jit, static_argnames=("antialiased",))
def _ours(means, quats, scales, opacities, viewmats, Ks, antialiased=False):
    return projection.project(means, quats, scales, opacities, viewmats, Ks, WIDTH, HEIGHT, antialiased=antialiased)


def _theirs(means, quats, scales, viewmats, Ks, **options):
    covars, _ = reference._quat_scale_to_covar_preci(quats, scales, compute_preci=False)
    return reference._fully_fused_projection(means, covars, viewmats, Ks, WIDTH, HEIGHT, **options)


@pytest.mark.parametrize("antialiased", [False, True])
def test_values(antialiased):
    arrays = _inputs(np.float32)
    ours = _ours(*map(jnp.asarray, arrays), antialiased=antialiased)
    means, quats, scales, opacities, viewmats, Ks = (torch.tensor(x).double() for x in arrays)
    radii, means2d, depths, conics, compensations = _theirs(means, quats, scales, viewmats, Ks, calc_compensations=True)
    seen = np.asarray(ours.radii > 0).all(-1)
    assert 50 < seen.sum() < seen.size  # the scene must exercise both
    assert not (seen & ~(radii > 0).all(-1).numpy()).any()  # ours are opacity-aware, hence a subset
    for mine, theirs in ((ours.means2d, means2d), (ours.depths, depths), (ours.conics, conics)):
        np.testing.assert_allclose(np.asarray(mine)[seen], theirs.numpy()[seen], rtol=1e-5, atol=1e-5)
    expected = opacities * compensations if antialiased else opacities.expand(3, -1)
    np.testing.assert_allclose(np.asarray(ours.opacities)[seen], expected.numpy()[seen], rtol=1e-5, atol=1e-5)


def test_radii_are_the_references_where_gaussians_are_opaque():
    means, quats, scales, opacities, viewmats, Ks = _inputs(np.float32)
    opacities = np.ones_like(opacities)
    ours = _ours(*map(jnp.asarray, (means, quats, scales, opacities, viewmats, Ks)))
    theirs = _theirs(*(torch.tensor(x) for x in (means, quats, scales, viewmats, Ks)))[0].numpy()
    both = (np.asarray(ours.radii) > 0).all(-1) & (theirs > 0).all(-1)
    assert both.sum() > 50
    # sqrt(2 ln 255) = 3.3290 here, 3.33 there: a pixel's difference where the ceiling falls between.
    assert np.abs(np.asarray(ours.radii)[both] - theirs[both]).max() <= 1
    assert (np.asarray(ours.radii)[both] == theirs[both]).mean() > 0.95


def test_gradients():
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x) for x in _inputs(np.float64)]
        names = ("means", "quats", "scales", "opacities", "viewmats", "Ks")
        rng = np.random.default_rng(0)
        weights = [rng.normal(size=(3, 500, n)) for n in (2, 1, 3, 1)]

        def ours(*arrays):
            p = _ours(*arrays, antialiased=True)
            seen = jax.lax.stop_gradient(jnp.all(p.radii > 0, -1))[..., None]
            parts = (p.means2d, p.depths[..., None], p.conics, p.opacities[..., None])
            return sum(jnp.sum(jnp.where(seen, w * x, 0)) for w, x in zip(weights, parts, strict=True)), seen

        gradients, seen = jax.jit(jax.grad(ours, argnums=range(6), has_aux=True))(*arrays)
        leaves = [torch.tensor(np.asarray(x)).requires_grad_(True) for x in arrays]
        means, quats, scales, opacities, viewmats, Ks = leaves
        _, means2d, depths, conics, compensations = _theirs(means, quats, scales, viewmats, Ks, calc_compensations=True)
        parts = (means2d, depths[..., None], conics, (opacities * compensations)[..., None])
        mask = torch.tensor(np.asarray(seen))
        loss = sum(
            torch.where(mask, torch.tensor(w) * x, torch.zeros(())).sum() for w, x in zip(weights, parts, strict=True)
        )
        for name, mine, theirs in zip(names, gradients, torch.autograd.grad(loss, leaves), strict=True):
            theirs = theirs.numpy()
            assert np.isfinite(np.asarray(mine)).all(), name
            # The reference reads K's skew, the CUDA kernel and ours do not.
            keep = np.ones(theirs.shape, bool)
            if name == "Ks":
                keep[:, 0, 1] = keep[:, 1, 0] = False
            np.testing.assert_allclose(
                np.asarray(mine)[keep], theirs[keep], rtol=1e-7, atol=1e-7 * np.abs(theirs).max(), err_msg=name
            )


@pytest.mark.parametrize("degree", range(4))
def test_spherical_harmonics(degree):
    rng = np.random.default_rng(degree)
    directions = rng.normal(size=(200, 3)).astype(np.float32)
    coefficients = rng.normal(size=(200, 16, 3)).astype(np.float32)
    leaves = [torch.tensor(x).double().requires_grad_(True) for x in (directions, coefficients)]
    theirs = reference._spherical_harmonics(degree, *leaves)
    weight = rng.normal(size=(200, 3)).astype(np.float32)

    @jax.jit
    def pull(directions, coefficients, weight):
        ours, pullback = jax.vjp(lambda d, c: sh.spherical_harmonics(degree, d, c), directions, coefficients)
        return ours, pullback(weight)

    ours, pulled = pull(directions, coefficients, weight)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-5)
    expected = torch.autograd.grad((theirs * torch.tensor(weight)).sum(), leaves, allow_unused=True)
    for mine, wanted in zip(pulled, expected, strict=True):
        wanted = 0 if wanted is None else wanted.numpy()  # degree 0 does not read the direction
        np.testing.assert_allclose(mine, wanted, atol=2e-5)


def test_camera_positions_invert_any_view_matrix():
    rng = np.random.default_rng(0)
    viewmats = np.tile(np.eye(4), (5, 1, 1))
    viewmats[:, :3] += rng.normal(size=(5, 3, 4)) * 0.4
    ours = projection.camera_positions(jnp.asarray(viewmats, jnp.float32))
    np.testing.assert_allclose(ours, np.linalg.inv(viewmats)[:, :3, 3], rtol=2e-4, atol=2e-4)


def _assert_lists_are_gsplat_s(means2d, radii, depths, width, height, capacity):
    """Same (tile, depth, index) order as the reference's isect_tiles, entry by entry. → number of intersections."""
    C, G = depths.shape
    bins = jax.jit(binning.bin_gaussians, static_argnums=(3, 4, 5))(means2d, radii, depths, width, height, capacity)
    across, down = binning.tile_grid(width, height)
    _, isect_ids, flatten_ids = reference._isect_tiles(
        *(torch.tensor(np.asarray(x)) for x in (means2d, radii, depths)), 16, across, down
    )
    assert int(bins.total) == len(flatten_ids)
    assert int(bins.overflow) == 0
    offsets = reference._isect_offset_encode(isect_ids, C, across, down).reshape(-1).numpy()
    np.testing.assert_array_equal(bins.starts, offsets)
    camera = np.repeat(np.arange(C * across * down) // (across * down), np.asarray(bins.counts))
    ids = np.asarray(bins.order)[camera, np.asarray(bins.ranks)[: len(camera)]] + camera * G
    np.testing.assert_array_equal(ids, flatten_ids.numpy())
    return len(ids)


def test_tile_lists_are_those_of_gsplat():
    means, quats, scales, opacities, viewmats, Ks = _inputs(np.float32)
    means[::9] = means[0]  # equal depths: ties must keep the input's order
    means[0] = 0
    p = _ours(*map(jnp.asarray, (means, quats, scales, opacities, viewmats, Ks)))
    assert _assert_lists_are_gsplat_s(p.means2d, p.radii, p.depths, WIDTH, HEIGHT, 20_000) > 1000


def test_tile_and_rank_may_need_more_than_32_bits():
    """2¹⁵ tiles and 2¹⁷ Gaussians: pairs are sorted instead of single keys."""
    rng, width, height, count = np.random.default_rng(0), 4096, 2048, 70_000
    means2d = rng.uniform(0, 1, (1, count, 2)).astype(np.float32) * np.float32([width, height])
    radii = rng.integers(0, 20, (1, count, 2)).astype(np.int32)
    depths = rng.uniform(1, 2, (1, count)).astype(np.float32)
    depths[0, ::9] = depths[0, 0]
    assert _assert_lists_are_gsplat_s(means2d, radii, depths, width, height, 1 << 19) > 100_000
