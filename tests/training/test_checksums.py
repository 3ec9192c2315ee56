"""Checksums: the same from NumPy and from devices, and flipped bits in a checkpoint's data are found by them."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pointillist_jax.files import FileFormatError, UserError
from pointillist_jax.training.checkpoints import Checkpoints, load_params
from pointillist_jax.training.checksums import _sum, _sum_on_devices, check_sums, checksums
from pointillist_jax.training.state import TrainState


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool", "uint32", "float64"])
def test_host_and_devices_agree(dtype, rng, x64):
    for shape in ((5, 7), (), (0, 3), (2, 3, 4)):
        x = jnp.asarray(100 * rng.normal(size=shape)).astype(dtype)
        assert _sum(np.asarray(x)) == _sum(x) == int(_sum_on_devices(x))


def test_every_bit_and_every_place_counts(rng):
    x = rng.normal(size=(6, 4)).astype(np.float32)
    sums = checksums({"a": x}, {"meta": {"steps": 3, "list": [1, 2]}})
    check_sums(sums, {"a": x}, {"meta": {"list": (1, 2), "steps": 3}})
    words = x.view(np.uint32)
    for bit in range(32):
        changed = (words ^ np.where(np.arange(24).reshape(6, 4) == bit % 24, np.uint32(1 << bit), 0)).view(np.float32)
        with pytest.raises(FileFormatError, match=r"\['a'\] is not what was saved"):
            check_sums(sums, {"a": changed.astype(np.float32)}, {})
    with pytest.raises(FileFormatError, match=r"\['a'\]"):
        check_sums(sums, {"a": x[::-1]}, {})
    with pytest.raises(FileFormatError, match="meta is not what was saved"):
        check_sums(sums, {}, {"meta": {"steps": 4, "list": [1, 2]}})


def test_flipped_bits_inside_large_arrays_are_never_loaded(rng, tmp_path):
    """Large arrays lie in files of their own, whose bytes neither Orbax nor TensorStore checks."""
    # Few bits of every number are set: then they are compressed, and a flip decodes to other numbers.
    params = {"w": np.round(rng.normal(size=(256, 256)), 1).astype(np.float32)}
    state = TrainState(jnp.int32(5), jax.tree.map(jnp.asarray, params), (), None, jax.random.PRNGKey(0))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    stream = SimpleNamespace(get_state=dict, set_state=lambda state: None)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, stream, {})
    data = max((tmp_path / "checkpoints/5/params").rglob("d/*"), key=lambda path: path.stat().st_size)
    whole, found = data.read_bytes(), []
    for place in rng.integers(100, len(whole) - 100, 12):
        changed = bytearray(whole)
        changed[place] ^= 1 << rng.integers(8)
        data.write_bytes(changed)
        with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError) as refused:
            checkpoints.restore(abstract, stream)
        found.append("its checksum differs" in str(refused.value))
        with pytest.raises(FileFormatError, match="name an earlier step"):
            load_params(tmp_path)
    assert any(found)
    data.write_bytes(whole)
    np.testing.assert_array_equal(load_params(tmp_path)[0]["w"], params["w"])
