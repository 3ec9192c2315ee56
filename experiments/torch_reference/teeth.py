"""The teeth of GaussianAvatars on a FLAME head of 5023 vertices, in PyTorch (facts/avatars_gsplat.md A.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.torch_reference.flame import Head

UPPER_RING = [1713, 1715, 1716, 1735, 1696, 1694, 1657, 3543, 2774, 2811, 2813, 2850, 2833, 2832, 2830]
LOWER_RING = [1576, 1577, 1773, 1774, 1795, 1802, 1865, 3503, 2948, 2905, 2898, 2881, 2880, 2713, 2712]
FIRST = 5023
# Of a quad between a ring that begins at A and one at B: a = A + i, b = B + i; capitals are the next ones.
STRIPS = (  # A, B, triangles for i = 0 … 6, for i = 7 … 13
    (0, 30, "aBb aAB", "aAb ABb"),
    (60, 75, "abB aBA", "abA AbB"),
    (75, 30, "abA AbB", "abB aBA"),
    (45, 15, "aAb ABb", "aBb aAB"),
    (90, 105, "aBb aAB", "aAb ABb"),
    (105, 45, "aAb ABb", "aBb aAB"),
)


def with_teeth(head: Head) -> Head:
    """5143 vertices and 10144 faces; the upper teeth are the skull's (joint 1), the lower ones the jaw's (joint 2)."""
    if len(head.v_template) != FIRST:
        raise ValueError(f"teeth belong on a head of {FIRST} vertices, not {len(head.v_template)}")
    template = head.v_template
    rings = template[UPPER_RING], template[LOWER_RING]
    d = (rings[0] - rings[1]).norm(dim=-1).mean()
    middle = (rings[0] + rings[1]) / 2
    middle = torch.stack([middle[:, 0], middle[:, 1].mean().expand(15), middle[:, 2] - 1.5 * d], -1)

    def at(y: float, z: float) -> Tensor:
        return middle + d * torch.tensor([0.0, y, z], dtype=template.dtype, device=template.device)

    # Root, edge and their backs, first of the upper row, then of the lower one; each with the joint it follows.
    upper_root, upper_edge, lower_root, lower_edge = (2.1, 0.0), (0.1, 0.0), (-2.1, -0.4), (-0.1, -0.4)
    back = lambda place: (place[0], place[1] - 1)  # noqa: E731
    blocks = [
        (upper_root, 1), (lower_root, 2), (upper_edge, 1), (lower_edge, 2),
        (back(upper_root), 1), (back(upper_edge), 1), (back(lower_root), 2), (back(lower_edge), 2),
    ]  # fmt: skip
    joints = torch.tensor([joint for _, joint in blocks]).repeat_interleave(15)
    skin = torch.nn.functional.one_hot(joints, head.skin_weights.shape[1])
    directions = (head.shape_dirs[UPPER_RING] + head.shape_dirs[LOWER_RING]) / 2

    def grown(x: Tensor, more: Tensor | None = None, dim: int = 0) -> Tensor:
        if more is None:
            more = x.new_zeros([120 if axis == dim else n for axis, n in enumerate(x.shape)])
        return torch.cat([x, more.to(x)], dim)

    return head._replace(
        v_template=grown(template, torch.cat([at(*place) for place, _ in blocks])),
        faces=grown(head.faces, faces()),
        shape_dirs=grown(head.shape_dirs, directions.repeat(8, 1, 1)),
        expr_dirs=grown(head.expr_dirs),
        pose_dirs=grown(head.pose_dirs),
        joint_regressor=grown(head.joint_regressor, dim=1),
        skin_weights=grown(head.skin_weights, skin),
    )


def faces() -> Tensor:
    """[168, 3]."""
    found = []
    for A, B, first, last in STRIPS:
        for i in range(14):
            corner = {"a": A + i, "A": A + i + 1, "b": B + i, "B": B + i + 1}
            found += [[corner[c] for c in triangle] for triangle in (first if i < 7 else last).split()]
    return torch.tensor(found) + FIRST
