"""From a rigged fit on disk to what the token store holds: canonical points, tokens, portrait (DESIGN §2)."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pointillist_jax.data.captures import load_capture
from pointillist_jax.data.fits import fit_folder, load_fit
from pointillist_jax.data.images import check_header, load_rgba, square_portrait
from pointillist_jax.data.template_space import canonical_frames, template_canonical
from pointillist_jax.data.token_store import FLAME_FIELDS, StoreSpec, SubjectRecord
from pointillist_jax.files import FileFormatError, UserError, file_sha256
from pointillist_jax.flame import FlameModel, FlameParams
from pointillist_jax.flame.param_files import load_flame_params
from pointillist_jax.ply import check_ply

_COLUMNS = {"x", "y", "z", "opacity", "scale_2", "rot_3", "f_dc_2", "binding_0"}


@dataclasses.dataclass(frozen=True)
class Portrait:
    """The photograph a subject is generated from.

    Attributes:
      image: [side, side, 3] uint8, on white.
      flame: its tracked parameters, name → [n] float32 (`FLAME_FIELDS`).
      source: the picture's file.
    """

    image: np.ndarray
    flame: Mapping[str, np.ndarray]
    source: Path


def subject_record(
    name: str, folder: str | os.PathLike, model: FlameModel, spec: StoreSpec, portrait: Portrait | None = None
) -> SubjectRecord:
    """Tokenises one fit: its Gaussians' centres around the identity's canonical mesh, or that of the mean shape.

    Args:
      name: the subject's.
      folder: anything `fits.load_fit` reads.
      model: the head; its sha256 has to be the spec's.
      spec: of the store.
      portrait: from `find_portrait`.

    Raises:
      FileNotFoundError, FileFormatError: as `load_fit`.
      UserError: points outside the cube (counted, the fix named), or another head than the spec's.
    """
    if model.sha256 != spec.flame_sha256 or model.num_faces != spec.tokenizer.num_faces:
        raise UserError(
            f"the head {model.source} ({model.num_faces} faces, sha256 {model.sha256[:12]}) is not the store's "
            f"({spec.tokenizer.num_faces} faces, sha256 {spec.flame_sha256[:12]})."
        )
    fit, t = load_fit(folder, model), spec.tokenizer
    canonical = fit.identity.canonical(spec.canonical_jaw)
    binding = np.asarray(fit.gaussians.binding)
    # `local_to_global` of the centres alone, in NumPy: JAX would compile anew for every number of Gaussians.
    around = canonical if spec.space == "identity" else template_canonical(model, spec.canonical_jaw)
    frames = canonical_frames(model, around)
    local = np.asarray(fit.gaussians.means)
    if spec.keep < 1:
        kept = _kept_points(name, len(local), spec.keep)
        binding, local = binding[kept], local[kept]
    turned = np.einsum("pab,pb->pa", frames.rotation[binding], local)
    points = frames.scale[binding][:, None] * turned + frames.center[binding]
    try:
        tokens = t.encode(points, binding, out_of_bounds=spec.out_of_bounds)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    # As PointTokenizer.quantize counts: a float32 on the border may lie half a step beyond it.
    slack = np.abs([t.lower, t.upper]).max() * 1e-7
    outside = ((points < np.array(t.lower) - slack) | (points > np.array(t.upper) + slack)).any(axis=1)
    offset = fit.params.static_offset
    return SubjectRecord(
        name=name,
        tokens=tokens,
        shape=np.asarray(fit.params.shape),
        static_offset=None if offset is None else np.asarray(offset),
        portrait=None if portrait is None else portrait.image,
        flame=flame_fields(canonical) if portrait is None else portrait.flame,
        num_clipped=int(outside.sum()),
        fit_sha256=file_sha256(fit.folder / "point_cloud.ply"),
    )


def find_portrait(folders: Sequence[str | os.PathLike], model: FlameModel, side: int) -> Portrait | None:
    """The portrait of a subject, from the first of `folders` that has one.

    A folder has one if it holds `portrait.png` with `portrait_flame_param.npz`, or if it is a capture: then it is the
    view of the held-out frontal camera (split "val") at the calmest timestep, the one of smallest expression and jaw.

    Args:
      folders: where to look, e.g. the fit's folder and the capture's.
      model: the head.
      side: of the square picture, pixels.

    Raises:
      FileFormatError: half a portrait (one of the two files), or damaged files.
      CaptureError: as `load_capture`.
    """
    for folder in map(Path, folders):
        if found := _own_portrait(folder, model):
            image, flame = found
            return Portrait(square_portrait(load_rgba(image), side), flame_fields(flame, 0), image)
        if (folder / "transforms_val.json").is_file() and (portrait := _capture_portrait(folder, model, side)):
            return portrait
    return None


def check_subject(folder: str | os.PathLike, model: FlameModel, portraits: Sequence[str | os.PathLike] = ()) -> None:
    """Most of what would stop `subject_record` or `find_portrait`, found in milliseconds: by headers and small files.

    Args:
      folder, model: as `subject_record`.
      portraits: folders, as `find_portrait`.

    Raises:
      FileNotFoundError, FileFormatError: as those two.
    """
    folder = fit_folder(folder)
    count, columns, _ = check_ply(folder / "point_cloud.ply")
    if not count or _COLUMNS - set(columns.names):
        load_fit(folder, model)  # Says what it is instead.
    load_flame_params(folder / "flame_param.npz", model)
    for place in map(Path, portraits):
        if found := _own_portrait(place, model):
            check_header(found[0])
            return


def _own_portrait(folder: Path, model: FlameModel) -> tuple[Path, FlameParams] | None:
    """`portrait.png` of a folder and what it shows, if it lies there."""
    image, params = folder / "portrait.png", folder / "portrait_flame_param.npz"
    if image.is_file() != params.is_file():
        there, missing = (image, params) if image.is_file() else (params, image)
        raise FileFormatError(f"{there} lies alone: {missing.name} is missing beside it; add it or remove both.")
    if not image.is_file():
        return None
    flame = load_flame_params(params, model)
    if (timesteps := len(flame.expr)) != 1:
        raise FileFormatError(f"{params} holds {timesteps} timesteps, expected the one of {image.name}.")
    return image, flame


def _kept_points(name: str, num: int, keep: float) -> np.ndarray:
    """Indices, in order, of a share of `num` points: by the subject's name, so that a store is the same wherever and
    in whatever order it is built."""
    seed = np.frombuffer(hashlib.sha256(name.encode()).digest(), np.uint32)
    count = min(num, max(1, round(keep * num)))
    return np.sort(np.random.default_rng(seed).choice(num, count, replace=False))


def flame_fields(params: FlameParams, t: int | None = None) -> dict[str, np.ndarray]:
    """FLAME parameters as NumPy by name, without the static offset; of timestep t if they have a time axis."""
    fields = {}
    for name in FLAME_FIELDS:
        value = np.asarray(getattr(params, name), np.float32)
        fields[name] = value if t is None or name == "shape" else value[t]
    return fields


def _capture_portrait(folder: Path, model: FlameModel, side: int) -> Portrait | None:
    # One picture and its parameters: neither its camera nor other sequences of a UNION set matter.
    capture = load_capture(folder, model, splits=("val",), identity="first", cy_from_bottom=False, cache_bytes=0)
    views, params = capture.split("val"), capture.params
    if not len(views):
        return None
    strength = np.linalg.norm(np.asarray(params.expr), axis=1) + np.linalg.norm(np.asarray(params.jaw_pose), axis=1)
    n = int(np.argmin(strength[views.timesteps]))
    flame = flame_fields(params, int(views.timesteps[n]))
    return Portrait(square_portrait(views.rgba(n), side), flame, views.image_paths[n])
