"""The condition: a portrait and its tracked head → context tokens for cross-attention (paper §4.1; DESIGN §6).

Portrait → DINOv2 (cls and patch tokens), points on the tracked head's surface → Michelangelo's encoder; both are
projected to the transformer's width and concatenated. Token 0 of the point encoder (the whole shape) and the others
(its parts) have a projection each, as the paper says.

Encoders are frozen and their features computed once (`EncoderConfig.frozen`), or, at tiny size, trained along.

Letters: B batch, D width, S context tokens = 1 + image patches + point queries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pointillist_jax.configs import PATCH_COLORS, EncoderConfig, ModelConfig
from pointillist_jax.files import UserError
from pointillist_jax.flame import FlameModel, FlameParams, flame_vertices
from pointillist_jax.flame.surface_points import head_points
from pointillist_jax.models.image_encoder import DinoV2, dinov2_param_specs, normalize_images
from pointillist_jax.models.layers import Params, linear, linear_specs, ones, rms_norm
from pointillist_jax.models.point_encoder import PointEncoder, point_encoder_param_specs
from pointillist_jax.tokens import SLOTS

Features = Mapping[str, Array]


def image_encoder(config: EncoderConfig, dtype: str = "float32") -> DinoV2:
    """The image encoder a config names."""
    if config.image == "tiny":
        return DinoV2(width=64, layers=2, heads=2, image_size=config.image_size, dtype=dtype)
    return DinoV2.from_name(config.image, dtype=dtype)


def point_encoder(config: EncoderConfig, dtype: str = "float32") -> PointEncoder:
    """The point encoder a config names. Raises UserError for an unknown one."""
    if config.points == "tiny":
        return PointEncoder(width=64, layers=2, heads=2, queries=17, frequencies=6, dtype=dtype)
    if config.points == "michelangelo":
        return PointEncoder(dtype=dtype)
    raise UserError(f"no point encoder {config.points!r}; there are tiny and michelangelo.")


def encoder_specs(config: ModelConfig) -> dict[str, Any]:
    """The parameters of both encoders."""
    return {
        "image_encoder": dinov2_param_specs(image_encoder(config.encoder)),
        "point_encoder": point_encoder_param_specs(point_encoder(config.encoder)),
    }


def condition_specs(config: ModelConfig) -> dict[str, Any]:
    """The trainable parameters: projections, and the encoders unless they are frozen."""
    axes, shapes = ("embed", "table_embed"), feature_shapes(config)
    widths = {"image": shapes["image"][1], "shape": shapes["points"][1], "parts": shapes["points"][1]}
    specs = {f"{name}_projection": linear_specs(width, config.width, axes) for name, width in widths.items()}
    if config.condition_loss:
        specs["marginals"] = {
            "norm": ones(config.width),
            **{slot: linear_specs(config.width, config.width, ("embed", None)) for slot in SLOTS},
        }
    return specs if config.encoder.frozen else {**specs, **encoder_specs(config)}


def feature_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """{"image": (1 + T, Di), "points": (Q, Dp)}: what `encode_features` gives for one subject."""
    image, points = image_encoder(config.encoder), point_encoder(config.encoder)
    patches = (config.encoder.image_size // image.patch) ** 2
    return {"image": (1 + patches, image.width), "points": (points.queries, points.width)}


def context_length(config: ModelConfig) -> int:
    """S, for portraits of the configured size."""
    return sum(tokens for tokens, _ in feature_shapes(config).values())


def encode_features(
    encoders: Params,
    config: ModelConfig,
    head: FlameModel,
    portrait: UInt8[Array, "B h w 3"],
    flame: Mapping[str, Float[Array, "B n"]],
) -> dict[str, Array]:
    """Runs both encoders. What frozen ones give may be stored (`data.condition_features`).

    Frozen encoders compute in float32 whatever the transformer does: their features are made once and should not
    depend on its settings.

    Args:
      encoders: has `image_encoder` and `point_encoder`.
      head: whose parameters `flame` holds.
      portrait: resized to the configured size.
      flame: name → coefficients of the portrait. Global rotation and translation are the camera's business and are
        left out; they would carry the head out of the encoder's box.

    Returns:
      {"image": [B, 1 + T, Di] cls and patches, "points": [B, Q, Dp]}.
    """
    encoder = config.encoder
    dtype = "float32" if encoder.frozen else config.dtype
    with jax.named_scope("encode_image"):
        size = encoder.image_size
        images = portrait.astype(jnp.promote_types(dtype, jnp.float32)) / 255
        if images.shape[1:3] != (size, size):
            images = jax.image.resize(images, (images.shape[0], size, size, 3), "cubic")
        normalised = normalize_images(images)
        seen = image_encoder(encoder, dtype).apply({"params": encoders["image_encoder"]}, normalised)
        image = jnp.concatenate([seen["cls"][:, None], seen["patch_tokens"]], axis=1)
    with jax.named_scope("encode_points"):
        pose = FlameParams(**flame)
        still = pose.replace(rotation=jnp.zeros_like(pose.rotation), translation=jnp.zeros_like(pose.translation))
        cloud = head_points(head, flame_vertices(head, still), encoder.num_points)
        points = point_encoder(encoder, dtype).apply({"params": encoders["point_encoder"]}, cloud)
    return {"image": image, "points": points}


def project_features(params: Params, config: ModelConfig, features: Features) -> Float[Array, "B S D"]:
    """Encoders' features → context: three linear maps, concatenated."""
    with jax.named_scope("project_condition"):
        image, points = (features[name].astype(config.dtype) for name in ("image", "points"))
        return jnp.concatenate(
            [
                linear(image, params["image_projection"]),
                linear(points[:, :1], params["shape_projection"]),
                linear(points[:, 1:], params["parts_projection"]),
            ],
            axis=1,
        )


def with_patch_colors(
    context: Float[Array, "B S D"], portrait: UInt8[Array, "B h w 3"], config: ModelConfig
) -> Float[Array, "B S D+12"]:
    """The context with each image patch's colours: RGB means of its 2 × 2 quarters, in [-1, 1]; zeros at other tokens.

    Args:
      context: of `encode_condition`: cls, patches row by row, then point tokens.
      portrait: of any size; resized to two pixels a patch.
    """
    patches = feature_shapes(config)["image"][0] - 1
    side = math.isqrt(patches)
    small = jax.image.resize(portrait.astype(jnp.float32), (len(portrait), 2 * side, 2 * side, 3), "linear") / 127.5 - 1
    # [B, row, quarter row, column, quarter column, RGB] → [B, patch, 12]
    quarters = small.reshape(-1, side, 2, side, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, patches, PATCH_COLORS)
    after = context.shape[1] - 1 - patches
    colors = jnp.pad(quarters, ((0, 0), (1, after), (0, 0))).astype(context.dtype)
    return jnp.concatenate([context, colors], axis=-1)


def marginal_states(params: Params, context: Float[Array, "B S D"]) -> tuple[Float[Array, "B D"], ...]:
    """States whose classification (`models.ar.output_tables`) says which x, y, z and b the person's points have.

    `params`: as `condition_specs` with `condition_loss`. From the mean of the context: no point is read.
    """
    heads = params["marginals"]
    with jax.named_scope("marginals"):
        pooled = rms_norm(jnp.mean(context, axis=1), heads["norm"])
        return tuple(linear(pooled, heads[slot]) for slot in SLOTS)


def encode_condition(
    params: Params, config: ModelConfig, head: FlameModel, condition: Mapping[str, Any]
) -> Float[Array, "B S D"]:
    """A condition → context, in the dtype of the computation.

    Args:
      params: as `condition_specs`. Where frozen encoders are to be run, their parameters beside them
        (`convert.load_frozen_encoders`); they get no gradients.
      condition: {"features": as `encode_features` gives} or {"portrait": [B, h, w, 3] uint8, "flame": {name: [B, n]}},
        as windows carry them. Features are taken before anything is encoded.

    Raises:
      UserError: frozen encoders with neither features nor their parameters.
    """
    if "features" in condition:
        return project_features(params, config, condition["features"])
    if not {"image_encoder", "point_encoder"} <= set(params):
        raise UserError(
            "the encoders are frozen, but neither features nor weights are given: compute features first (python -m "
            "experiments.encode_conditions), or train encoders along with --config.model.encoder.frozen=false."
        )
    features = encode_features(params, config, head, condition["portrait"], condition["flame"])
    if config.encoder.frozen:
        features = jax.lax.stop_gradient(features)
    return project_features(params, config, features)
