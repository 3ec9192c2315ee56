"""DINOv2 vision transformers (facts/encoders_and_metrics.md 1; DESIGN §6): what a portrait is turned into.

Letters: B batch, T patches, R registers, S = 1 + R + T tokens, D width, F feed-forward, N heads, H head dim, L layers,
p patch side in pixels, h × w patches.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pointillist_jax.files import UserError
from pointillist_jax.models.attention import attention
from pointillist_jax.models.layers import (
    ParamSpec,
    cast,
    declare,
    layer_norm,
    layer_norm_specs,
    linear,
    linear_specs,
    matrix,
    ones,
    stack_specs,
    zeros,
)

# Of the photographs DINOv2 was trained on: RGB in [0, 1].
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORM_EPS = 1e-6
INTERPOLATIONS = ("antialias", "hub", "transformers")

_SIZES = {  # width, layers, heads, mlp
    "vits14": (384, 12, 6, "gelu"),
    "vitb14": (768, 12, 12, "gelu"),
    "vitl14": (1024, 24, 16, "gelu"),
    "vitg14": (1536, 40, 24, "swiglu"),
}
NAMES = tuple(f"{name}{suffix}" for name in _SIZES for suffix in ("", "_reg"))


class DinoV2(nn.Module):
    """A DINOv2 vision transformer; `DinoV2.from_name("vitl14_reg")` or any size of one's own.

    `init(key, images)` gives parameters boxed with logical axes (`sharding.shardings_for`), `nn.unbox` makes them
    plain, and `convert.dinov2_from_torch` reads published ones. Layers are stored stacked and run by a scan.

    Attributes:
      width, layers, heads: of the transformer; published models have heads of 64.
      mlp: "gelu" (hidden width 4D) or "swiglu" (vitg14's; hidden width 8D/3, rounded up to a multiple of 8).
      patch: side of a patch in pixels.
      registers: number of register tokens, 0 or 4 in published models.
      image_size: pixels, of the square image whose patches the position table has rows for.
      interpolation: how that table is resized for images of other sizes. "antialias" is the register models' rule in
        every implementation. For models without registers torch.hub ("hub") and Hugging Face ("transformers")
        disagree: outputs differ by about 1 % at sizes other than `image_size`.
      attention: implementation, see `models.attention.attention`.
      remat: recompute layers in the backward instead of storing them (to fine-tune the large models).
      dtype: of the computation; parameters, norms, softmax and the residual stream are float32 at least.
    """

    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp: str = "gelu"
    patch: int = 14
    registers: int = 0
    image_size: int = 518
    interpolation: str = "antialias"
    attention: str = "auto"
    remat: bool = False
    dtype: Any = "float32"

    @classmethod
    def from_name(cls, name: str, **options: Any) -> DinoV2:
        """A published model by its torch.hub name, with or without the leading `dinov2_`.

        Args:
          name: vits14, vitb14, vitl14 or vitg14, each also with `_reg`: with 4 registers.
          options: other attributes. Models without registers follow `interpolation="hub"` unless told otherwise.

        Raises:
          UserError: an unknown name.
        """
        size, registers = name.removeprefix("dinov2_").removesuffix("_reg"), 4 if name.endswith("_reg") else 0
        if size not in _SIZES:
            raise UserError(f"no DINOv2 model {name!r}; there are {', '.join(NAMES)}.")
        width, layers, heads, mlp = _SIZES[size]
        defaults = {"registers": registers, "interpolation": "antialias" if registers else "hub"}
        return cls(width=width, layers=layers, heads=heads, mlp=mlp, **(defaults | options))

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"]) -> dict[str, Array]:
        """Features of the final norm.

        Args:
          images: RGB, already normalised (`normalize_images`); height and width are multiples of `patch`.

        Returns:
          {"patch_tokens": [B, T, D] row by row from the top left, "cls": [B, D]}, float32 (float64 for float64).

        Raises:
          UserError: another shape of images, or attributes that do not fit together.
        """
        self._check(images)
        params, residual = declare(self, dinov2_param_specs(self)), jnp.promote_types(self.dtype, jnp.float32)
        rows, columns = (n // self.patch for n in images.shape[1:3])
        x = self._embed(params, images, rows, columns).astype(residual)
        run_layer = jax.checkpoint(self._layer) if self.remat else self._layer
        x, _ = jax.lax.scan(run_layer, x, params["layers"])
        x = layer_norm(x, params["norm"], NORM_EPS)
        return {"patch_tokens": x[:, 1 + self.registers :], "cls": x[:, 0]}

    def _embed(self, params, images, rows: int, columns: int):
        """[B, H, W, 3] → [B, S, D]: cls, registers, patches."""
        with jax.named_scope("embed"):
            # A convolution whose stride is its kernel is a product of patches.
            b, p = images.shape[0], self.patch
            patches = images.astype(self.dtype).reshape(b, rows, p, columns, p, 3)
            kernel, bias = cast((params["patch_kernel"], params["patch_bias"]), self.dtype)
            patches = jnp.einsum("BhpwqC,pqCD->BhwD", patches, kernel) + bias
            positions = self._positions(params["position_embedding"], rows, columns)
            x = patches.reshape(b, rows * columns, -1) + positions[1:]
            cls = params["cls_token"] + positions[:1]
            # Registers stand between and have no position.
            first = jnp.concatenate([cls, params["register_tokens"]]) if self.registers else cls
            return jnp.concatenate([jnp.broadcast_to(first, (b, *first.shape)), x], axis=1)

    def _positions(self, table, rows: int, columns: int):
        """The position table [1 + grid², D] for an image of rows × columns patches: [1 + rows · columns, D]."""
        grid = self.image_size // self.patch
        if rows == columns == grid:
            return table
        down, across = (
            jnp.asarray(interpolation_matrix(n, grid, self.interpolation), table.dtype) for n in (rows, columns)
        )
        # Positions are the numerically delicate part: no bf16, no TF32.
        resized = jnp.einsum(
            "ha,wb,abD->hwD", down, across, table[1:].reshape(grid, grid, -1), precision=jax.lax.Precision.HIGHEST
        )
        return jnp.concatenate([table[:1], resized.reshape(rows * columns, -1)])

    def _layer(self, x, layer):
        narrow = cast(layer, self.dtype)
        with jax.named_scope("self_attention"):
            y = layer_norm(x, layer["norm1"], NORM_EPS).astype(self.dtype)
            p = narrow["attention"]
            qkv = jnp.einsum("BSD,DcE->cBSE", y, p["qkv_kernel"]) + p["qkv_bias"][:, None, None]
            q, k, v = qkv.reshape(3, *x.shape[:2], self.heads, -1)
            out = attention(q, k, v, implementation=self.attention).reshape(x.shape)
            x = x + linear(out, p["out"]) * layer["scale1"]
        with jax.named_scope("mlp"):
            y = layer_norm(x, layer["norm2"], NORM_EPS).astype(self.dtype)
            p = narrow["mlp"]
            if self.mlp == "swiglu":
                hidden = jax.nn.silu(linear(y, p["gate"])) * linear(y, p["up"])
            else:
                hidden = jax.nn.gelu(linear(y, p["up"]), approximate=False)
            return x + linear(hidden, p["down"]) * layer["scale2"], None

    def _check(self, images):
        if self.width % self.heads or self.mlp not in ("gelu", "swiglu") or self.interpolation not in INTERPOLATIONS:
            raise UserError(
                f"DinoV2 needs a width ({self.width}) that its heads ({self.heads}) divide, mlp gelu or swiglu (not "
                f"{self.mlp!r}) and interpolation {', '.join(INTERPOLATIONS)} (not {self.interpolation!r})."
            )
        if images.ndim != 4 or images.shape[-1] != 3:
            raise UserError(f"images have shape {images.shape}, expected [B, H, W, 3]: RGB last, with a batch axis.")
        height, width = images.shape[1:3]
        if not (height and width) or height % self.patch or width % self.patch:
            p = self.patch
            near = [max(round(n / p), 1) * p for n in (height, width)]
            raise UserError(
                f"images are {height} × {width} pixels, but a patch is {p}: both sides must be multiples of {p}; "
                f"resize to {near[0]} × {near[1]}."
            )


def normalize_images(images: Float[Array, "*b H W 3"]) -> Float[Array, "*b H W 3"]:
    """RGB in [0, 1] → what DINOv2 reads: minus the mean, over the deviation of its training photographs."""
    return (images - jnp.asarray(IMAGE_MEAN, images.dtype)) / jnp.asarray(IMAGE_STD, images.dtype)


def swiglu_width(width: int) -> int:
    """Hidden width of DINOv2's SwiGLU: two thirds of 4D, rounded up to a multiple of 8; 4096 for vitg14."""
    return (int(4 * width * 2 / 3) + 7) // 8 * 8


def dinov2_param_specs(model: DinoV2) -> dict[str, Any]:
    """Every parameter of the model: shape, logical axes, initial distribution."""
    D, p, grid = model.width, model.patch, model.image_size // model.patch
    table = functools.partial(ParamSpec, init=nn.initializers.truncated_normal(0.02))
    specs: dict[str, Any] = {
        "patch_kernel": matrix((p, p, 3, D), (None, None, None, "embed"), 3 * p * p),
        "patch_bias": zeros(D),
        "cls_token": table((1, D), (None, "norm")),
        "position_embedding": table((1 + grid * grid, D), (None, "norm")),
        "layers": stack_specs(_layer_specs(model), model.layers),
        "norm": layer_norm_specs(D),
    }
    if model.registers:
        specs["register_tokens"] = table((model.registers, D), (None, "norm"))
    return specs


def _layer_specs(model: DinoV2) -> dict[str, Any]:
    D = model.width
    F = swiglu_width(D) if model.mlp == "swiglu" else 4 * D
    mlp = {"up": linear_specs(D, F), "down": linear_specs(F, D, ("mlp", "embed"))}
    if model.mlp == "swiglu":
        mlp["gate"] = linear_specs(D, F)
    return {
        "norm1": layer_norm_specs(D),
        "attention": {
            # Axis "heads" is N · H long, head by head; a checkpoint then needs no number of heads to be read.
            "qkv_kernel": matrix((D, 3, D), ("embed", None, "heads"), D),
            "qkv_bias": zeros(3, D, axes=(None, "heads")),
            "out": linear_specs(D, D, ("heads", "embed")),
        },
        "scale1": ones(D),
        "norm2": layer_norm_specs(D),
        "mlp": mlp,
        "scale2": ones(D),
    }


def interpolation_matrix(size: int, grid: int, rule: str) -> np.ndarray:
    """[size, grid] float64 weights that resample `grid` positions to `size` of them (facts 1.2).

    "antialias" widens a cubic kernel with a = -0.5 when shrinking, and renormalises it inside the grid. The other two
    take a = -0.75, never widen, and repeat the border; "hub" maps coordinates as if the size were size + 0.1.
    """
    scale = {"antialias": size, "transformers": size, "hub": size + 0.1}[rule] / grid
    centers = (np.arange(size) + 0.5) / scale - 0.5
    if rule == "antialias":
        weights = _cubic((np.arange(grid) - centers[:, None]) * min(scale, 1.0), -0.5)
        return weights / weights.sum(axis=1, keepdims=True)
    weights = np.zeros((size, grid))
    for tap in range(-1, 3):
        source = np.floor(centers).astype(int) + tap
        np.add.at(weights, (np.arange(size), np.clip(source, 0, grid - 1)), _cubic(source - centers, -0.75))
    return weights


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' kernel of support 2."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
