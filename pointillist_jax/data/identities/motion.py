"""Motions for captures: random expressions, speech, blinks, gazes and head poses, one sequence per person."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from pointillist_jax.flame import FlameModel, FlameParams

# Expressions by the open head's names: how strong each direction gets, and the jaw's angle in radians.
_FACES: tuple[tuple[dict[str, float], float], ...] = (
    ({}, 0.0),
    ({"mouth-corner-puller": 0.8, "eye-left-slit": 0.25, "eye-right-slit": 0.25}, 0.0),
    ({"mouth-upward-retraction": 0.8, "mouth-corner-puller": 0.3, "eye-left-slit": 0.3, "eye-right-slit": 0.3}, 0.05),
    ({"eyebrows-left-up": 0.9, "eyebrows-right-up": 0.9, "eye-left-opened-up": 0.7, "eye-right-opened-up": 0.7}, 0.24),
    ({"eyebrows-left-down": 0.9, "eyebrows-right-down": 0.9, "mouth-compression": 0.6}, 0.0),
    ({"eyebrows-left-down": 0.7, "eyebrows-right-down": 0.7, "mouth-part-later": 0.6, "nose-compression": 0.4}, 0.03),
    ({"mouth-pursing": 0.9}, 0.02),
    ({"mouth-protusion": 0.6}, 0.08),
    ({"mouth-depression": 0.8, "eyebrows-left-inner-up": 0.8, "eyebrows-right-inner-up": 0.8}, 0.0),
    ({"mouth-retraction": 0.6}, 0.10),
    ({"mouth-eversion": 0.5}, 0.16),
    ({"mouth-elevation": 0.6, "nose-left-elevation": 0.5, "nose-right-elevation": 0.5}, 0.0),
    ({"eye-left-closure": 1.0, "eye-right-closure": 1.0}, 0.0),
    ({"eye-left-closure": 1.0, "mouth-corner-puller": 0.5}, 0.04),
    ({"eye-right-closure": 1.0, "mouth-corner-puller": 0.4}, 0.0),
    ({"mouth-depression-retraction": 0.6}, 0.06),
    ({}, 0.30),
    ({"mouth-corner-puller": 0.4}, 0.18),
)
_KEY_EVERY = 3


def random_motion(model: FlameModel, shape: np.ndarray, num_timesteps: int, rng: np.random.Generator) -> FlameParams:
    """A person who pulls faces, talks, blinks and looks about; every third timestep is a new pose, others lie between.

    Args:
      model: named expressions are used where it has them; FLAME's nameless ones are drawn at random, weakly.
      shape: [S] of the person.
      num_timesteps: T. The first is neutral.
      rng: decides everything.

    Returns:
      FlameParams [T, ...], shape [S]. Translations have mean zero, as exporters leave them (facts A.8).
    """
    keys = -(-num_timesteps // _KEY_EVERY) + 1
    num_expr = model.expr_dirs.shape[-1]
    expr, jaw = np.zeros((keys, num_expr)), np.zeros(keys)
    # Every face comes once before any comes again.
    order = np.concatenate([1 + rng.permutation(len(_FACES) - 1) for _ in range(-(-keys // (len(_FACES) - 1)))])
    for k in range(1, keys):
        amounts, angle = _FACES[order[k - 1]]
        strength = rng.uniform(0.7, 1.05)
        for name, amount in amounts.items():
            if name in model.expr_names:
                expr[k, model.expr_names.index(name)] = min(1.0, strength * amount)
        if not any(name in model.expr_names for name in _FACES[1][0]):
            expr[k, :20] = 0.6 * rng.normal(size=min(20, num_expr))
        jaw[k] = angle * rng.uniform(0.8, 1.15)
    neck = rng.normal(size=(keys, 3)) * [0.10, 0.26, 0.06]
    rotation = rng.normal(size=(keys, 3)) * [0.04, 0.08, 0.03]
    gaze = rng.normal(size=(keys, 2)) * [0.07, 0.16] - 0.35 * neck[:, :2]
    shift = rng.normal(size=(keys, 3)) * 0.004
    for values in (neck, rotation, gaze, shift):
        values[0] = 0

    time = np.arange(num_timesteps) / _KEY_EVERY

    def sampled(values: np.ndarray, low: float, high: float) -> np.ndarray:
        at = np.floor(time).astype(int)
        share = (time - at).reshape(-1, *([1] * (values.ndim - 1)))
        share = share * share * (3 - 2 * share)
        values = np.clip(values, low, high)
        return (1 - share) * values[at] + share * values[np.minimum(at + 1, keys - 1)]

    shift = sampled(shift, -0.012, 0.012)
    eyes = sampled(np.concatenate([gaze, np.zeros((keys, 1))], axis=1), -0.35, 0.35)
    values = {
        "expr": sampled(expr, -1.5, 1.5),
        "rotation": sampled(rotation, -0.2, 0.2),
        "neck_pose": sampled(neck, -0.55, 0.55),
        "jaw_pose": np.concatenate([sampled(jaw, 0, 0.35)[:, None], np.zeros((num_timesteps, 2))], axis=1),
        "eyes_pose": np.concatenate([eyes, eyes], axis=1),
        "translation": shift - shift.mean(axis=0),
    }
    return FlameParams(
        shape=jnp.asarray(shape, jnp.float32),
        **{name: jnp.asarray(value, jnp.float32) for name, value in values.items()},
    )


def portrait_params(model: FlameModel, shape: np.ndarray, rng: np.random.Generator) -> FlameParams:
    """A relaxed look into the camera, with a hint of a smile for most."""
    params = model.neutral_params().replace(shape=jnp.asarray(shape, jnp.float32))
    expr = np.zeros(model.expr_dirs.shape[-1], np.float32)
    if "mouth-corner-puller" in model.expr_names:
        expr[model.expr_names.index("mouth-corner-puller")] = max(0.0, rng.normal(0.2, 0.15))
    neck = rng.normal(size=3) * [0.02, 0.04, 0.015]
    return params.replace(expr=jnp.asarray(expr), neck_pose=jnp.asarray(neck, jnp.float32))
