"""Weights to torch and back: a model that another process without JAX loads, and a workdir that is the old one."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.trained import load_ar
from pointillist_jax.files import UserError
from pointillist_jax.models.ar import hidden_states
from pointillist_jax.training.checkpoints import load_params, save_params
from tests.experiments.small_ar import ROOT, start, write_ar, write_people
from tests.models.test_gaussian_decoder import CONFIG
from tests.models.test_gaussian_decoder import random_params as random_decoder

pytest.importorskip("safetensors")

# A process in which neither JAX nor this package's JAX half can be had.
WITHOUT_JAX = """
import json, sys
import numpy as np, torch
from experiments.torch_reference.exported import load_exported, part
from experiments.torch_reference.point_transformer import PointTransformer
state, content = load_exported(sys.argv[1])
model = PointTransformer(content.config.model)
model.load_state_dict(part(state, "transformer"))
arrays = np.load(sys.argv[2])
hidden = model(torch.tensor(arrays["tokens"]).long(), torch.tensor(arrays["context"]))
np.save(sys.argv[3], hidden.detach().numpy())
assert "jax" not in sys.modules and "pointillist_jax" not in sys.modules
print(json.dumps({"kind": content.kind, "step": content.step}))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    write_ar(root / "ar", write_people(root / "store", 3))
    done = start(root, "export", f"--checkpoint={root / 'ar'}", f"--output={root / 'ar.safetensors'}")
    assert done.returncode == 0, done.stderr
    return root


def test_there_and_back_is_the_same_checkpoint(root):
    done = start(root, "export", f"--import={root / 'ar.safetensors'}", f"--output={root / 'back'}")
    assert done.returncode == 0, done.stderr
    before, after = (load_ar(str(root / name)) for name in ("ar", "back"))
    # A sha256 over every parameter, its path and its dtype: what features and decoders ask for.
    assert after.checkpoint == before.checkpoint
    assert (after.model, after.data, after.spec) == (before.model, before.data, before.spec)
    with pytest.raises(UserError, match="has checkpoints; replace them with --overwrite"):
        save_params(root / "back", 1, {}, {})


def test_loads_where_there_is_no_jax(root, rng):
    pytest.importorskip("torch")
    (root / "no_jax").mkdir()
    (root / "no_jax/jax.py").write_text("raise ImportError('no JAX here')\n")
    trained = load_ar(str(root / "ar"))
    arrays = {
        "tokens": rng.integers(0, trained.model.bins, (2, 16)),
        "context": rng.normal(size=(2, 5, trained.model.width)).astype(np.float32),
    }
    np.savez(root / "in.npz", **arrays)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(root / "no_jax"), str(ROOT)))}
    files = [str(root / name) for name in ("ar.safetensors", "in.npz", "out.npy")]
    done = subprocess.run([sys.executable, "-c", WITHOUT_JAX, *files], capture_output=True, text=True, env=environment,
                          cwd=root)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"kind": "ar", "step": 7}
    expected = jax.jit(hidden_states, static_argnums=1)(trained.params["transformer"], trained.model, **arrays)
    np.testing.assert_allclose(np.load(root / "out.npy"), expected, atol=1e-5)


def test_decoder_goes_there_and_back(root, tmp_path):
    params = jax.tree.map(np.asarray, random_decoder(CONFIG))
    spec = load_ar(str(root / "ar")).spec
    meta = {"config": {"decoder": dataclasses.asdict(CONFIG)}, "features": spec.to_json(), "seed": 1}
    meta = json.loads(json.dumps(meta))
    save_params(tmp_path / "decoder", 3, params, meta)
    for arguments in (
        (f"--checkpoint={tmp_path / 'decoder'}", f"--output={tmp_path / 'decoder.safetensors'}"),
        (f"--import={tmp_path / 'decoder.safetensors'}", f"--output={tmp_path / 'back'}"),
    ):
        done = start(root, "export", *arguments)
        assert done.returncode == 0, done.stderr
    found, found_meta = load_params(tmp_path / "back", 3)
    assert found_meta == meta
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_errors_are_sentences(root, tmp_path):
    for arguments, said in (
        ((), "give either --checkpoint="),
        ((f"--checkpoint={root / 'ar'}", f"--output={root / 'ar.safetensors'}"), "exists; replace it with --overwrite"),
        ((f"--import={root / 'nothing'}", f"--output={tmp_path / 'x'}"), "expected weights that experiments.export"),
    ):
        done = start(root, "export", *arguments)
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr
