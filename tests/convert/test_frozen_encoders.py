"""Frozen encoders from files or from chance: which weights they have is known, and others are refused."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from pointillist_jax.configs import EncoderConfig, ModelConfig
from pointillist_jax.convert import load_frozen_encoders
from pointillist_jax.files import FileFormatError, UserError

CONFIG = ModelConfig(encoder=EncoderConfig(image_size=28, num_points=20, frozen=True))


@pytest.fixture
def files(rng, tmp_path):
    return write_weights(rng, tmp_path)


def write_weights(rng, folder):
    """Files of both tiny encoders, and the torch modules that are in them."""
    torch = pytest.importorskip("torch")
    from tests.convert.torch_weights import huggingface_dinov2, randomize
    from tests.models import torch_point_encoder as twin

    image = huggingface_dinov2(rng, layers=2, heads=2, registers=0, image_size=28)
    points = twin.PointEncoder(width=64, layers=2, heads=2, queries=17, frequencies=6)
    randomize(points, rng)
    torch.save(image.state_dict(), folder / "dinov2.pth")
    torch.save({"state_dict": twin.checkpoint(points)}, folder / "michelangelo.ckpt")
    return folder / "dinov2.pth", folder / "michelangelo.ckpt", image, points


def test_the_same_weights_in_another_file_are_the_same(files, tmp_path):
    import safetensors.torch

    image, points, module, _ = files
    encoders = load_frozen_encoders(CONFIG, image, points)
    safetensors.torch.save_file(module.state_dict(), tmp_path / "model.safetensors")
    again = load_frozen_encoders(CONFIG, tmp_path / "model.safetensors", points, expected=encoders.weights)
    assert again.weights == encoders.weights
    jax.tree.map(np.testing.assert_array_equal, again.params, encoders.params)


def test_other_weights_than_those_of_the_training_are_refused(files, rng, tmp_path):
    image, points, *_ = files
    weights = load_frozen_encoders(CONFIG, image, points).weights
    (tmp_path / "other").mkdir()
    _, other, *_ = write_weights(rng, tmp_path / "other")
    with pytest.raises(UserError, match=r"other points weights .* than .*michelangelo\.ckpt"):
        load_frozen_encoders(CONFIG, image, other, expected=weights)
    with pytest.raises(UserError, match="random ones"):
        load_frozen_encoders(CONFIG, random_seed=0, expected=weights)


def test_random_encoders_are_made_again_from_what_a_checkpoint_says():
    encoders = load_frozen_encoders(CONFIG, random_seed=3)
    assert encoders.weights == {"image": "random-3", "points": "random-3"}
    again = load_frozen_encoders(CONFIG, expected=encoders.weights)
    jax.tree.map(np.testing.assert_array_equal, again.params, encoders.params)


def test_what_is_missing_is_named(files):
    image, points, *_ = files
    for given in ({}, {"image_weights": image}, {"point_weights": points}):
        with pytest.raises(UserError, match=r"tiny and tiny are frozen.*--image_weights=.*--point_weights="):
            load_frozen_encoders(CONFIG, **given)
    with pytest.raises(UserError, match="exclude each other"):
        load_frozen_encoders(CONFIG, image, points, random_seed=0)
    with pytest.raises(FileFormatError, match="another model"):
        load_frozen_encoders(CONFIG, points, image)
