"""Stage one: trains the autoregressive point transformer on a token store (paper §4.4.1, §5.1).

    python -m experiments.train_ar --config=tiny --store=outputs/tokens --workdir=outputs/ar [--resume|--overwrite]
       [--config.train.steps=2000 …] [--mesh=data:2,fsdp:4] [--profile=20:22]
       [--image_weights=dinov2_vits14_reg4_pretrain.pth] [--point_weights=shapevae-256.ckpt]

Several processes: start the same command once per process with --coordinator=<host:port of process 0>
--num_processes=N --process_id=i, or --coordinator=auto under SLURM, Kubernetes or Open MPI.

With frozen encoders (config.model.encoder.frozen, preset `paper`) it reads the features that the script
experiments.encode_conditions has put into the store. Published encoders that are trained along begin with the weights
that --image_weights and --point_weights name.

Writes checkpoints/, metrics.jsonl, tensorboard/, card.json and curve.png. SIGTERM and Ctrl-C save and stop, with exit
code 0 and 130; --resume goes on from the newest checkpoint, on the same mesh bit for bit. At the end the loss on
held-out subjects stands beside two baselines and beside the loss with the conditions of the subjects exchanged.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import flags

from experiments.charts import line_chart
from experiments.common import end_stopped, print_changes, refuse_flags, run
from experiments.config_flags import define_config
from experiments.encoder_weights import first_encoders
from experiments.heads import named_head
from experiments.job import MESH, SEED, goes_on, open_job, start_job
from experiments.media import write_image
from pointillist_jax.configs import Config
from pointillist_jax.data.condition_features import feature_kind, open_features
from pointillist_jax.data.token_store import TokenStore, open_store
from pointillist_jax.data.windows import split_subjects, window_batches
from pointillist_jax.evaluation.token_baselines import MEAN_HEAD_STAGES, fit_histogram
from pointillist_jax.files import UserError, atomic_path
from pointillist_jax.flame import FlameModel
from pointillist_jax.flops import device_peak, training_flops, transformer_flops
from pointillist_jax.models.attention import require_attention
from pointillist_jax.models.condition import context_length, feature_shapes
from pointillist_jax.sharding import batch_share, make_mesh, require_share
from pointillist_jax.training import ar
from pointillist_jax.training.checkpoints import Checkpoints
from pointillist_jax.training.loop import resume_or_init, train
from pointillist_jax.training.metric_log import read_metrics
from pointillist_jax.training.same_model import check_same_model
from pointillist_jax.training.state import (
    Params,
    TrainState,
    abstract_state,
    begin_with,
    jit_step,
    make_optimizer,
    make_schedule,
    train_step,
)

STORE = flags.DEFINE_string("store", None, "The token store (experiments.tokenize).")
WORKDIR = flags.DEFINE_string("workdir", "outputs/ar", "Where the run goes.")
FLAME = flags.DEFINE_string("flame", None, "Your FLAME .pkl, if the store was made with it.")
PROFILE = flags.DEFINE_string("profile", "", "first:last step of a trace for TensorBoard or Perfetto, e.g. 20:22.")
CONFIG = define_config("model", "data", "train")

OUTPUTS = ("checkpoints", "metrics.jsonl", "tensorboard", "profile", "card.json", "curve.png")
# Of config.data, beside the tokenizer: what a store's spec has too.
_OF_STORE = ("canonical_jaw", "portrait_size", "out_of_bounds", "keep", "space")


def main() -> None:
    start_job()
    start = time.perf_counter()
    if STORE.value is None:
        raise UserError("--store is missing: name a token store (python -m experiments.tokenize makes one).")
    refuse_flags(["config.data.subjects_per_shard"], "in training: the store has its shards")
    store = open_store(STORE.value)
    head = named_head(store.spec.flame_source, store.spec.flame_sha256, STORE.value, FLAME.value)
    config = with_store(CONFIG(), store)
    profile, workdir = _profile(PROFILE.value, config.train.steps), Path(WORKDIR.value)
    state, stopped, held_out = train_ar(
        store,
        head,
        config,
        workdir,
        seed=SEED.value,
        mesh=MESH.value,
        profile=profile,
        encoders={} if goes_on(workdir) else first_encoders(config.model),
        open_workdir=lambda: open_job(workdir, OUTPUTS),
    )
    if jax.process_index():
        return
    if stopped:
        end_stopped(stopped, int(state.step))
        return
    if not read_metrics(workdir):
        print(f"\n{workdir} is trained to its last step, but its metrics.jsonl is gone: card.json and curve.png "
              "are left as they are.")  # fmt: skip
        return
    print_summary(summarize(workdir, store, config, held_out))
    print(f"\ndone in {time.perf_counter() - start:.0f} s; everything lies in {workdir}/:")
    print("  checkpoints/<step>/  params (for generation), state (for --resume)")
    print("  metrics.jsonl        one line per logged step; tensorboard/ shows the same")
    print("  curve.png            training and held-out loss")
    print("  card.json            held-out losses beside the baselines")


def with_store(config: Config, store: TokenStore) -> Config:
    """The config with what the store decided when it was made.

    Raises:
      UserError: the command line says otherwise; the sentence names the difference.
    """
    t = store.tokenizer
    decided: dict[str, Any] = {"bins": t.bins, "lower": t.lower, "upper": t.upper}
    decided |= {name: getattr(store.spec, name) for name in _OF_STORE}
    said = {f"data.{name}": value for name, value in decided.items()}
    for path, value in {**said, "model.bins": t.bins, "model.num_faces": t.num_faces}.items():
        given = operator.attrgetter(path)(config)
        if flags.FLAGS[f"config.{path}"].present and given != value:
            raise UserError(
                f"--config.{path} says {given}, but {store.path} was made with {value}: leave the flag out, or "
                "tokenise again."
            )
    model, data = config.model.for_tokenizer(t), dataclasses.replace(config.data, **decided)
    return dataclasses.replace(config, model=model, data=data)


def train_ar(
    store: TokenStore,
    head: FlameModel,
    config: Config,
    workdir: Path,
    *,
    seed: int = 0,
    mesh: str = "",
    profile: tuple[int, int] | None = None,
    bar: bool = True,
    encoders: Params | None = None,
    open_workdir: Callable[[], Any] = lambda: None,
) -> tuple[TrainState, str | None, tuple[str, ...]]:
    """Trains, or goes on with what lies in `workdir`. Returns the state, what stopped it early, held-out subjects.

    Args:
      encoders: parameters that a new run begins with (`encoder_weights.first_encoders`).
      open_workdir: called when everything is checked, before `workdir` is touched: it may delete what lies there.

    Raises:
      UserError: frozen encoders without stored features, a checkpoint of another model in `workdir`, and what
        `training.loop.train` refuses.
    """
    model, data, settings = config.model, config.data, config.train
    devices = make_mesh(mesh)
    require_share(settings.batch_size, devices)
    data = dataclasses.replace(data, held_out=_held_out(store, data.held_out))
    config = dataclasses.replace(config, data=data)
    training, held_out = split_subjects(store.subjects, data.held_out, data.split_seed)
    features = None
    if model.encoder.frozen:
        features = open_features(store, feature_kind(model.encoder), feature_shapes(model))
    share, shares = batch_share(devices)
    window = {
        "batch_size": settings.batch_size,
        "condition": () if features else ("portrait", "flame"),
        "features": features,
        "process_index": share,
        "process_count": shares,
    }
    stream = iter(
        window_batches(
            store,
            subjects=training,
            seed=seed,
            num_workers=data.num_workers,
            num_threads=data.num_threads,
            prefetch=data.prefetch,
            **ar.training_window(model, data.stride),
            **window,
        )
    )

    def evaluation_batches(name: str):
        exchange = name == "exchanged"
        return window_batches(
            store,
            subjects=held_out,
            shuffle=False,
            num_epochs=1,
            exchange_conditions=exchange,
            **ar.training_window(model),
            **window,
        )

    names = (("", "exchanged") if len(held_out) > 1 else ("",)) if held_out else ()
    for name in names:
        evaluation_batches(name)  # Raises what held-out subjects lack, before hours of training.
    evaluate = ar.make_evaluation(ar.make_loss(model, head), devices, evaluation_batches, names) if held_out else None
    loss_fn = ar.make_loss(model, head, settings.z_loss)
    meta = {"config": dataclasses.asdict(config), "store": store.spec.to_json(), "seed": seed}
    meta["features"] = features.spec.to_json() if features else None
    optimizer, init = make_optimizer(settings), ar.init_params(model)
    step = functools.partial(train_step, loss_fn=loss_fn, optimizer=optimizer, config=settings)
    peak, key = device_peak(jax.devices()[0].device_kind), jax.random.PRNGKey(seed)
    # Both raise what would else fail behind `open_workdir`: sizes that the mesh does not divide, an attention.
    abstract_state(init, optimizer, settings, key, devices)
    require_attention(model.attention, model.dtype)
    open_workdir()
    with Checkpoints(workdir, settings.keep) as checkpoints:
        check = functools.partial(check_same_model, config=config, part="model", where=str(workdir))
        state, saved = resume_or_init(checkpoints, init, optimizer, settings, key, devices, stream, check)
        if saved is not None:
            print_changes(saved, config, "model", workdir)
        elif encoders:
            state = begin_with(state, state.params | {"condition": state.params["condition"] | encoders})
        state, stopped = train(
            state,
            jit_step(step, state),
            stream,
            config=settings,
            mesh=devices,
            workdir=workdir,
            checkpoints=checkpoints,
            meta=meta,
            schedule=make_schedule(settings),
            evaluate=evaluate,
            describe=lambda batch: "subjects " + ", ".join(store.subjects[i] for i in sorted(set(batch["subject"]))),
            tokens_per_step=settings.batch_size * model.window_tokens,
            flops_per_step=settings.batch_size * training_flops(transformer_flops(model, context_length(model))),
            peak_flops=peak and peak.flops,
            profile=profile,
            bar=bar,
        )
    stream.close()
    return state, stopped, held_out


def summarize(workdir: Path, store: TokenStore, config: Config, held_out: tuple[str, ...]) -> dict[str, Any]:
    """Writes card.json and curve.png: the last evaluation beside the baselines, all on the held-out subjects."""
    lines = read_metrics(workdir)
    evaluations = [line for line in lines if "eval_loss" in line]
    training, _ = split_subjects(store.subjects, len(held_out), config.data.split_seed)
    summary: dict[str, Any] = {"steps": lines[-1]["step"], "held_out": list(held_out), "unit": "nats per token"}
    if evaluations:
        last = evaluations[-1]
        # Null where a loss was no number.
        by_name = {
            k.removeprefix("eval_"): v if v is None else round(v, 4) for k, v in last.items() if k.startswith("eval_")
        }
        summary["model"] = {k: v for k, v in by_name.items() if not k.startswith("exchanged_")}
        if "exchanged_loss" in by_name:
            summary["conditions_exchanged"] = {
                k.removeprefix("exchanged_"): v for k, v in by_name.items() if k.startswith("exchanged_loss")
            }
    if held_out and len(training) > 1:
        known, unseen = ([store.tokens(store.index(name)) for name in names] for names in (training, held_out))
        for name, stages in (("unigram", 1), ("mean_head", MEAN_HEAD_STAGES)):
            scores = fit_histogram(known, store.tokenizer, stages).nll(unseen)
            summary[name] = {key: round(value, 4) for key, value in scores.items()}
    with atomic_path(workdir / "card.json") as path:
        path.write_text(json.dumps(summary, indent=1) + "\n")
    series = {
        "training": [(line["step"], line["loss"]) for line in lines if "loss" in line],
        "held out": [(line["step"], line["eval_loss"]) for line in evaluations if line["eval_loss"] is not None],
    }
    levels = {
        name: summary[key]["loss"]
        for name, key in (("unigram", "unigram"), ("mean head", "mean_head"))
        if key in summary
    }
    write_image(workdir / "curve.png", line_chart(series, levels, "step", "nats per token"))
    return summary


def print_summary(summary: dict[str, Any]) -> None:
    """The table of losses on held-out subjects."""
    rows = [
        (name, summary[name]) for name in ("unigram", "mean_head", "conditions_exchanged", "model") if name in summary
    ]
    if not rows:
        return
    print(f"\nheld-out subjects ({len(summary['held_out'])}), nats per token after {summary['steps']} steps:")
    print(f"  {'':<22}{'all':>8}" + "".join(f"{slot:>8}" for slot in "xyzb"))
    for name, scores in rows:
        values = [scores.get(key, "") for key in ("loss", *(f"loss_{slot}" for slot in "xyzb"))]
        cells = "".join(f"{v:>8.3f}" if isinstance(v, float) else f"{'nan' if v is None else v:>8}" for v in values)
        print(f"  {name.replace('_', ' '):<22}{cells}")
    if "model" in summary and summary["model"].get("loss") is None:
        print(
            "the model's loss is no number: it has diverged; train it again with a lower --config.train.learning_rate."
        )


def _held_out(store: TokenStore, asked: int) -> int:
    """How many subjects are held out: `asked`, or as many as leave two to train on, which is said then."""
    people = len(store)
    if people - asked >= 2 or asked == 0:
        return asked
    if people < 2:
        raise UserError(
            f"data.held_out={asked}, but {store.path} has one subject: tokenise more, or train on it with "
            "--config.data.held_out=0."
        )
    if not jax.process_index():
        print(
            f"warning: {store.path} has {people} subjects and data.held_out={asked}: {people - 2} are held out and 2 "
            "train; give --config.data.held_out.",
            file=sys.stderr,
        )  # fmt: skip
    return people - 2


def _profile(text: str, steps: int) -> tuple[int, int] | None:
    if not text:
        return None
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    if not match or not 1 <= int(match[1]) <= min(int(match[2]), steps):
        raise UserError(f"--profile={text} must be first:last step of the {steps}, e.g. {max(steps - 2, 1)}:{steps}.")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    run(main)
