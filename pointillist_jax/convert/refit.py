"""A mesh of one FLAME edition in the coefficients of another: least squares (facts/encoders_and_metrics.md 5.5).

FLAME's editions share vertices and faces, but not their directions: coefficients copied from one to another give
another person. What carries over is the mesh. Letters: V vertices, S shape and E expression coefficients.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pointillist_jax.files import UserError
from pointillist_jax.flame import FlameModel, FlameParams, flame_vertices
from pointillist_jax.flame.teeth import FLAME_VERTICES, NUM_TEETH_VERTICES

# Coefficients are standard deviations of people, so their prior is 1; the mesh is trusted to a millimetre.
_RIDGE = 1e-3**2
# A jaw opens by some 0.3 rad.
_JAW_RIDGE = _RIDGE / 0.3**2
_STEPS, _SMALL_STEP = 8, 1e-4


def refit_shape(head: FlameModel, vertices: Float[np.ndarray, "5023 3"]) -> tuple[np.ndarray, np.ndarray]:
    """The identity of a neutral, unposed FLAME mesh, by ridge regression.

    Args:
      head: FLAME, with or without teeth.
      vertices: metres, in FLAME's axes; the 5023 of FLAME, without teeth.

    Returns:
      shape [S], and what it leaves of the mesh as a static offset [V, 3]; the teeth have none.

    Raises:
      UserError: the head is not FLAME.
    """
    require_flame(head)
    A = np.asarray(head.shape_dirs, np.float64)[:FLAME_VERTICES].reshape(3 * FLAME_VERTICES, -1)
    b = (vertices - np.asarray(head.v_template, np.float64)[:FLAME_VERTICES]).ravel()
    shape = np.linalg.solve(A.T @ A + _RIDGE * np.eye(A.shape[1]), A.T @ b)
    offset = np.zeros((head.num_vertices, 3))
    offset[:FLAME_VERTICES] = (b - A @ shape).reshape(-1, 3)
    return shape, offset


def refit_expression(head: FlameModel, start: FlameParams, vertices: Float[np.ndarray, "5023 3"]) -> FlameParams:
    """Expression and jaw of a mesh, by Gauss-Newton steps with a ridge; everything else is left as it is.

    Expression and jaw are found together, because editions differ in what they leave to which: in one without a jaw
    joint, expression directions open the mouth.

    Args:
      head: FLAME.
      start: identity, neck and eyes of the mesh, rotation and translation of zero; its jaw is where the search begins,
        its expression is not read. No leading axes.
      vertices: the posed mesh, metres.

    Returns:
      `start` with `expr` [E] and `jaw_pose` [3].
    """
    require_flame(head)
    target = jnp.asarray(vertices, head.v_template.dtype)
    num = head.expr_dirs.shape[-1]
    x = jnp.concatenate([jnp.zeros(num, target.dtype), start.jaw_pose.astype(target.dtype)])
    for _ in range(_STEPS):
        residual, jacobian = (np.asarray(a, np.float64) for a in _linearized(head, start, target, x))
        ridge = np.r_[np.full(num, _RIDGE), np.full(3, _JAW_RIDGE)]
        # The prior pulls towards 0, for the jaw too: the ridge is on the values, not on the step.
        gradient = jacobian.T @ residual + ridge * np.asarray(x, np.float64)
        step = np.linalg.solve(jacobian.T @ jacobian + np.diag(ridge), gradient)
        x = x - jnp.asarray(step, target.dtype)
        if np.abs(step).max() < _SMALL_STEP:
            break
    return start.replace(expr=x[:num], jaw_pose=x[num:])


def require_flame(head: FlameModel) -> None:
    """Raises UserError for a head that does not have FLAME's vertices."""
    if head.num_vertices not in (FLAME_VERTICES, FLAME_VERTICES + NUM_TEETH_VERTICES):
        raise UserError(
            f"a mesh of FLAME's {FLAME_VERTICES} vertices cannot be told in coefficients of "
            f"{head.source or 'this head'}, which has {head.num_vertices}: give your FLAME file with --flame."
        )


@jax.jit
def _linearized(head: FlameModel, start: FlameParams, target: Float[Array, "5023 3"], x: Float[Array, "n"]):
    """Residual [3 · 5023] of the mesh at `x` = (expression, jaw), and its Jacobian [3 · 5023, n]."""

    def residual(x):
        num = head.expr_dirs.shape[-1]
        posed = flame_vertices(head, start.replace(expr=x[:num], jaw_pose=x[num:]))
        return (posed[:FLAME_VERTICES] - target).ravel()

    return residual(x), jax.jacfwd(residual)(x)
