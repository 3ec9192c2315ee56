"""What every network here is made of: parameter descriptions, norms, rotary positions, products (DESIGN §6).

A network is described once, as a nested dict of `ParamSpec`; abstract values, logical axes and initial values all
follow from it. Linen modules only hold the parameters (`declare`); everything else is pure functions on dicts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Params = Mapping[str, Any]
Initializer = Callable[[Array, tuple[int, ...], Any], Array]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter: its shape, the logical name of each axis (`sharding.RULES`), and how it starts."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer

    def stacked(self, layers: int) -> ParamSpec:
        """The same parameter of `layers` layers, stacked on a first axis."""
        return ParamSpec((layers, *self.shape), ("layers", *self.axes), self.init)


def matrix(shape: tuple[int, ...], axes: tuple[str | None, ...], fan_in: int, gain: float = 1.0) -> ParamSpec:
    """A weight with entries of standard deviation gain / √fan_in, truncated at two."""
    # The truncated normal has deviation 0.8796; undo that.
    return ParamSpec(shape, axes, nn.initializers.truncated_normal(gain / math.sqrt(fan_in) / 0.87962566))


def ones(size: int, axis: str = "norm") -> ParamSpec:
    return ParamSpec((size,), (axis,), nn.initializers.ones)


def zeros(*shape: int, axes: tuple[str | None, ...] | None = None) -> ParamSpec:
    return ParamSpec(shape, axes or ("norm",) * len(shape), nn.initializers.zeros)


def stack_specs(specs: Any, layers: int) -> Any:
    """The specs of one layer → those of all layers, stacked."""
    return jax.tree.map(lambda spec: spec.stacked(layers), specs, is_leaf=_is_spec)


def count_parameters(specs: Any) -> int:
    """Numbers in all parameters of a (nested) dict of specs."""
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(specs, is_leaf=_is_spec))


def init_params(specs: Any, key: Array, dtype: Any = jnp.float32, *, boxed: bool = False) -> Any:
    """Initial values of a (nested) dict of specs. `boxed` keeps the logical axes (`nn.LogicallyPartitioned`).

    Each parameter's key depends on its path only, so adding one changes no other.
    """

    def one(path, spec: ParamSpec):
        name = jax.tree_util.keystr(path)
        value = spec.init(jax.random.fold_in(key, zlib.crc32(name.encode())), spec.shape, dtype)
        return nn.LogicallyPartitioned(value, spec.axes) if boxed else value

    return jax.tree_util.tree_map_with_path(one, specs, is_leaf=_is_spec)


def declare(module: nn.Module, specs: Mapping[str, Any]) -> dict[str, Any]:
    """Makes `specs` the parameters of a Linen module and returns their values; call it from a compact method."""
    return {
        name: module.param(name, lambda key, spec=spec, name=name: init_params({name: spec}, key, boxed=True)[name])
        for name, spec in specs.items()
    }


def unstack_layers(stacked: Any) -> tuple[Any, ...]:
    """Parameters stacked on a first axis of length L → L dicts. Its gradient is one concatenation per parameter."""
    leaves, tree = jax.tree.flatten(stacked)
    number = leaves[0].shape[0]
    parts = [[jnp.squeeze(part, 0) for part in jax.lax.split(leaf, (1,) * number)] for leaf in leaves]
    return tuple(tree.unflatten([part[i] for part in parts]) for i in range(number))


def stack_layers(layers: Any) -> Any:
    """The inverse of `unstack_layers`."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def cast(params: Any, dtype: Any) -> Any:
    """Weights in the dtype of the computation; the float32 originals stay with the optimiser."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params)


def weighted_sum(terms: Array, weights: Array, axes: tuple[int, ...]) -> Array:
    """Σ terms · weights over `axes`, which are all that `weights` has; on CPU as a product, which it adds up faster."""
    if jax.default_backend() == "cpu":
        # The weights on the left where they lie along the first axes: otherwise the terms would be transposed.
        weights, own = weights.astype(terms.dtype), tuple(range(weights.ndim))
        if 0 in axes:
            return jax.lax.dot_general(weights, terms, ((own, axes), ((), ())))
        return jax.lax.dot_general(terms, weights, ((axes, own), ((), ())))
    others = [axis for axis in range(terms.ndim) if axis not in axes]
    return jnp.sum(terms * jnp.expand_dims(weights, others), axes)


def rms_norm(x: Float[Array, "*b D"], scale: Float[Array, "D"], eps: float = 1e-6) -> Float[Array, "*b D"]:
    """x / rms(x) · scale, computed in float32 (float64 for float64) and returned in the dtype of x."""
    return _rms_norm(x, scale, eps)


# Its own derivative: of the one JAX would take, XLA's CPU back end computes the sum for `scale` ten times slower.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rms_norm(x, scale, eps):
    return _rms_norm_forward(x, scale, eps)[0]


def _rms_norm_forward(x, scale, eps):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * inverse * scale).astype(x.dtype), (x, inverse, scale)


def _rms_norm_backward(eps, residuals, y_bar):
    del eps
    x, inverse, scale = residuals
    # Both sums are of y_bar · x, which is written once: a sum that the CPU compiler fuses with what makes its terms
    # runs at a fifth of the speed.
    y_bar = y_bar.astype(inverse.dtype)
    terms = y_bar * x
    scale_bar = weighted_sum(terms, inverse[..., 0], tuple(range(x.ndim - 1)))
    mean = weighted_sum(terms, scale, (x.ndim - 1,))[..., None] / x.shape[-1]
    x_bar = inverse * (y_bar * scale - x * (inverse * inverse * mean))
    return x_bar.astype(x.dtype), scale_bar.astype(scale.dtype)


_rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def layer_norm(x: Float[Array, "*b D"], params: Params, eps: float) -> Float[Array, "*b D"]:
    """LayerNorm with `params["scale"]` and `params["bias"]`, computed in float32 at least."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - wide.mean(-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + eps) * params["scale"] + params["bias"]).astype(x.dtype)


def linear(x: Float[Array, "*b I"], params: Params) -> Float[Array, "*b O"]:
    """x · kernel [I, O] + bias [O], if there is one, in the dtype of x."""
    y = x @ params["kernel"].astype(x.dtype)
    return y + params["bias"].astype(x.dtype) if "bias" in params else y


def linear_specs(size_in: int, size_out: int, axes=("embed", "mlp"), bias: bool = True) -> dict[str, ParamSpec]:
    specs = {"kernel": matrix((size_in, size_out), axes, size_in)}
    return {**specs, "bias": zeros(size_out, axes=(axes[1],))} if bias else specs


def layer_norm_specs(size: int) -> dict[str, ParamSpec]:
    return {"scale": ones(size), "bias": zeros(size)}


def rope_angles(
    positions: Int[Array, "*b T"], head_dim: int, theta: float, dtype: Any = jnp.float32
) -> tuple[Array, Array]:
    """(cos, sin), each [..., T, H/2], of rotary positions: frequency theta^(-2i/H) for the i-th pair."""
    frequencies = jnp.asarray(theta ** (-np.arange(0, head_dim, 2) / head_dim), dtype)
    angles = positions[..., None].astype(dtype) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def computed_once(function: Callable[[Array], Any], x: Array) -> Any:
    """`function`, elementwise, as a result that XLA keeps for all its users.

    XLA's CPU compiler computes what looks cheap anew inside every user, cosines too, and drops optimisation barriers
    before it does so. The result of a loop it leaves alone.
    """
    mesh, blocks = jax.sharding.get_abstract_mesh(), 4
    if jax.default_backend() != "cpu" or mesh.size > 1 or x.size % blocks:
        return function(x)
    parts = jax.lax.map(function, x.reshape(blocks, -1))
    return jax.tree.map(lambda y: y.reshape(*x.shape, *y.shape[2:]), parts)


@jax.custom_vjp
def product(x: Float[Array, "*b I"], w: Float[Array, "I O"]) -> Float[Array, "*b O"]:
    """x · w, with a gradient of `w` whose form XLA's CPU back end computes fast.

    The derivative JAX would take transposes the cotangent; inside a fusion that costs more than the product. Here the
    narrower of the two factors is transposed.
    """
    return x @ w


def _product_forward(x, w):
    return x @ w, (x, w)


def _product_backward(residuals, y_bar):
    x, w = residuals
    tokens = tuple(range(x.ndim - 1))
    contract = ((tokens, tokens), ((), ()))
    if w.shape[0] <= w.shape[1]:
        w_bar = jax.lax.dot_general(x, y_bar, contract)
    else:
        w_bar = jax.lax.dot_general(y_bar, x, contract).T
    return y_bar @ w.T, w_bar


product.defvjp(_product_forward, _product_backward)


def products(x: Float[Array, "*b I"], *weights: Array) -> list[Array]:
    """x · w [*b, N, H] of weights [I, N, H] (or [*b, N] of [I, N]), as one product: large ones keep more cores busy.

    They stay apart over several devices, where weights laid side by side would have to be moved, and for sequences of
    few tokens, where copying the weights would cost more than the product. (What a batch holds must not decide: the
    two ways round differently, and a row's result is not to depend on its neighbours.)
    """
    mesh, few = jax.sharding.get_abstract_mesh(), x.ndim < 3 or x.shape[-2] < x.shape[-1]
    flat = tuple(w.reshape(w.shape[0], -1) for w in weights)
    if not mesh.empty and mesh.shape["tensor"] > 1 and len({w.shape for w in flat}) == 1:
        parts = _products_apart(x, flat)
    elif mesh.size > 1 or few:
        parts = [product(x, w) for w in flat]
    else:
        together = product(x, jnp.concatenate(flat, axis=1))
        # Cut where heads begin, not channels: what is cut then costs no more to read than what is whole.
        together, axis = together.reshape(*x.shape[:-1], -1, *weights[0].shape[2:]), x.ndim - 1
        return jnp.split(together, np.cumsum([w.shape[1] for w in weights])[:-1], axis=axis)
    return [part.reshape(*x.shape[:-1], *w.shape[1:]) for part, w in zip(parts, weights, strict=True)]


@jax.custom_vjp
def _products_apart(x, weights):
    return tuple(x @ w for w in weights)


def _products_apart_forward(x, weights):
    # Written out: of a call to the function above, remat policies could not see the products that they are to save.
    return tuple(x @ w for w in weights), (x, weights)


def _products_apart_backward(residuals, y_bars):
    # A device of the tensor axis has its columns' share of the gradient of x. The shares of all weights are one product
    # here, so that they are summed over the devices once: of a product for each weight XLA sums every one.
    x, weights = residuals
    x_bar = jnp.einsum("...wO,wIO->...I", jnp.stack(y_bars, axis=-2), jnp.stack(weights))
    return x_bar, tuple(_product_backward((x, w), y_bar)[1] for w, y_bar in zip(weights, y_bars, strict=True))


_products_apart.defvjp(_products_apart_forward, _products_apart_backward)


def rotate(x: Float[Array, "*b T N H"], angles: tuple[Array, Array]) -> Float[Array, "*b T N H"]:
    """Rotates the pairs (x_i, x_{i+H/2}) of each head.

    In float32 at least: bf16 holds 8 bits of a product whose differences between near positions are what matters.
    """
    cos, sin = (a[..., None, :] for a in angles)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    first, second = jnp.split(wide, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def _is_spec(x: Any) -> bool:
    return isinstance(x, ParamSpec)
