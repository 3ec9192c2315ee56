"""The arithmetic of the paper's metrics, in NumPy and float64 (facts/encoders_and_metrics.md 6; DESIGN §11).

The paper gives no definitions of AKD and APD and no units: these are ours, and no number here equals a column of its
Table 1. Networks, which make features, landmarks and rotations of pictures, live in `networks.py`.

Letters: N pictures, D features, K landmarks.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from pointillist_jax.files import UserError

# AKD is told in pixels of a picture of this width.
AKD_WIDTH = 512


def frechet_distance(a: Float[np.ndarray, "N D"], b: Float[np.ndarray, "M D"]) -> float:
    """Fréchet distance of the normal distributions of two sets of features: FID, if they are Inception's.

    |μa − μb|² + tr Sa + tr Sb − 2 tr √(Sa Sb), covariances divided by n − 1. With centred features X/√(n − 1), whose
    XᵀX is S, the last trace is the sum of the singular values of Xa Xbᵀ: no square root of a matrix is taken, which
    loses half the digits where there are fewer pictures than features.

    Raises:
      UserError: fewer than two pictures in a set, or different numbers of features.
    """
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise UserError(f"a Fréchet distance needs two sets [N, D] of two or more, not {a.shape} and {b.shape}.")
    (mean_a, root_a), (mean_b, root_b) = _moments(a), _moments(b)
    cross = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    # Rounding may leave a set a hair nearer to itself than zero.
    return float(max(np.sum((mean_a - mean_b) ** 2) + np.sum(root_a**2) + np.sum(root_b**2) - 2 * cross, 0.0))


def keypoint_distance(a: Float[np.ndarray, "*b K 2"], b: Float[np.ndarray, "*b K 2"]) -> Float[np.ndarray, "*b"]:
    """Mean Euclidean distance of landmarks, in the unit they are given in (AKD of one picture)."""
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    return np.linalg.norm(difference, axis=-1).mean(axis=-1)


def geodesic_angle(a: Float[np.ndarray, "*b 3 3"], b: Float[np.ndarray, "*b 3 3"]) -> Float[np.ndarray, "*b"]:
    """Angle of the rotation between two head poses, radians in [0, π] (APD of one picture)."""
    turn = np.einsum("...ji,...jk->...ik", np.asarray(a, np.float64), np.asarray(b, np.float64))
    axis = np.stack(
        [turn[..., 2, 1] - turn[..., 1, 2], turn[..., 0, 2] - turn[..., 2, 0], turn[..., 1, 0] - turn[..., 0, 1]], -1
    )
    # By both sine and cosine: the arc cosine alone has no digits left near 0.
    return np.arctan2(np.linalg.norm(axis, axis=-1), np.trace(turn, axis1=-2, axis2=-1) - 1)


def euler_angles(rotation: Float[np.ndarray, "*b 3 3"]) -> Float[np.ndarray, "*b 3"]:
    """(pitch, yaw, roll) in radians as 6DRepNet counts them: R = Rz(roll) Ry(yaw) Rx(pitch)."""
    r = np.asarray(rotation, np.float64)
    pitch = np.arctan2(r[..., 2, 1], r[..., 2, 2])
    yaw = np.arctan2(-r[..., 2, 0], np.hypot(r[..., 0, 0], r[..., 1, 0]))
    roll = np.arctan2(r[..., 1, 0], r[..., 0, 0])
    return np.stack([pitch, yaw, roll], axis=-1)


def euler_distance(a: Float[np.ndarray, "*b 3 3"], b: Float[np.ndarray, "*b 3 3"]) -> Float[np.ndarray, "*b"]:
    """Mean absolute difference of the three Euler angles, radians; each the short way round (the other APD)."""
    difference = euler_angles(a) - euler_angles(b)
    return np.abs((difference + np.pi) % (2 * np.pi) - np.pi).mean(axis=-1)


def cosine(a: Float[np.ndarray, "*b D"], b: Float[np.ndarray, "*b D"]) -> Float[np.ndarray, "*b"]:
    """Cosine of the angle between embeddings (CLIP score, before the factor 100)."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.sum(a * b, axis=-1) / np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-30)


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D], and [min(N, D), D] whose transpose times itself is the covariance."""
    mean = features.mean(axis=0)
    root = (features - mean) / np.sqrt(len(features) - 1)
    return mean, root if len(root) <= root.shape[1] else np.linalg.qr(root, mode="r")
