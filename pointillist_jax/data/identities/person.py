"""One synthetic person: traits, shape and ground-truth Gaussians bound to the faces of a head."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pointillist_jax.configs import IdentityConfig
from pointillist_jax.data.identities import accessories, facial_hair, hair, skin
from pointillist_jax.data.identities.anatomy import Anatomy, identity_vertices, study
from pointillist_jax.data.identities.surface import Collider, Splats
from pointillist_jax.data.identities.traits import Traits, sample_traits
from pointillist_jax.flame import FlameModel, FlameParams, face_frames, global_to_local
from pointillist_jax.flame.rotations import rotation_to_quat
from pointillist_jax.gaussians import Gaussians

PARTS = ("skin", "eyes", "mouth", "teeth", "hair", "brow", "lash", "beard", "clothing", "glasses")


@dataclasses.dataclass(frozen=True)
class Identity:
    """A person. Letters: G Gaussians, F faces.

    Attributes:
      seed: that made it, with the config.
      traits: what the person looks like.
      params: neutral, with the person's shape.
      canonical: the same with the jaw open by `canonical_jaw`.
      gaussians: triangle-local, `binding` set; G differs between people.
      parts: [G] int index into `part_names`.
      part_names: what a Gaussian belongs to.
      face_flags: "hair", "beard", "cheek" → [F] bool: faces from which this person's hair or beard grows, and bare
        cheeks, for counting Gaussians by region.
    """

    seed: int
    traits: Traits
    params: FlameParams
    canonical: FlameParams
    gaussians: Gaussians
    parts: np.ndarray
    part_names: tuple[str, ...]
    face_flags: dict[str, np.ndarray]

    def counts(self) -> dict[str, int]:
        """Gaussians of each part."""
        return {name: int((self.parts == i).sum()) for i, name in enumerate(self.part_names)}


def sample_identity(
    model: FlameModel,
    seed: int,
    config: IdentityConfig | None = None,
    *,
    anatomy: Anatomy | None = None,
    **fixed: str,
) -> Identity:
    """Draws a person; the same seed, head and config give the same bytes.

    Args:
      model: any head in FLAME's layout; people on one without named regions have plainer skin and no lashes.
      seed: ≥ 0.
      config: density of the Gaussians, spread of the shapes.
      anatomy: `study(model)`, to save measuring the head for every person.
      fixed: `hair_style=`, `beard=` or `glasses=` replace what would be drawn.
    """
    anatomy = study(model) if anatomy is None else anatomy
    config = IdentityConfig() if config is None else config
    streams = [np.random.default_rng([seed, stream]) for stream in range(9)]
    traits = sample_traits(streams[0], **fixed)
    shape = config.shape_spread * streams[1].normal(size=model.shape_dirs.shape[-1])
    # A shrunk normal keeps faces plausible; a hard bound keeps the rare extreme out.
    shape = np.clip(shape, -2.2 * config.shape_spread, 2.2 * config.shape_spread).astype(np.float32)
    vertices = identity_vertices(model, shape)
    joints = (np.asarray(model.joint_regressor, np.float64) @ vertices)[3:5]
    collider = Collider(anatomy, vertices)
    density = config.density

    points = skin.skin_points(anatomy, vertices, density, streams[2])
    points = points.take(~accessories.covered(points, traits))
    colors = skin.skin_colors(anatomy, points, traits, streams[2])
    for tint, rgb in (
        (hair.scalp_tint(anatomy, points, traits), np.array(traits.hair_rgb) * 0.55),
        (facial_hair.beard_tint(anatomy, points, traits), np.array(traits.beard_rgb) * 0.8),
        (facial_hair.brow_tint(points, traits), facial_hair.brow_color(traits)),
        # What little skin shows between threads at the collar must not look like a hole in it.
        (accessories.below_neckline(points.template, traits.clothing) > 5e-4, np.array(traits.clothing_rgb) * 0.8),
    ):
        colors = colors + tint[:, None] * (rgb - colors)
    splats = skin.head_splats(anatomy, points, colors, traits)
    splats.append(skin.eye_splats(anatomy, vertices, joints, traits, density, streams[3]))
    splats += hair.head_hair(anatomy, vertices, collider, traits, density, streams[4])
    splats += facial_hair.brow_splats(anatomy, vertices, collider, traits, density, streams[5])
    splats += facial_hair.lash_splats(anatomy, vertices, joints, traits, density, streams[5])
    splats += facial_hair.beard_splats(anatomy, vertices, collider, traits, density, streams[6])
    splats += accessories.clothing_splats(anatomy, vertices, traits, density, streams[7])
    splats += accessories.glasses_splats(anatomy, vertices, joints, traits, density, streams[8])

    params = model.neutral_params().replace(shape=jnp.asarray(shape))
    hairy, bearded = hair.hair_faces(anatomy, traits), facial_hair.beard_faces(anatomy, traits)
    return Identity(
        seed=seed,
        traits=traits,
        params=params,
        canonical=params.canonical(config.canonical_jaw),
        gaussians=_bind(anatomy, vertices, splats),
        parts=np.concatenate([np.full(len(s), PARTS.index(s.part), np.uint8) for s in splats]),
        part_names=PARTS,
        face_flags={"hair": hairy, "beard": bearded, "cheek": _cheek_faces(anatomy) & ~bearded},
    )


def _bind(anatomy: Anatomy, vertices: np.ndarray, splats: list[Splats]) -> Gaussians:
    """World-space splats round the neutral mesh → local to their faces, float32."""

    count = sum(len(s) for s in splats)
    # People differ in their number of Gaussians; padded to few sizes they share compiled programs.
    spare = -count % 8192

    def gather(name: str) -> np.ndarray:
        values = np.concatenate([getattr(s, name) for s in splats])
        return np.concatenate([values, np.repeat(values[:1], spare, axis=0)])

    arrays = {name: gather(name).astype(np.float32) for name in ("means", "axes", "scales", "opacities", "colors")}
    local = _to_local(
        arrays, gather("binding").astype(np.int32), jnp.asarray(vertices, jnp.float32), anatomy.model.faces
    )
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[:count]), local)


@jax.jit
def _to_local(arrays: dict[str, jax.Array], binding: jax.Array, vertices: jax.Array, faces: jax.Array) -> Gaussians:
    world = Gaussians(
        means=arrays["means"],
        quats=rotation_to_quat(arrays["axes"]),
        scales=jnp.maximum(arrays["scales"], 1e-5),
        opacities=arrays["opacities"],
        colors=arrays["colors"],
    )
    return global_to_local(world, binding, face_frames(vertices, faces))


def _cheek_faces(anatomy: Anatomy) -> np.ndarray:
    centers = anatomy.template[anatomy.faces].mean(axis=1)
    x, y, z = np.abs(centers[:, 0]), centers[:, 1], centers[:, 2]
    bare = anatomy.outside & ~anatomy.faces_of("nose", "lips", "lids", "ears")
    return bare & (x > 0.024) & (x < 0.062) & (y > -0.035) & (y < 0.010) & (z > 0.0)
