"""Flags that name the weights of published encoders, and what they load: `encode_conditions` and `train_ar`."""

from __future__ import annotations

from typing import Any

from absl import flags

from experiments.common import refuse_flags
from pointillist_jax.configs import ModelConfig
from pointillist_jax.convert import FrozenEncoders, load_encoders, load_frozen_encoders
from pointillist_jax.files import UserError

IMAGE_WEIGHTS = flags.DEFINE_string("image_weights", None, "DINOv2's .pth or .safetensors.")
POINT_WEIGHTS = flags.DEFINE_string("point_weights", None, "Michelangelo's .ckpt.")
RANDOM_WEIGHTS = flags.DEFINE_boolean("random_weights", False, "Random encoders in their place, to try things out.")


def frozen_encoders(model: ModelConfig, seed: int) -> FrozenEncoders:
    """Both encoders of the flags; those of --random_weights come from `seed`."""
    random_seed = seed if RANDOM_WEIGHTS.value else None
    return load_frozen_encoders(model, IMAGE_WEIGHTS.value, POINT_WEIGHTS.value, random_seed=random_seed)


def first_encoders(model: ModelConfig) -> dict[str, Any]:
    """Parameters that encoders begin with which are trained along: of those encoders whose files are named.

    Raises:
      UserError: the encoders are frozen, a published one has no file and --random_weights is not given, or a file is
        not of its encoder.
    """
    encoder = model.encoder
    if encoder.frozen:
        names = ("image_weights", "point_weights", "random_weights")
        refuse_flags(names, "with frozen encoders, whose features lie in the store")
        return {}
    files = (("image", encoder.image, IMAGE_WEIGHTS.value), ("point", encoder.points, POINT_WEIGHTS.value))
    without = [(kind, name) for kind, name, file in files if name != "tiny" and file is None]
    if not without and RANDOM_WEIGHTS.value:
        refuse_flags(("random_weights",), "here: no published encoder lacks its weights")
    if without and not RANDOM_WEIGHTS.value:
        kind, name = without[0]
        raise UserError(
            f"the {kind} encoder {name} would be trained from random weights: give --{kind}_weights=<its file>, freeze "
            "the encoders (--config.model.encoder.frozen), or say --random_weights if that is what you mean."
        )
    return load_encoders(model, IMAGE_WEIGHTS.value, POINT_WEIGHTS.value)
