"""Parameters of the models here ↔ state dicts of the PyTorch reference (`experiments/torch_reference`), losslessly.

One map, read in both directions. It is derived from the models' own descriptions (`param_specs`), so a parameter that
is added there has a name here, and what is missing, unexpected or of another shape is named. Layers, stacked here, are
numbered there; a matrix [in…, out…] here is a `weight` [out, in] there; a norm's scale is a `weight`. Values only move:
going there and back gives the same bits.

On disk: `.safetensors`, whose metadata hold the config as JSON, so that a process without JAX can build the model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from pointillist_jax.configs import DecoderConfig, ModelConfig
from pointillist_jax.convert.state_dicts import check_state, require_mapping
from pointillist_jax.convert.torch_files import as_numpy
from pointillist_jax.files import FileFormatError, UserError, WriteError, atomic_path, require_file
from pointillist_jax.models import ar, condition, gaussian_decoder
from pointillist_jax.models.layers import ParamSpec

State = dict[str, np.ndarray]
# Key of the metadata; their value is a JSON object.
METADATA, VERSION = "pointillist_jax", 1
_MAX_METADATA = 1 << 20
_STACKED = ("layers", "mlps")
# Leading axes that a product sums over; every other array is kept as it is.
_INPUTS = {
    "query": 1, "key": 1, "value": 1, "up": 1, "gate": 1, "down": 1, "kernel": 1, "query_key_value": 1, "key_value": 1,
    "qkv_kernel": 1, "point_embedding": 2, "patch_kernel": 3,
}  # fmt: skip


def ar_to_torch(params: Mapping[str, Any], config: ModelConfig) -> State:
    """Parameters of stage one → a state dict: names begin with `transformer.` and `condition.`.

    Args:
      params: {"transformer": …, "condition": …} of `training.ar.init_params`, with or without encoders as
        `config.encoder.frozen` says.

    Raises:
      UserError: names what is missing, unexpected or of another shape.
    """
    return _to_torch(params, _ar_specs(config), "the AR model")


def ar_from_torch(state: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The inverse of `ar_to_torch`: nested dicts of NumPy arrays in the dtypes of `state`.

    Args:
      state: name → torch tensor or array.

    Raises:
      FileFormatError: names what is missing, unexpected or of another shape; NaN.
      UserError: not a state dict.
    """
    return _from_torch(state, _ar_specs(config), "the AR model")


def transformer_to_torch(params: Mapping[str, Any], config: ModelConfig) -> State:
    """As `ar_to_torch`, of `params["transformer"]` alone: what `torch_reference.PointTransformer` loads."""
    return _to_torch(params, ar.param_specs(config), "the point transformer")


def transformer_from_torch(state: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The inverse of `transformer_to_torch`; as `ar_from_torch`."""
    return _from_torch(state, ar.param_specs(config), "the point transformer")


def decoder_to_torch(params: Mapping[str, Any], config: DecoderConfig) -> State:
    """Parameters of the Gaussian decoder → a state dict of `torch_reference.GaussianDecoder`; as `ar_to_torch`."""
    return _to_torch(params, gaussian_decoder.param_specs(config), "the Gaussian decoder")


def decoder_from_torch(state: Mapping[str, Any], config: DecoderConfig) -> dict[str, Any]:
    """The inverse of `decoder_to_torch`; as `ar_from_torch`."""
    return _from_torch(state, gaussian_decoder.param_specs(config), "the Gaussian decoder")


def save_reference(path: str | os.PathLike, state: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Writes a state dict as `.safetensors`, atomically, with JSON metadata beside the tensors.

    Raises:
      UserError: safetensors is not installed.
    """
    try:
        from safetensors.numpy import save_file
    except ImportError:
        raise UserError(f"{path} needs the safetensors package: pip install safetensors.") from None
    # "pt" is what other programs look for before they read the tensors into torch.
    text = json.dumps({"version": VERSION, **metadata})
    with atomic_path(path) as temporary:
        try:
            save_file(dict(state), temporary, {"format": "pt", METADATA: text})
        except Exception as error:  # Of the Rust writer, whatever the system said.
            raise WriteError(path, error) from None


def load_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON metadata of a file of `save_reference`; the tensors are read with `load_torch_file`.

    Raises:
      FileNotFoundError: no such file.
      FileFormatError: damaged, or without this project's metadata.
      UserError: safetensors is not installed.
    """
    path = require_file(path, "weights that experiments.export wrote")
    try:
        from safetensors import safe_open
    except ImportError:
        raise UserError(f"{path} needs the safetensors package: pip install safetensors.") from None
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(METADATA, "")
    except Exception as error:  # Rust's errors have no Python classes of their own.
        reason = str(error)[:200]
        raise FileFormatError(f"{path} is damaged or no safetensors file ({reason}); copy it again.") from None
    try:
        found = json.loads(text) if len(text) <= _MAX_METADATA else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("version") != VERSION:
        raise FileFormatError(
            f"{path} has no metadata of this program (version {VERSION}): without the config the weights belong to, "
            "they cannot be read; keep the metadata of the exported file when you save it again."
        )
    return found


class _Entry(NamedTuple):
    """One tensor of the state dict.

    Attributes:
      path: of the parameter in the nested dict.
      layer: index on its first axis, or None.
      name: in the state dict.
      shape: here, without the layer's axis.
      inputs: leading axes that become the last one there; 0 keeps the array as it is.
    """

    path: tuple[str, ...]
    layer: int | None
    name: str
    shape: tuple[int, ...]
    inputs: int

    @property
    def is_convolution(self) -> bool:
        return self.path[-1] == "patch_kernel"

    @property
    def torch_shape(self) -> tuple[int, ...]:
        if self.is_convolution:
            height, width, size_in, size_out = self.shape
            return size_out, size_in, height, width
        if self.path[-1] == "qkv_bias":
            return (int(np.prod(self.shape)),)
        if not self.inputs:
            return self.shape
        return tuple(int(np.prod(part)) for part in (self.shape[self.inputs :], self.shape[: self.inputs]))

    def to_torch(self, value: np.ndarray) -> np.ndarray:
        if self.is_convolution:
            value = value.transpose(3, 2, 0, 1)
        elif self.inputs:
            value = value.reshape(self.torch_shape[::-1]).T
        return np.array(value.reshape(self.torch_shape), order="C")

    def from_torch(self, value: np.ndarray) -> np.ndarray:
        if self.is_convolution:
            value = value.transpose(2, 3, 1, 0)
        elif self.inputs:
            value = value.T
        return value.reshape(self.shape)


def _ar_specs(config: ModelConfig) -> dict[str, Any]:
    return {"transformer": ar.param_specs(config), "condition": condition.condition_specs(config)}


def _to_torch(params: Any, specs: Mapping[str, Any], what: str) -> State:
    found = {"/".join(path): np.asarray(value) for path, value in _leaves(params)}
    expected = {"/".join(path): spec.shape for path, spec in _leaves(specs)}
    check_state(what, found, expected, kind="the parameter tree")
    state = {}
    for entry in _entries(specs):
        value = found["/".join(entry.path)]
        state[entry.name] = entry.to_torch(value if entry.layer is None else value[entry.layer])
    return state


def _from_torch(state: Any, specs: Mapping[str, Any], what: str) -> dict[str, Any]:
    state, entries = require_mapping(state, what), list(_entries(specs))
    check_state(what, state, {entry.name: entry.torch_shape for entry in entries})
    arrays: dict[tuple[str, ...], list[np.ndarray]] = {}
    for entry in entries:
        value = as_numpy(entry.name, state[entry.name], f"the state dict of {what}")
        if bad := int((~np.isfinite(value)).sum()):
            raise FileFormatError(f"{entry.name} of {what} holds {bad} NaN or infinite values; export it again.")
        arrays.setdefault(entry.path, []).append(entry.from_torch(value))
    params: dict[str, Any] = {}
    for path, spec in _leaves(specs):
        at = params
        for key in path[:-1]:
            at = at.setdefault(key, {})
        stacked = len(spec.shape) > arrays[path][0].ndim
        at[path[-1]] = np.stack(arrays[path]) if stacked else np.array(arrays[path][0], order="C")
    return params


def _entries(specs: Mapping[str, Any]) -> Iterator[_Entry]:
    for path, spec in _leaves(specs):
        at = next((i for i, key in enumerate(path) if key in _STACKED), None)
        if at is None:
            yield _Entry(path, None, _name(path), spec.shape, _inputs(path, spec.shape))
            continue
        shape = spec.shape[1:]
        for layer in range(spec.shape[0]):
            name = _name((*path[: at + 1], str(layer), *path[at + 1 :]))
            yield _Entry(path, layer, name, shape, _inputs(path, shape))


def _inputs(path: tuple[str, ...], shape: tuple[int, ...]) -> int:
    # "out" is a matrix [N, H, D] here and a linear layer's group elsewhere.
    return len(shape) - 1 if path[-1] == "out" else _INPUTS.get(path[-1], 0)


def _name(path: tuple[str, ...]) -> str:
    *parents, last = path
    if last in ("kernel", "scale") and parents:
        last = "weight"
    elif last.endswith("norm") or last in _INPUTS or last == "out":
        # qkv_kernel and patch_kernel stand for layers qkv and patch, whose biases are qkv_bias and patch_bias.
        last = f"{last.removesuffix('_kernel')}.weight"
    elif last in ("qkv_bias", "patch_bias"):
        last = f"{last.removesuffix('_bias')}.bias"
    return ".".join((*parents, last))


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Paths and leaves of nested dicts in the order of the data, not of the alphabet."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, (*path, str(key)))
    elif isinstance(tree, (tuple, list)) and not isinstance(tree, ParamSpec):
        for i, value in enumerate(tree):
            yield from _leaves(value, (*path, str(i)))
    else:
        yield path, tree
