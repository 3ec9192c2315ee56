"""Built-in motions: sequences of FLAME parameters that show what a head can do."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from pointillist_jax.flame import FlameModel, FlameParams

# A mouth that speaks: syllables of (jaw angle in radians, how much the corners are pulled), four a second.
_SYLLABLES = ((0.02, 0.0), (0.16, 0.1), (0.05, 0.3), (0.2, 0.0), (0.08, 0.5), (0.03, 0.1), (0.22, 0.2), (0.1, 0.4))


def turn_and_talk(model: FlameModel, num_frames: int, fps: int = 24) -> FlameParams:
    """The head turns to both sides and back while it talks, blinks and looks about.

    Args:
      model: any head. Blinks and smiles need named directions as the open head has them; another head (FLAME's are
        not named) only talks with its jaw.
      num_frames: T.
      fps: frames a second, which sets the speed of speech and blinks; the turn takes the whole sequence.

    Returns:
      FlameParams with leading axis T and the neutral identity.
    """
    seconds = np.arange(num_frames) / fps
    phase = 2 * math.pi * np.arange(num_frames) / num_frames
    step = seconds * 4
    blend = 0.5 - 0.5 * np.cos(math.pi * (step % 1))
    at, following = (np.array(_SYLLABLES)[(np.floor(step).astype(int) + k) % len(_SYLLABLES)] for k in (0, 1))
    jaw, corners = ((1 - blend[:, None]) * at + blend[:, None] * following).T
    blink = np.exp(-(((seconds % 1.7) - 0.9) ** 2) / 0.004)

    expr = np.zeros((num_frames, model.expr_dirs.shape[-1]))
    amounts = {
        "eye-left-closure": blink,
        "eye-right-closure": blink,
        "mouth-corner-puller": 0.6 * corners,
        "mouth-pursing": 0.4 * np.clip(np.sin(5 * seconds), 0, 1) * (jaw < 0.1),
        "eyebrows-left-up": 0.35 * np.clip(np.sin(phase), 0, 1),
        "eyebrows-right-up": 0.35 * np.clip(np.sin(phase), 0, 1),
    }
    for name, amount in amounts.items():
        if name in model.expr_names:
            expr[:, model.expr_names.index(name)] = amount

    def angles(x=0.0, y=0.0) -> jnp.ndarray:
        return jnp.asarray(np.stack(np.broadcast_arrays(x, y, np.zeros(num_frames)), axis=-1), jnp.float32)

    gaze = angles(y=0.25 * np.sin(2 * phase))
    return model.neutral_params((num_frames,)).replace(
        expr=jnp.asarray(expr, jnp.float32),
        rotation=angles(y=0.25 * np.sin(phase)),
        neck_pose=angles(x=0.06 * np.sin(2 * phase), y=0.45 * np.sin(phase)),
        jaw_pose=angles(x=jaw),
        eyes_pose=jnp.concatenate([gaze, gaze], axis=-1),
    )
