"""Rigged Gaussian fitting with density control: GaussianAvatars' procedure (DESIGN §9)."""

from pointillist_jax.fitting.data import ArrayViews, FitData, Views
from pointillist_jax.fitting.evaluate import evaluate, render_views
from pointillist_jax.fitting.fit import FitResult, fit

__all__ = ["ArrayViews", "FitData", "FitResult", "Views", "evaluate", "fit", "render_views"]
