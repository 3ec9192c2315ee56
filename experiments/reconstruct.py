"""Avatars from trained models: a portrait, or people of a feature set, to avatar bundles (paper §4; DESIGN §2).

    python -m experiments.reconstruct --ar=outputs/ar --decoder=outputs/decoder --portrait=me.jpg
       [--tracker=flame_param.npz [--timestep=0]]
    python -m experiments.reconstruct --decoder=outputs/decoder --features=outputs/features --store=outputs/tokens
       [--subjects=person_0003]

With a portrait the AR model generates the cloud (the flags of sampling are those of `generate`); with features the
points and hidden states are there already, and only a decoder with cross-attention needs `--ar`. `--tracker` is what a
FLAME tracker found in the portrait. Writes <workdir>/<name>/ (avatar bundle: gaussians.ply for any splat viewer,
rig.npz, avatar.json) and <name>.png; show them in motion with `experiments.animate --avatar=<workdir>/<name>`.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.common import refuse_flags, run
from experiments.drawing import Drawing, Person, define_drawing, draw_clouds
from experiments.media import write_image
from experiments.portraits import PortraitFlags
from experiments.trained import Contexts, TrainedAR, load_ar
from experiments.trained_decoder import TrainedDecoder, load_decoder
from pointillist_jax.cameras import orbit
from pointillist_jax.data.point_features import FeatureSet
from pointillist_jax.data.token_store import open_store, spec_difference
from pointillist_jax.files import UserError, require_writable
from pointillist_jax.flame import FlameModel, FlameParams
from pointillist_jax.gaussians import Avatar, save_avatar
from pointillist_jax.playback import AvatarRenderer

DECODER = flags.DEFINE_string("decoder", None, "Workdir of experiments.train_decoder.")
AR = flags.DEFINE_string("ar", None, "Workdir of experiments.train_ar, whose features the decoder was trained on.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint of --ar; the newest if not given.", lower_bound=0)
WORKDIR = flags.DEFINE_string("workdir", "outputs/avatars", "Where the avatars go.")
portrait_flags = PortraitFlags()
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
    portrait, workdir = portrait_flags.path, Path(WORKDIR.value)
    if (portrait is None) == (FEATURES.value is None):
        raise UserError("give either --portrait=<a photograph> or --features=<a folder of point features>.")
    portrait_flags.check()
    trained_decoder = load_decoder(DECODER.value, FLAME.value)
    if portrait is not None:
        refuse_flags(("store", "subjects"), "with --portrait, which shows one person")
        names: Sequence[str] = (portrait.stem,)
        made = from_portrait(trained_decoder)
    else:
        refuse_flags([field.name for field in dataclasses.fields(Drawing)], "with --features, whose points are there")
        if not trained_decoder.config.cross_attention:
            unread = ("ar", "step", "image_weights", "point_weights")
            refuse_flags(unread, "with --features, unless the decoder has cross-attention")
        if SHAPES.value is None:
            raise UserError("--features needs --store, the token store they were extracted from: it knows the shapes.")
        features = FeatureSet(FEATURES.value)
        names = tuple(dict.fromkeys(SUBJECTS.value or features.subjects))
        if unknown := [name for name in names if name not in features.subjects]:
            features.load(unknown[0])  # Says who is there.
        made = from_features(trained_decoder, features, names)
    check_outputs(workdir, names)
    for name, avatar, provenance in made:
        save_avatar(workdir / name, avatar, provenance={"made_by": "experiments.reconstruct", **provenance})
        write_image(workdir / f"{name}.png", views_of(avatar, trained_decoder.head))
        print(f"  {name}: {avatar.gaussians.num_gaussians} Gaussians")
    print(f"\ndone in {time.perf_counter() - start:.0f} s; everything lies in {workdir}/:")
    print("  <name>/     avatar bundle: gaussians.ply (any splat viewer), rig.npz, avatar.json")
    print("  <name>.png  front, three-quarter and side view")


def check_outputs(workdir: Path, names: Sequence[str]) -> None:
    """Raises UserError if something is in the way of these people's avatars: before hours of drawing, not after."""
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file; name a folder.")
    portrait = portrait_flags.path
    for name in names:
        bundle, picture = workdir / name, workdir / f"{name}.png"
        if bundle.exists() and not (bundle / "avatar.json").is_file():
            raise UserError(f"{bundle} exists and is no avatar bundle; name another --workdir.")
        if portrait is not None and picture.exists() and picture.samefile(portrait):
            raise UserError(f"{picture} is the portrait itself and would be replaced; name another --workdir.")
        if not OVERWRITE.value and (found := next((p for p in (bundle, picture) if p.exists()), None)):
            raise UserError(f"{found} exists; give --overwrite to replace it, or another --workdir.")
    require_writable(workdir)


def load_ar_of(decoder: TrainedDecoder) -> TrainedAR:
    """The AR model of --ar. Raises UserError unless it is the one whose features the decoder was trained on."""
    trained = load_ar(AR.value, STEP.value, FLAME.value)
    decoder.check_ar(trained)
    return trained


def from_features(
    decoder: TrainedDecoder, features: FeatureSet, names: Sequence[str]
) -> Iterator[tuple[str, Avatar, dict[str, Any]]]:
    """Yields (name, avatar, provenance) of a feature set's people."""
    spec, head, config = decoder.spec, decoder.head, decoder.config
    if difference := spec_difference(features.spec.store, spec):
        raise UserError(f"{FEATURES.value} was made with {difference}, as the decoder was trained: extract again.")
    if dict(features.spec.checkpoint) != decoder.checkpoint:
        raise UserError(
            f"{FEATURES.value} are of step {features.spec.checkpoint.get('step')} of an AR model, the decoder was "
            f"trained on those of step {decoder.checkpoint.get('step')} of another one or another run: extract again."
        )
    store = open_store(SHAPES.value, spec.tokenizer, flame_sha256=spec.flame_sha256)
    identities = [store.identity(store.index(name)) for name in names]
    contexts = None
    if config.cross_attention:
        if AR.value is None:
            raise UserError("this decoder has cross-attention to the AR model's context: name that model with --ar.")
        contexts = Contexts(load_ar_of(decoder), store, IMAGE_WEIGHTS.value, POINT_WEIGHTS.value)
    for name, identity in zip(names, identities, strict=True):
        cloud = features.load(name)
        canonical = head.neutral_params().replace(**{k: jnp.asarray(v) for k, v in identity.items()})
        canonical = canonical.canonical(spec.canonical_jaw)
        context = None if contexts is None else contexts.for_decoder(config, contexts.condition(name))
        avatar = decoder.avatar(canonical, cloud.points, cloud.binding, cloud.hidden, context)
        yield name, avatar, {"features": dict(features.spec.checkpoint), "source": features.spec.source}


def from_portrait(decoder: TrainedDecoder) -> Iterator[tuple[str, Avatar, dict[str, Any]]]:
    """Yields (name, avatar, provenance) of the person on --portrait."""
    config, trained = decoder.config, load_ar_of(decoder)
    portrait = portrait_flags.read(decoder.spec, decoder.head)
    contexts = Contexts(trained, None, IMAGE_WEIGHTS.value, POINT_WEIGHTS.value)
    person = Person(portrait.path.stem, portrait.condition, 0)
    for _, cloud, seconds in draw_clouds(trained, [person], contexts, drawing_flags(None), 1, return_hidden=True):
        num = int(cloud.num_points[0])
        if num == 0:
            raise UserError("the model generated no points: train it longer, or try another --seed.")
        avatar = decoder.avatar(
            portrait.tracked.canonical(decoder.spec.canonical_jaw),
            np.asarray(cloud.points)[0][:num],
            np.asarray(cloud.binding)[0][:num],
            np.asarray(cloud.hidden)[0][:num],
            contexts.for_decoder(config, portrait.condition),
        )
        made = {"portrait": portrait.path.name, "ar": trained.checkpoint, "seconds": round(seconds, 2)}
        yield person.name, avatar, made


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
