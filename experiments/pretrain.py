"""Makes the weights that the package ships: both models of the `laptop` preset, trained on synthetic people.

    python -m experiments.pretrain [--workdir=outputs/pretrained] [--num_identities=288] [--processes=2] [--resume]

People → tokens → transformer → its weights in half precision → features → decoder → its weights → scores of the
held-out people beside those of guesses. Each stage is a script whose command is printed; a kill costs little: the same
command with --resume goes on. <workdir>/weights/ then holds what lies in pointillist_jax/pretrained: ar.npz,
decoder.npz, example/ and scores.json. About two hours on two cores; the log of the shipped ones is in
experiments/LOG.md.

The features are made with the weights as they are written, so that the decoder has seen exactly what others will load.
The decoder first learns on the people's true points, then on points drawn from their portraits (paper), where it learns
to trust the portrait more than the cloud.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from absl import flags

from experiments.common import open_workdir, run
from experiments.stages import Stages, config_flags, run_script
from pointillist_jax.files import UserError, atomic_folder, atomic_path, read_json
from pointillist_jax.training.checkpoints import load_params, newest_step
from pointillist_jax.training.weights import save_weights

WORKDIR = flags.DEFINE_string("workdir", "outputs/pretrained", "Where the run goes.")
NUM = flags.DEFINE_integer("num_identities", 288, "Synthetic people, of whom 16 are held out.", lower_bound=3)
PROCESSES = flags.DEFINE_integer("processes", 2, "People made side by side.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of people, parameters and batches.", lower_bound=0)
SMOKE = flags.DEFINE_boolean("smoke", False, "The smallest setting, which shows that the stages fit together.")
RESUME = flags.DEFINE_boolean("resume", False, "Go on with the run in --workdir.")
OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Delete the run in --workdir first.")

OUTPUTS = ("people", "tokens", "ar", "features", "sampled", "decoder_first", "decoder", "evaluation", "weights")
# Of a capture, what the example keeps.
_EXAMPLE = ("images", "fg_masks", "flame_param", "canonical_flame_param.npz", "transforms.json",
            "transforms_train.json", "transforms_val.json", "transforms_test.json", "portrait.png",
            "portrait_flame_param.npz")  # fmt: skip


def main() -> None:
    start = time.perf_counter()
    workdir = open_workdir(WORKDIR.value, OUTPUTS, resume=RESUME.value, overwrite=OVERWRITE.value)
    stages, weights, smoke = Stages(8), workdir / "weights", SMOKE.value
    preset = "--config=laptop"
    with stages.stage(f"{NUM.value} synthetic people, and captures of them"):
        size, portrait = (32, 112) if smoke else (96, 112)
        run_script(
            "make_identities", preset, f"--workdir={workdir}/people", f"--num_identities={NUM.value}",
            "--timesteps=4", f"--size={size}", f"--portrait_size={portrait}", f"--processes={PROCESSES.value}",
            f"--seed={SEED.value}", *config_flags({"identities.density": 0.1} if smoke else {}), "--resume",
        )  # fmt: skip
    with stages.stage("everyone as tokens"):
        run_script("tokenize", preset, f"--fits={workdir}/people", f"--workdir={workdir}/tokens", "--resume")
    with stages.stage("stage one: the transformer"):
        small = {"model.window": 64, "data.stride": 256, "model.layers": 1, "train.steps": 4, "data.held_out": 1}
        run_script("train_ar", preset, f"--store={workdir}/tokens", f"--workdir={workdir}/ar", f"--seed={SEED.value}",
                   *config_flags(small if smoke else {}), *resumed(workdir / "ar"))  # fmt: skip
        params, meta = load_params(workdir / "ar")
        save_weights(weights / "ar.npz", params, meta, newest_step(workdir / "ar"))
    most = f"--max_points={64 if smoke else 6000}"
    drawing = ("--temperature=0.9", "--top_p=0.95", most)
    shared = (f"--ar={weights}/ar.npz", f"--store={workdir}/tokens")
    with stages.stage("hidden states at the points of everyone, and at points drawn from the portraits"):
        run_script("extract_features", *shared, f"--workdir={workdir}/features", "--batch=4", "--resume")
        run_script("extract_features", *shared, f"--workdir={workdir}/sampled", "--source=sampled", "--batch=16",
                   *drawing, "--resume")  # fmt: skip
    with stages.stage("stage two: the decoder, on true points"):
        small = {"decoder.layers": 1, "decoder.train.steps": 2} if smoke else {"decoder.train.steps": 650}
        decoder = ("train_decoder", preset, *shared, f"--captures={workdir}/people", f"--seed={SEED.value}")
        run_script(*decoder, f"--features={workdir}/features", f"--workdir={workdir}/decoder_first",
                   *config_flags(small), *resumed(workdir / "decoder_first"))  # fmt: skip
    with stages.stage("stage two: the decoder, on drawn points"):
        small = {"decoder.layers": 1, "decoder.train.steps": 2} if smoke else {"decoder.train.steps": 2200}
        run_script(*decoder, f"--features={workdir}/sampled", f"--workdir={workdir}/decoder",
                   f"--init={workdir}/decoder_first", *config_flags(small), *resumed(workdir / "decoder"))  # fmt: skip
        params, meta = load_params(workdir / "decoder")
        save_weights(weights / "decoder.npz", params, meta, newest_step(workdir / "decoder"))
    with stages.stage("held-out people from their portraits, beside guesses"):
        run_script("evaluate", *shared, f"--decoder={weights}/decoder.npz", f"--captures={workdir}/people",
                   f"--fits={workdir}/people", "--protocols=self", *drawing, f"--candidates={2 if smoke else 8}",
                   "--views=24", "--mean_of=12", "--batch_size=16", f"--workdir={workdir}/evaluation",
                   *resumed(workdir / "evaluation"))  # fmt: skip
    with stages.stage("somebody to try the weights on"):
        name = example_subject(workdir)
        copy_example(workdir / "people" / name, weights / "example")
        print(f"  {name}, held out")
    card = {"identities": NUM.value, "seed": SEED.value, "smoke": smoke, "seconds": stages.seconds}
    with atomic_path(weights / "card.json") as path:
        path.write_text(json.dumps(card, indent=1) + "\n")
    print(f"\ndone in {time.perf_counter() - start:.0f} s; everything lies in {workdir}/:")
    print("  weights/     ar.npz, decoder.npz (--ar and --decoder take them), example/, card.json")
    print("  evaluation/  scores of the held-out people beside those of guesses")


def resumed(folder: Path) -> list[str]:
    """--resume for a stage that has begun."""
    return ["--resume"] if folder.is_dir() and any(folder.iterdir()) else []


def example_subject(workdir: Path) -> str:
    """Of the held-out people the one whose avatar has the median PSNR: neither the best nor the worst."""
    found = []
    for path in sorted((workdir / "evaluation" / "scores" / "self").glob("*.json")):
        scores = read_json(path, "a person's scores")["scores"]["ours"]["psnr"]
        found.append((sum(scores) / len(scores), path.stem))
    if not found:
        raise UserError(f"{workdir}/evaluation holds no scores: evaluate again with --overwrite.")
    return sorted(found)[len(found) // 2][1]


def copy_example(capture: Path, target: Path) -> None:
    with atomic_folder(target) as folder:
        for name in _EXAMPLE:
            source = capture / name
            shutil.copytree(source, folder / name) if source.is_dir() else shutil.copyfile(source, folder / name)


if __name__ == "__main__":
    run(main)
