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

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.common import refuse_flags, run
from experiments.drawing import Drawing, Person, define_drawing, draw_clouds
from experiments.heads import named_head
from experiments.media import write_image
from experiments.portraits import PortraitFlags
from experiments.trained import Contexts, TrainedAR, load_ar
from pointillist_jax.cameras import orbit
from pointillist_jax.configs import DecoderConfig, config_from_json
from pointillist_jax.data.point_features import FeatureSet
from pointillist_jax.data.token_store import StoreSpec, open_store, read_spec, spec_difference
from pointillist_jax.files import UserError, require_writable
from pointillist_jax.flame import FlameModel, FlameParams
from pointillist_jax.gaussians import Avatar, save_avatar
from pointillist_jax.playback import AvatarRenderer
from pointillist_jax.reconstruct import decode_avatar
from pointillist_jax.training.checkpoints import load_params

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
    trained_decoder = load_decoder(DECODER.value)
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


@dataclasses.dataclass(frozen=True)
class TrainedDecoder:
    """What `experiments.train_decoder` left.

    Attributes:
      workdir: of the training.
      params, config: of the decoder.
      spec: of the token store of its features.
      checkpoint: identifies the AR model of its features.
      head: of the store.
    """

    workdir: str
    params: Any
    config: DecoderConfig
    spec: StoreSpec
    checkpoint: dict[str, Any]
    head: FlameModel

    def load_ar(self) -> TrainedAR:
        """The AR model of --ar. Raises UserError unless it is the one whose features the decoder was trained on."""
        trained = load_ar(AR.value, STEP.value, FLAME.value)
        trained.check_checkpoint(self.checkpoint, "the features the decoder was trained on")
        if difference := spec_difference(trained.spec, self.spec):
            raise UserError(
                f"{AR.value} was trained with {difference}, as the decoder: name the AR model it belongs to."
            )
        return trained


def load_decoder(workdir: str | None) -> TrainedDecoder:
    """The newest checkpoint of a run of experiments.train_decoder.

    Raises:
      UserError: no workdir named, the run of another script, one without clouds, or of a head that --flame is not.
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
    checkpoint = checkpoint if isinstance(checkpoint, dict) else {}
    spec = read_spec(Path(workdir), meta["features"])
    head = named_head(spec.flame_source, spec.flame_sha256, workdir, FLAME.value)
    return TrainedDecoder(workdir, jax.tree.map(jnp.asarray, params), config, spec, checkpoint, head)


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
        contexts = Contexts(decoder.load_ar(), store, IMAGE_WEIGHTS.value, POINT_WEIGHTS.value)
    for name, identity in zip(names, identities, strict=True):
        cloud = features.load(name)
        canonical = head.neutral_params().replace(**{k: jnp.asarray(v) for k, v in identity.items()})
        canonical = canonical.canonical(spec.canonical_jaw)
        context = None if contexts is None else contexts([contexts.condition(name)])[0]
        avatar = decode_avatar(
            decoder.params, config, head, canonical, cloud.points, cloud.binding, cloud.hidden, context
        )
        yield name, avatar, {"features": dict(features.spec.checkpoint), "source": features.spec.source}


def from_portrait(decoder: TrainedDecoder) -> Iterator[tuple[str, Avatar, dict[str, Any]]]:
    """Yields (name, avatar, provenance) of the person on --portrait."""
    config, trained = decoder.config, decoder.load_ar()
    portrait = portrait_flags.read(decoder.spec, decoder.head)
    contexts = Contexts(trained, None, IMAGE_WEIGHTS.value, POINT_WEIGHTS.value)
    person = Person(portrait.path.stem, portrait.condition, 0)
    for _, cloud, seconds in draw_clouds(trained, [person], contexts, drawing_flags(None), 1, return_hidden=True):
        num = int(cloud.num_points[0])
        if num == 0:
            raise UserError("the model generated no points: train it longer, or try another --seed.")
        avatar = decode_avatar(
            decoder.params,
            config,
            decoder.head,
            portrait.tracked.canonical(decoder.spec.canonical_jaw),
            np.asarray(cloud.points)[0][:num],
            np.asarray(cloud.binding)[0][:num],
            np.asarray(cloud.hidden)[0][:num] if config.uses_features else None,
            contexts([portrait.condition])[0] if config.cross_attention else None,
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
