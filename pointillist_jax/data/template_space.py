"""Clouds in the space of the template: every person's points as they would lie on the head of mean shape (ours).

With `DataConfig.space="template"` the tokens of a store say where a point lies on its face, not how the person's head
is shaped: that is known from FLAME anyway, and a small model then only has to learn what FLAME does not tell: hair,
beards, clothes, how densely. A point moves with the local frame of its face (`flame.face_frames`), so the way there and
back is exact. All NumPy, in float32.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from jaxtyping import Float, Int

from pointillist_jax.flame import FaceFrames, FlameModel, FlameParams, face_frames, flame_vertices

SPACES = ("identity", "template")


def canonical_frames(head: FlameModel, canonical: FlameParams) -> FaceFrames:
    """The face frames of a canonical mesh, as NumPy. `canonical`: without leading axes."""
    return FaceFrames(*map(np.asarray, _frames(head, canonical)))


# One program: step by step, a first subject would wait for some thirty small ones to be compiled.
@jax.jit
def _frames(head: FlameModel, canonical: FlameParams) -> FaceFrames:
    return face_frames(flame_vertices(head, canonical), head.faces)


def template_canonical(head: FlameModel, jaw: float) -> FlameParams:
    """The canonical pose of the head of mean shape. `jaw`: radians."""
    return head.neutral_params().canonical(jaw)


def place(
    points: Float[np.ndarray, "P 3"], binding: Int[np.ndarray, "P"], source: FaceFrames, target: FaceFrames
) -> Float[np.ndarray, "P 3"]:
    """Points around one mesh → around another, each as its face lies there: local coordinates are kept."""
    local = np.einsum("pba,pb->pa", source.rotation[binding], points - source.center[binding])
    local = local * (target.scale[binding] / source.scale[binding])[:, None]
    return (np.einsum("pab,pb->pa", target.rotation[binding], local) + target.center[binding]).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Placement:
    """From the space of a store's tokens to one person's canonical mesh.

    Attributes:
      template, person: face frames; None where tokens are in the person's own space and nothing is to be done.
    """

    template: FaceFrames | None = None
    person: FaceFrames | None = None

    def __call__(self, points: Float[np.ndarray, "P 3"], binding: Int[np.ndarray, "P"]) -> Float[np.ndarray, "P 3"]:
        return points if self.template is None else place(points, binding, self.template, self.person)


def placement(head: FlameModel, canonical: FlameParams, space: str, jaw: float) -> Placement:
    """How a person's points are placed.

    Args:
      canonical: the person's, `params.canonical(jaw)`.
      space: of the tokens, one of `SPACES`.
      jaw: of the canonical pose, radians.
    """
    if space == "identity":
        return Placement()
    return Placement(canonical_frames(head, template_canonical(head, jaw)), canonical_frames(head, canonical))
