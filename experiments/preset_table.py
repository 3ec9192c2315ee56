"""What every preset needs before it runs: parameters, memory, FLOPs, and hours at a stated share of a device's peak.

    python -m experiments.preset_table [--utilisation=0.4] [--devices=A100,H100] [--presets=small,paper]

Everything is computed, nothing is run: numbers of parameters and of bytes kept for the backward pass from shapes
alone, FLOPs by `pointillist_jax/flops.py`, peaks from datasheets. docs/gpu_and_clusters.md shows the output;
`experiments.bench_train` and `experiments.bench_decode` measure the same on the device at hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from absl import flags

from experiments.common import run
from pointillist_jax.configs import PRESETS, Config, ModelConfig, preset
from pointillist_jax.files import UserError
from pointillist_jax.flops import PEAKS, training_flops, transformer_flops
from pointillist_jax.models import gaussian_decoder
from pointillist_jax.models.ar import param_specs
from pointillist_jax.models.condition import condition_specs, context_length, encoder_specs
from pointillist_jax.models.layers import count_parameters
from pointillist_jax.scaling.memory import residual_bytes

PRESET_NAMES = flags.DEFINE_list("presets", list(PRESETS), "Which presets.")
DEVICES = flags.DEFINE_list("devices", ["L40S", "A100", "H100", "H200", "B200"], f"Of {', '.join(PEAKS)}.")
UTILISATION = flags.DEFINE_float("utilisation", 0.4, "Share of the peak FLOP/s that is assumed.", 0, 1)

# Bytes of a parameter in training: itself, its gradient and AdamW's two moments, all float32.
TRAINED_BYTES = 16
# Narrower models wait for kernels to be launched, not for products: a share of the peak says nothing about them.
LEAST_WIDTH = 512


@dataclasses.dataclass(frozen=True)
class Needs:
    """What stage one of a preset needs.

    Attributes:
      transformer, condition, encoders, decoder: parameters. `condition` are the projections and whatever is trained
        along; `encoders` are those that are frozen, whose features are made beforehand.
      kept: bytes that the backward pass of one more window needs (residuals, by their shapes).
      tokens: of a window. window_flops: forward and backward of one.
      decode_bytes: read from memory for every token (or point) that one person's generation emits, once a window is
        behind it: all weights, and the keys and values of window and context, in the dtype of the computation.
      batch, steps: of the preset's training.
    """

    transformer: int
    condition: int
    encoders: int
    decoder: int
    kept: int
    tokens: int
    window_flops: float
    decode_bytes: int
    batch: int
    steps: int

    @property
    def trained(self) -> int:
        return self.transformer + self.condition

    def hours(self, flops_per_second: float) -> float:
        return self.steps * self.batch * self.window_flops / flops_per_second / 3600


def main() -> None:
    configs = {name: preset(name) for name in PRESET_NAMES.value}
    if unknown := [name for name in DEVICES.value if name not in PEAKS]:
        raise UserError(f"--devices={','.join(DEVICES.value)}: {unknown[0]!r} is none of {', '.join(PEAKS)}.")
    if not UTILISATION.value:
        raise UserError("--utilisation=0 would take for ever; give a share above 0, such as 0.4.")
    needs = {name: needs_of(config) for name, config in configs.items()}
    print(size_table(needs))
    wide = {name: need for name, need in needs.items() if configs[name].model.width >= LEAST_WIDTH}
    if wide:
        print("\n" + time_table(wide, DEVICES.value, UTILISATION.value))


def needs_of(config: Config) -> Needs:
    """Computed from shapes; nothing is allocated."""
    model = config.model
    decoder = config.decoder.for_features(model.tokenizer, model.width, context_tokens=context_length(model))
    return Needs(
        transformer=count_parameters(param_specs(model)),
        condition=count_parameters(condition_specs(model)),
        encoders=count_parameters(encoder_specs(model)) if model.encoder.frozen else 0,
        decoder=count_parameters(gaussian_decoder.param_specs(decoder)),
        kept=residual_bytes(model, 2) - residual_bytes(model, 1),
        tokens=model.window_tokens,
        window_flops=training_flops(transformer_flops(model, context_length(model))),
        decode_bytes=decode_bytes(model),
        batch=config.train.batch_size,
        steps=config.train.steps,
    )


def decode_bytes(model: ModelConfig) -> int:
    """Bytes that a step of generation reads at batch 1."""
    cached = model.layers * (model.window + context_length(model)) * 2 * model.num_kv_heads * model.head_dim
    return (count_parameters(param_specs(model)) + cached) * jnp.dtype(model.dtype).itemsize


def size_table(needs: dict[str, Needs]) -> str:
    """Markdown: parameters, memory and FLOPs of stage one by preset."""
    rows = [
        ["preset", "AR parameters", "frozen encoders", "decoder", "weights, gradients, AdamW", "kept per window",
         "tokens in a window", "windows a step", "MFLOP a token", "TFLOP a step", "steps"],
    ]  # fmt: skip
    for name, need in needs.items():
        rows.append(
            [f"`{name}`", millions(need.trained), millions(need.encoders) if need.encoders else "–",
             millions(need.decoder), size(TRAINED_BYTES * need.trained), size(need.kept), f"{need.tokens:,}",
             f"{need.batch}", f"{need.window_flops / need.tokens / 1e6:,.0f}",
             figures(need.batch * need.window_flops / 1e12), f"{need.steps:,}"]
        )  # fmt: skip
    return table(rows)


def time_table(needs: dict[str, Needs], devices: Sequence[str], utilisation: float) -> str:
    """Markdown: stage one, and generation, on one device; computed from its peaks."""
    heads = ("tokens/s in training", "hours of stage one", "tokens/s generating, at most")
    rows = [["device, computed", "bf16 peak", *(f"`{name}`: {head}" for name in needs for head in heads)]]
    for device in devices:
        peak = PEAKS[device]
        row = [f"{device}, {utilisation:.0%} of peak", f"{peak.flops / 1e12:,.0f} TFLOP/s"]
        for need in needs.values():
            rate = need.tokens * utilisation * peak.flops / need.window_flops
            hours = figures(need.hours(utilisation * peak.flops))
            row += [two_figures(rate), hours, two_figures(peak.bandwidth / need.decode_bytes)]
        rows.append(row)
    return table(rows)


def table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def millions(number: int) -> str:
    return f"{figures(number / 1e6)} M"


def size(number: float) -> str:
    return f"{figures(number / 2**30)} GiB" if number >= 2**30 else f"{figures(number / 2**20)} MiB"


def two_figures(number: float) -> str:
    return f"{float(f'{number:.2g}'):,.0f}"


def figures(number: float) -> str:
    """Three figures, whole from a hundred on."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


if __name__ == "__main__":
    run(main)
