"""Rigged fits on disk, in GaussianAvatars' layout: `point_cloud.ply` (triangle-local) beside `flame_param.npz`."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import numpy as np

from pointillist_jax.files import FileFormatError, UserError, atomic_folder
from pointillist_jax.flame import FlameModel, FlameParams, face_frames, flame_vertices, local_to_global
from pointillist_jax.flame.param_files import load_flame_params, save_flame_params
from pointillist_jax.gaussians import Gaussians, load_ply, save_ply


@dataclasses.dataclass(frozen=True)
class RiggedFit:
    """One person as Gaussians on the faces of a head (facts/avatars_gsplat.md A.6).

    Attributes:
      gaussians: triangle-local, `binding` set.
      params: of the T timesteps it was fitted to: everything [T, ...] but shape [S] and static_offset.
      folder: where it was read from.
    """

    gaussians: Gaussians
    params: FlameParams
    folder: Path

    @property
    def identity(self) -> FlameParams:
        """The person's parameters without a time axis: those of the first timestep."""
        return self.params.timestep(0)

    def canonical(self, model: FlameModel, jaw: float) -> tuple[FlameParams, Gaussians]:
        """Parameters of the identity's canonical mesh (jaw open by `jaw` radians), and the Gaussians around it."""
        params = self.identity.canonical(jaw)
        return params, local_to_global(self.gaussians, face_frames(flame_vertices(model, params), model.faces))


def load_fit(path: str | os.PathLike, model: FlameModel) -> RiggedFit:
    """Reads a fit: a folder with `point_cloud.ply` and `flame_param.npz`, or GaussianAvatars' model folder.

    Of a model folder (`point_cloud/iteration_<N>/`) the last iteration is taken; of a synthetic person, the truth.

    Raises:
      FileNotFoundError: no fit there.
      FileFormatError: names file and field; a file without Gaussians or not bound to faces; faces the head does not
        have.
    """
    folder = fit_folder(path)
    gaussians = load_ply(folder / "point_cloud.ply", num_faces=model.num_faces)
    if gaussians.binding is None:
        raise FileFormatError(
            f"{folder / 'point_cloud.ply'} has no binding_0: it is a plain 3DGS file, not Gaussians rigged to a head."
        )
    if not gaussians.num_gaussians:
        raise FileFormatError(f"{folder / 'point_cloud.ply'} holds no Gaussians; fit again, or leave the subject out.")
    return RiggedFit(gaussians, load_flame_params(folder / "flame_param.npz", model), folder)


def save_fit(folder: str | os.PathLike, gaussians: Gaussians, params: FlameParams, model: FlameModel) -> None:
    """Writes both files; the folder appears at once, in place of an older one.

    Args:
      folder: for GaussianAvatars' viewer, `<model>/point_cloud/iteration_<N>`.
      gaussians: triangle-local, with `binding`.
      params: one identity over T timesteps, or one without a time axis.
      model: the head.
    """
    if gaussians.binding is None:
        raise UserError("save_fit takes triangle-local Gaussians, which carry a binding: use global_to_local first.")
    if gaussians.num_gaussians and int(np.max(gaussians.binding)) >= model.num_faces:
        raise UserError(f"a binding names face {int(np.max(gaussians.binding))}; the head has {model.num_faces} faces.")
    with atomic_folder(folder) as temporary:
        save_ply(temporary / "point_cloud.ply", gaussians)
        save_flame_params(temporary / "flame_param.npz", params, model, dynamic_offset=True)


def fit_folder(path: str | os.PathLike) -> Path:
    """The folder in which `load_fit` finds point_cloud.ply. Raises FileNotFoundError."""
    folder = _fit_folder(Path(path))
    if folder is None:
        raise FileNotFoundError(
            f"{path} holds no fit; expected point_cloud.ply, there or in point_cloud/iteration_<N>/: check the path."
        )
    return folder


def find_fits(root: str | os.PathLike) -> dict[str, Path]:
    """Subject name → folder to pass to `load_fit`, for one fit or a folder of subjects, sorted by name.

    Raises:
      FileNotFoundError: none there.
    """
    root = Path(root)
    if _fit_folder(root):
        return {root.resolve().name: root}
    children = sorted(root.iterdir()) if root.is_dir() else []
    found = {child.name: child for child in children if not child.name.startswith(".") and _fit_folder(child)}
    if not found:
        raise FileNotFoundError(
            f"{root} holds no fits; expected <subject>/point_cloud/iteration_<N>/point_cloud.ply or "
            "<subject>/point_cloud.ply: check the path."
        )
    return found


def _fit_folder(path: Path) -> Path | None:
    iterations = {
        int(match[1]): child
        for child in (path / "point_cloud").glob("iteration_*")
        if (match := re.fullmatch(r"iteration_(\d{1,12})", child.name))
    }
    last = [iterations[n] for n in sorted(iterations, reverse=True)]
    return next((c for c in (path, *last, path / "truth") if (c / "point_cloud.ply").is_file()), None)
