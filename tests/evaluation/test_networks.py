"""Metric networks load the published file formats, refuse others in a sentence, and see what their libraries see.

Weights are random: nobody ships the real ones. What is tested is that a user's file becomes the library's network.
"""

from __future__ import annotations

import importlib.util
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from pointillist_jax.evaluation import networks
from pointillist_jax.files import FileFormatError, UnsafeFileError, UserError


def needs(package: str):
    """The metric's own library, which `pip install -e '.[test]'` leaves out: it would bring torchvision along."""
    reason = f"pip install --no-deps {package.replace('_', '-')}"
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=reason)


@pytest.fixture
def pictures(rng):
    return rng.integers(0, 256, (3, 40, 48, 3), dtype=np.uint8)


def random_state(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and statistic of a network at random, scaled so that signals neither die nor explode."""
    generator, state = torch.Generator().manual_seed(0), network.state_dict()
    for name, value in state.items():
        if value.ndim > 1:
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
        elif value.is_floating_point():
            value.uniform_(0.5, 1.5, generator=generator) if name.endswith("var") else value.normal_(
                0 if name.endswith(("bias", "mean")) else 1, 0.1, generator=generator
            )
    return state


@needs("torch_fidelity")
def test_inception_gives_torch_fidelitys_features(tmp_path, pictures):
    with networks._submodules("torch_fidelity", "", ""):
        module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    kind = module.FeatureExtractorInceptionV3
    # Its constructor wants a file: everything else of it is made by hand here.
    blank, load = object.__new__(kind), torch.load
    try:
        module.torch.load = lambda *_, **__: None
        kind.load_state_dict = lambda self, state: None
        kind.__init__(blank, "inception-v3-compat", ["2048"], feature_extractor_weights_path="none")
    finally:
        module.torch.load = load
        del kind.load_state_dict
    path = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    torch.save(random_state(blank), path)
    found = networks.Inception(path)(pictures)
    expected = blank(torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy()))[0].numpy()
    assert found.shape == (3, 2048)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-3
    # The package itself was not imported, and is not left half imported.
    assert "torch_fidelity" not in sys.modules


@needs("torch_fidelity")
def test_inception_refuses_other_files(tmp_path):
    other = tmp_path / "other.pth"
    torch.save({"fc.weight": torch.zeros(3, 3)}, other)
    with pytest.raises(FileFormatError, match=r"other.pth is not FID's Inception-v3"):
        networks.Inception(other)

    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("it ran",))

    hostile = tmp_path / "hostile.pth"
    torch.save({"a": torch.zeros(1)}, hostile)
    hostile.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises((UnsafeFileError, FileFormatError)):
        networks.Inception(hostile)
    with pytest.raises(FileNotFoundError):
        networks.Inception(tmp_path / "nothing.pth")


@needs("sixdrepnet")
@pytest.mark.slow  # The network has 37 million parameters.
def test_head_pose_loads_6drepnet_and_gives_rotations(tmp_path, pictures):
    network = networks._sixdrepnet().SixDRepNet("RepVGG-B1g2", "", deploy=True, pretrained=False)
    path = tmp_path / "6DRepNet_300W_LP_AFLW2000.pth"
    torch.save(random_state(network), path)
    found = networks.HeadPose(path)(pictures)
    assert found.shape == (3, 3, 3)
    np.testing.assert_allclose(np.einsum("nab,ncb->nac", found, found), np.tile(np.eye(3), (3, 1, 1)), atol=1e-5)
    np.testing.assert_allclose(np.linalg.det(found), 1, atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-5
    assert not {"model", "utils", "backbone"} & set(sys.modules)
    other = tmp_path / "other.pth"
    torch.save({"a": torch.zeros(1)}, other)
    with pytest.raises(FileFormatError, match=r"other.pth is not 6DRepNet"):
        networks.HeadPose(other)


def small_clip(path):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                              image_size=32, patch_size=8, projection_dim=12)  # fmt: skip
    network = CLIPVisionModelWithProjection(config).eval()
    network.save_pretrained(path)
    return network


def test_clip_gives_transformers_embeddings(tmp_path, pictures):
    network = small_clip(tmp_path / "clip")
    found = networks.ClipImages(tmp_path / "clip")(pictures)
    # 40 × 48 pixels: the short side becomes 32, the long one 38, of which the middle 32 are seen.
    batch = networks.cropped(pictures, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711),
                             bicubic=True, side=32)  # fmt: skip
    assert batch.shape == (3, 3, 32, 32)
    with torch.no_grad():
        expected = network(pixel_values=torch.from_numpy(batch)).image_embeds.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(UserError, match=r"config.json"):
        networks.ClipImages(tmp_path)
    (tmp_path / "clip" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(FileFormatError, match="no CLIP model that can be read"):
        networks.ClipImages(tmp_path / "clip")


def test_crops_are_transformers_own(pictures):
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil()
    wide = np.repeat(np.repeat(pictures, 8, axis=1), 8, axis=2)
    expected = np.stack(processor(list(wide), return_tensors="np")["pixel_values"])
    found = networks.cropped(wide, processor.image_mean, processor.image_std, bicubic=True)
    assert np.abs(found - expected).max() < 0.05


def test_faces_of_mediapipes_result(rng):
    points = rng.uniform(size=(478, 2))
    landmark = [types.SimpleNamespace(x=x, y=y, z=0.0) for x, y in points]
    turn = Rotation.from_euler("xyz", [0.1, -0.4, 0.2]).as_matrix()
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = 1.3 * turn, [1, 2, 3]
    result = types.SimpleNamespace(face_landmarks=[landmark], facial_transformation_matrixes=[matrix])
    face = networks.face_of(result, aspect=1.5)
    np.testing.assert_allclose(face.points, points * [1, 1.5])
    np.testing.assert_allclose(face.rotation, turn, atol=1e-12)
    nobody = types.SimpleNamespace(face_landmarks=[], facial_transformation_matrixes=[])
    assert networks.face_of(nobody, aspect=1.0) is None


@needs("mediapipe")
def test_a_file_that_is_no_face_landmarker_is_refused(tmp_path):
    path = tmp_path / "face_landmarker.task"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(FileFormatError, match=r"is not MediaPipe's face_landmarker.task"):
        networks.FaceLandmarks(path)
    with pytest.raises(FileNotFoundError):
        networks.FaceLandmarks(tmp_path / "nothing.task")


@pytest.mark.parametrize(("package", "kind", "command"), [
    ("torch_fidelity", networks.Inception, "torch-fidelity"), ("sixdrepnet", networks.HeadPose, "sixdrepnet"),
])  # fmt: skip
def test_a_missing_library_is_a_sentence_with_the_command(monkeypatch, tmp_path, package, kind, command):
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(1)}, path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a))
    with pytest.raises(UserError, match=f"pip install --no-deps '?{command}"):
        kind(path)
