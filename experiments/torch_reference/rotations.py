"""Rotations as axis-angle, matrix and wxyz quaternion, in PyTorch; leading axes are a batch."""

from __future__ import annotations

import torch
from torch import Tensor


def rodrigues(axis_angle: Tensor) -> Tensor:
    """[..., 3] radians → [..., 3, 3]; value and gradient are finite at zero."""
    square = axis_angle.square().sum(-1)[..., None, None]
    small = square < 1e-4
    angle = torch.where(small, 1, square).sqrt()
    # Of sin θ / θ and (1 - cos θ) / θ²; the first term left out is below 1e-18.
    a = torch.where(small, 1 - square / 6 + square**2 / 120 - square**3 / 5040, angle.sin() / angle)
    b = torch.where(small, 0.5 - square / 24 + square**2 / 720 - square**3 / 40320, (1 - angle.cos()) / angle**2)
    x, y, z = axis_angle.unbind(-1)
    zero = torch.zeros_like(x)
    rows = [torch.stack(row, -1) for row in ((zero, -z, y), (z, zero, -x), (-y, x, zero))]
    K = torch.stack(rows, -2)
    return torch.eye(3, dtype=K.dtype, device=K.device) + a * K + b * (K @ K)


def nearest_rotation(matrix: Tensor, iterations: int = 10) -> Tensor:
    """The polar factor of matrices with positive determinant. By Newton's iteration: the derivative of an SVD does not
    exist where singular values are equal, as those of rotations are."""
    for _ in range(iterations):
        matrix = (matrix + torch.linalg.inv(matrix).transpose(-1, -2)) / 2
    return matrix


def matrix_to_quat(rotation: Tensor) -> Tensor:
    """[..., 3, 3] → [..., 4], its largest component positive."""
    (a, b, c), (d, e, f), (g, h, i) = (row.unbind(-1) for row in rotation.unbind(-2))
    # Row n is four times component n times the quaternion.
    rows = [
        [1 + a + e + i, h - f, c - g, d - b],
        [h - f, 1 + a - e - i, b + d, c + g],
        [c - g, b + d, 1 - a + e - i, f + h],
        [d - b, c + g, f + h, 1 - a - e + i],
    ]
    table = torch.stack([torch.stack(row, -1) for row in rows], -2)
    largest = table.diagonal(dim1=-2, dim2=-1).argmax(-1)
    return normalize(table.gather(-2, largest[..., None, None].expand(*largest.shape, 1, 4))[..., 0, :])


def quat_multiply(p: Tensor, q: Tensor) -> Tensor:
    """The rotation q followed by p."""
    p0, q0, pv, qv = p[..., :1], q[..., :1], p[..., 1:], q[..., 1:]
    pv, qv = torch.broadcast_tensors(pv, qv)
    scalar = p0 * q0 - (pv * qv).sum(-1, keepdim=True)
    return torch.cat([scalar, p0 * qv + q0 * pv + torch.linalg.cross(pv, qv)], -1)


def normalize(x: Tensor) -> Tensor:
    """x / √max(x·x, 1e-20)."""
    return x / x.square().sum(-1, keepdim=True).clamp(min=1e-20).sqrt()
