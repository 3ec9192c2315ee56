"""Stage two: trains the Gaussian decoder on photographs, from point features (paper §4.4.2, §5.4).

    python -m experiments.train_decoder --config=tiny --features=outputs/features --captures=outputs/people
       --workdir=outputs/decoder [--vgg=vgg16-397923af.pth] [--resume|--overwrite] [--config.decoder.train.steps=600 …]
       [--config.decoder.inputs=both|ar_only|position_only|none] [--config.decoder.points=ar|flame_vertices]
       [--compare=all] [--mesh=data:4]

`experiments.extract_features` makes the features. Subjects are those of the features that have a capture; the same
ones are held out as in stage one. `--compare=all` trains the method and its ablations one after another, in folders of
their own, and prints one table; --resume goes on with the one that was stopped. Several processes: as `train_ar`.

Writes checkpoints/, metrics.jsonl, tensorboard/, strips/ (renders above photographs), curve.png and card.json. SIGTERM
and Ctrl-C save and stop, with exit code 0 and 130; --resume goes on from the newest checkpoint, on the same mesh bit
for bit.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import jax
import numpy as np
from absl import flags

from experiments.charts import line_chart
from experiments.common import end_stopped, print_changes, refuse_flags, run
from experiments.config_flags import define_config
from experiments.heads import named_head
from experiments.job import MESH, SEED, goes_on, open_job, start_job
from experiments.media import write_image
from experiments.pictures import contact_sheet
from experiments.trained import Contexts, load_ar
from experiments.trained_decoder import VARIANTS
from pointillist_jax.configs import Config, DecoderConfig
from pointillist_jax.convert import load_torch_file, lpips_from_torch
from pointillist_jax.data.captures import Capture, find_captures, load_capture
from pointillist_jax.data.point_features import FeatureSet
from pointillist_jax.data.subject_views import FeatureClouds, SubjectViews, TemplateClouds, subject_batches
from pointillist_jax.data.template_space import placement
from pointillist_jax.data.token_store import open_store, spec_difference
from pointillist_jax.files import UserError, atomic_path
from pointillist_jax.flame import FlameModel
from pointillist_jax.models.attention import require_attention
from pointillist_jax.sharding import batch_share, make_mesh, require_share
from pointillist_jax.training import decoder
from pointillist_jax.training.checkpoints import Checkpoints, load_params, model_kind
from pointillist_jax.training.loop import resume_or_init, train
from pointillist_jax.training.metric_log import read_metrics
from pointillist_jax.training.same_model import check_same_model
from pointillist_jax.training.state import TrainState, abstract_state, begin_with, make_optimizer, make_schedule

FEATURES = flags.DEFINE_string("features", None, "Point features (experiments.extract_features).")
CAPTURES = flags.DEFINE_string("captures", None, "Folder of captures of the same subjects.")
WORKDIR = flags.DEFINE_string("workdir", "outputs/decoder", "Where the run goes.")
FLAME = flags.DEFINE_string("flame", None, "Your FLAME .pkl, if the features were made with it.")
VGG = flags.DEFINE_string("vgg", None, "torchvision's vgg16-397923af.pth, for LPIPS; without it that loss is off.")
AR = flags.DEFINE_string("ar", None, "With decoder.cross_attention: the workdir of experiments.train_ar.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint of --ar; the newest if not given.", lower_bound=0)
STORE = flags.DEFINE_string("store", None, "With decoder.cross_attention: the token store, for the portraits.")
INIT = flags.DEFINE_string(
    "init",
    None,
    "Begin with the parameters of this run (workdir or file of weights), e.g. to go on with sampled features.",
)
DOWNSCALE = flags.DEFINE_integer("downscale", 1, "Divide the pictures' sides by this.", lower_bound=1)
IDENTITY = flags.DEFINE_enum("identity", "check", ("check", "first"), "As experiments.fit.")
CY_FROM_BOTTOM = flags.DEFINE_boolean("cy_from_bottom", None, "As experiments.fit.")
COMPARE = flags.DEFINE_list("compare", [], "Train these one after another and print one table: all, or some of full, "
                            "ar_only, position_only, flame_vertices, mean_colour.")  # fmt: skip
CONFIG = define_config("decoder", "data")

OUTPUTS = ("checkpoints", "metrics.jsonl", "tensorboard", "strips", "card.json", "curve.png", "table.json", *VARIANTS)
# Scores of the table: a stream's name and what it is.
STREAMS = {
    "views": "training people, unseen camera",
    "expressions": "training people, unseen expressions",
    "people": "unseen people, unseen camera",
    "people_expressions": "unseen people, unseen expressions",
}
# Of config.data, what a stream of stage two reads.
_LOADING = ("num_workers", "num_threads", "prefetch")
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Data:
    """What stage two trains on and is tested on.

    Attributes:
      features: the point features.
      head: that everyone is bound to.
      training, held_out: captures.
      lpips: parameters of LPIPS, or None.
      contexts: subject → [S, C] of the AR model, for cross-attention, or None.
    """

    features: FeatureSet
    head: FlameModel
    training: tuple[Capture, ...]
    held_out: tuple[Capture, ...]
    lpips: Any = None
    contexts: dict[str, np.ndarray] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the pictures."""
        return tuple(int(x) for x in self.training[0].split("train").sizes[0])


def main() -> None:
    start_job()
    start = time.perf_counter()
    config = CONFIG()
    check_flags(config)
    variants = chosen_variants() if COMPARE.value else {"": {}}
    data = load_data(config)
    workdir, opened = Path(WORKDIR.value), functools.cache(lambda: open_job(WORKDIR.value, OUTPUTS))
    table: dict[str, Any] = {}
    for name, change in variants.items():
        if name:
            print(f"\n{name}:", flush=True)
        chosen = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, **change))
        state, stopped = train_decoder(
            data, chosen, workdir / name, seed=SEED.value, mesh=MESH.value, init_from=INIT.value, open_workdir=opened
        )
        if stopped:
            if not jax.process_index():
                print_table(table, data, config.decoder.eval_people)
                end_stopped(stopped, int(state.step))
            return
        if not jax.process_index():
            table[name or "model"] = summarize(workdir / name)
            if name:  # After each, so that a kill leaves what is done.
                with atomic_path(workdir / "table.json") as path:
                    path.write_text(json.dumps(table, indent=1) + "\n")
    if jax.process_index():
        return
    print_table(table, data, config.decoder.eval_people)
    where = f"{workdir}/<variant>" if COMPARE.value else workdir
    print(f"\ndone in {time.perf_counter() - start:.0f} s; everything lies in {where}/:")
    print("  checkpoints/<step>/  params (for reconstruction), state (for --resume)")
    print("  metrics.jsonl        one line per logged step; tensorboard/ shows the same")
    print("  strips/              renders above photographs, at every evaluation")
    print("  curve.png, card.json the loss; scores of all held-out views")


def check_flags(config: Config) -> None:
    """Raises UserError for flags that would do nothing."""
    decoder_, data = "config.decoder.", (field.name for field in dataclasses.fields(config.data))
    found = [
        decoder_ + name for name in ("feature_width", "context_width", "context_tokens", "lower", "upper", "space")
    ]
    refuse_flags(found, "here: the features decide it")
    refuse_flags([f"config.data.{name}" for name in data if name not in _LOADING], "in stage two: the features have it")
    refuse_flags([f"{decoder_}train.z_loss"], "in stage two, which has no logits")
    if COMPARE.value:
        refuse_flags([f"{decoder_}inputs", f"{decoder_}points"], "with --compare, which chooses both")
    if not config.decoder.cross_attention:
        refuse_flags(("ar", "step", "store"), "without --config.decoder.cross_attention")
    if COMPARE.value:
        refuse_flags(("init",), "with --compare, whose variants have other parameters")
    if not config.decoder.lambda_lpips:
        refuse_flags(("vgg",), "with decoder.lambda_lpips=0")


def chosen_variants() -> dict[str, dict[str, str]]:
    """Those of --compare."""
    names = list(VARIANTS) if COMPARE.value == ["all"] else COMPARE.value
    if unknown := [name for name in names if name not in VARIANTS]:
        raise UserError(f"--compare={','.join(names)}: {unknown[0]!r} is none of all, {', '.join(VARIANTS)}.")
    return {name: VARIANTS[name] for name in names}


def load_data(config: Config) -> Data:
    """Opens features and captures, and says what is used. Raises UserError where they do not belong together."""
    if FEATURES.value is None or CAPTURES.value is None:
        raise UserError("--features and --captures are missing: name what experiments.extract_features wrote, and the "
                        "captures of the same people.")  # fmt: skip
    features = FeatureSet(FEATURES.value)
    store = features.spec.store
    head = named_head(store.flame_source, store.flame_sha256, FEATURES.value, FLAME.value)
    folders = find_captures(CAPTURES.value)
    names = tuple(name for name in features.subjects if name in folders)
    if not names:
        raise UserError(
            f"none of the {len(features)} subjects of {FEATURES.value} ({', '.join(features.subjects[:3])} …) has a "
            f"capture in {CAPTURES.value} ({', '.join(list(folders)[:3])} …): name the captures of the same people."
        )
    if len(names) < len(features) and not jax.process_index():
        print(f"{len(features) - len(names)} of {len(features)} subjects have no capture and are left out")
    # Those of stage one, so that nobody it trained on counts as unseen here.
    kept_back = features.spec.held_out
    how = {"downscale": DOWNSCALE.value, "identity": IDENTITY.value, "cy_from_bottom": CY_FROM_BOTTOM.value}
    captures = [load_capture(folders[name], head, **how) for name in names]
    captures = [dataclasses.replace(c, subject=name) for c, name in zip(captures, names, strict=True)]
    training = tuple(c for c in captures if c.subject not in kept_back)
    held_out = tuple(c for c in captures if c.subject in kept_back)
    if not training:
        raise UserError(f"all {len(names)} subjects were held out by stage one: add captures of those it trained on.")
    weights = None if VGG.value is None else lpips_from_torch(load_torch_file(VGG.value))
    contexts = None
    if config.decoder.cross_attention:
        contexts = make_contexts(names, features, config.decoder)
    return Data(features, head, training, held_out, weights, contexts)


def make_contexts(names: tuple[str, ...], features: FeatureSet, config: DecoderConfig) -> dict[str, np.ndarray]:
    """The AR model's context of each person's portrait, once for the whole training: it is frozen."""
    if AR.value is None or STORE.value is None:
        raise UserError("decoder.cross_attention needs --ar and --store: the model and the store of the features.")
    trained, store = load_ar(AR.value, STEP.value, FLAME.value), open_store(STORE.value)
    trained.check_checkpoint(features.spec.checkpoint, "the features")
    if difference := spec_difference(store.spec, features.spec.store):
        raise UserError(f"{STORE.value} was made with {difference}, as the features: name the store they came from.")
    trained.check_store(store)
    contexts = Contexts(trained, store)
    return {name: np.asarray(contexts.for_decoder(config, contexts.condition(name))) for name in names}


def train_decoder(
    data: Data,
    config: Config,
    workdir: Path,
    *,
    seed: int = 0,
    mesh: str = "",
    bar: bool = True,
    init_from: str | None = None,
    open_workdir: Callable[[], Any] = lambda: None,
) -> tuple[TrainState, str | None]:
    """Trains, or goes on with what lies in `workdir`. Returns the state and what stopped it early.

    Args:
      init_from: a run whose parameters a new one begins with.
      open_workdir: called when everything is checked, before `workdir` is touched: it may delete what lies there.
    """
    spec = data.features.spec
    context_tokens = len(next(iter(data.contexts.values()))) if data.contexts else 0
    settings = config.decoder.for_features(spec.store.tokenizer, spec.width, spec.store.space, context_tokens)
    config = dataclasses.replace(config, decoder=settings)
    run_, devices = settings.train, make_mesh(mesh)
    require_share(run_.batch_size, devices)
    if data.lpips is None and settings.lambda_lpips and not jax.process_index():
        print("LPIPS is off: no VGG16 weights (--vgg=vgg16-397923af.pth); the loss is L1, SSIM and the offsets'")
    everyone = (*data.training, *data.held_out)
    jaw, space = spec.store.canonical_jaw, spec.store.space
    identities = {c.subject: c.params.timestep(0).canonical(jaw) for c in everyone}
    clouds = FeatureClouds(data.features, {n: placement(data.head, p, space, jaw) for n, p in identities.items()})
    if settings.points == "flame_vertices":
        clouds = TemplateClouds(data.head, everyone, spec.store.canonical_jaw)
    shared = {
        "views": settings.views,
        "canonical_jaw": spec.store.canonical_jaw,
        "features": settings.uses_features,
        "contexts": data.contexts if settings.cross_attention else None,
        # One size for everyone, so that one program serves training and evaluation.
        "max_points": settings.max_points or largest_cloud(clouds, everyone),
    }
    shares = dict(zip(("process_index", "process_count"), batch_share(devices), strict=True))
    loading = {"num_workers": config.data.num_workers, "num_threads": config.data.num_threads, **shares}
    source = SubjectViews(data.training, clouds, seed=seed, **shared)
    stream = iter(subject_batches(source, run_.batch_size, prefetch=config.data.prefetch, **loading))
    width, height = data.size

    scored = data.training[: settings.eval_people or None]
    held_back = {"views": (scored, "val"), "expressions": (scored, "test")}
    held_back |= {"people": (data.held_out, "val"), "people_expressions": (data.held_out, "test")}

    def streams(limit: int) -> dict[str, Any]:
        found = {}
        for name, (captures, split) in held_back.items():
            if sum(len(c.split(split)) for c in captures):
                test = SubjectViews(captures, clouds, split=split, shuffle=False, limit=limit, **shared)
                found[name] = lambda test=test: subject_batches(test, run_.batch_size, **shares)
        return found

    frozen = decoder.frozen_on(devices, data.head, data.lpips)
    optimizer, init = make_optimizer(run_), decoder.init_params(settings)
    meta = {
        "config": dataclasses.asdict(config),
        "features": spec.to_json(),
        "seed": seed,
        "capacity": decoder.first_capacity(shared["max_points"], width, height),
    }
    key = jax.random.PRNGKey(seed)
    # Both raise what would else fail behind `open_workdir`: sizes that the mesh does not divide, an attention.
    require_attention(settings.attention, settings.dtype)
    abstract, _ = abstract_state(init, optimizer, run_, key, devices)
    # Whatever has become of that run since, this one goes on.
    initial = None if init_from is None or goes_on(workdir) else initial_params(abstract.params, init_from)
    open_workdir()

    def check(saved: dict[str, Any]) -> None:
        if saved["features"] != json.loads(json.dumps(meta["features"])):
            raise UserError(
                f"{workdir} was trained on other features than {data.features.path} (another AR checkpoint, store "
                "or sampling); give it those, or start anew with --overwrite."
            )
        check_same_model(saved, config, "decoder", str(workdir))

    with Checkpoints(workdir, run_.keep) as checkpoints:
        state, saved = resume_or_init(checkpoints, init, optimizer, run_, key, devices, stream, check)
        if saved is None and initial is not None:
            state = begin_with(state, initial)
        if saved is not None:
            print_changes(saved, config, "decoder", workdir)
            meta["capacity"] = int(saved["capacity"])
            if not jax.process_index():
                print(f"going on from step {int(state.step)}", flush=True)
        step = decoder.GrowingStep(
            settings, frozen, optimizer, width, height, state=state, capacity=meta["capacity"],
            on_grow=lambda capacity: meta.update(capacity=capacity),
        )  # fmt: skip

        evaluation = decoder.Evaluation(settings, frozen, devices, width, height, capacity=meta["capacity"])
        first, few = int(state.step), streams(settings.eval_views)
        names = {name: [c.subject for c in captures] for name, (captures, _) in held_back.items()}
        strips = None if jax.process_index() else Strips(workdir, names, lambda: first + step.taken)
        state, stopped = train(
            state,
            step,
            stream,
            config=run_,
            mesh=devices,
            workdir=workdir,
            checkpoints=checkpoints,
            meta=meta,
            schedule=make_schedule(run_),
            evaluate=lambda params, stopped: evaluation(params, few, strips, stopped=stopped),
            describe=lambda batch: "subjects " + ", ".join(source.subjects[i] for i in sorted(set(batch["subject"]))),
            bar=bar,
            flags="config.decoder.train",
        )
    stream.close()
    if stopped is None and (first < run_.steps or not (workdir / "card.json").is_file()):
        scores = evaluation(state.averaged_params, streams(0), bar=bar and not jax.process_index())
        if not jax.process_index():
            points = {c.subject: clouds.num_points(c.subject) for c in everyone}
            write_card(workdir, config, scores, points, spec.source, lpips=data.lpips is not None)
    return state, stopped


def initial_params(fresh: Any, path: str) -> Any:
    """The parameters of another run. Raises UserError where their shapes, or their kind, are not those of `fresh`."""
    found, meta = load_params(path)
    if model_kind(meta, path) != "decoder":
        raise UserError(f"--init={path} holds no decoder: name a run of experiments.train_decoder.")

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        return {jax.tree_util.keystr(key): leaf.shape for key, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    mine, theirs = shapes(fresh), shapes(found)
    if different := sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)):
        name = different[0]
        raise UserError(
            f"--init={path} is another decoder: {name} has shape {theirs.get(name)}, here {mine.get(name)}."
        )
    return found


def largest_cloud(clouds, captures) -> int:
    """Points of the largest, rounded up."""
    return -(-max(clouds.num_points(c.subject) for c in captures) // 256) * 256


class Strips:
    """Writes `strips/<step>_<stream>.png`: renders, named by subject, above photographs, named by camera and timestep.

    A picture that is there already is never replaced: one that differs gets a number of its own.
    """

    def __init__(self, workdir: Path, subjects: Mapping[str, Sequence[str]], step: Callable[[], int]):
        """`subjects`: stream → the names its numbers stand for; `step`: tells how far the training is."""
        self._folder, self._subjects, self._step = workdir / "strips", subjects, step

    def __call__(self, stream: str, views: Sequence[decoder.ShownView]) -> None:
        if not views:
            return
        names = [self._subjects[stream][view.subject] for view in views]
        labels = names + [f"c{view.camera} t{view.timestep}" for view in views]
        # Small pictures are enlarged: names must fit beneath them.
        zoom = -(-128 // views[0].rendered.shape[1])
        images = [view.rendered for view in views] + [view.photograph for view in views]
        sheet = contact_sheet([image.repeat(zoom, 0).repeat(zoom, 1) for image in images], labels, len(views))
        name, number = f"{self._step():06d}_{stream}", 1
        path = self._folder / f"{name}.png"
        while path.exists():
            # A resumed run draws the same picture again.
            if np.array_equal(iio.imread(path), np.uint8(np.round(255 * sheet))):
                return
            number += 1
            path = self._folder / f"{name}_{number}.png"
        write_image(path, sheet)


def write_card(
    workdir: Path, config: Config, scores: dict[str, float], points: dict[str, int], source: str, lpips: bool
) -> None:
    """card.json: scores of all held-out views."""
    card = {
        "steps": config.decoder.train.steps,
        "inputs": config.decoder.inputs,
        "points": config.decoder.points,
        "lpips": lpips,
        "features": source,
        "num_points": points,
        "scores": {name: round(value, 4) for name, value in scores.items()},
    }
    with atomic_path(workdir / "card.json") as path:
        path.write_text(json.dumps(card, indent=1) + "\n")


def summarize(workdir: Path) -> dict[str, float]:
    """Draws curve.png; returns the scores of card.json."""
    lines = read_metrics(workdir)
    series = {"training": [(line["step"], line["psnr"]) for line in lines if "psnr" in line]}
    for name, what in STREAMS.items():
        series[what] = [(line["step"], line[f"eval_{name}_psnr"]) for line in lines if f"eval_{name}_psnr" in line]
    write_image(workdir / "curve.png", line_chart(series, {}, "step", "PSNR, dB"))
    return json.loads((workdir / "card.json").read_text())["scores"]


def print_table(table: dict[str, dict[str, float]], data: Data, scored: int = 0) -> None:
    """PSNR and SSIM of every variant on every kind of held-out view; nothing for none."""
    if not table:
        return
    streams = [name for name in STREAMS if any(f"{name}_psnr" in scores for scores in table.values())]
    people = f"{len(data.training)} training people" + (f" ({scored} scored)" if scored else "")
    print(f"\n{people}, {len(data.held_out)} unseen; PSNR in dB / SSIM (zero padding);")
    drawn = data.features.spec.source == "sampled"
    print("points drawn from the portraits:" if drawn else "points of the fits themselves, unseen people's too:")
    print(f"  {'':<16}" + "".join(f"{name:>20}" for name in streams))
    for name, scores in table.items():
        cells = (f"{scores[f'{s}_psnr']:.2f} / {scores[f'{s}_ssim']:.4f}" for s in streams)
        print(f"  {name:<16}" + "".join(f"{cell:>20}" for cell in cells))
    for name in streams:
        print(f"  {name}: {STREAMS[name]}")


if __name__ == "__main__":
    run(main)
