"""Head models in FLAME's layout: the pytrees, their files, and the free default (DESIGN §3).

Letters: V vertices, F faces, J = 5 joints (root, neck, jaw, left eye, right eye), S shape, E expression coefficients.
"""

from __future__ import annotations

import functools
import os
from importlib import resources
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pointillist_jax.files import (
    ArraySpec,
    FileFormatError,
    UserError,
    check_array,
    file_sha256,
    read_npz,
    require_file,
    write_npz,
)
from pointillist_jax.flame import teeth as tooth
from pointillist_jax.flame.unpickle import load_flame_pickle

JOINTS = ("root", "neck", "jaw", "left_eye", "right_eye")
FLAME_SHAPE_DIRS, FLAME_EXPR_DIRS = 300, 100
# FLAME files are at most ~110 MB (float64, all directions); anything far larger is not one.
_MAX_FILE_BYTES = 1 << 30


@flax.struct.dataclass
class FlameModel:
    """A head model: a template, linear shape and expression directions, pose correctives and a five-joint skeleton.

    Metres; x to the subject's left, y up, z to the viewer.

    Attributes:
      v_template: [V, 3].
      faces: [F, 3] int32, outward-facing.
      shape_dirs: [V, 3, S].
      expr_dirs: [V, 3, E].
      pose_dirs: [V, 3, 36] correctives, driven by the rotation matrices of joints 1–4 minus identity.
      joint_regressor: [J, V], applied to the shaped mesh.
      skin_weights: [V, J], rows sum to 1.
      face_regions: [F] int32 index into `region_names`.
      parents: parent of each joint, -1 for the root (static).
      expr_names: one name per expression direction (static).
      region_names: names of the face regions (static).
      source: where the model came from (static).
      sha256: of the file it was read from (static).
    """

    v_template: Float[Array, "V 3"]
    faces: Int[Array, "F 3"]
    shape_dirs: Float[Array, "V 3 S"]
    expr_dirs: Float[Array, "V 3 E"]
    pose_dirs: Float[Array, "V 3 36"]
    joint_regressor: Float[Array, "J V"]
    skin_weights: Float[Array, "V J"]
    face_regions: Int[Array, "F"]
    parents: tuple[int, ...] = flax.struct.field(pytree_node=False)
    expr_names: tuple[str, ...] = flax.struct.field(pytree_node=False)
    region_names: tuple[str, ...] = flax.struct.field(pytree_node=False)
    source: str = flax.struct.field(pytree_node=False, default="")
    sha256: str = flax.struct.field(pytree_node=False, default="")

    @property
    def num_vertices(self) -> int:
        return self.v_template.shape[0]

    @property
    def num_faces(self) -> int:
        return self.faces.shape[0]

    def astype(self, dtype: Any) -> FlameModel:
        """The same model with its floating arrays in `dtype` (float64 needs jax_enable_x64)."""
        return jax.tree.map(lambda x: jnp.asarray(x, dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, self)

    def neutral_params(self, batch_shape: tuple[int, ...] = ()) -> FlameParams:
        """Zero shape, expression, pose and translation, with leading axes `batch_shape`, in the model's dtype."""

        def zeros(n: int) -> Array:
            return jnp.zeros((*batch_shape, n), self.v_template.dtype)

        return FlameParams(
            shape=zeros(self.shape_dirs.shape[-1]),
            expr=zeros(self.expr_dirs.shape[-1]),
            rotation=zeros(3),
            neck_pose=zeros(3),
            jaw_pose=zeros(3),
            eyes_pose=zeros(6),
            translation=zeros(3),
        )

    def region_faces(self, *names: str) -> np.ndarray:
        """Indices of the faces in any of the named regions. Raises UserError for a name the model does not have."""
        if unknown := [name for name in names if name not in self.region_names]:
            raise UserError(f"no face region {unknown[0]!r} in {self.source}; it has: {', '.join(self.region_names)}.")
        wanted = [self.region_names.index(name) for name in names]
        return np.flatnonzero(np.isin(np.asarray(self.face_regions), wanted))


@flax.struct.dataclass
class FlameParams:
    """What poses a head. Angles are axis-angle radians; leading axes of the fields broadcast against each other.

    Attributes:
      shape: [..., S] identity coefficients.
      expr: [..., E] expression coefficients.
      rotation: [..., 3] global rotation about the root joint.
      neck_pose, jaw_pose: [..., 3].
      eyes_pose: [..., 6] left eye, then right eye.
      translation: [..., 3] metres, added after everything else.
      static_offset: [..., V, 3] metres added to the template, or None.
    """

    shape: Float[Array, "*b S"]
    expr: Float[Array, "*b E"]
    rotation: Float[Array, "*b 3"]
    neck_pose: Float[Array, "*b 3"]
    jaw_pose: Float[Array, "*b 3"]
    eyes_pose: Float[Array, "*b 6"]
    translation: Float[Array, "*b 3"]
    static_offset: Float[Array, "*b V 3"] | None = None

    def canonical(self, jaw: float = 0.3) -> FlameParams:
        """This identity in the canonical pose: zero expression, pose and translation, the jaw open by `jaw` radians.

        DESIGN §3 (ours): 0.3 is the open mouth of the exporters of existing captures; 0 closes it.
        """
        zero = {
            name: jnp.zeros_like(getattr(self, name))
            for name in ("expr", "rotation", "neck_pose", "eyes_pose", "translation")
        }
        opened = jnp.broadcast_to(jnp.asarray([jaw, 0.0, 0.0], self.jaw_pose.dtype), self.jaw_pose.shape)
        return self.replace(jaw_pose=opened, **zero)

    def timestep(self, t: int | Int[Array, ""]) -> FlameParams:
        """One timestep of one identity's motion: everything but shape and static offset has a leading axis [T]."""
        timed = ("expr", "rotation", "neck_pose", "jaw_pose", "eyes_pose", "translation")
        return self.replace(**{name: getattr(self, name)[t] for name in timed})


def load_flame(
    path: str | os.PathLike, *, n_shape: int = FLAME_SHAPE_DIRS, n_expr: int = FLAME_EXPR_DIRS, teeth: bool = True
) -> FlameModel:
    """Reads a FLAME `.pkl` (2020, 2023, 2023 Open; old chumpy files too) or a `.npz` written by `save_flame`.

    The file is untrusted: the pickle goes through a restricted unpickler that runs nothing.

    Args:
      path: the file; the user's own, FLAME is never shipped.
      n_shape, n_expr: how many of the (at most 300 and 100) directions to keep.
      teeth: add the 120 vertices and 168 faces of GaussianAvatars to a `.pkl` (5143 vertices, 10144 faces). A `.npz` is
        taken as it is.

    Raises:
      FileNotFoundError: no such file.
      UnsafeFileError: a pickle that wants to run code.
      FileFormatError: names file, key, expected and found.
    """
    path = require_file(path, "a FLAME .pkl or a head model .npz")
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise FileFormatError(
            f"{path} is {path.stat().st_size >> 20} MiB, far more than a FLAME model; check the path."
        )
    if not (0 <= n_shape <= FLAME_SHAPE_DIRS and 0 <= n_expr <= FLAME_EXPR_DIRS):
        raise UserError(
            f"n_shape={n_shape} must lie in 0..{FLAME_SHAPE_DIRS}, n_expr={n_expr} in 0..{FLAME_EXPR_DIRS}."
        )
    if path.suffix.lower() == ".npz":
        return _trim(_load_npz(path), n_shape, n_expr)
    arrays = _check_pickle(load_flame_pickle(path.read_bytes(), str(path), _PICKLE), str(path))
    model = FlameModel(
        **arrays,
        expr_names=tuple(f"expr_{i:02d}" for i in range(arrays["expr_dirs"].shape[-1])),
        region_names=("head",),
        source=path.name,
        sha256=file_sha256(path),
    )
    model = _trim(model, n_shape, n_expr)
    return _to_jax(add_teeth(model) if teeth else model)


def save_flame(path: str | os.PathLike, model: FlameModel) -> None:
    """Writes a model as `.npz`, byte for byte the same for the same model."""
    arrays = {key: np.asarray(getattr(model, key)) for key in _NPZ if key not in _STATIC}
    arrays["parents"] = np.array(model.parents, np.int32)
    arrays["expr_names"] = np.array(model.expr_names, dtype=np.str_)
    arrays["region_names"] = np.array(model.region_names, dtype=np.str_)
    write_npz(path, arrays)


@functools.lru_cache(maxsize=2)
def open_head(detail: str = "full") -> FlameModel:
    """The free head that stands in for FLAME everywhere (facts/open_head.md; CC0, see flame/OPEN_HEAD.md).

    Args:
      detail: "full" (≈ 9,500 faces, like FLAME) or "coarse" (≈ 2,500 faces, for laptops).
    """
    if detail not in ("full", "coarse"):
        raise UserError(f'open_head(detail={detail!r}): detail must be "full" or "coarse".')
    resource = resources.files("pointillist_jax.flame").joinpath("open_head.npz")
    with resources.as_file(resource) as path:
        return _load_npz(path, prefix=f"{detail}_").replace(source=f"open_head({detail})")


def add_teeth(model: FlameModel) -> FlameModel:
    """FLAME's 5023 vertices and 9976 faces → 5143 and 10144 (facts A.1). Raises UserError for another topology."""
    if (model.num_vertices, model.num_faces) != (tooth.FLAME_VERTICES, tooth.FLAME_FACES):
        raise UserError(
            f"{model.source} has {model.num_vertices} vertices and {model.num_faces} faces; teeth can only be added to "
            "FLAME's 5023 and 9976: load it with teeth=False."
        )
    v_template, shape_dirs = np.asarray(model.v_template), np.asarray(model.shape_dirs)

    def rows(array: Array) -> np.ndarray:
        array = np.asarray(array)
        zeros = np.zeros((tooth.NUM_TEETH_VERTICES, *array.shape[1:]), array.dtype)
        return np.concatenate([array, zeros])

    return model.replace(
        v_template=np.concatenate([v_template, tooth.teeth_vertices(v_template)]),
        faces=np.concatenate([np.asarray(model.faces), tooth.teeth_faces()]),
        shape_dirs=np.concatenate([shape_dirs, tooth.teeth_shape_dirs(shape_dirs)]),
        expr_dirs=rows(model.expr_dirs),
        pose_dirs=rows(model.pose_dirs),
        joint_regressor=rows(np.asarray(model.joint_regressor).T).T,
        skin_weights=np.concatenate([np.asarray(model.skin_weights), tooth.teeth_skin_weights(v_template.dtype)]),
        face_regions=np.concatenate(
            [np.asarray(model.face_regions), np.full(tooth.NUM_TEETH_FACES, len(model.region_names), np.int32)]
        ),
        region_names=(*model.region_names, "teeth"),
    )


# Bound on plausible coordinates: a head in metres, even one whose unit was mistaken for decimetres.
_FAR = 100.0
_NPZ = {
    "v_template": ArraySpec(("V", 3), low=-_FAR, high=_FAR),
    "faces": ArraySpec(("F", 3), "int", low=0),
    "shape_dirs": ArraySpec(("V", 3, "S"), low=-_FAR, high=_FAR),
    "expr_dirs": ArraySpec(("V", 3, "E"), low=-_FAR, high=_FAR),
    "pose_dirs": ArraySpec(("V", 3, 36), low=-_FAR, high=_FAR),
    "joint_regressor": ArraySpec((5, "V"), low=-_FAR, high=_FAR),
    "skin_weights": ArraySpec(("V", 5), low=-1e-4, high=1 + 1e-4),
    "face_regions": ArraySpec(("F",), "int", low=0),
    "parents": ArraySpec((5,), "int", low=-1, high=4),
    "expr_names": ArraySpec(("E",), "str"),
    "region_names": ArraySpec((None,), "str"),
}
_PICKLE = {
    "v_template": ArraySpec(("V", 3), low=-_FAR, high=_FAR),
    "f": ArraySpec(("F", 3), "int", low=0),
    "shapedirs": ArraySpec(("V", 3, FLAME_SHAPE_DIRS + FLAME_EXPR_DIRS), low=-_FAR, high=_FAR),
    "posedirs": ArraySpec(("V", 3, 36), low=-_FAR, high=_FAR),
    "J_regressor": ArraySpec((5, "V"), low=-_FAR, high=_FAR),
    "weights": ArraySpec(("V", 5), low=-1e-4, high=1 + 1e-4),
    "kintree_table": ArraySpec((2, 5), "int"),
}
_STATIC = ("parents", "expr_names", "region_names")


def _load_npz(path: Path, prefix: str = "") -> FlameModel:
    specs = {prefix + key: spec for key, spec in _NPZ.items()}
    arrays = {key.removeprefix(prefix): value for key, value in read_npz(path, specs, "a head model .npz").items()}
    names = {key: tuple(str(name) for name in arrays.pop(key)) for key in ("expr_names", "region_names")}
    parents = tuple(int(p) for p in arrays.pop("parents"))
    _check_geometry(arrays, parents, str(path))
    if arrays["face_regions"].size and arrays["face_regions"].max() >= len(names["region_names"]):
        raise FileFormatError(f"{path}: face_regions names region {arrays['face_regions'].max()}, which has no name.")
    return _to_jax(FlameModel(**arrays, **names, parents=parents, source=path.name, sha256=file_sha256(path)))


def _check_pickle(content: dict[str, np.ndarray], source: str) -> dict[str, Any]:
    """FLAME's arrays → the array fields and parents of FlameModel, as NumPy, checked."""
    arrays, letters = {}, {}
    for key, spec in _PICKLE.items():
        value = content[key]
        # Old files keep index arrays as floats.
        if spec.kind == "int" and value.dtype.kind == "f" and np.array_equal(value, np.round(value)):
            value = value.astype(np.int64)
        check_array(source, key, value, spec, letters)
        arrays[key] = value
    # The root's parent is stored as 2³² - 1.
    parents = (-1, *(int(p) for p in arrays["kintree_table"][0][1:]))
    shape_dirs, expr_dirs = np.split(arrays["shapedirs"], [FLAME_SHAPE_DIRS], axis=-1)
    fields = {
        "v_template": arrays["v_template"],
        "faces": arrays["f"],
        "shape_dirs": shape_dirs,
        "expr_dirs": expr_dirs,
        "pose_dirs": arrays["posedirs"],
        "joint_regressor": arrays["J_regressor"],
        "skin_weights": arrays["weights"],
        "face_regions": np.zeros(len(arrays["f"]), np.int32),
    }
    _check_geometry(fields, parents, source)
    return {**fields, "parents": parents}


def _check_geometry(arrays: dict[str, np.ndarray], parents: tuple[int, ...], source: str) -> None:
    v = len(arrays["v_template"])
    if arrays["faces"].size and arrays["faces"].max() >= v:
        raise FileFormatError(f"{source}: faces refer to vertex {arrays['faces'].max()}, but there are {v} vertices.")
    if any(not 0 <= p < j for j, p in enumerate(parents) if j):
        raise FileFormatError(f"{source}: joint parents are {parents}; every parent must come before its child.")
    off = np.abs(arrays["skin_weights"].sum(axis=1, dtype=np.float64) - 1).max(initial=0)
    if off > 1e-3:
        raise FileFormatError(f"{source}: skinning weights of a vertex sum to 1 ± {off:.3g}; the file is damaged.")


def _trim(model: FlameModel, n_shape: int, n_expr: int) -> FlameModel:
    return model.replace(
        shape_dirs=model.shape_dirs[..., :n_shape],
        expr_dirs=model.expr_dirs[..., :n_expr],
        expr_names=model.expr_names[:n_expr],
    )


def _to_jax(model: FlameModel) -> FlameModel:
    """Moves the arrays to the default device, in float64 if the file has it and jax_enable_x64 is set, else float32."""
    floats = [x.dtype for x in jax.tree.leaves(model) if np.issubdtype(x.dtype, np.floating)]
    dtype = np.result_type(np.float32, *floats)

    def convert(x):
        wanted = dtype if np.issubdtype(x.dtype, np.floating) else np.int32
        return jnp.asarray(np.ascontiguousarray(x, wanted))

    # Loading may happen while a caller is being traced; a cached model must never hold that trace's values.
    with jax.ensure_compile_time_eval():
        return jax.tree.map(convert, model)
