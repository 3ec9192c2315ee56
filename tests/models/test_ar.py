"""The point transformer: what a token may see, and that every way of running it is the same model."""

import dataclasses
import functools
import json
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pointillist_jax.configs import ModelConfig, preset
from pointillist_jax.files import UserError
from pointillist_jax.models import PointTransformer
from pointillist_jax.models.ar import coordinate_tables, hidden_states, output_tables, param_specs
from pointillist_jax.models.layers import init_params, stack_layers, unstack_layers
from tests.models.tiny_ar import CONFIG, assert_reaches, changed, loss, random_batch, random_params

forward = jax.jit(hidden_states, static_argnums=1)
gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)


def assert_same(found, expected, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), found, expected)


def test_causal(rng):
    """Changing token t changes hidden states from t on, and none before."""
    config = changed(attention="chunked")
    params, batch = random_params(config), random_batch(rng, config)
    tokens = batch["tokens"]
    before = np.asarray(forward(params, config, tokens, batch["context"]))
    for t in (0, 15, 16, 31):  # 15 and 16 lie in different tiles.
        other = tokens.copy()
        other[0, t] = (other[0, t] + 1) % CONFIG.bins
        after = np.asarray(forward(params, config, other, batch["context"]))
        np.testing.assert_array_equal(after[0, :t], before[0, :t])
        np.testing.assert_array_equal(after[1], before[1])
        assert (np.abs(after[0, t:] - before[0, t:]).max(axis=-1) > 1e-5).all()


def test_window(rng):
    """One layer with a window of 8: token t reaches t … t + 7 and no further."""
    assert_reaches(rng, changed(window=8, layers=1, attention="chunked"), 5, range(5, 13))


def test_padding_changes_nothing(rng):
    """Neither padding of the sequence nor of the context; padded targets cost nothing."""
    params, batch = random_params(CONFIG), random_batch(rng, CONFIG)
    tokens, context = batch["tokens"], batch["context"]
    longer = np.pad(tokens, ((0, 0), (0, 8)), constant_values=CONFIG.tokenizer.pad)
    hidden = forward(params, CONFIG, tokens, context)
    np.testing.assert_allclose(forward(params, CONFIG, longer, context)[:, :32], hidden, atol=1e-5)
    padded = np.pad(context, ((0, 0), (0, 5), (0, 0)), constant_values=3.0)
    lengths = jnp.full(2, context.shape[1])
    found = forward(params, CONFIG, tokens, padded, None, lengths)
    np.testing.assert_allclose(found, hidden, atol=1e-5)
    assert np.abs(forward(params, CONFIG, tokens, padded) - hidden).max() > 1e-3


def test_the_condition_is_used(rng):
    params, batch = random_params(CONFIG), random_batch(rng, CONFIG)
    grad = jax.grad(lambda context: loss(params, CONFIG, {**batch, "context": context}))(batch["context"])
    assert np.abs(grad).max() > 1e-4


def test_only_relative_positions_matter(rng):
    params, batch = random_params(CONFIG), random_batch(rng, CONFIG)
    positions = np.broadcast_to(np.arange(32), (2, 32))
    at_zero, far = (forward(params, CONFIG, batch["tokens"], batch["context"], positions + n) for n in (0, 4000))
    np.testing.assert_allclose(at_zero, far, atol=2e-3)
    spread = forward(params, CONFIG, batch["tokens"], batch["context"], positions * 2)
    assert np.abs(spread - at_zero).max() > 1e-2


@pytest.mark.parametrize(("scan", "remat"), [(True, "none"), (False, "dots"), (True, "attention"), (False, "full")])
def test_scan_remat_and_chunks_change_nothing(rng, scan, remat):
    params, batch = random_params(CONFIG), random_batch(rng, CONFIG)
    expected = gradient(params, CONFIG, batch)
    config = changed(attention="chunked", scan_layers=scan, remat=remat)
    assert_same(gradient(params, config, batch), expected, 2e-5)


def test_layers_stack_and_unstack(rng):
    params, batch = random_params(CONFIG), random_batch(rng, CONFIG)
    layers = unstack_layers(params["layers"])
    assert len(layers) == CONFIG.layers
    jax.tree.map(np.testing.assert_array_equal, stack_layers(layers), params["layers"])
    found = forward({**params, "layers": layers}, CONFIG, batch["tokens"], batch["context"])
    np.testing.assert_allclose(found, forward(params, CONFIG, batch["tokens"], batch["context"]), atol=1e-6)


def test_grouped_queries_with_repeated_keys_equal_full_heads(rng):
    grouped, full = CONFIG, changed(kv_heads=0)
    params, batch = random_params(grouped), random_batch(rng, grouped)
    layers = {name: dict(part) for name, part in params["layers"].items()}
    for part in ("cross_attention", "self_attention"):
        for name in ("key", "value"):
            layers[part][name] = jnp.repeat(layers[part][name], 2, axis=2)
    args = batch["tokens"], batch["context"]
    found = forward({**params, "layers": layers}, full, *args)
    np.testing.assert_allclose(found, forward(params, grouped, *args), atol=1e-5)


@pytest.mark.parametrize("option", [
    {"order": "self_first"}, {"mlp": "plain"}, {"qk_norm": False}, {"slot_embedding": False}, {"tied_head": False},
    {"coord_tables": "learned"}, {"loss_support": "vocab"},
    {"coord_tables": "learned", "loss_support": "vocab", "tied_head": False},
])  # fmt: skip
def test_options_use_every_parameter(rng, option):
    """Each option runs, differs from the default, and gives every parameter it declares a gradient."""
    config = changed(**option)
    params, batch = random_params(config), random_batch(rng, config)
    value, grads = gradient(params, config, batch)
    assert np.isfinite(value)
    assert abs(value - gradient(random_params(CONFIG), CONFIG, batch)[0]) > 1e-4
    dead = [jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(grads) if not np.any(g)]
    assert dead == []


def test_support_of_the_slot(rng):
    """Classes of each slot, and what they cost at the start: nearly uniform."""
    params, batch = init_params(param_specs(CONFIG), jax.random.PRNGKey(0)), random_batch(rng, CONFIG)
    x, y, _, b = output_tables(params, CONFIG)
    assert (x.num_classes, y.num_classes, b.num_classes) == (CONFIG.bins + 1, CONFIG.bins, CONFIG.num_faces)
    ids = CONFIG.tokenizer
    assert x.labels(jnp.array([5, ids.eos, ids.bos, ids.pad, ids.bins]), ids.eos).tolist() == [5, 32, -1, -1, -1]
    assert b.labels(jnp.array([ids.bins + 3, 5, ids.eos]), ids.eos).tolist() == [3, -1, -1]
    assert abs(loss(params, CONFIG, batch) - np.log([33, 32, 32, 40]).mean()) < 1.0


def test_whole_vocabulary_leaves_out_padding_only():
    config = changed(loss_support="vocab")
    ids = config.tokenizer
    for table in output_tables(random_params(config), config):
        assert table.rows.shape[0] == ids.padded_vocab_size
        assert table.num_classes == ids.pad
        assert table.labels(jnp.array([0, ids.eos, ids.pad]), ids.eos).tolist() == [0, ids.eos, -1]


def test_neighbouring_bins_start_out_alike():
    config = dataclasses.replace(preset("tiny").model, num_faces=40)
    tables = np.asarray(coordinate_tables(init_params(param_specs(config), jax.random.PRNGKey(0)), config))
    unit = tables / np.linalg.norm(tables, axis=-1, keepdims=True)
    near, far = (np.einsum("sbd,sbd->sb", unit[:, :-n], unit[:, n:]).mean() for n in (1, 300))
    assert near > 0.7
    assert far < 0.4


def test_bf16_stays_near_float32(rng):
    params, batch = random_params(CONFIG), random_batch(rng, CONFIG)
    half = gradient(params, changed(dtype="bfloat16"), batch)
    full = gradient(params, CONFIG, batch)
    assert abs(half[0] - full[0]) < 0.02
    for a, b in zip(jax.tree.leaves(half[1]), jax.tree.leaves(full[1]), strict=True):
        assert a.dtype == jnp.float32
        assert np.abs(a - b).max() < 0.05 * np.abs(b).max() + 1e-3


def test_module_holds_boxed_parameters(rng):
    model, batch = PointTransformer(CONFIG), random_batch(rng, CONFIG)
    boxed = jax.eval_shape(model.init, jax.random.PRNGKey(0), batch["tokens"], batch["context"])["params"]
    leaves = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert all(isinstance(x, nn.LogicallyPartitioned) and len(x.names) == x.value.ndim for x in leaves)
    params = random_params(CONFIG)
    shapes = jax.tree.map(lambda x: x.shape, nn.unbox(boxed))
    assert shapes == jax.tree.map(lambda x: x.shape, params)
    found = jax.jit(model.apply)({"params": params}, batch["tokens"], batch["context"])
    np.testing.assert_allclose(found, forward(params, CONFIG, batch["tokens"], batch["context"]), atol=1e-5)


def test_paper_preset_has_the_size_it_claims():
    config = preset("paper").model
    shapes = jax.eval_shape(functools.partial(init_params, param_specs(config)), jax.random.PRNGKey(0))
    assert shapes["embedding"].shape == (11264, 1024)
    assert 0.40e9 < sum(x.size for x in jax.tree.leaves(shapes)) < 0.45e9


def test_wrong_options_are_refused_in_words():
    with pytest.raises(UserError, match=r"model\.order='cross'"):
        ModelConfig(order="cross")
    with pytest.raises(UserError, match=r"multiple of model\.kv_heads=3"):
        ModelConfig(heads=4, kv_heads=3)


# Unoptimised code: compiling for eight devices is most of the time.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
MESHES = ("data:8", "fsdp:8", "tensor:4,data:2", "context:8", "fsdp:2,tensor:2,context:2", "data:2,fsdp:2,context:2")


@pytest.mark.slow
def test_sharded_equals_unsharded():
    """Loss and every gradient, on meshes of each kind of axis and of mixtures."""
    env = {**os.environ, "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.models.mesh_program", *MESHES],
        capture_output=True,
        text=True,
        env=env,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    for mesh, row in found.items():
        assert row["loss"] < 1e-5, mesh
        assert row["grads"] < 1e-5 * max(row["largest"], 1), mesh
    assert found["fsdp:8"]["shard"] == [2, 4, 8, 8]
    assert found["tensor:4,data:2"]["shard"] == [2, 32, 2, 8]
