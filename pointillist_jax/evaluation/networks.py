"""The networks of the paper's metrics, from well-kept libraries and files the user supplies (DESIGN §11).

Nothing is downloaded, and no library is imported before its network is asked for. No file is unpickled that asks for
more than tensors. Two packages, torch-fidelity and sixdrepnet, import torchvision when they
are imported, which these networks do not use and which a CPU build of torch breaks on: only the modules needed are.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from pointillist_jax.convert import load_torch_file
from pointillist_jax.evaluation.scores import Face
from pointillist_jax.files import FileFormatError, UserError, require_file

# Faces are looked for in pictures at least this wide: detectors expect photographs.
_FACE_WIDTH = 512
_CROP = 224
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Inception:
    """Pool features of Inception-v3 as FID wants them: torch-fidelity's, with TensorFlow 1's way of resizing."""

    resize = "bilinear to 299 as TensorFlow 1 does it (torch-fidelity)"

    def __init__(self, path: str | Path):
        """`path`: of weights-inception-2015-12-05-6726825d.pth.

        Raises:
          UserError: torch or torch-fidelity is missing. FileNotFoundError, FileFormatError: not such a file.
        """
        # Its own reader would run what a pickle asks for: the file is read without that first, and refused if need be.
        load_torch_file(path)
        torch = _torch("FID")
        with _submodules("torch_fidelity", "FID", "pip install --no-deps 'torch-fidelity>=0.4'"):
            module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        try:
            self._network = module.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
            )
        except RuntimeError as error:
            raise FileFormatError(f"{path} is not FID's Inception-v3 ({_first_line(error)}).") from None
        self._torch, self._device = torch, _device(torch)
        self._network.to(self._device)

    def __call__(self, pictures: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N 2048"]:
        batch = self._torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))
        with self._torch.no_grad():
            return self._network(batch.to(self._device))[0].cpu().numpy()


class FaceLandmarks:
    """MediaPipe's 478 face landmarks and its facial transformation, of the one surest face."""

    def __init__(self, path: str | Path):
        """`path`: of face_landmarker.task.

        Raises:
          UserError: MediaPipe is missing. FileNotFoundError, FileFormatError: not such a file.
        """
        path = require_file(path, "MediaPipe's face_landmarker.task")
        try:
            import mediapipe
            from mediapipe.tasks.python import BaseOptions, vision
        except ImportError as error:
            raise _missing("AKD", "pip install 'mediapipe>=0.10.21'", error) from None
        options = vision.FaceLandmarkerOptions(
            base_options=BaseOptions(model_asset_buffer=path.read_bytes()),
            running_mode=vision.RunningMode.IMAGE,
            num_faces=1,
            min_face_detection_confidence=0.5,
            min_face_presence_confidence=0.5,
            output_facial_transformation_matrixes=True,
        )
        try:
            self._network = vision.FaceLandmarker.create_from_options(options)
        except (RuntimeError, ValueError) as error:
            raise FileFormatError(f"{path} is not MediaPipe's face_landmarker.task ({_first_line(error)}).") from None
        self._image = lambda data: mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=data)

    def __call__(self, picture: UInt8[np.ndarray, "H W 3"]) -> Face | None:
        from PIL import Image

        height, width = picture.shape[:2]
        if width < _FACE_WIDTH:
            size = (_FACE_WIDTH, round(height * _FACE_WIDTH / width))
            picture = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
        return face_of(self._network.detect(self._image(np.ascontiguousarray(picture))), height / width)


def face_of(result: Any, aspect: float) -> Face | None:
    """MediaPipe's FaceLandmarkerResult → `Face`, or None without one.

    Args:
      aspect: height / width of the picture. Landmarks come in fractions of both; here both count in widths.
    """
    if not result.face_landmarks or not result.facial_transformation_matrixes:
        return None
    points = np.array([[point.x, point.y * aspect] for point in result.face_landmarks[0]])
    linear = np.asarray(result.facial_transformation_matrixes[0], np.float64)[:3, :3]
    # The transformation scales too: the nearest rotation is the pose.
    u, _, vt = np.linalg.svd(linear)
    return Face(points, u @ np.diag([1, 1, np.sign(np.linalg.det(u @ vt))]) @ vt)


class HeadPose:
    """Head rotations by 6DRepNet (package sixdrepnet; RepVGG-B1g2), from the whole picture.

    The network expects a cropped face; renders and captures here show a head and little else, so that the short side
    is scaled to 224 and the middle cut out, as its package does with a crop.
    """

    def __init__(self, path: str | Path):
        """`path`: of 6DRepNet_300W_LP_AFLW2000.pth (the re-parametrised network).

        Raises:
          UserError: torch or sixdrepnet is missing. FileNotFoundError, FileFormatError: not such a file.
        """
        weights = load_torch_file(path)
        self._torch = _torch("APD")
        network = _sixdrepnet().SixDRepNet("RepVGG-B1g2", "", deploy=True, pretrained=False)
        _load(network, weights, path, "6DRepNet", self._torch)
        self._device = _device(self._torch)
        self._network = network.eval().to(self._device)

    def __call__(self, pictures: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N 3 3"]:
        batch = self._torch.from_numpy(cropped(pictures, *_IMAGENET, bicubic=False))
        with self._torch.no_grad():
            return self._network(batch.to(self._device)).cpu().numpy()


class ClipImages:
    """CLIP's image embeddings (the projected ones), by transformers from a local folder."""

    def __init__(self, folder: str | Path):
        """`folder`: with config.json and model.safetensors, as published for openai/clip-vit-base-patch32.

        Raises:
          UserError: torch or transformers is missing, no folder, or no CLIP in it.
        """
        if not (Path(folder) / "config.json").is_file():
            raise UserError(f"{folder} is not a folder with config.json and the weights of a CLIP model: check --clip.")
        self._torch = _torch("the CLIP score")
        try:
            from transformers import CLIPVisionModelWithProjection
        except ImportError as error:
            raise _missing("the CLIP score", "pip install 'transformers>=4.45'", error) from None
        try:
            self._network, report = CLIPVisionModelWithProjection.from_pretrained(
                str(folder), local_files_only=True, output_loading_info=True
            )
        except Exception as error:  # transformers and safetensors raise a dozen kinds for damaged files.
            raise FileFormatError(f"{folder} holds no CLIP model that can be read ({_first_line(error)}).") from None
        if missing := sorted(report["missing_keys"]):
            raise FileFormatError(f"{folder} lacks {missing[0]} of a CLIP vision model: is it one?")
        self._device = _device(self._torch)
        self._network.eval().to(self._device)
        self._side = int(self._network.config.image_size)

    def __call__(self, pictures: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N D"]:
        batch = self._torch.from_numpy(cropped(pictures, *_CLIP, bicubic=True, side=self._side))
        with self._torch.no_grad():
            return self._network(pixel_values=batch.to(self._device)).image_embeds.cpu().numpy()


def cropped(pictures: UInt8[np.ndarray, "N H W 3"], mean, std, *, bicubic: bool, side: int = _CROP) -> np.ndarray:
    """[N, 3, side, side] float32: short side scaled, the middle cut out, normalised."""
    from PIL import Image

    how = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    out = []
    for picture in pictures:
        height, width = picture.shape[:2]
        # Truncated, as both libraries' own preprocessing does it.
        size = tuple(side * length // min(height, width) for length in (width, height))
        left, top = (size[0] - side) // 2, (size[1] - side) // 2
        image = Image.fromarray(picture).resize(size, how).crop((left, top, left + side, top + side))
        out.append((np.asarray(image, np.float32) / 255 - np.float32(mean)) / np.float32(std))
    return np.ascontiguousarray(np.stack(out).transpose(0, 3, 1, 2))


def _load(network: Any, weights: dict[str, np.ndarray], path: str | Path, what: str, torch: Any) -> None:
    """Gives a torch module its parameters. Raises FileFormatError if they are not its own."""
    try:
        network.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in weights.items()})
    except RuntimeError as error:
        raise FileFormatError(f"{path} is not {what} ({_first_line(error)}).") from None
    network.requires_grad_(False)


def _torch(what: str) -> Any:
    try:
        import torch
    except ImportError as error:
        raise _missing(what, "pip install torch", error) from None
    return torch


def _device(torch: Any) -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _missing(what: str, command: str, error: ImportError) -> UserError:
    return UserError(f"{what} needs a library that is not there ({error}): {command}")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[min(1, len(lines) - 1) if lines else 0][:200]


@contextlib.contextmanager
def _submodules(package: str, what: str, command: str) -> Iterator[None]:
    """Lets modules of a package be imported without running the package's own __init__."""
    if package in sys.modules:
        yield
        return
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{what} needs a library that is not there ({package}): {command}")
    bare = types.ModuleType(package)
    bare.__path__ = list(spec.submodule_search_locations)
    sys.modules[package] = bare
    try:
        yield
    finally:
        # Whoever imports the package later gets all of it.
        for name in [n for n in sys.modules if n == package or n.startswith(package + ".")]:
            del sys.modules[name]


def _sixdrepnet() -> Any:
    """sixdrepnet's `model` module, which imports its neighbours by their bare names."""
    command = "pip install --no-deps sixdrepnet opencv-python-headless"
    spec = importlib.util.find_spec("sixdrepnet")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"APD needs a library that is not there (sixdrepnet): {command}")
    names = ("model", "utils", "backbone", "backbone.repvgg", "backbone.se_block")
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, next(iter(spec.submodule_search_locations)))
    try:
        return importlib.import_module("model")
    except ImportError as error:
        raise _missing("APD", command, error) from None
    finally:
        sys.path.pop(0)
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(others)
