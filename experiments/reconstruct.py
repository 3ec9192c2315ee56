"""Avatars from trained models: a portrait, or people of a feature set, to avatar bundles (paper §4; DESIGN §2).

    python -m experiments.reconstruct --ar=outputs/ar --decoder=outputs/decoder --portrait=me.jpg [--tracker=…]
    python -m experiments.reconstruct --decoder=outputs/decoder --features=outputs/features [--subjects=person_0003]

With a portrait the AR model generates the cloud (the flags of sampling are those of `generate`); with features the
points and hidden states are there already. `--tracker` is the flame_param.npz that a FLAME tracker found in the
portrait. Writes <workdir>/<name>/ (avatar bundle: gaussians.ply for any splat viewer, rig.npz, avatar.json) and
<name>.png; show them in motion with `experiments.animate --avatar=<workdir>/<name>`.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.common import open_workdir, run
from experiments.drawing import Person, define_drawing, draw_clouds
from experiments.heads import named_head
from experiments.media import write_image
from experiments.trained import Contexts, load_ar
from pointillist_jax.cameras import orbit
from pointillist_jax.configs import DecoderConfig, config_from_json
from pointillist_jax.data.images import load_rgba, square_portrait
from pointillist_jax.data.point_features import FeatureSet
from pointillist_jax.data.subjects import flame_fields
from pointillist_jax.data.token_store import StoreSpec, open_store, read_spec, spec_difference
from pointillist_jax.files import UserError
from pointillist_jax.flame import FlameModel, FlameParams
from pointillist_jax.flame.param_files import load_flame_params
from pointillist_jax.gaussians import Avatar, save_avatar
from pointillist_jax.playback import AvatarRenderer
from pointillist_jax.reconstruct import decode_avatar
from pointillist_jax.training.checkpoints import load_params

DECODER = flags.DEFINE_string("decoder", None, "Workdir of experiments.train_decoder.")
AR = flags.DEFINE_string("ar", None, "Workdir of experiments.train_ar, whose features the decoder was trained on.")
STEP = flags.DEFINE_integer("step", None, "Its checkpoint; the newest if not given.", lower_bound=0)
WORKDIR = flags.DEFINE_string("workdir", "outputs/avatars", "Where the avatars go.")
PORTRAIT = flags.DEFINE_string("portrait", None, "A photograph of a head.")
TRACKER = flags.DEFINE_string("tracker", None, "Its FLAME parameters: a flame_param.npz; neutral ones if not given.")
FEATURES = flags.DEFINE_string(
    "features", None, "Instead of a portrait: point features of experiments.extract_features."
)
SHAPES = flags.DEFINE_string("store", None, "With --features: the token store, which knows the people's shapes.")
SUBJECTS = flags.DEFINE_list("subjects", None, "Which people; all if not given.")
FLAME = flags.DEFINE_string("flame", None, "Your FLAME .pkl, if the models were trained with it.")
IMAGE_WEIGHTS = flags.DEFINE_string("image_weights", None, "DINOv2's weights, for models with frozen encoders.")
POINT_WEIGHTS = flags.DEFINE_string("point_weights", None, "Michelangelo's weights, for models with frozen encoders.")
OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Replace avatars of these people in --workdir.")
drawing_flags = define_drawing()


def main() -> None:
    start = time.perf_counter()
    if (PORTRAIT.value is None) == (FEATURES.value is None):
        raise UserError("give either --portrait=<a photograph> or --features=<a folder of point features>.")
    params, config, spec, checkpoint = load_decoder(DECODER.value)
    head = named_head(spec.flame_source, spec.flame_sha256, DECODER.value, FLAME.value)
    source = from_portrait if PORTRAIT.value else from_features
    made = source(params, config, spec, checkpoint, head)
    workdir = Path(WORKDIR.value)
    first = True
    for name, avatar, provenance in made:
        if first:
            open_workdir(workdir, [], resume=True, overwrite=False)
            first = False
        if (workdir / name).exists() and not OVERWRITE.value:
            raise UserError(f"{workdir / name} exists; give --overwrite to replace it, or another --workdir.")
        save_avatar(workdir / name, avatar, provenance={"made_by": "experiments.reconstruct", **provenance})
        write_image(workdir / f"{name}.png", views_of(avatar, head))
        print(f"  {name}: {avatar.gaussians.num_gaussians} Gaussians")
    print(f"\ndone in {time.perf_counter() - start:.0f} s; everything lies in {workdir}/:")
    print("  <name>/     avatar bundle: gaussians.ply (any splat viewer), rig.npz, avatar.json")
    print("  <name>.png  front, three-quarter and side view")


def load_decoder(workdir: str | None) -> tuple[Any, DecoderConfig, StoreSpec, dict[str, Any]]:
    """Parameters, config, store spec and AR checkpoint of a run of experiments.train_decoder.

    Raises:
      UserError: no workdir named, the run of another script, or one without clouds.
      FileNotFoundError: no checkpoint there.
    """
    if workdir is None:
        raise UserError("--decoder is missing: name the workdir of a training (python -m experiments.train_decoder).")
    params, meta = load_params(workdir)
    meta = meta if isinstance(meta, dict) else {}
    if not isinstance(meta.get("features"), dict) or "tokenizer" not in meta["features"]:
        raise UserError(f"{workdir} is no training of the decoder (no features in its meta): check --decoder.")
    config = meta.get("config")
    config = config_from_json(DecoderConfig, config.get("decoder") if isinstance(config, dict) else None, workdir)
    if config.points == "flame_vertices":
        raise UserError(f"{workdir} was trained on the head's vertices, an ablation without clouds; name another one.")
    checkpoint = meta["features"].get("checkpoint")
    spec = read_spec(Path(workdir), meta["features"])
    return jax.tree.map(jnp.asarray, params), config, spec, checkpoint if isinstance(checkpoint, dict) else {}


def from_features(params, config: DecoderConfig, spec: StoreSpec, checkpoint: dict[str, Any], head: FlameModel):
    """Yields (name, avatar, provenance) of a feature set's people."""
    features = FeatureSet(FEATURES.value, flame_sha256=head.sha256)
    if difference := spec_difference(features.spec.store, spec):
        raise UserError(f"{FEATURES.value} was made with {difference}, as the decoder was trained: extract again.")
    if dict(features.spec.checkpoint) != checkpoint:
        raise UserError(
            f"{FEATURES.value} are of step {features.spec.checkpoint.get('step')} of an AR model, the decoder was "
            f"trained on those of step {checkpoint.get('step')} of another one or another run: extract again."
        )
    if SHAPES.value is None:
        raise UserError("--features needs --store, the token store they were extracted from: it knows the shapes.")
    store = open_store(SHAPES.value, spec.tokenizer, flame_sha256=spec.flame_sha256)
    contexts = None
    if config.cross_attention:
        contexts = Contexts(load_ar(AR.value, STEP.value, FLAME.value), store, IMAGE_WEIGHTS.value, POINT_WEIGHTS.value)
    for name in SUBJECTS.value or features.subjects:
        cloud, identity = features.load(name), store.identity(store.index(name))
        canonical = head.neutral_params().replace(**{k: jnp.asarray(v) for k, v in identity.items()})
        canonical = canonical.canonical(spec.canonical_jaw)
        context = None if contexts is None else contexts([contexts.condition(name)])[0]
        avatar = decode_avatar(params, config, head, canonical, cloud.points, cloud.binding, cloud.hidden, context)
        yield name, avatar, {"features": dict(features.spec.checkpoint), "source": features.spec.source}


def from_portrait(params, config: DecoderConfig, spec: StoreSpec, checkpoint: dict[str, Any], head: FlameModel):
    """Yields (name, avatar, provenance) of the person on --portrait."""
    trained = load_ar(AR.value, STEP.value, FLAME.value)
    trained.check_checkpoint(checkpoint, "the features the decoder was trained on")
    if difference := spec_difference(trained.spec, spec):
        raise UserError(f"{AR.value} was trained with {difference}, as the decoder: name the AR model it belongs to.")
    if config.uses_features and config.feature_width != trained.model.width:
        raise UserError(f"{AR.value} has width {trained.model.width}, the decoder reads {config.feature_width}.")
    path = Path(PORTRAIT.value)
    image = square_portrait(load_rgba(path), spec.portrait_size)
    if TRACKER.value is None:
        print(
            "warning: no --tracker: a neutral head of mean shape; give the flame_param.npz of a tracker for a likeness."
        )
        tracked = head.neutral_params()
    else:
        tracked = load_flame_params(TRACKER.value, head).timestep(0)
    condition = {"portrait": image, "flame": flame_fields(tracked)}
    contexts = Contexts(trained, None, IMAGE_WEIGHTS.value, POINT_WEIGHTS.value)
    drawing = drawing_flags(None)
    person = Person(path.stem, condition, 0)
    for _, cloud, seconds in draw_clouds(trained, [person], contexts, drawing, 1, return_hidden=True):
        num = int(cloud.num_points[0])
        if num == 0:
            raise UserError("the model generated no points: train it longer, or try another --seed.")
        avatar = decode_avatar(
            params,
            config,
            head,
            tracked.canonical(spec.canonical_jaw),
            np.asarray(cloud.points)[0][:num],
            np.asarray(cloud.binding)[0][:num],
            np.asarray(cloud.hidden)[0][:num] if config.uses_features else None,
            contexts([condition])[0] if config.cross_attention else None,
        )
        yield path.stem, avatar, {"portrait": path.name, "ar": trained.checkpoint, "seconds": round(seconds, 2)}


def views_of(avatar: Avatar, head: FlameModel, size: int = 256) -> np.ndarray:
    """[size, 3 size, 3]: front, three-quarter and side view of the neutral head."""
    renderer = AvatarRenderer(avatar, head, size, size)
    pose: FlameParams = head.neutral_params()
    images = []
    for azimuth in (0.0, math.radians(40), math.radians(90)):
        camera = orbit(1, width=size, height=size, distance=1.2, target=(0, -0.03, -0.04), azimuth=(azimuth, azimuth))
        images.append(renderer(pose, camera.viewmats[0], camera.Ks[0]))
    return np.concatenate(images, axis=1)


if __name__ == "__main__":
    run(main)
