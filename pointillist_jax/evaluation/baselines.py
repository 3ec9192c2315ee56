"""What a reconstruction from one portrait has to beat: guesses made of the training people's own fits (ours).

Everything is triangle-local, so any guess can sit on any head: on the mean shape of the training people, on a training
person's, or on the subject's own tracked one, which the method is given too.

* **mean head**: one Gaussian on each face, the mean of what the training people have there;
* **mean picture**: the pixel mean of training people's pictures at the same pose and camera, which is the constant
  guess of least squared error, up to how many people are averaged;
* **nearest person**: the whole fit of the training person whose portrait, or whose head shape, is nearest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8
from scipy.spatial.transform import Rotation

from pointillist_jax.files import UserError
from pointillist_jax.flame import FlameModel, FlameParams, flame_vertices
from pointillist_jax.gaussians import SH_C0, Gaussians

# Portraits are compared as so many blurred pixels a side: who somebody is, not where an eyelash lies.
_SMALL, _BLUR = 16, 1.0


@dataclasses.dataclass(frozen=True)
class Baseline:
    """One guess.

    Attributes:
      content: "mean", "mean_image", "nearest" (by portrait) or "nearest_shape".
      on_shape: whether it sits on the subject's own tracked head, not on that of the people it is made of.
      what: a line for tables.
    """

    content: str
    on_shape: bool
    what: str


BASELINES = {
    "mean": Baseline("mean", False, "the mean training head: one Gaussian a face, on the mean training shape"),
    "mean_on_shape": Baseline("mean", True, "the same on the subject's own tracked shape"),
    "mean_image": Baseline("mean_image", False, "pixel mean of training people's avatars in the same pose and camera"),
    "mean_image_on_shape": Baseline("mean_image", True, "the same, all of them on the subject's own tracked shape"),
    "nearest": Baseline("nearest", False, "the training person with the nearest portrait (small, blurred, L2)"),
    "nearest_on_shape": Baseline("nearest", True, "the same on the subject's own tracked shape"),
    "nearest_shape": Baseline("nearest_shape", False, "the training person with the nearest head shape"),
}


def mean_gaussians(people: Iterable[Gaussians], head: FlameModel) -> Gaussians:
    """The mean training head: at most one Gaussian on each face, triangle-local.

    Of each person and face, position, covariance and colour are the means of the person's Gaussians there, weighted by
    opacity, and the opacity is what they hide together, 1 − Π(1 − o). People count by that opacity, which is itself
    averaged with 0 for those who have nothing on the face. The spread of positions is left out of the covariance: with
    it scalps with and without hair make one huge Gaussian (9.0 instead of 16.2 dB on four synthetic people).

    Args:
      people: triangle-local Gaussians of each, one pass.
      head: they are bound to. Faces that nobody has a Gaussian on stay empty.

    Raises:
      UserError: nobody.
    """
    F = head.num_faces
    # By columns: position, covariance, colour.
    total, hidden, count = np.zeros((F, 3 + 9 + 3)), np.zeros(F), 0
    for person in people:
        binding, opacity = np.asarray(person.binding), np.asarray(person.opacities, np.float64)
        # In NumPy: JAX would compile anew for every number of Gaussians.
        turn = Rotation.from_quat(np.asarray(person.quats, np.float64), scalar_first=True).as_matrix()
        covariance = np.einsum("pab,pb,pcb->pac", turn, np.asarray(person.scales, np.float64) ** 2, turn)
        columns = np.concatenate(
            [np.asarray(person.means, np.float64), covariance.reshape(-1, 9), plain_colors(person)], axis=1
        )
        weight, mine, seen_through = np.zeros(F), np.zeros_like(total), np.zeros(F)
        np.add.at(weight, binding, opacity)
        np.add.at(mine, binding, opacity[:, None] * columns)
        np.add.at(seen_through, binding, np.log1p(-np.minimum(opacity, 1 - 1e-6)))
        hides = 1 - np.exp(seen_through)
        total += (hides / np.maximum(weight, 1e-12))[:, None] * mine
        hidden += hides
        count += 1
    if not count:
        raise UserError("a mean head needs at least one training person with a fit: check --fits.")
    faces = np.flatnonzero(hidden > 1e-6)
    mean = total[faces] / hidden[faces][:, None]
    variances, axes = np.linalg.eigh(mean[:, 3:12].reshape(-1, 3, 3))
    axes[:, :, 0] *= np.sign(np.linalg.det(axes))[:, None]
    return Gaussians(
        means=jnp.asarray(mean[:, :3], jnp.float32),
        quats=jnp.asarray(Rotation.from_matrix(axes).as_quat(scalar_first=True), jnp.float32),
        scales=jnp.asarray(np.sqrt(np.maximum(variances, 1e-12)), jnp.float32),
        opacities=jnp.asarray(np.clip(hidden[faces] / count, 0, 0.999), jnp.float32),
        colors=jnp.asarray(np.clip(mean[:, 12:], 0, 1), jnp.float32),
        binding=jnp.asarray(faces, jnp.int32),
    )


def plain_colors(gaussians: Gaussians) -> Float[np.ndarray, "G 3"]:
    """RGB without view dependence: of spherical harmonics, their constant part."""
    if gaussians.sh is None:
        return np.asarray(gaussians.colors, np.float64)
    return 0.5 + SH_C0 * np.asarray(gaussians.sh[..., 0, :], np.float64)


def mean_identity(identities: Sequence[dict[str, np.ndarray]], head: FlameModel) -> FlameParams:
    """The mean of people's shape, and of their static offsets with zero for those who have none.

    Args:
      identities: {"shape": [S], "static_offset": [V, 3] or missing}, as `TokenStore.identity`.
    """
    fields: dict[str, Any] = {"shape": jnp.asarray(np.mean([i["shape"] for i in identities], axis=0), jnp.float32)}
    if offsets := [i["static_offset"] for i in identities if "static_offset" in i]:
        fields["static_offset"] = jnp.asarray(np.sum(offsets, axis=0) / len(identities), jnp.float32)
    return head.neutral_params().replace(**fields)


def portrait_distances(
    portrait: UInt8[np.ndarray, "S S 3"], portraits: Sequence[UInt8[np.ndarray, "S S 3"]]
) -> Float[np.ndarray, "N"]:
    """Root mean squared difference of small, blurred pictures on white, in [0, 1]; of any sizes."""
    from scipy.ndimage import gaussian_filter

    def small(picture: np.ndarray) -> np.ndarray:
        from PIL import Image

        shrunk = Image.fromarray(np.asarray(picture, np.uint8)).resize((_SMALL, _SMALL), Image.Resampling.BOX)
        return gaussian_filter(np.asarray(shrunk, np.float64) / 255, (_BLUR, _BLUR, 0), mode="nearest")

    mine = small(portrait)
    return np.array([np.sqrt(np.mean((small(other) - mine) ** 2)) for other in portraits])


def shape_distances(
    identity: FlameParams, identities: Sequence[dict[str, np.ndarray]], head: FlameModel, jaw: float
) -> Float[np.ndarray, "N"]:
    """Root mean squared distance of the vertices of canonical meshes, metres: coefficients are no lengths."""
    mine = np.asarray(_canonical_vertices(head, identity, jaw))
    found = []
    for other in identities:
        params = head.neutral_params().replace(**{name: jnp.asarray(value) for name, value in other.items()})
        difference = np.asarray(_canonical_vertices(head, params, jaw)) - mine
        found.append(np.sqrt(np.mean(np.sum(difference**2, axis=-1))))
    return np.array(found)


@jax.jit
def _canonical_vertices(head: FlameModel, identity: FlameParams, jaw: float):
    return flame_vertices(head, identity.canonical(jaw))


def random_people(names: Sequence[str], num: int, seed: int) -> list[str]:
    """`num` of the names by chance, in their order; all for 0 or where there are no more."""
    if not num or num >= len(names):
        return list(names)
    chosen: Int[np.ndarray, "n"] = np.random.default_rng([seed, 24]).choice(len(names), num, replace=False)
    return [names[i] for i in sorted(chosen)]
