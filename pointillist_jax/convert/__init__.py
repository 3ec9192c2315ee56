"""Weights and parameters of other programs → this project's (facts/encoders_and_metrics.md)."""

from pointillist_jax.convert.dinov2 import dinov2_from_torch
from pointillist_jax.convert.frozen_encoders import FrozenEncoders, load_encoders, load_frozen_encoders
from pointillist_jax.convert.lpips import lpips_from_torch
from pointillist_jax.convert.pixel3dmm import frame_camera
from pointillist_jax.convert.point_encoder import point_encoder_from_torch
from pointillist_jax.convert.torch_files import load_torch_file
from pointillist_jax.convert.trackers import flame_params_from_tracker

__all__ = [
    "FrozenEncoders",
    "dinov2_from_torch",
    "flame_params_from_tracker",
    "frame_camera",
    "load_encoders",
    "load_frozen_encoders",
    "load_torch_file",
    "lpips_from_torch",
    "point_encoder_from_torch",
]
