"""Networks: the autoregressive point transformer, its encoders (DESIGN §6) and the Gaussian decoder (§7)."""

from pointillist_jax.models.ar import PointTransformer
from pointillist_jax.models.gaussian_decoder import GaussianDecoder
from pointillist_jax.models.image_encoder import DinoV2
from pointillist_jax.models.point_encoder import PointEncoder

__all__ = ["DinoV2", "GaussianDecoder", "PointEncoder", "PointTransformer"]
