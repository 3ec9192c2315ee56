"""The JAX tile rasteriser against the float64 torch compositor, on the very same projected Gaussians."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scenes
import torch
import torch_compositor

from renderer_bridge import binning, projection, tiles

NAMES = ("means2d", "conics", "colors", "opacities")
SAME = 3000  # scenes are filled up to this many, so that they share one compiled program


def _filled(scene, count):
    """The scene with Gaussians of opacity 0 put between its own, which changes every index but no pixel."""
    if len(scene[0]) >= count:
        return scene
    places = np.sort(np.random.default_rng(len(scene[0])).permutation(count)[: len(scene[0])])
    filled = tuple(x[np.arange(count) % len(x)] for x in scene)
    filled[3][:] = 0
    for array, original in zip(filled, scene, strict=True):
        array[places] = original
    return filled


@functools.partial(jax.jit, static_argnums=(6, 7))
def _project(means, quats, scales, opacities, viewmats, Ks, width, height):
    return projection.project(means, quats, scales, opacities, viewmats, Ks, width, height)


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _blend(inputs, radii, depths, bars, width, height, max_alpha):
    """Image, alpha, their gradients against `bars`, overflow."""
    bins = binning.bin_gaussians(inputs[0], radii, depths, width, height, radii.shape[0] * radii.shape[1] * 64)

    def blend(means2d, conics, colors, opacities):
        return tiles.blend_tiles(means2d, conics, opacities, colors, bins, width, height, max_alpha=max_alpha)

    ours, pullback = jax.vjp(blend, *inputs)
    return ours, pullback(bars), bins.overflow


def _compare(scene, width, height, dtype, value_tolerance, gradient_tolerance, max_alpha=0.999):
    viewmats, Ks = scenes.cameras(2, width, height)
    projected = _project(*map(jnp.asarray, (*scene[:4], viewmats, Ks)), width, height)
    colors = jnp.broadcast_to(scene[4], (2, *scene[4].shape))
    inputs = tuple(x.astype(dtype) for x in (projected.means2d, projected.conics, colors, projected.opacities))
    projected = projected._replace(depths=projected.depths.astype(dtype))
    rng = np.random.default_rng(7)
    image_bar = rng.normal(size=(2, height, width, 3))
    alpha_bar = rng.normal(size=(2, height, width, 1))

    def cotangents(doubtful):
        certain = (~doubtful).double()[..., None]
        return torch.tensor(image_bar) * certain, torch.tensor(alpha_bar) * certain

    as_torch = [torch.tensor(np.asarray(x, np.float64)) for x in inputs]
    radii, depths = torch.tensor(np.asarray(projected.radii)), torch.tensor(np.asarray(projected.depths))
    image, alpha, doubtful, gradients = torch_compositor.oracle(
        *as_torch, radii, depths, width, height, cotangents, max_alpha
    )
    certain = ~doubtful.numpy()
    assert certain.mean() > 0.8

    bars = tuple(jnp.asarray(x.numpy(), dtype) for x in cotangents(doubtful))
    ours, pulled, overflow = _blend(inputs, projected.radii, projected.depths, bars, width, height, max_alpha)
    assert int(overflow) == 0
    np.testing.assert_allclose(np.asarray(ours[0])[certain], image.numpy()[certain], atol=value_tolerance, rtol=0)
    np.testing.assert_allclose(np.asarray(ours[1])[certain], alpha.numpy()[certain], atol=value_tolerance, rtol=0)
    for name, mine, reference in zip(NAMES, pulled, gradients, strict=True):
        reference = reference.numpy()
        error = np.abs(np.asarray(mine) - reference) / (np.abs(reference) + np.abs(reference).max())
        assert error.max() < gradient_tolerance, (name, error.max())


@pytest.mark.parametrize("name", list(scenes.SCENES))
def test_float32_agrees_with_float64_oracle(name):
    scene = scenes.SCENES[name]()
    _compare(scene if name == "one" else _filled(scene, SAME), 70, 50, jnp.float32, 1e-5, 1e-4)


@pytest.mark.parametrize("name", ["head", pytest.param("needles", marks=pytest.mark.slow)])
def test_float32_on_several_groups_of_tiles(name):
    _compare(scenes.SCENES[name](), 128, 128, jnp.float32, 1e-5, 1e-4)


@pytest.mark.parametrize(
    "name", ["needles", pytest.param("dense", marks=pytest.mark.slow), pytest.param("opaque", marks=pytest.mark.slow)]
)
def test_float64_agrees_with_oracle_to_rounding(name):
    with jax.enable_x64(True):
        _compare(scenes.SCENES[name](), 50, 40, jnp.float64, 1e-11, 1e-9)


def test_clamp_of_gsplat_1_6():
    _compare(scenes.opaque_scene(300), 64, 64, jnp.float32, 1e-5, 1e-4, max_alpha=0.99)


@pytest.mark.slow
def test_100k_gaussians():
    _compare(scenes.random_scene(100_000, size=0.008), 160, 160, jnp.float32, 1e-5, 1e-4)
