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
from pointillist_jax.configs import DecoderConfig, config_from_json
from pointillist_jax.files import UserError
from pointillist_jax.models.ar import hidden_states
from pointillist_jax.models.condition import feature_shapes, marginal_states, project_features
from pointillist_jax.models.gaussian_decoder import decode
from pointillist_jax.pretrained import weights_file
from pointillist_jax.training.checkpoints import load_params, save_params
from tests.experiments.small_ar import ROOT, start, write_ar, write_people
from tests.models.test_gaussian_decoder import CONFIG, FIELDS
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


# Both shipped models in that process: the context of a portrait, the chain of heads, the decoder that copies colours.
SHIPPED = """
import sys
import numpy as np, torch
from experiments.torch_reference.condition import Condition
from experiments.torch_reference.exported import load_exported, part
from experiments.torch_reference.gaussian_decoder import GaussianDecoder
from experiments.torch_reference.point_step import PointStepTransformer
state, content = load_exported(sys.argv[1])
transformer, condition = PointStepTransformer(content.config.model), Condition(content.config.model)
transformer.load_state_dict(part(state, "transformer"))
condition.load_state_dict(part(state, "condition"))
given = {name: torch.tensor(x) for name, x in np.load(sys.argv[3]).items()}
with torch.no_grad():
    context = condition({"features": {"image": given["image"], "points": given["cloud"]}})
    found = {"context": context, "hidden": transformer(given["tokens"].long(), context)}
    found |= {f"marginal_{slot}": x for slot, x in zip("xyzb", condition.marginals(context))}
    state, content = load_exported(sys.argv[2])
    decoder = GaussianDecoder(content.config.decoder)
    decoder.load_state_dict(state)
    decoded = decoder(given["points"], given["hidden"], None, given["decoder_context"])
np.savez(sys.argv[4], **{name: x.numpy() for name, x in (found | decoded._asdict()).items()})
assert "jax" not in sys.modules and "pointillist_jax" not in sys.modules
"""


@pytest.mark.slow
def test_the_shipped_weights_go_to_torch(root, tmp_path, rng):
    """Options of the `laptop` preset: point steps, marginals, the portrait's colours. There, and the same bits back."""
    pytest.importorskip("torch")
    files, back = [], {}
    for kind in ("ar", "decoder"):
        files.append(tmp_path / f"{kind}.safetensors")
        for arguments in (
            (f"--checkpoint=pretrained/{kind}", f"--output={files[-1]}"),
            (f"--import={files[-1]}", f"--output={tmp_path / kind}"),
        ):
            done = start(root, "export", *arguments)
            assert done.returncode == 0, done.stderr
        expected, meta = load_params(weights_file(kind))
        back[kind], found_meta = load_params(tmp_path / kind)
        assert found_meta == meta
        jax.tree.map(np.testing.assert_array_equal, back[kind], expected)
    trained = load_ar(str(tmp_path / "ar"))
    decoder = config_from_json(DecoderConfig, meta["config"]["decoder"], "decoder.npz")
    assert trained.model.condition_loss
    assert decoder.context_colors
    shapes = feature_shapes(trained.model)
    arrays = {
        "image": rng.normal(size=(2, *shapes["image"])),
        "cloud": rng.normal(size=(2, *shapes["points"])),
        "points": rng.uniform(decoder.lower, decoder.upper, (2, 30, 3)),
        "hidden": rng.normal(size=(2, 30, 4, decoder.feature_width)),
        "decoder_context": rng.uniform(-1, 1, (2, decoder.context_tokens, decoder.context_width)),
    }
    arrays = {name: x.astype(np.float32) for name, x in arrays.items()}
    arrays["tokens"] = rng.integers(0, trained.model.bins, (2, 16))
    np.savez(tmp_path / "in.npz", **arrays)
    (tmp_path / "no_jax").mkdir()
    (tmp_path / "no_jax/jax.py").write_text("raise ImportError('no JAX here')\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path / "no_jax"), str(ROOT)))}
    arguments = [str(path) for path in (*files, tmp_path / "in.npz", tmp_path / "out.npz")]
    done = subprocess.run([sys.executable, "-c", SHIPPED, *arguments], capture_output=True, text=True, env=environment,
                          cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    params = trained.params
    context = project_features(
        params["condition"], trained.model, {"image": arrays["image"], "points": arrays["cloud"]}
    )
    expected = {
        "context": context,
        "hidden": hidden_states(params["transformer"], trained.model, arrays["tokens"], context),
    }
    states = marginal_states(params["condition"], context)
    expected |= {f"marginal_{slot}": x for slot, x in zip("xyzb", states, strict=True)}
    decoded = decode(back["decoder"], decoder, arrays["points"], arrays["hidden"], None, arrays["decoder_context"])
    expected |= {name: getattr(decoded.gaussians, name) for name in FIELDS} | {"offsets": decoded.offsets}
    with np.load(tmp_path / "out.npz") as found:
        assert set(found) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=1e-4 * np.abs(value).max(), err_msg=name)


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
