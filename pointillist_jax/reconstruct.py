"""From one portrait to an animatable avatar: generate → decode → rig (paper §4; DESIGN §2).

context = training.ar.encode(ar_params, ar_config, head, condition)
avatar, cloud = reconstruct(ar_params, ar_config, decoder_params, decoder_config, tokenizer, head, context[0],
                            canonical, key=key, max_points=30_000)
save_avatar("me", avatar)
frames = AvatarRenderer(avatar, head, 512, 512).play(motion, camera)
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pointillist_jax.configs import DecoderConfig, ModelConfig
from pointillist_jax.data.template_space import placement
from pointillist_jax.files import UserError
from pointillist_jax.flame import FlameModel, FlameParams, bind_points
from pointillist_jax.gaussians import Avatar
from pointillist_jax.models.gaussian_decoder import Decoded, decode, rigged
from pointillist_jax.models.layers import Params
from pointillist_jax.sampling import Generation, generate
from pointillist_jax.tokens import PointTokenizer

# Clouds are padded to multiples of it, so that people of about one size share a program.
_BUCKET = 1024


class Reconstruction(NamedTuple):
    """An avatar, and the cloud it was made from (a batch of one)."""

    avatar: Avatar
    cloud: Generation


def reconstruct(
    ar_params: Params,
    ar_config: ModelConfig,
    decoder_params: Params,
    decoder_config: DecoderConfig,
    tokenizer: PointTokenizer,
    head: FlameModel,
    context: Float[Array, "S D"],
    canonical: FlameParams,
    *,
    key: Array,
    max_points: int,
    **sampling: Any,
) -> Reconstruction:
    """One person's avatar.

    Args:
      ar_params: of stage one: {"transformer": …, "condition": …}.
      decoder_params, decoder_config: of stage two, made for this AR model.
      tokenizer: of the token store both were trained on.
      head: the head of that store.
      context: of the portrait and its FLAME parameters: `training.ar.encode`.
      canonical: the identity's canonical mesh, `params.canonical(jaw)` with the store's jaw.
      key: of the sampling. max_points: at most so many.
      **sampling: temperature, top_p and so on: see `sampling.generate`.

    Raises:
      UserError: a decoder for other hidden states; a model that stopped at once.
    """
    if decoder_config.uses_features and decoder_config.feature_width != ar_config.width:
        raise UserError(
            f"the decoder reads hidden states of width {decoder_config.feature_width}, the AR model has "
            f"{ar_config.width}: name the AR model whose features the decoder was trained on."
        )
    context = jnp.asarray(context)
    cloud = generate(
        ar_params["transformer"], ar_config, tokenizer, context[None], key=key, max_points=max_points, **sampling
    )
    num = int(cloud.num_points[0])
    if num == 0:
        raise UserError("the model generated no points: train it longer, or try another --seed.")
    hidden = None if cloud.hidden is None else cloud.hidden[0][:num]
    avatar = decode_avatar(
        decoder_params,
        decoder_config,
        head,
        canonical,
        np.asarray(cloud.points)[0][:num],
        np.asarray(cloud.binding)[0][:num],
        hidden,
        context,
    )
    return Reconstruction(avatar, cloud)


def decode_avatar(
    params: Params,
    config: DecoderConfig,
    head: FlameModel,
    canonical: FlameParams,
    points: Float[Array, "P 3"],
    binding: Int[Array, "P"],
    hidden: Float[Array, "P 4 E"] | None = None,
    context: Float[Array, "S C"] | None = None,
) -> Avatar:
    """An avatar from points, their faces and their AR features.

    Args:
      params, config: of stage two.
      points: canonical, metres, in the space that the decoder was trained on (`config.space`). With
        `config.points == "flame_vertices"` the mesh's vertices instead: see `data.subject_views.TemplateClouds`.
      hidden: needed where the decoder reads AR features. context: needed with `config.cross_attention`.

    Raises:
      UserError: what the decoder needs is missing; points and bindings that `bind_points` refuses.
    """
    if config.uses_features and hidden is None:
        raise UserError(
            "this decoder reads AR features: generate with return_hidden=True, or load them with the points."
        )
    if config.cross_attention and context is None:
        raise UserError("this decoder reads the AR model's context: pass it on.")
    points, num = np.asarray(points, np.float32), len(points)
    if config.points == "ar":
        on_person = placement(head, canonical, config.space, float(canonical.jaw_pose[0]))
        points = on_person(points, np.asarray(binding))
    more = -num % _BUCKET

    def pad(x, **how):
        return (
            None if x is None else jnp.asarray(np.pad(np.asarray(x), [(0, more)] + [(0, 0)] * (np.ndim(x) - 1), **how))
        )

    decoded = _decode(
        params,
        config,
        pad(points, mode="edge")[None],
        pad(hidden)[None] if config.uses_features else None,
        jnp.array([num], jnp.int32),
        jnp.asarray(context)[None] if config.cross_attention else None,
    )
    one = jax.tree.map(lambda x: x[0, :num], decoded)
    return rigged(one, bind_points(head, canonical, points, binding))


@functools.partial(jax.jit, static_argnums=1)
def _decode(params, config, points, hidden, num_points, context) -> Decoded:
    return decode(params, config, points, hidden, num_points, context)
