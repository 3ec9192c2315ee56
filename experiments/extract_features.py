"""Hidden states of a trained autoregressive model at every point of a store's people: what the decoder is trained on.

    python -m experiments.extract_features --ar=outputs/ar --store=outputs/tokens --workdir=outputs/features
       [--source=teacher_forced|sampled] [--subjects=…] [--num_shards=4 --shard=0] [--resume|--overwrite]

`sampled` (paper): the model draws each person's cloud from their condition. `teacher_forced`: it reads the fit's own
tokens, which takes one forward instead of thousands of steps. Writes <workdir>/<subject>.npz (tokens, points, binding,
hidden [P, 4, D] in half precision) and meta.json.

A kill costs the subjects in work: `--resume` makes those that are missing and touches no other; teacher-forced features
are then the same to the byte, for the same --batch. Several processes share the people of one workdir: the same command
with --num_shards=N and --shard=0 … N-1.
"""

from __future__ import annotations

import dataclasses
import glob
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from experiments.common import refuse_flags, run
from experiments.drawing import Drawing, Person, define_drawing, draw_clouds
from experiments.trained import Contexts, TrainedAR, load_ar
from pointillist_jax.data.point_features import (
    SOURCES,
    FeatureSet,
    FeatureSpec,
    PointFeatures,
    features_difference,
    save_point_features,
    write_feature_meta,
)
from pointillist_jax.data.token_store import META, TokenStore, open_store
from pointillist_jax.files import UserError, read_json
from pointillist_jax.sampling import score

AR = flags.DEFINE_string("ar", None, "Workdir of experiments.train_ar.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint; the newest if not given.", lower_bound=0)
STORE = flags.DEFINE_string("store", None, "The token store (experiments.tokenize).")
WORKDIR = flags.DEFINE_string("workdir", "outputs/features", "Where the features go.")
SOURCE = flags.DEFINE_enum("source", "teacher_forced", SOURCES, "Whose tokens: the model's own draws, or the fits'.")
SUBJECTS = flags.DEFINE_list("subjects", None, "Only these people; all that have a portrait if not given.")
FLAME = flags.DEFINE_string("flame", None, "Your FLAME .pkl, if the model was trained with it.")
IMAGE_WEIGHTS = flags.DEFINE_string("image_weights", None, "DINOv2's weights: frozen encoders run anew.")
POINT_WEIGHTS = flags.DEFINE_string("point_weights", None, "Michelangelo's weights, likewise.")
BATCH = flags.DEFINE_integer("batch", 1, "People side by side.", lower_bound=1)
NUM_SHARDS = flags.DEFINE_integer("num_shards", 1, "Processes that share the people.", lower_bound=1)
SHARD = flags.DEFINE_integer("shard", 0, "Which of them this is.", lower_bound=0)
RESUME = flags.DEFINE_boolean("resume", False, "Make what is missing in --workdir.")
OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Delete these people's features in --workdir first.")
drawing_flags = define_drawing()


def main() -> None:
    start = time.perf_counter()
    if STORE.value is None:
        raise UserError("--store is missing: name the token store of the training.")
    if SHARD.value >= NUM_SHARDS.value:
        raise UserError(f"--shard={SHARD.value} must be less than --num_shards={NUM_SHARDS.value}.")
    trained = load_ar(AR.value, STEP.value, FLAME.value)
    store = open_store(STORE.value)
    trained.check_store(store)
    contexts = Contexts(trained, store, IMAGE_WEIGHTS.value, POINT_WEIGHTS.value)
    names = chosen(store)
    drawing, sampled = drawing_flags(store), SOURCE.value == "sampled"
    if not sampled:
        drawn_only = [field.name for field in dataclasses.fields(Drawing)]
        refuse_flags(drawn_only, "with --source=teacher_forced, which draws nothing")
    spec = FeatureSpec(
        store=store.spec,
        width=trained.model.width,
        source=SOURCE.value,
        checkpoint=trained.checkpoint,
        sampling=dataclasses.asdict(drawing) if sampled else {},
        held_out=trained.held_out(store),
    )
    # Groups are cut once and for all: what a person is computed beside decides the last bits of the result.
    groups = [names[i : i + BATCH.value] for i in range(0, len(names), BATCH.value)][SHARD.value :: NUM_SHARDS.value]
    folder, mine = Path(WORKDIR.value), [name for group in groups for name in group]
    prepare(folder, spec, names, mine)
    todo = [name for name in mine if not (folder / f"{name}.npz").is_file()]
    if len(todo) < len(mine):
        print(f"{len(mine) - len(todo)} of {len(mine)} people are done already")
    points = 0
    if todo:
        if sampled:
            people = [Person(name, contexts.condition(name), store.index(name)) for name in todo]
            stream = drawn(trained, people, contexts, drawing)
        else:
            stream = forced(trained, store, [group for group in groups if set(group) & set(todo)], contexts)
        for name, features in stream:
            if name in todo:
                save_point_features(folder / f"{name}.npz", features)
                points += features.num_points
    there = sum((folder / f"{name}.npz").is_file() for name in names)
    print(f"\n{points:,} points of {len(todo)} people, hidden states of width {spec.width}")
    print(f"{there} of {len(names)} people are there; done in {time.perf_counter() - start:.0f} s")
    print(f"everything lies in {folder}/:")
    print("  <subject>.npz  tokens, points, binding, hidden: for experiments.train_decoder")
    print("  meta.json      tokenizer, head, checkpoint and settings they were made with")


def chosen(store: TokenStore) -> list[str]:
    """The people of all shards, in the order of the store."""
    able = [name for name, has in zip(store.subjects, store.has_portrait, strict=True) if has]
    if SUBJECTS.value is None:
        if len(able) < len(store):
            print(f"{len(store) - len(able)} of {len(store)} people have no portrait and are left out")
        return able
    wanted = {store.subjects[store.index(name)] for name in SUBJECTS.value}
    return [name for name in store.subjects if name in wanted]


def prepare(folder: Path, spec: FeatureSpec, names: list[str], mine: list[str]) -> None:
    """The folder with its meta.json. Other shards may be at work in it: only this one's people are touched.

    Raises:
      UserError: it holds some of them and neither --resume nor --overwrite is given; features of other settings; or
        something that is no features.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--workdir={folder} is a file; name a folder.")
    if RESUME.value and OVERWRITE.value:
        raise UserError("--resume and --overwrite exclude each other; give one.")
    known: list[str] = []
    if (folder / META).is_file():
        there = FeatureSet(folder, partial=True)  # Checks the file.
        known = read_json(folder / META, "the meta.json of point features")["subjects"]
        if difference := features_difference(there.spec, spec):
            if not OVERWRITE.value:
                raise UserError(
                    f"{folder} was made with {difference}: name another folder, or replace it with --overwrite."
                )
            # One meta.json speaks for all files of a folder, so none of other settings may stay in it.
            if others := sorted(set(there.subjects) - set(mine)):
                raise UserError(
                    f"{folder} holds {len(others)} people that this command does not replace ({others[0]} …), made "
                    f"with {difference}: name another folder, or delete that one first."
                )
            (folder / META).unlink()
            known = []
    elif folder.is_dir() and not OVERWRITE.value and any(not p.name.startswith(".") for p in folder.iterdir()):
        raise UserError(f"--workdir={folder} holds something that is no features; name another folder.")
    for name in mine:
        path = folder / f"{name}.npz"
        if path.exists() and OVERWRITE.value:
            path.unlink()
        elif path.exists() and not RESUME.value:
            raise UserError(
                f"--workdir={folder} holds {name} already; go on with --resume, replace with --overwrite, or name "
                "another folder."
            )
        for rest in folder.glob(f".{glob.escape(name)}.tmp-*.npz"):  # What a killed run was writing.
            rest.unlink(missing_ok=True)
    write_feature_meta(folder, spec, [*known, *(name for name in names if name not in known)])


def forced(
    trained: TrainedAR, store: TokenStore, groups: list[list[str]], contexts: Contexts
) -> Iterator[tuple[str, PointFeatures]]:
    """Features at the people's own tokens, a group at a time."""
    t, total = store.tokenizer, sum(int(store.num_points[store.index(name)]) for group in groups for name in group)
    with tqdm(total=total, desc="read", unit="point") as bar:
        for group in groups:
            # The last group is filled up with its last person: one program for all.
            filled = (group + [group[-1]] * BATCH.value)[: BATCH.value]
            sequences = [np.asarray(store.tokens(store.index(name))) for name in filled]
            tokens = np.full((len(filled), max(map(len, sequences))), t.pad, np.int32)
            for row, sequence in zip(tokens, sequences, strict=True):
                row[: len(sequence)] = sequence
            context = contexts([contexts.condition(name) for name in filled])
            found = score(trained.params["transformer"], trained.model, tokens, context, tokenizer=t)
            for i, name in enumerate(group):
                points, binding = t.decode(sequences[i])
                yield name, PointFeatures(sequences[i], points, binding, found.hidden[i, : len(points)])
                bar.update(len(points))


def drawn(trained: TrainedAR, people: list[Person], contexts: Contexts, drawing) -> Iterator[tuple[str, PointFeatures]]:
    """Features at tokens that the model draws."""
    for person, cloud, _ in draw_clouds(trained, people, contexts, drawing, BATCH.value, return_hidden=True):
        n = int(cloud.num_points[0])
        yield (
            person.name,
            PointFeatures(cloud.tokens[0, : 4 * n + 8], cloud.points[0, :n], cloud.binding[0, :n], cloud.hidden[0, :n]),
        )


if __name__ == "__main__":
    run(main)
