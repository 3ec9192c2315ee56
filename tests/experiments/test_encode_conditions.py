"""experiments.encode_conditions as a user starts it: torch's features in the store, whole files kept."""

from __future__ import annotations

import sys

import jax.numpy as jnp
import numpy as np
import pytest

from pointillist_jax.data.condition_features import open_features
from pointillist_jax.flame import FlameParams, flame_vertices, open_head
from pointillist_jax.flame.surface_points import head_points
from pointillist_jax.models.condition import feature_shapes
from tests.convert.test_frozen_encoders import CONFIG, write_weights
from tests.convert.torch_weights import huggingface_features
from tests.training.ar_runs import finish, start, write_people

SCRIPT = [sys.executable, "-m", "experiments.encode_conditions"]


def test_features_are_those_of_the_torch_encoders_and_are_kept(rng, tmp_path):
    torch = pytest.importorskip("torch")
    image, points, dinov2, michelangelo = write_weights(rng, tmp_path)
    store, head = write_people(tmp_path / "store", side=28), open_head("coarse")
    settings = ["--config.model.encoder.image_size=28", "--config.model.encoder.num_points=20", "--dtype=float32"]
    run = [*SCRIPT, f"--store={store.path}", f"--image_weights={image}", f"--point_weights={points}", *settings]
    said = finish(start(run, tmp_path / "compiled"))
    assert "tiny-28_tiny-20: image (5, 64), points (17, 64), float32" in said
    features = open_features(store, "tiny-28_tiny-20", feature_shapes(CONFIG))
    assert said.splitlines()[-3] == f"everything lies in {features.folder}/:"
    for i in range(len(store)):
        condition = store.condition(i)
        pixels = condition["portrait"][None] / 255.0
        pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        seen = huggingface_features(dinov2, pixels)
        np.testing.assert_allclose(features[i]["image"][0], seen["cls"][0], atol=1e-4)
        np.testing.assert_allclose(features[i]["image"][1:], seen["patch_tokens"][0], atol=1e-4)
        still = {k: jnp.asarray(v) for k, v in condition["flame"].items()} | {
            "rotation": jnp.zeros(3),
            "translation": jnp.zeros(3),
        }
        cloud = np.array(head_points(head, flame_vertices(head, FlameParams(**still)), 20))
        with torch.no_grad():
            expected = michelangelo(torch.from_numpy(cloud)[None])[0].numpy()
        np.testing.assert_allclose(features[i]["points"], expected, atol=1e-4)

    files = sorted(features.folder.glob("*.npz"))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    files[3].unlink()
    finish(start([*run, "--resume"], tmp_path / "compiled"))
    for path in files:
        written, content = before[path]
        assert path.read_bytes() == content
        assert (path.stat().st_mtime_ns != written) == (path == files[3])
    # A mistake is a sentence.
    process = start([*SCRIPT, f"--store={store.path}"], tmp_path / "compiled")
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 2
    assert said.startswith("error: the encoders tiny and tiny are frozen and need their weights")
