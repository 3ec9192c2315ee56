"""When what happens in a fit, as pure functions of the iteration (facts A.4). Iterations count from 1."""

from __future__ import annotations

import math

from pointillist_jax.configs import FitConfig
from pointillist_jax.files import UserError


def check(config: FitConfig, num_faces: int) -> None:
    """Raises UserError for a configuration that cannot run."""
    positive = ("iterations", "views_per_step", "sh_interval", "densify_interval", "save_interval", "log_interval")
    for name in (*positive, "budget_steps"):
        if getattr(config, name) < 1:
            raise UserError(f"fit.{name} is {getattr(config, name)}; expected at least 1.")
    if not 0 <= config.sh_degree <= 3:
        raise UserError(f"fit.sh_degree is {config.sh_degree}; expected 0 to 3.")
    if config.split_std not in ("world", "local"):
        raise UserError(f'fit.split_std is {config.split_std!r}; it must be "world" or "local".')
    if config.max_points and config.max_points < num_faces:
        raise UserError(
            f"fit.max_points={config.max_points} is less than one Gaussian for each of the head's {num_faces} faces; "
            "raise it, or take a head with fewer faces."
        )
    if config.max_points and (config.overshoot < 1 or not 0 < config.budget_at <= 1):
        raise UserError("fit.overshoot must be at least 1 and fit.budget_at in (0, 1].")
    if config.lr_means <= 0 or config.lr_means_final <= 0:
        raise UserError("fit.lr_means and fit.lr_means_final decay log-linearly; both must be above 0.")


def learning_rates(config: FitConfig, iteration: int, extent: float) -> dict[str, float]:
    """Of every entry of `FitState.params`."""
    along = min(iteration / config.iterations, 1.0)
    means = math.exp((1 - along) * math.log(config.lr_means) + along * math.log(config.lr_means_final))
    rates = {
        "means": means * extent,
        "f_dc": config.lr_f_dc,
        "f_rest": config.lr_f_rest,
        "opacities": config.lr_opacities,
        "scales": config.lr_scales,
        "quats": config.lr_quats,
    }
    if config.finetune_flame:
        rates |= {"expr": config.lr_expr, "translation": config.lr_translation}
        rates |= dict.fromkeys(("rotation", "neck_pose", "jaw_pose", "eyes_pose"), config.lr_pose)
    return rates


def active_sh_degree(config: FitConfig, iteration: int) -> int:
    return min(config.sh_degree, iteration // config.sh_interval)


def last_densification(config: FitConfig) -> int:
    """The iteration up to which density control runs: with a budget it ends where pruning to the budget begins."""
    return min(config.densify_until, budget_iterations(config)[0] if config.max_points else config.iterations)


def densifies(config: FitConfig, iteration: int) -> bool:
    due = iteration % config.densify_interval == 0
    return config.densify and due and config.densify_from < iteration < last_densification(config)


def prunes_large(config: FitConfig, iteration: int) -> bool:
    return iteration > config.prune_large_from


def resets_opacities(config: FitConfig, iteration: int) -> bool:
    """As GaussianAvatars: every interval, and once more where densification starts if the background is white."""
    if not config.densify or not config.opacity_reset_interval or iteration >= last_densification(config):
        return False
    white = config.background == 1.0
    return iteration % config.opacity_reset_interval == 0 or (white and iteration == config.densify_from)


def budget_iterations(config: FitConfig) -> list[int]:
    """When Gaussians are pruned to the budget: `budget_steps` rounds, each followed by as many steps of recovery."""
    first = max(1, round(config.budget_at * config.iterations))
    apart = max(1, (config.iterations - first) // (2 * config.budget_steps))
    return [min(first + i * apart, config.iterations) for i in range(config.budget_steps)]


def budget_at(config: FitConfig, iteration: int, num: int) -> int | None:
    """The number of Gaussians to prune to after this iteration, or None; the last round reaches the budget."""
    if not config.max_points:
        return None
    rounds = budget_iterations(config)
    if iteration not in rounds:
        return None
    left = len(rounds) - 1 - max(i for i, at in enumerate(rounds) if at == iteration)
    # Each round takes the same share of what there is, so that the last one ends at the budget.
    return config.max_points + round((num - config.max_points) * left / (left + 1)) if num > config.max_points else None
