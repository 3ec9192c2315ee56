"""The dense splatter: pictures and gradients of every input, the tile rasteriser in JAX against PyTorch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from renderer_bridge import rasterize
from renderer_bridge.projection import project
from tests.renderer_bridge import scenes

torch = pytest.importorskip("torch")
from experiments.torch_reference import rasterizer as twin  # noqa: E402
from tests.parity.compare import assert_close  # noqa: E402

pytestmark = pytest.mark.usefixtures("x64")
NAMES = ("means", "quats", "scales", "opacities", "colors", "viewmats", "Ks", "backgrounds")


def scene(kind: str):
    if kind == "opaque":
        found = scenes.opaque_scene(80, seed=3)
    else:
        found = scenes.random_scene(150, seed=1, size=0.08)
        # Some behind the cameras, some far outside of the picture, some too faint to be seen.
        found[0][:5, 2] -= 9
        found[0][5:10, 0] += 6
        found[3][10:15] = 0.003
    return [np.asarray(x, np.float64) for x in found]


@pytest.mark.parametrize(("kind", "mode"), [("random", "classic"), ("opaque", "antialiased")])
def test_pictures_and_gradients(rng, kind, mode):
    width, height = 40, 28
    viewmats, Ks = (np.asarray(x, np.float64) for x in scenes.cameras(2, width, height))
    inputs = [*scene(kind), viewmats, Ks, rng.uniform(size=(2, 3))]
    bars = rng.normal(size=(2, height, width, 3)), rng.normal(size=(2, height, width, 1))

    def total(*arrays):
        *arrays, backgrounds = arrays
        image, alpha, info = rasterize(*arrays, width, height, backgrounds=backgrounds, rasterize_mode=mode,
                                       backend="jax", capacity=8192)  # fmt: skip
        return jnp.sum(image * bars[0]) + jnp.sum(alpha * bars[1]), (image, alpha, info["overflow"])

    (_, (*expected, overflow)), gradients = jax.jit(jax.value_and_grad(total, range(8), has_aux=True))(*inputs)
    assert overflow == 0
    tensors = [torch.tensor(x, requires_grad=True) for x in inputs]
    found = twin.rasterize(*tensors[:7], width, height, backgrounds=tensors[7], antialiased=mode == "antialiased")
    assert 0.2 < expected[1].mean() < 0.999
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)
    sum((a * torch.tensor(b)).sum() for a, b in zip(found, bars, strict=True)).backward()
    for name, tensor, gradient in zip(NAMES, tensors, gradients, strict=True):
        # A quaternion's length has no gradient but rounding.
        assert_close(tensor.grad, gradient, 1e-9, name)


def test_projection(rng):
    width, height = 40, 28
    viewmats, Ks = (np.asarray(x, np.float64) for x in scenes.cameras(1, width, height))
    arrays = scene("random")[:4]
    expected = project(*arrays, viewmats, Ks, width, height)
    found = twin.project(*map(torch.tensor, (*arrays, viewmats[0], Ks[0])), width, height)
    seen = np.array((expected.radii > 0).all(-1))[0]
    assert 0 < seen.sum() < len(seen)
    np.testing.assert_array_less(seen, np.asarray(found.visible) + 1)
    for name in ("means2d", "depths", "conics", "opacities"):
        assert_close(getattr(found, name)[seen], getattr(expected, name)[0][seen], name=name)
