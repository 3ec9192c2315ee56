"""Locks of hair: grown step by step over a head, then laid out as small, long Gaussians."""

from __future__ import annotations

import dataclasses

import numpy as np

from pointillist_jax.data.identities.anatomy import unit
from pointillist_jax.data.identities.surface import Collider, Splats

DOWN = np.array([0.0, -1.0, 0.0])


@dataclasses.dataclass
class Strands:
    """N locks of S + 1 points.

    Attributes:
      points: [N, S + 1, 3] metres around the neutral head, root first.
      binding: [N] face a lock is bound to.
      width: [N] standard deviation across a lock, metres.
      shade: [N, S + 1] brightness: dark in the depth of the hair, at the roots.
    """

    points: np.ndarray
    binding: np.ndarray
    width: np.ndarray
    shade: np.ndarray

    def take(self, rows: np.ndarray) -> Strands:
        return Strands(self.points[rows], self.binding[rows], self.width[rows], self.shade[rows])


def grow(
    collider: Collider,
    roots: np.ndarray,
    direction: np.ndarray,
    length: np.ndarray,
    clearance: np.ndarray,
    steps: int,
    *,
    gravity: float = 0.0,
    pull=None,
    rise: int = 2,
) -> np.ndarray:
    """Follows N locks from their roots.

    Args:
      collider: the head they stay outside of.
      roots: [N, 3]. direction: [N, 3] at the root. length: [N] metres.
      clearance: [N] metres above the skin that a lock keeps after `rise` steps: the volume of the hair.
      steps: S.
      gravity: weight of falling against keeping the direction, per step.
      pull: (points [N, 3], directions [N, 3], step) → [N, 3] added to the direction, or None.

    Returns:
      [N, S + 1, 3].
    """
    step_length = (length / steps)[:, None]
    points, heading = [roots], unit(direction)
    at = roots
    for i in range(steps):
        wish = heading + gravity * DOWN
        if pull is not None:
            wish = wish + pull(at, heading, i)
        heading = unit(wish)
        moved = at + step_length * heading
        height = clearance * min(1.0, (i + 1) / rise)
        outside, _ = collider.push_out(moved, np.minimum(height, 0.85 * length * (i + 1) / steps + 5e-4))
        # Keep the step's length, so that locks that lie on the head are as long as the ones that hang.
        heading = unit(outside - at)
        at = at + step_length * heading
        at, _ = collider.push_out(at, np.full(len(at), 5e-4))
        points.append(at)
    return np.stack(points, axis=1)


def curl(
    points: np.ndarray, amount: float, radius: float, turns_per_metre: float, rng: np.random.Generator
) -> np.ndarray:
    """Winds locks [N, S + 1, 3] round their own line; neighbours turn alike only in part."""
    if amount <= 0.05:
        return points
    tangent = unit(np.gradient(points, axis=1))
    side = unit(np.cross(tangent, [0.0, 0.3, 1.0]))
    other = np.cross(tangent, side)
    travelled = np.concatenate(
        [np.zeros((len(points), 1)), np.cumsum(np.linalg.norm(np.diff(points, axis=1), axis=2), axis=1)], axis=1
    )
    phase = rng.uniform(0, 2 * np.pi, (len(points), 1))
    rate = turns_per_metre * rng.uniform(0.8, 1.25, (len(points), 1))
    angle = 2 * np.pi * rate * travelled + phase
    grown = np.minimum(travelled / 0.03, 1.0) * radius * amount
    return points + grown[..., None] * (np.cos(angle)[..., None] * side + np.sin(angle)[..., None] * other)


def strand_splats(
    strands: Strands,
    color: np.ndarray,
    part: str,
    rng: np.random.Generator,
    *,
    variation: float = 0.12,
    grey: float = 0.0,
    shine: float = 0.10,
    flat: float = 0.5,
    opacity: float = 0.93,
    overlap: float = 0.62,
    tip: float = 0.6,
    center: np.ndarray | None = None,
) -> Splats:
    """One Gaussian per segment of each lock: long along it, narrow across, thin towards the head.

    Args:
      color: [3] of the hair.
      variation: spread of brightness between locks; grey: share of grey ones.
      shine: strength of the band of light across the hair.
      flat: thickness per width.
      overlap: standard deviations along a lock per length of its segments.
      tip: width at the tip per width at the root.
      center: [3] middle of the head; hair is thin towards it.
    """
    points = strands.points
    N, S = points.shape[0], points.shape[1] - 1
    middle, along = (points[:, 1:] + points[:, :-1]) / 2, np.diff(points, axis=1)
    length = np.linalg.norm(along, axis=2)
    tangent = unit(along)
    center = np.array([0.0, 0.02, -0.04]) if center is None else center
    outward = unit(middle - center)
    out = unit(outward - np.einsum("nsa,nsa->ns", outward, tangent)[..., None] * tangent)
    axes = np.stack([tangent, np.cross(out, tangent), out], axis=-1)
    width = strands.width[:, None] * np.linspace(1.0, tip, S)[None]

    tone = np.exp(variation * rng.normal(size=(N, 1)))
    warmth = 1 + 0.025 * rng.normal(size=(N, 1))
    rgb = np.asarray(color) * tone[..., None] * np.concatenate([warmth, np.ones((N, 1)), 1 / warmth], axis=1)[:, None]
    rgb = np.broadcast_to(rgb, (N, S, 3)).copy()
    pale = rng.random(N) < grey
    rgb[pale] += 0.45 * (0.55 - rgb[pale])
    shade = (strands.shade[:, 1:] + strands.shade[:, :-1]) / 2
    # Hair shines where it lies across the light (Kajiya and Kay 1989): dark hair least in total, most in contrast.
    across = np.sqrt(np.clip(1 - (tangent @ _HALF) ** 2, 0, 1))
    facing = np.clip(0.25 + out @ _LIGHT, 0, 1)
    lit = shade * (
        0.62 + 0.30 * np.clip(out @ _LIGHT, -0.6, 1) + 0.18 * np.sqrt(np.clip(1 - (tangent @ _LIGHT) ** 2, 0, 1))
    )
    highlight = shine * across**26 * facing * shade * rng.uniform(0.4, 1.3, (N, 1))
    rgb = rgb * lit[..., None] + highlight[..., None] * (0.35 + 0.65 * np.sqrt(np.asarray(color)))
    return Splats(
        means=middle.reshape(-1, 3),
        axes=axes.reshape(-1, 3, 3),
        scales=np.stack([np.maximum(overlap * length, 0.4 * width), width, flat * width], axis=-1).reshape(-1, 3),
        opacities=np.full(N * S, opacity),
        colors=np.clip(rgb.reshape(-1, 3), 0.0, 1.0),
        binding=np.repeat(strands.binding, S),
        part=part,
    )


_LIGHT = unit(np.array([0.25, 0.80, 0.50]))
_HALF = unit(_LIGHT + np.array([0.0, 0.0, 1.0]))
