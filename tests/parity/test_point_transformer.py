"""The point transformer: hidden states, losses and gradients of every parameter, JAX against PyTorch."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pointillist_jax.models.ar import hidden_states
from pointillist_jax.training.ar import window_loss
from tests.models.tiny_ar import changed, random_batch, random_params

torch = pytest.importorskip("torch")
from experiments.torch_reference import point_transformer  # noqa: E402
from experiments.torch_reference.layers import load_arrays  # noqa: E402
from experiments.torch_reference.point_step import PointStepTransformer  # noqa: E402
from experiments.torch_reference.point_transformer import PointTransformer  # noqa: E402
from tests.parity.compare import assert_close, assert_same_gradients, to_torch  # noqa: E402

pytestmark = pytest.mark.usefixtures("x64")
OPTIONS = [
    {},
    {"order": "self_first", "mlp": "plain", "qk_norm": False, "slot_embedding": False, "tied_head": False,
     "kv_heads": 0, "coord_tables": "learned", "loss_support": "vocab"},
    {"coord_tables": "learned", "kv_heads": 1, "window": 12},
    {"step": "point", "window": 8},
]  # fmt: skip


def twin_of(config, params) -> PointTransformer:
    twin = (PointStepTransformer if config.step == "point" else PointTransformer)(config)
    load_arrays(twin, jax.tree.map(np.asarray, params))
    return twin


def window(rng, config) -> dict[str, np.ndarray]:
    """From the middle of a sequence, its last row padded at the end."""
    batch = random_batch(rng, config)
    batch = {name: x.astype(np.float64 if x.dtype.kind == "f" else np.int64) for name, x in batch.items()}
    positions = np.arange(32) + np.array([[4000], [0]])
    mask = np.ones((2, 32), bool)
    mask[0, 29:] = False
    return {**batch, "positions": positions, "mask": mask}


@pytest.mark.parametrize("options", OPTIONS, ids=["default", "paper", "window", "point"])
def test_losses_and_gradients(rng, options):
    config = changed(dtype="float64", **options)
    params, batch = random_params(config), window(rng, config)

    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def loss(params, context):
        return window_loss(params, config, batch, context, z_loss=0.3).mean

    expected, (gradients, d_context) = jax.jit(loss)(params, jnp.asarray(batch["context"]))
    twin, tensors = twin_of(config, params), to_torch(batch)
    context = tensors["context"].requires_grad_()
    found = twin.loss(tensors["tokens"], tensors["targets"], context, tensors["positions"], tensors["mask"], 0.3)
    assert found.dtype == torch.float64
    assert_close(found, expected)
    found.backward()
    assert_close(context.grad, d_context, name="context")
    assert_same_gradients(twin, gradients, load_arrays)


@pytest.mark.parametrize("step", ["token", "point"])
def test_padded_contexts_and_positions(rng, step):
    config = changed(dtype="float64", step=step)
    params, batch = random_params(config), window(rng, config)
    # Only differences of positions matter, so the first row's are spread.
    # Points stay whole.
    spread = np.arange(32) + 4 * (np.arange(32) // 4)
    positions, lengths = np.stack([spread, np.arange(32)]), np.array([11, 6])
    expected = np.asarray(hidden_states(params, config, batch["tokens"], batch["context"], positions, lengths))
    twin, tensors = twin_of(config, params), to_torch(batch)
    args = tensors["tokens"], tensors["context"]
    assert_close(twin(*args, torch.tensor(positions), torch.tensor(lengths)), expected)
    plain = twin(*args).detach().numpy()
    assert (np.abs(plain - expected).max(axis=(1, 2)) > 1e-3).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_narrow_dtypes(rng, dtype, tolerance):
    """Parameters stay float32; bf16 holds eight bits, which two layers multiply."""
    config = changed(dtype=dtype)
    params, batch = random_params(config), random_batch(rng, config)
    expected = hidden_states(params, config, batch["tokens"], batch["context"])
    found = twin_of(config, params)(torch.tensor(batch["tokens"]).long(), torch.tensor(batch["context"]))
    assert str(found.dtype) == f"torch.{dtype}"
    assert_close(found.float(), expected.astype(jnp.float32), tolerance)


def test_it_compiles_as_one_graph(rng):
    """The loss under `torch.compile`, its backward too; without a compiler of machine code, which says nothing here."""
    config = changed(layers=1)
    twin, batch = twin_of(config, random_params(config)), window(rng, config)
    args = [torch.tensor(batch[name]) for name in ("tokens", "targets")], torch.tensor(batch["context"]).float()
    expected = twin.loss(*args[0], args[1])
    compiled = torch.compile(twin.loss, backend="aot_eager", fullgraph=True)
    found = compiled(*args[0], args[1])
    assert_close(found, expected, 1e-5)
    found.backward()
    assert twin.coord_fourier.grad.abs().max() > 0


def test_it_needs_neither_jax_nor_the_package():
    """A process that can import neither reads every module, makes a model from the fields of a config, and runs it."""
    fields = repr(dataclasses.asdict(changed()))
    names = sorted(path.stem for path in Path(point_transformer.__file__).parent.glob("[a-z]*.py"))
    program = f"""
import importlib, sys
sys.modules["jax"] = sys.modules["pointillist_jax"] = None
import torch
modules = {{name: importlib.import_module(f"experiments.torch_reference.{{name}}") for name in {names}}}
model = modules["point_transformer"].PointTransformer(modules["settings"].from_fields({fields}))
hidden = model(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 3, 32))
assert hidden.shape == (1, 8, 32)
"""
    assert len(names) > 10
    subprocess.run([sys.executable, "-c", program], check=True)
