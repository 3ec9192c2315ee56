"""Motions: built-in sequences of FLAME parameters that show what a head can do, and those that trackers leave."""

from __future__ import annotations

import math
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from pointillist_jax.convert import flame_params_from_tracker
from pointillist_jax.files import UserError
from pointillist_jax.flame import FlameModel, FlameParams

TRACKED = "a flame_param.npz or another tracker's output (.frame or folder)"
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


def turn(model: FlameModel, num_frames: int, fps: int = 24, angle: float = 1.0) -> FlameParams:
    """The head turns by `angle` radians to both sides, a third of it in the neck, and comes back."""
    del fps
    yaw = angle * np.sin(2 * math.pi * np.arange(num_frames) / num_frames)
    zero = np.zeros_like(yaw)
    return model.neutral_params((num_frames,)).replace(
        rotation=jnp.asarray(np.stack([zero, yaw * 2 / 3, zero], axis=-1), jnp.float32),
        neck_pose=jnp.asarray(np.stack([zero, yaw / 3, zero], axis=-1), jnp.float32),
    )


def talk(model: FlameModel, num_frames: int, fps: int = 24) -> FlameParams:
    """Speech and blinks of `turn_and_talk`, the head held still."""
    moving = turn_and_talk(model, num_frames, fps)
    still = {name: jnp.zeros_like(getattr(moving, name)) for name in ("rotation", "neck_pose")}
    return moving.replace(**still)


def expressions(model: FlameModel, num_frames: int, fps: int = 24, most: int = 12) -> FlameParams:
    """One expression direction after another comes and goes; at most the first `most`, then the jaw.

    Args:
      model: any head.
      num_frames: T, shared out evenly.
    """
    del fps
    num = min(most, model.expr_dirs.shape[-1])
    phase = np.arange(num_frames) * (num + 1) / num_frames
    amount = 0.5 - 0.5 * np.cos(2 * math.pi * (phase % 1))
    which = np.floor(phase).astype(int)
    expr = np.zeros((num_frames, model.expr_dirs.shape[-1]))
    # FLAME's directions are standard deviations of a population, the open head's whole movements.
    size = 1.0 if named_expressions(model) else 2.0
    shown = which < num
    expr[np.flatnonzero(shown), which[shown]] = size * amount[shown]
    jaw = np.zeros((num_frames, 3))
    jaw[:, 0] = np.where(shown, 0, 0.3 * amount)
    return model.neutral_params((num_frames,)).replace(
        expr=jnp.asarray(expr, jnp.float32), jaw_pose=jnp.asarray(jaw, jnp.float32)
    )


MOTIONS = {"turn": turn, "talk": talk, "expressions": expressions, "turn_and_talk": turn_and_talk}


def check_motion(text: str) -> bool:
    """Whether --motion names a built-in one. Raises UserError if it is neither that nor something that exists."""
    if text in MOTIONS:
        return True
    if not Path(text).exists():
        raise UserError(f"--motion={text} must be one of {', '.join(MOTIONS)}, or {TRACKED} that exists.")
    return False


def load_motion(text: str, head: FlameModel, frames: int, fps: int) -> FlameParams:
    """A built-in motion of so many frames, or a tracker's, with leading axis [T].

    Raises:
      UserError: as `convert.flame_params_from_tracker`.
    """
    return MOTIONS[text](head, frames, fps) if text in MOTIONS else flame_params_from_tracker(text, head)


def named_expressions(model: FlameModel) -> bool:
    """Whether directions are movements with names; FLAME's are principal components, and their names only numbers."""
    return any(not re.fullmatch(r"expr_\d+", name) for name in model.expr_names)
