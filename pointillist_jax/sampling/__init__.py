"""Generation: constrained sampling with ring-buffer caches, and its teacher-forced twin (DESIGN §6)."""

from pointillist_jax.sampling.generate import Generation, Request, generate, generate_many
from pointillist_jax.sampling.score import Score, score

__all__ = ["Generation", "Request", "Score", "generate", "generate_many", "score"]
