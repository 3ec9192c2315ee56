"""The frozen encoders of a condition, from the files their authors publish (DESIGN §6).

Training reads their stored features (`experiments.encode_conditions`); generation runs them on a new portrait. Both
load them here, and a checkpoint says which ones it was trained with (`meta["features"]`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from pointillist_jax.configs import ModelConfig
from pointillist_jax.convert.dinov2 import dinov2_from_torch
from pointillist_jax.convert.point_encoder import point_encoder_from_torch
from pointillist_jax.convert.torch_files import load_torch_file
from pointillist_jax.files import UserError
from pointillist_jax.models.condition import encoder_specs, image_encoder, point_encoder
from pointillist_jax.models.layers import init_params

_RANDOM = "random-"


class FrozenEncoders(NamedTuple):
    """Encoders that are run but not trained.

    Attributes:
      params: {"image_encoder": …, "point_encoder": …}, for `models.condition.encode_features` and `training.ar.encode`.
      weights: {"image": …, "points": …}: sha256 of the parameters, equal for every file format that holds the same
        numbers; or "random-<seed>".
    """

    params: dict[str, Any]
    weights: dict[str, str]


def load_frozen_encoders(
    config: ModelConfig,
    image_weights: str | os.PathLike | None = None,
    point_weights: str | os.PathLike | None = None,
    *,
    random_seed: int | None = None,
    expected: Mapping[str, str] | None = None,
) -> FrozenEncoders:
    """Loads both encoders that `config.encoder` names.

    Args:
      image_weights: DINOv2's .pth or .safetensors.
      point_weights: Michelangelo's .ckpt, or another file that holds its encoder.
      random_seed: instead of files: random parameters, to try a pipeline out. They see nothing.
      expected: `weights` of the encoders a model was trained with; others are refused. If those were random, they are
        made again and no file is needed.

    Raises:
      FileNotFoundError, UserError: a file is missing, damaged, of another encoder, or holds other weights.
    """
    expected = dict(expected or {})
    if random_seed is None and image_weights is None and point_weights is None:
        random_seed = _random_seed(expected)
    if random_seed is not None:
        if image_weights is not None or point_weights is not None:
            raise UserError("random weights and files of weights exclude each other; give one.")
        params = init_params(encoder_specs(config), jax.random.PRNGKey(random_seed))
        weights = dict.fromkeys(("image", "points"), f"{_RANDOM}{random_seed}")
    else:
        if image_weights is None or point_weights is None:
            raise UserError(
                f"the encoders {config.encoder.image} and {config.encoder.points} are frozen and need their weights: "
                "give --image_weights=<DINOv2's .pth or .safetensors> and --point_weights=<Michelangelo's .ckpt>."
            )
        params = load_encoders(config, image_weights, point_weights)
        weights = {"image": _sha256(params["image_encoder"]), "points": _sha256(params["point_encoder"])}
    for name, path in (("image", image_weights), ("points", point_weights)):
        if name in expected and weights[name] != expected[name]:
            raise UserError(
                f"the model was trained on features of other {name} weights (sha256 {expected[name][:16]}…) than "
                f"{path or 'random ones'} ({weights[name][:16]}…): give the file it was trained with."
            )
    return FrozenEncoders(params, weights)


def load_encoders(
    config: ModelConfig,
    image_weights: str | os.PathLike | None = None,
    point_weights: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Parameters of those encoders of `config.encoder` that have a file: `image_encoder`, `point_encoder` or both.

    Raises:
      FileNotFoundError, UserError: a file is missing, damaged or of another encoder.
    """
    params = {}
    if image_weights is not None:
        params["image_encoder"] = dinov2_from_torch(load_torch_file(image_weights), image_encoder(config.encoder))
    if point_weights is not None:
        params["point_encoder"] = point_encoder_from_torch(
            load_torch_file(point_weights), point_encoder(config.encoder)
        )
    return params


def _random_seed(weights: Mapping[str, str]) -> int | None:
    found = set(weights.values())
    text = found.pop() if len(found) == 1 else ""
    number = text.removeprefix(_RANDOM)
    return int(number) if text.startswith(_RANDOM) and number.isdigit() and len(number) < 10 else None


def _sha256(params: Any) -> str:
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf, np.float32)
        digest.update(f"{jax.tree_util.keystr(path)}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()
