"""Hyper-parameters: one frozen dataclass per part of the method, and named presets (DESIGN §1, §6).

The only place where they live. Scripts take `--config=<preset>` and `--config.<part>.<field>=<value>`
(`experiments/config_flags.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from pointillist_jax.files import UserError
from pointillist_jax.tokens import DEFAULT_LOWER, DEFAULT_UPPER, PointTokenizer

# Numbers that `DecoderConfig.context_colors` adds to a token: RGB of 2 × 2 quarters of a patch.
PATCH_COLORS = 12
# Published image encoders (`models.image_encoder`); "tiny" is ours.
DINOV2 = tuple(f"{size}{suffix}" for size in ("vits14", "vitb14", "vitl14", "vitg14") for suffix in ("", "_reg"))
# Implementations of attention (`models.attention`).
ATTENTIONS = ("auto", "cudnn", "chunked", "xla")


def _one_of(config: Any, path: str, choices: dict[str, tuple[str, ...]]) -> None:
    """Raises UserError for the first field of `config` that is none of its legal values."""
    for name, legal in choices.items():
        if getattr(config, name) not in legal:
            raise UserError(f"{path}.{name}={getattr(config, name)!r} must be one of {', '.join(legal)}.")


def _at_least(config: Any, path: str, **least: float) -> None:
    """Raises UserError for the first field of `config` below its least value; `path` leads to it in flags."""
    for name, low in least.items():
        if not getattr(config, name) >= low:  # So that NaN is refused too.
            raise UserError(f"{path}.{name}={getattr(config, name)} must be at least {low}.")


@dataclasses.dataclass(frozen=True)
class IdentityConfig:
    """Synthetic people (`data/identities/`). All of it is ours: the paper's people are licensed captures.

    Attributes:
      density: Gaussians per area and locks of hair, relative to the full head's; about 7,000 for a bald head and
        25,000 with long hair at 1.
      shape_spread: standard deviation of the shape coefficients; 1 is the head model's whole population.
      canonical_jaw: radians, of the canonical mesh (DESIGN §3).
    """

    density: float = 1.0
    shape_spread: float = 0.7
    canonical_jaw: float = 0.3

    def __post_init__(self):
        _at_least(self, "identities", density=1e-3, shape_spread=0)


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """Rigged Gaussian fitting (`fitting/`). The defaults are GaussianAvatars' (facts/avatars_gsplat.md A.3–A.5).

    Attributes:
      iterations: optimiser steps.
      views_per_step: images per step, of any timesteps.
      sh_degree: of the colours, raised by one every `sh_interval` iterations. 0 (ours) because tokens carry no colour
        and the Gaussian decoder paints RGB; GaussianAvatars uses 3.
      background: grey level behind the head in images and renders; captures are white.
      lr_means, lr_means_final: log-linear over the run, both times the extent of the cameras.
      lambda_position, threshold_position: on the local distance from the face, beyond the threshold.
      lambda_scaling, threshold_scaling: on the local scales, beyond the threshold.
      densify: density control. Off: the number of Gaussians stays that of the faces.
      densify_grad: mean |d loss / d means2d|, in normalised device coordinates, above which a Gaussian is doubled.
      percent_dense: of the extent; larger Gaussians are split, others cloned.
      split_std: "world" is GaussianAvatars to the letter: children are spread by the world-space standard deviation,
        in local coordinates; "local" (ours) spreads them over the parent.
      prune_large_from: iteration after which Gaussians larger than `prune_radius` pixels on the screen or
        `prune_scale` extents are pruned.
      opacity_reset_interval: 0 for none. With a white background there is one more at `densify_from`.
      max_points: budget (ours); 0 for none. Density control may exceed it by `overshoot`; it ends at `budget_at` of
        the iterations, where Gaussians of least blending weight are pruned in `budget_steps` rounds.
      finetune_flame: expressions, poses and translations are optimised along.
      save_interval: iterations between checkpoints of the whole state.
      log_interval: iterations between entries of the history.
    """

    iterations: int = 600_000
    views_per_step: int = 1
    seed: int = 0
    sh_degree: int = 0
    sh_interval: int = 1000
    background: float = 1.0

    lr_means: float = 0.005
    lr_means_final: float = 0.00005
    lr_f_dc: float = 0.0025
    lr_f_rest: float = 0.0025 / 20
    lr_opacities: float = 0.05
    lr_scales: float = 0.017
    lr_quats: float = 0.001

    lambda_ssim: float = 0.2
    lambda_position: float = 0.01
    threshold_position: float = 1.0
    lambda_scaling: float = 1.0
    threshold_scaling: float = 0.6

    densify: bool = True
    densify_from: int = 10_000
    densify_until: int = 600_000
    densify_interval: int = 2000
    densify_grad: float = 2e-4
    percent_dense: float = 0.01
    split_std: str = "world"
    prune_opacity: float = 0.005
    prune_large_from: int = 60_000
    prune_radius: float = 20.0
    prune_scale: float = 0.1
    opacity_reset_interval: int = 60_000

    max_points: int = 0
    overshoot: float = 1.3
    budget_at: float = 0.7
    budget_steps: int = 3

    finetune_flame: bool = True
    lr_expr: float = 1e-3
    lr_pose: float = 1e-5
    lr_translation: float = 1e-6

    save_interval: int = 60_000
    log_interval: int = 1000


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Token store, windows and views (`data/`; DESIGN §2, §5, §6).

    Attributes:
      bins: quantisation levels per axis (paper: 1024).
      lower, upper: corners of the quantised box, metres (ours).
      out_of_bounds: what happens to points outside the box: "error", or "clip" onto its border, counted.
      keep: share of every fit's points that become tokens, drawn at random by the subject's name (ours, for laptops:
        shorter sequences of the same shapes; the decoder makes up for the gaps with larger Gaussians). Paper: 1.
      space: what points lie around: the person's own canonical mesh ("identity", paper), or for everybody the mesh of
        mean shape ("template", ours: `data/template_space.py`): FLAME knows the shapes of heads already.
      canonical_jaw: radians by which the canonical mesh opens its mouth (ours: 0.3, the exporters'; 0 closes it).
      portrait_size: side of the stored portraits, pixels.
      subjects_per_shard: of a token store.
      stride: tokens from one training window to the next; 0 is the window itself (no overlap). The window is the
        model's.
      held_out: subjects kept from training, chosen by `split_seed` (paper: 25 of 419).
      num_workers, num_threads, prefetch: of `streams.Batches`.
    """

    bins: int = 1024
    lower: tuple[float, float, float] = DEFAULT_LOWER
    upper: tuple[float, float, float] = DEFAULT_UPPER
    out_of_bounds: str = "error"
    keep: float = 1.0
    space: str = "identity"
    canonical_jaw: float = 0.3
    portrait_size: int = 518
    subjects_per_shard: int = 16
    stride: int = 0
    held_out: int = 25
    split_seed: int = 0
    num_workers: int = 0
    num_threads: int = 2
    prefetch: int = 4

    def __post_init__(self):
        low = {"bins": 2, "portrait_size": 1, "subjects_per_shard": 1, "stride": 0, "held_out": 0}
        _at_least(self, "data", **low, num_workers=0, num_threads=0, prefetch=0)
        _one_of(self, "data", {"out_of_bounds": ("error", "clip"), "space": ("identity", "template")})


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The runtime of a training stage (`training/`; DESIGN §10; paper §5.1). Stage two has its own in
    `DecoderConfig.train`.

    Attributes:
      steps: optimiser steps in all.
      batch_size: examples per step, over all devices and processes.
      learning_rate: peak, reached after `warmup_steps`.
      schedule: what follows the warm-up: "constant" (as the paper seems to do) or "cosine" down to a tenth.
      weight_decay: AdamW, on matrices only.
      clip_norm: of the global gradient; 0 is off.
      accumulate: micro-batches per step, for batches that do not fit.
      z_loss: weight of the mean of log²(Σ exp logits), which keeps logits from drifting; 0 is off. Stage one only.
      ema_decay: of an averaged copy of the parameters, which is then what is evaluated and loaded; 0 is off.
      log_every, eval_every, checkpoint_every: steps. keep: newest checkpoints that stay.
    """

    steps: int = 50_000
    batch_size: int = 4
    learning_rate: float = 1e-4
    schedule: str = "constant"
    warmup_steps: int = 1000
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.95
    clip_norm: float = 1.0
    accumulate: int = 1
    z_loss: float = 0.0
    ema_decay: float = 0.0
    log_every: int = 10
    eval_every: int = 500
    checkpoint_every: int = 500
    keep: int = 3

    def __post_init__(self):
        _one_of(self, "train", {"schedule": ("constant", "cosine")})
        low = {"steps": 1, "batch_size": 1, "warmup_steps": 0, "accumulate": 1, "log_every": 1, "eval_every": 0}
        low |= {"checkpoint_every": 1, "keep": 1, "learning_rate": 0, "weight_decay": 0, "clip_norm": 0}
        low |= {"z_loss": 0}
        _at_least(self, "train", **low)
        if self.batch_size % self.accumulate:
            raise UserError(
                f"train.batch_size={self.batch_size} does not divide into train.accumulate={self.accumulate} parts."
            )
        for name in ("b1", "b2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:  # A mean whose memory never ends is 0 / 0 at the first step.
                raise UserError(f"train.{name}={getattr(self, name)} must be at least 0 and below 1.")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """What the model is conditioned on (`models/condition.py`; DESIGN §6, facts/encoders_and_metrics.md 1 and 2).

    Attributes:
      image: "tiny", or a DINOv2 variant: vits14, vitb14, vitl14, vitg14, each also with `_reg`.
      image_size: side of the square portrait in pixels, a multiple of 14.
      points: "tiny", or "michelangelo" (257 queries, width 768, 8 + 1 blocks).
      num_points: points of the head mesh that the point encoder reads.
      frozen: the encoders get no gradients; their features may then be computed once and stored.
    """

    image: str = "tiny"
    image_size: int = 112
    points: str = "tiny"
    num_points: int = 512
    frozen: bool = False

    def __post_init__(self):
        if self.image_size < 14 or self.image_size % 14:
            raise UserError(f"model.encoder.image_size={self.image_size} must be a positive multiple of 14.")
        _one_of(self, "model.encoder", {"image": ("tiny", *DINOV2), "points": ("tiny", "michelangelo")})
        _at_least(self, "model.encoder", num_points=1)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The autoregressive model (`models/ar.py`; DESIGN §6). The paper states no sizes: all of them are ours.

    Attributes:
      num_faces, bins: of the tokenizer; `for_tokenizer` sets them.
      width, layers, heads, head_dim: of the transformer. kv_heads: grouped queries; 0 is one per head.
      mlp: "gated" (GELU) or "plain". mlp_width: of its hidden layer.
      step: what one position of the transformer stands for (`models/point_step.py`): a "token", as in the paper, or a
        whole "point" (ours), whose four tokens a chain of small heads emits. slot_layers: MLPs of each of those heads.
      order: "cross_first" as the paper's text says, or "self_first" as its figure draws.
      window: steps a step may see, itself included; the length of training windows. With step="point" it reaches four
        times as many tokens.
      qk_norm: RMSNorm on queries and keys. rope_theta: of the rotary positions.
      slot_embedding: a learned row for each of x, y, z, b is added to the input.
      tied_head: the output classifier is the embedding table.
      coord_tables: "learned" is the paper's one table; "fourier_tied" gives each coordinate slot its own table of
        learned rows plus a linear map of Fourier features, shared between input and output.
      loss_support: softmax over the whole "vocab" (paper) or over the legal ids of the "slot".
      attention: "auto", "cudnn", "chunked" or "xla". attention_block: tile of "chunked".
      scan_layers: one compiled layer, or all of them unrolled; the parameters are the same.
      remat: what the backward keeps: "none" (keep all), "dots", "attention" or "full" (keep only layer inputs).
      dtype: of the computation; parameters, norms, softmax and loss are float32.
      condition_loss: weight of a second loss: from the mean of the context alone, which coordinates and faces the
        person's tokens have (ours). Encoders that are trained along learn from it what tells people apart; without it
        a small model finds its own tokens so telling that it never looks at the portrait (experiments/LOG.md).
      encoder: of the condition.
    """

    num_faces: int = 10144
    bins: int = 1024
    width: int = 128
    layers: int = 4
    heads: int = 2
    head_dim: int = 64
    kv_heads: int = 0
    mlp: str = "gated"
    mlp_width: int = 384
    order: str = "cross_first"
    step: str = "token"
    slot_layers: int = 2
    window: int = 1024
    qk_norm: bool = True
    rope_theta: float = 1e6
    slot_embedding: bool = True
    tied_head: bool = True
    coord_tables: str = "fourier_tied"
    loss_support: str = "slot"
    attention: str = "auto"
    attention_block: int = 576
    scan_layers: bool = False
    remat: str = "none"
    dtype: str = "float32"
    condition_loss: float = 0.0
    encoder: EncoderConfig = EncoderConfig()

    def __post_init__(self):
        choices = {
            "mlp": ("gated", "plain"),
            "order": ("cross_first", "self_first"),
            "coord_tables": ("learned", "fourier_tied"),
            "loss_support": ("vocab", "slot"),
            "step": ("token", "point"),
            "remat": ("none", "dots", "attention", "full"),
            "attention": ATTENTIONS,
            "dtype": ("float32", "bfloat16", "float64"),
        }
        _one_of(self, "model", choices)
        positive = ("num_faces", "bins", "width", "layers", "heads", "head_dim", "mlp_width", "slot_layers")
        _at_least(self, "model", **dict.fromkeys((*positive, "attention_block"), 1))
        _at_least(self, "model", condition_loss=0)
        if not 0 < self.rope_theta < math.inf:
            raise UserError(f"model.rope_theta={self.rope_theta} must be a positive number.")
        if self.kv_heads < 0 or self.heads % self.num_kv_heads:
            raise UserError(f"model.heads={self.heads} must be a multiple of model.kv_heads={self.kv_heads}.")
        if self.head_dim % 2 or self.window < 4 or self.window % 4:
            raise UserError(
                f"model.head_dim={self.head_dim} must be even and model.window={self.window} a multiple of 4."
            )

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def window_tokens(self) -> int:
        """Tokens that a window reaches."""
        return self.window * (4 if self.step == "point" else 1)

    @property
    def tokenizer(self) -> PointTokenizer:
        """A tokenizer with this vocabulary (and the default box), for its ids."""
        return PointTokenizer(self.num_faces, self.bins)

    def for_tokenizer(self, tokenizer: PointTokenizer) -> ModelConfig:
        """The same model for another vocabulary."""
        return dataclasses.replace(self, num_faces=tokenizer.num_faces, bins=tokenizer.bins)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The Gaussian decoder and stage two (`models/gaussian_decoder.py`, `training/decoder.py`; DESIGN §7; paper §4.2,
    §4.4.2). The paper states the losses' weights, Adam, 12,500 steps of 4 on 8 GPUs; the rest is ours.

    Attributes:
      inputs: what a point is decoded from: its position and AR features ("both", paper), one of them ("ar_only",
        "position_only", the paper's ablations), or nothing ("none", ours: one Gaussian for all, a baseline).
      points: "ar", the generated ones, or "flame_vertices", the static template of the paper's ablation. That one has
        no AR features, so `inputs` must be "position_only" or "none".
      cross_attention: to the AR model's image and point context.
      context_colors: the context's image tokens carry the colours of their patches (2 × 2 means) beside the AR model's
        features, which were trained on shapes alone. Every point's input has all of these colours, and its own colour
        is a mean of them, which it chooses by attention, plus a correction (ours): copying is learned from a few
        hundred people, painting is not.
      feature_width: of the AR model's hidden states, context_width: of its context; `for_features` sets them.
      context_tokens: of the context, with `context_colors`; set beside them.
      lower, upper: corners of the box whose points are encoded, metres; of the tokenizer, `for_features` sets them.
      space: of the points, "identity" or "template" (`DataConfig.space`); `for_features` sets it.
      octaves: frequencies of the positional encoding, from one wave over the box.
      width, layers, heads, head_dim, mlp_width: of the transformer.
      max_offset: metres, bound on each coordinate of the offset. max_scale: metres.
      initial_opacity: before training. initial_log_scale: natural logarithm of metres.
      attention, attention_block, remat, dtype: as of the autoregressive model.
      views: photographs of each subject in a step; `train.batch_size` counts subjects.
      lambda_l1, lambda_ssim, lambda_lpips, lambda_reg: weights of the loss; reg is the mean squared offset.
      max_points: larger clouds are an error; 0 takes the largest of the feature set.
      eval_views: of each split, in evaluations during training; the final table takes all.
      eval_people: of the training people, the first so many are scored, by both; 0 is all of them.
      train: the runtime.
    """

    inputs: str = "both"
    points: str = "ar"
    cross_attention: bool = False
    context_colors: bool = False
    feature_width: int = 128
    context_width: int = 128
    context_tokens: int = 0
    lower: tuple[float, float, float] = DEFAULT_LOWER
    upper: tuple[float, float, float] = DEFAULT_UPPER
    space: str = "identity"
    octaves: int = 8
    width: int = 64
    layers: int = 2
    heads: int = 2
    head_dim: int = 32
    mlp_width: int = 192
    max_offset: float = 0.1
    max_scale: float = 0.02
    initial_opacity: float = 0.1
    initial_log_scale: float = -5.0
    attention: str = "auto"
    attention_block: int = 576
    remat: str = "none"
    dtype: str = "float32"
    views: int = 4
    lambda_l1: float = 1.0
    lambda_ssim: float = 0.5
    lambda_lpips: float = 0.1
    lambda_reg: float = 0.1
    max_points: int = 0
    eval_views: int = 8
    eval_people: int = 0
    train: TrainConfig = TrainConfig(
        steps=12_500, warmup_steps=100, weight_decay=0.0, b2=0.999, log_every=10, eval_every=500, checkpoint_every=500
    )

    def __post_init__(self):
        choices = {
            "inputs": ("both", "ar_only", "position_only", "none"),
            "points": ("ar", "flame_vertices"),
            "space": ("identity", "template"),
            "remat": ("none", "full"),
            "attention": ATTENTIONS,
            "dtype": ("float32", "bfloat16", "float64"),
        }
        _one_of(self, "decoder", choices)
        if self.points == "flame_vertices" and self.uses_features:
            raise UserError(
                "decoder.points=flame_vertices has no AR features: give decoder.inputs=position_only (or none)."
            )
        positive = ("width", "heads", "head_dim", "mlp_width", "octaves", "views", "eval_views", "feature_width")
        _at_least(self, "decoder", **dict.fromkeys((*positive, "context_width", "attention_block"), 1))
        _at_least(self, "decoder", layers=0, max_points=0, eval_people=0)
        if self.context_colors and not self.cross_attention:
            raise UserError("decoder.context_colors needs decoder.cross_attention: colours are part of the context.")
        if self.context_colors and self.inputs == "none":
            raise UserError("decoder.inputs=none is one Gaussian for all: leave decoder.context_colors out.")
        if not (0 < self.initial_opacity < 1 and self.max_scale > 1e-5 and self.max_offset >= 0):
            raise UserError(
                "decoder.initial_opacity must lie in (0, 1), max_scale above 1e-5, max_offset at 0 or more."
            )

    @property
    def uses_features(self) -> bool:
        return self.inputs in ("both", "ar_only")

    @property
    def uses_positions(self) -> bool:
        return self.inputs in ("both", "position_only")

    def for_features(
        self, tokenizer: PointTokenizer, width: int, space: str = "identity", context_tokens: int = 0
    ) -> DecoderConfig:
        """The same decoder for points of this tokenizer and space, and an AR model of this width and context."""
        context_width = width + (PATCH_COLORS if self.context_colors else 0)
        return dataclasses.replace(
            self,
            lower=tokenizer.lower,
            upper=tokenizer.upper,
            space=space,
            feature_width=width,
            context_width=context_width,
            context_tokens=context_tokens if self.context_colors else 0,
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything a run depends on, by part."""

    model: ModelConfig = ModelConfig()
    decoder: DecoderConfig = DecoderConfig()
    identities: IdentityConfig = IdentityConfig()
    fit: FitConfig = FitConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()


# A coarse head's person at 128² in minutes on two cores: two hundred times fewer steps, so larger ones.
_LAPTOP_FIT = FitConfig(
    iterations=1200,
    lr_means=0.01,
    lr_means_final=0.0005,
    lr_f_dc=0.01,
    lr_quats=0.005,
    densify_from=100,
    densify_interval=100,
    densify_grad=5e-4,
    percent_dense=0.003,
    split_std="local",
    prune_large_from=1200,
    opacity_reset_interval=0,
    max_points=8000,
    overshoot=1.25,
    finetune_flame=False,
    save_interval=200,
    log_interval=100,
)

_SMALL = ModelConfig(
    width=512,
    layers=12,
    heads=8,
    mlp_width=1408,
    window=6000,
    scan_layers=True,
    dtype="bfloat16",
)
# The paper's plain recipe: one learned table, an untied head, softmax over the whole vocabulary.
_PAPER = ModelConfig(
    width=1024,
    layers=24,
    heads=8,
    head_dim=128,
    mlp_width=2816,
    window=12_000,
    slot_embedding=False,
    tied_head=False,
    coord_tables="learned",
    loss_support="vocab",
    scan_layers=True,
    remat="dots",
    dtype="bfloat16",
    encoder=EncoderConfig("vitl14_reg", 518, "michelangelo", 4096, frozen=True),
)

# Some dozen people on a laptop, in a quarter of an hour or two: few steps, and large ones.
_TINY_TRAIN = TrainConfig(
    steps=1000,
    learning_rate=2e-3,
    schedule="cosine",
    warmup_steps=30,
    eval_every=200,
    checkpoint_every=100,
)
# A dozen people's captures of 64² to 128² on a laptop: few, large steps.
_TINY_DECODER = DecoderConfig(
    train=TrainConfig(
        steps=600,
        batch_size=1,
        learning_rate=2e-3,
        schedule="cosine",
        warmup_steps=20,
        weight_decay=0.0,
        b2=0.999,
        log_every=10,
        eval_every=200,
        checkpoint_every=100,
    )
)
_SMALL_DECODER = DecoderConfig(width=256, layers=4, heads=4, head_dim=64, mlp_width=768, dtype="bfloat16")
_PAPER_DECODER = DecoderConfig(
    feature_width=1024, width=512, layers=8, heads=8, head_dim=64, mlp_width=1408, remat="full", dtype="bfloat16"
)

# What `pretrained/` was made with, in about two hours on two cores: one step per point, two fifths of the points of
# some hundred people around one mesh, windows so short that only the portrait tells what the whole is like, and a
# decoder that looks at the portrait too, because positions say little about colours.
_LAPTOP_TRAIN = TrainConfig(
    steps=2600,
    batch_size=8,
    learning_rate=2e-3,
    schedule="cosine",
    warmup_steps=60,
    log_every=20,
    eval_every=650,
    checkpoint_every=325,
)
_LAPTOP_DECODER = DecoderConfig(
    cross_attention=True,
    context_colors=True,
    width=96,
    mlp_width=288,
    eval_people=8,
    train=TrainConfig(
        steps=2600,
        batch_size=1,
        learning_rate=2e-3,
        schedule="cosine",
        warmup_steps=60,
        weight_decay=0.0,
        b2=0.999,
        log_every=20,
        eval_every=650,
        checkpoint_every=325,
    ),
)

PRESETS = {
    # Identities at a laptop's density; data of a dozen people at the size the tiny image encoder reads.
    "tiny": Config(
        decoder=_TINY_DECODER,
        identities=IdentityConfig(density=0.35),
        fit=_LAPTOP_FIT,
        data=DataConfig(portrait_size=112, held_out=4),
        train=_TINY_TRAIN,
    ),
    "laptop": Config(
        model=ModelConfig(step="point", window=256, condition_loss=1.0),
        decoder=_LAPTOP_DECODER,
        identities=IdentityConfig(density=0.35),
        fit=_LAPTOP_FIT,
        data=DataConfig(portrait_size=112, held_out=16, keep=0.4, space="template", stride=512),
        train=_LAPTOP_TRAIN,
    ),
    "small": Config(model=_SMALL, decoder=_SMALL_DECODER),
    "paper": Config(model=_PAPER, decoder=_PAPER_DECODER),
}


def preset(name: str) -> Config:
    """The named preset: "tiny" (tests), "laptop" (the pretrained weights), "small" (one GPU) or "paper".

    Raises:
      UserError: no such preset.
    """
    if name not in PRESETS:
        raise UserError(f"no preset {name!r}; there are {', '.join(PRESETS)}.")
    return PRESETS[name]


def config_from_json(kind: type, content: Any, where: str) -> Any:
    """A config dataclass from what `dataclasses.asdict` gave and JSON kept; fields that are missing get their default.

    Args:
      kind: `ModelConfig`, `Config` or another one of this file.
      content: untrusted.
      where: the file, for messages.

    Raises:
      UserError: an unknown field, or a value of another type.
    """
    if not isinstance(content, Mapping):
        raise UserError(f"{where} holds no {kind.__name__}: it was not written by this program.")
    default, values = kind(), {}
    names = {field.name for field in dataclasses.fields(kind)}
    for name, value in content.items():
        if name not in names:
            raise UserError(f"{where}: {kind.__name__} has no field {name!r}: use the version that wrote it.")
        old = getattr(default, name)
        if dataclasses.is_dataclass(old):
            value = config_from_json(type(old), value, where)
        elif isinstance(old, tuple) and isinstance(value, (list, tuple)):
            value = tuple(value)
        elif isinstance(old, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(old):
            raise UserError(f"{where}: {name}={value!r} must be of type {type(old).__name__}, as in {old!r}.")
        values[name] = value
    return kind(**values)
