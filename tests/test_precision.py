"""Coordinates are never multiplied in TF32: every matrix product on their way is asked for in full precision."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pointillist_jax.cameras import look_at, viewmats_to_opengl
from pointillist_jax.flame import animate, bind_points, face_frames, flame_vertices, global_to_local, local_to_global
from pointillist_jax.gaussians import Avatar, Gaussians
from renderer_bridge import rasterize
from tests.conftest import random_params

_W, _H, _P = 32, 24, 10


def products(function, *arguments) -> list[str]:
    """The matrix products in a function's program and in its gradient's."""

    def both(*arguments):
        value, pullback = jax.vjp(function, *arguments)
        return value, pullback(value)

    text = jax.jit(both).lower(*arguments).as_text()
    return re.findall(r"stablehlo\.dot_general.*", text)


def _points(model, rng):
    """Gaussians bound to the first faces of a head."""
    floats = {"means": 3, "quats": 4, "scales": 3, "colors": 3}
    arrays = {name: jnp.asarray(rng.uniform(0.1, 1, (_P, n)), jnp.float32) for name, n in floats.items()}
    return Gaussians(**arrays, opacities=jnp.full(_P, 0.5), binding=jnp.arange(_P))


@pytest.fixture
def programs(rng, flame_model):
    """Name → function of floats and its arguments."""
    params = random_params(rng, flame_model)
    points = _points(flame_model, rng)
    rig = bind_points(flame_model, params, points.means, points.binding)
    avatar = Avatar(points.replace(binding=None), rig)
    frames = face_frames(flame_vertices(flame_model, params), flame_model.faces)

    def bound(means, params):
        rig = bind_points(flame_model, params, means, points.binding)
        return rig.rest_offset, rig.skin_weights

    def posed(skinning):
        def function(gaussians, params):
            moved = animate(avatar.replace(gaussians=gaussians), flame_model, params, skinning=skinning)
            return moved.means, moved.quats

        return function, (avatar.gaussians, params)

    def to_world(means, frames):
        return local_to_global(points.replace(means=means), frames).means

    def to_faces(means, frames):
        return global_to_local(points.replace(means=means, binding=None), points.binding, frames).means

    def splatted(means, quats, scales, opacities, colors, viewmats, Ks):
        options = {"capacity": 1024, "backgrounds": jnp.ones((1, 3)), "rasterize_mode": "antialiased"}
        return rasterize(means, quats, scales, opacities, colors, viewmats, Ks, _W, _H, backend="jax", **options)[:2]

    eye = jnp.asarray([0.1, 0.2, 3.0])
    K = jnp.asarray([[40.0, 0, 16], [0, 40, 12], [0, 0, 1]])
    fields = ("means", "quats", "scales", "opacities", "colors")
    scene = (*(getattr(points, name) for name in fields), look_at(eye, jnp.zeros(3))[None], K[None])
    return {
        "surface": posed("surface"),
        "interpolated": posed("interpolated"),
        "bind_points": (bound, (points.means, params)),
        "local_to_global": (to_world, (points.means, frames)),
        "global_to_local": (to_faces, (points.means, frames)),
        "rasterize": (splatted, scene),
        "look_at": (look_at, (eye, jnp.zeros(3))),
        "viewmats_to_opengl": (viewmats_to_opengl, (jnp.eye(4)[None],)),
    }


def test_every_product_of_coordinates_is_exact(programs):
    for name, (function, arguments) in programs.items():
        inexact = [p for p in products(function, *arguments) if "precision = [HIGHEST, HIGHEST]" not in p]
        assert not inexact, (name, inexact)


def test_an_inexact_product_would_be_seen():
    x = jnp.asarray(np.ones((4, 4)), jnp.float32)
    assert len(products(lambda a, b: a @ b, x, x)) == 3
    assert not any("HIGHEST" in p for p in products(lambda a, b: a @ b, x, x))
