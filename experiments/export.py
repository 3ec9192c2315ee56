"""What was trained, in the formats of other programs; and weights back from them.

    python -m experiments.export --format=torch --checkpoint=outputs/ar --output=ar.safetensors [--step=1000]
    python -m experiments.export --format=torch --import=ar.safetensors --output=outputs/ar_from_torch

torch: a training's parameters (of `train_ar` or `train_decoder`; their average where the run keeps one) as one
.safetensors file that the PyTorch models of experiments/torch_reference load as they are, in a process that needs
neither JAX nor this package (`torch_reference/exported.py`). Config, tokenizer and provenance lie in its metadata.
The way back gives a workdir that `generate`, `extract_features` and `reconstruct` read: the same parameters to the bit
if nothing changed them. It holds no optimiser state, so no training goes on from it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from absl import flags

from experiments.common import run
from pointillist_jax.configs import DecoderConfig, ModelConfig, config_from_json
from pointillist_jax.convert import load_torch_file
from pointillist_jax.convert.reference import (
    ar_from_torch,
    ar_to_torch,
    decoder_from_torch,
    decoder_to_torch,
    load_metadata,
    save_reference,
)
from pointillist_jax.files import FileFormatError, UserError
from pointillist_jax.training.checkpoints import load_params, newest_step, save_params

FORMAT = flags.DEFINE_enum("format", "torch", ["torch"], "Of the file that is written, or read with --import.")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a training: its weights are exported.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint of it; the newest if not given.", lower_bound=0)
IMPORT = flags.DEFINE_string("import", None, "Instead of --checkpoint: a file to make a workdir from.")
OUTPUT = flags.DEFINE_string("output", None, "File to write, or with --import the workdir.")
OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Replace --output.")

# Kind → the part of the config that makes the model, what that is, and the weights' ways there and back.
KINDS = {
    "ar": ("model", ModelConfig, ar_to_torch, ar_from_torch),
    "decoder": ("decoder", DecoderConfig, decoder_to_torch, decoder_from_torch),
}


def main() -> None:
    if (CHECKPOINT.value is None) == (IMPORT.value is None):
        raise UserError("give either --checkpoint=<workdir of a training> or --import=<a file of weights>.")
    if OUTPUT.value is None:
        raise UserError("--output is missing: name the file to write, or with --import the workdir.")
    if IMPORT.value is None:
        export_torch(CHECKPOINT.value, STEP.value, OUTPUT.value)
    else:
        import_torch(IMPORT.value, OUTPUT.value)


def export_torch(workdir: str, step: int | None, output: str) -> None:
    path = Path(output)
    if path.suffix != ".safetensors":
        raise UserError(f"--output={path} must end in .safetensors.")
    if path.exists() and not OVERWRITE.value:
        raise UserError(f"--output={path} exists; replace it with --overwrite, or name another file.")
    params, meta = load_params(workdir, step)
    meta = dict(meta) if isinstance(meta, dict) else {}
    step = newest_step(workdir) if step is None else step
    config = meta.pop("config", None)
    kind = kind_of(meta, workdir)
    part, model_config, to_torch, _ = KINDS[kind]
    model = config_from_json(model_config, config.get(part) if isinstance(config, dict) else None, str(workdir))
    state = to_torch(params, model)
    save_reference(path, state, {"kind": kind, "step": step, "config": config, "meta": meta})
    size, numbers = os.path.getsize(path), sum(x.size for x in state.values())
    print(f"{path}: {len(state)} tensors, {numbers / 1e6:.2f} M numbers, {size / 2**20:.1f} MiB, step {step}")
    print("load it with experiments.torch_reference.exported.load_exported, or with safetensors.torch.load_file")


def import_torch(path: str, output: str) -> None:
    content = load_metadata(path)
    kind, step = content.get("kind"), content.get("step")
    config, meta = content.get("config"), content.get("meta")
    if kind not in KINDS or type(step) is not int or step < 0 or not all(isinstance(x, dict) for x in (config, meta)):
        raise FileFormatError(f"{path}: its metadata are damaged (kind {kind!r}, step {step!r}); export it again.")
    part, model_config, _, from_torch = KINDS[kind]
    params = from_torch(load_torch_file(path), config_from_json(model_config, config.get(part), path))
    save_params(output, step, params, {**meta, "config": config}, overwrite=OVERWRITE.value)
    reader = "--ar" if kind == "ar" else "--decoder"
    print(f"{output}/checkpoints/{step}: read it with {reader}={output} (generate, extract_features, reconstruct)")


def kind_of(meta: dict[str, Any], where: str) -> str:
    """Which model a checkpoint holds: stage one names its store, stage two the features it was trained on."""
    if isinstance(meta.get("store"), dict):
        return "ar"
    if isinstance(meta.get("features"), dict) and "tokenizer" in meta["features"]:
        return "decoder"
    raise UserError(f"{where} is a run of neither experiments.train_ar nor experiments.train_decoder: check the path.")


if __name__ == "__main__":
    run(main)
