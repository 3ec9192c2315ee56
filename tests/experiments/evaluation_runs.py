"""What the tests of experiments.evaluate begin with: people whose photographs show their own fits, untrained models."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.trained import load_ar
from experiments.trained_decoder import VARIANTS
from pointillist_jax.cameras import Camera, orbit
from pointillist_jax.configs import DecoderConfig
from pointillist_jax.data.capture_writer import write_capture
from pointillist_jax.data.fits import load_fit, save_fit
from pointillist_jax.data.point_features import FeatureSpec
from pointillist_jax.data.subjects import find_portrait, subject_record
from pointillist_jax.data.token_store import StoreSpec, StoreWriter, open_store
from pointillist_jax.flame import bind_points
from pointillist_jax.gaussians import Avatar, Gaussians, save_avatar
from pointillist_jax.models.gaussian_decoder import param_specs
from pointillist_jax.models.layers import init_params
from pointillist_jax.playback import AvatarRenderer
from pointillist_jax.tokens import PointTokenizer
from pointillist_jax.training.checkpoints import Checkpoints
from pointillist_jax.training.state import TrainState
from tests.data.fit_files import MODEL, random_person
from tests.experiments.small_ar import CONFIG, write_ar

SIZE, PEOPLE, CAMERAS = 32, 4, 3
SPEC = StoreSpec(PointTokenizer(MODEL.num_faces), MODEL.sha256, MODEL.source, portrait_size=14)


def write_everything(root: Path) -> None:
    """`fits/p0` …, `captures/p0` …, `truth/p0` … (avatar bundles of the fits), `store/`, `ar/`, `decoder/` and
    `compared/full|flame_vertices/`."""
    renderer = None
    for i in range(PEOPLE):
        renderer = _write_person(root, f"p{i}", np.random.default_rng(i), renderer)
    writer = StoreWriter(root / "store", SPEC)
    records = [
        subject_record(
            f"p{i}",
            root / f"fits/p{i}",
            MODEL,
            SPEC,
            find_portrait([root / f"captures/p{i}"], MODEL, SPEC.portrait_size),
        )
        for i in range(PEOPLE)
    ]
    writer.write_shard(records)
    writer.finish()
    write_ar(root / "ar", open_store(root / "store"))
    write_decoder(root / "decoder", root, seed=0)
    for seed, name in enumerate(("full", "flame_vertices")):
        write_decoder(root / "compared" / name, root, seed=seed, **VARIANTS[name])


def _write_person(root: Path, name: str, rng, renderer: AvatarRenderer | None) -> AvatarRenderer:
    motion, num = random_person(rng), 200  # As many of everybody: JAX compiles anew for each number.
    motion = motion.replace(expr=0.3 * motion.expr, rotation=0.2 * motion.rotation)
    local = Gaussians(
        means=jnp.asarray(rng.normal(0, 0.3, (num, 3)), jnp.float32),
        quats=jnp.asarray(rng.normal(size=(num, 4)), jnp.float32),
        scales=jnp.asarray(rng.uniform(0.5, 1.5, (num, 3)), jnp.float32),
        opacities=jnp.asarray(rng.uniform(0.5, 0.95, num), jnp.float32),
        # Of one tone each, so that people differ.
        colors=jnp.asarray(rng.uniform(size=3) + rng.normal(0, 0.05, (num, 3)), jnp.float32).clip(0, 1),
        binding=jnp.asarray(rng.choice(MODEL.num_faces, num, replace=False), jnp.int32),
    )
    save_fit(root / "fits" / name, local, motion, MODEL)
    fit = load_fit(root / "fits" / name, MODEL)
    canonical, world = fit.canonical(MODEL, SPEC.canonical_jaw)
    avatar = Avatar(world, bind_points(MODEL, canonical, world.means, fit.gaussians.binding))
    save_avatar(root / "truth" / name, avatar)
    cameras = orbit(CAMERAS, width=SIZE, height=SIZE, distance=1.0, azimuth=(-0.6, 0.9), closed=False)
    renderer = AvatarRenderer(avatar, MODEL, SIZE, SIZE) if renderer is None else renderer.with_person(avatar)

    def render(_, params, cameras: Camera):
        images = [renderer(params, cameras.viewmats[c], cameras.Ks[c]) for c in range(CAMERAS)]
        return np.stack(images), np.ones((CAMERAS, SIZE, SIZE))

    (root / "captures" / name).mkdir(parents=True)
    write_capture(root / "captures" / name, MODEL, local, motion, canonical, cameras, render, validation_camera=1)
    return renderer


def write_decoder(workdir: Path, root: Path, seed: int, **changes) -> None:
    """A checkpoint as `experiments.train_decoder` leaves it, of step 3, with random parameters."""

    class Stream:
        def get_state(self):
            return {}

    trained = load_ar(str(root / "ar"))
    config = DecoderConfig(width=16, layers=1, heads=2, head_dim=8, mlp_width=16, attention="xla", **changes)
    config = config.for_features(trained.spec.tokenizer, trained.model.width)
    params = init_params(param_specs(config), jax.random.PRNGKey(seed))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.PRNGKey(seed), x.shape, x.dtype), params)
    held_out = trained.held_out(open_store(root / "store"))
    spec = FeatureSpec(trained.spec, trained.model.width, "sampled", trained.checkpoint, {}, held_out)
    state = TrainState(jnp.asarray(3), params, {"none": jnp.zeros(1)}, None, jax.random.PRNGKey(0))
    config = dataclasses.replace(CONFIG, decoder=config)
    meta = {"config": dataclasses.asdict(config), "features": spec.to_json(), "seed": 0, "capacity": 100}
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(state, Stream(), meta)
