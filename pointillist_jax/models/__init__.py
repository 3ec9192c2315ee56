"""Networks: the autoregressive point transformer, its encoders (DESIGN §6) and the Gaussian decoder (§7)."""

from pointillist_jax.models.ar import PointTransformer

__all__ = ["PointTransformer"]
