"""Capture folders in the GaussianAvatars/VHAP schema: checked whole before use, images streamed (facts A.8).

A capture is many photographs of one person with known cameras and a tracked head for every timestep. Ours (synthetic
people) and users' (NeRSemble exports, UNION sets with `../<sequence>/…` paths) are read alike.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from pointillist_jax.cameras import Camera, Frame, load_transforms, warn_of_cy
from pointillist_jax.data.images import ImageCache, check_header
from pointillist_jax.files import FileFormatError, UserError, read_json
from pointillist_jax.flame.model import FlameModel, FlameParams
from pointillist_jax.flame.param_files import load_flame_params

_log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
# As many problems as fit on a screen are told, but of no kind fewer than a few.
_PRINTED_PROBLEMS, _PRINTED_OF_A_KIND = 20, 3
# Exporters write float32 copies of the same identity into every timestep's file.
_SAME_IDENTITY = 1e-5


class CaptureError(UserError):
    """A capture that cannot be used as it is. Tells every kind of problem that it has, with examples and counts.

    Attributes:
      problems: all of them, one sentence each. A message that leaves some out names a file that lists them.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()):
        super().__init__(message)
        self.problems = tuple(problems)


@dataclasses.dataclass(frozen=True)
class CaptureSplit:
    """The views of one split. N views; image n was taken by `camera_indices[n]` at `timesteps[n]`.

    Attributes:
      name: "train", "val" or "test".
      viewmats: [N, 4, 4] float32 world to camera, OpenCV axes.
      Ks: [N, 3, 3] float32 pixels, already of the size the images are returned in.
      sizes: [N, 2] int32 width and height of the returned images.
      timesteps: [N] int32 row of `Capture.params`.
      camera_indices: [N] int32 as the capture numbers its cameras.
      image_paths, mask_paths: N each; a mask may be None.
    """

    name: str
    viewmats: Float[np.ndarray, "N 4 4"]
    Ks: Float[np.ndarray, "N 3 3"]
    sizes: Int[np.ndarray, "N 2"]
    timesteps: Int[np.ndarray, "N"]
    camera_indices: Int[np.ndarray, "N"]
    image_paths: tuple[Path, ...]
    mask_paths: tuple[Path | None, ...]
    file_sizes: Int[np.ndarray, "N 2"]
    cache: ImageCache

    def __len__(self) -> int:
        return len(self.timesteps)

    def camera(self, n: int) -> Camera:
        """The camera of view n."""
        return Camera(jnp.asarray(self.viewmats[n]), jnp.asarray(self.Ks[n]), *(int(x) for x in self.sizes[n]))

    def rgba(self, n: int) -> np.ndarray:
        """uint8 [H, W, 4]: colour multiplied by the mask, and the mask. Shared with the cache: do not write to it.

        Raises:
          FileFormatError: the image changed on disk since it was checked, or cannot be decoded.
        """
        return self.cache.get(
            self.image_paths[n], self.mask_paths[n], tuple(self.file_sizes[n].tolist()), tuple(self.sizes[n].tolist())
        )

    def image(self, n: int, background: float | Sequence[float] = 1.0) -> Float[np.ndarray, "H W 3"]:
        """View n as float32 in [0, 1], the person cut out by the mask on `background` (one grey value or RGB)."""
        rgba = self.rgba(n).astype(np.float32) / 255
        return rgba[..., :3] + np.asarray(background, np.float32) * (1 - rgba[..., 3:])

    def image_uint8(self, n: int) -> np.ndarray:
        """View n as uint8 [H, W, 3] on white."""
        rgba = self.rgba(n)
        return rgba[..., :3] + (255 - rgba[..., 3:])

    def mask(self, n: int) -> Float[np.ndarray, "H W"]:
        """The foreground of view n, float32 in [0, 1]; all ones where the capture has neither mask nor alpha."""
        return self.rgba(n)[..., 3].astype(np.float32) / 255


@dataclasses.dataclass(frozen=True)
class Capture:
    """One person's capture.

    Attributes:
      root: its folder.
      subject: the folder's name.
      params: FlameParams of all T timesteps of all splits: `shape [S]` and `static_offset [V, 3]` (or None) are the
        person's, everything else has a leading axis T. Row t is timestep `timestep_indices[t]`.
      canonical: the same person in the canonical pose the exporter wrote, without leading axes.
      timestep_indices: [T] as the capture numbers its timesteps. Not unique when splits are numbered independently.
      extent: 1.1 × the largest distance of a training camera from their mean centre, metres (facts A.4).
      splits: name → CaptureSplit.
    """

    root: Path
    subject: str
    params: FlameParams
    canonical: FlameParams
    timestep_indices: Int[np.ndarray, "T"]
    extent: float
    splits: dict[str, CaptureSplit]

    def split(self, name: str) -> CaptureSplit:
        """The views of "train", "val" or "test". Raises UserError for a split the capture was loaded without."""
        if name not in self.splits:
            raise UserError(f"{self.root} has no split {name!r}; it has: {', '.join(self.splits)}.")
        return self.splits[name]

    @property
    def num_timesteps(self) -> int:
        return len(self.timestep_indices)


def load_capture(
    root: str | os.PathLike,
    model: FlameModel,
    *,
    splits: Sequence[str] = SPLITS,
    resize: tuple[int, int] | None = None,
    downscale: int = 1,
    identity: str = "check",
    cy_from_bottom: bool | None = None,
    cache_bytes: int = 1 << 30,
) -> Capture:
    """Reads and checks a capture folder. Of images and masks header and end are checked; no pixel is decoded yet.

    Args:
      root: the folder with transforms_train.json and so on (facts/avatars_gsplat.md A.8). Untrusted.
      model: the head its FLAME parameters belong to.
      splits: which transforms_<split>.json have to exist and are read. Only "train" has to hold frames.
      resize: (width, height) in pixels to return all images in, or None for their own. Shrinks by area averaging.
      downscale: divides each image's own size instead; 1 keeps it.
      identity: "check" demands the same shape and static offset in every timestep's file of a sequence; of a UNION
        set's sequences, tracked apart, the first one's is taken with a warning. "first" takes the first in any case, as
        GaussianAvatars does.
      cy_from_bottom: see `cameras.load_transforms`; one warning for all splits.
      cache_bytes: bound on the decoded images kept in memory, shared by the splits.

    Raises:
      FileNotFoundError: no such folder.
      CaptureError: every problem found: missing or truncated files, images of another size than stated, damaged
        frames, NaN in FLAME files, indices that are missing or contradict each other.
      UserError: bad arguments.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; expected a capture (transforms_train.json, images/, …).")
    if identity not in ("check", "first"):
        raise UserError(f'identity={identity!r} must be "check" or "first".')
    if not splits or any(split not in SPLITS for split in splits):
        raise UserError(f"splits={tuple(splits)} must be some of {SPLITS}.")
    if downscale < 1 or (resize is not None and (downscale != 1 or min(resize) < 1)):
        raise UserError(f"resize={resize} and downscale={downscale}: give one of them, at least one pixel.")

    problems: list[str] = []
    frames = {split: _load_split(root, split, bool(cy_from_bottom), problems) for split in splits}
    every = [frame for split in frames.values() for frame in split]
    _check_timesteps(frames, problems)
    # Two sequences of a UNION set may count their timesteps alike: the FLAME file is what tells timesteps apart.
    files = {f.flame_param_path: f.timestep_index or 0 for f in every if f.flame_param_path}
    files = dict(sorted(files.items(), key=lambda item: (item[1], str(item[0]))))
    params, sequences = _load_params(files, model, identity, problems)
    canonical = _load_canonical(root / "canonical_flame_param.npz", model, sequences, identity, problems)
    _check_images(every, problems)
    if problems:
        raise CaptureError(_message(root, problems), problems)
    if cy_from_bottom is None:
        warn_of_cy(root, every)

    cache = ImageCache(cache_bytes)
    rows = {path: row for row, path in enumerate(files)}
    views = {name: _make_split(name, split, rows, resize, downscale, cache) for name, split in frames.items()}
    return Capture(
        root=root,
        subject=root.resolve().name,
        params=params,
        canonical=canonical,
        timestep_indices=np.array(list(files.values()), np.int32),
        extent=cameras_extent(views["train" if "train" in views else splits[0]].viewmats),
        splits=views,
    )


def find_captures(root: str | os.PathLike) -> dict[str, Path]:
    """Subject → capture folder, of one capture or a folder of captures, sorted by name.

    Warns of folders that hold parts of a capture but no transforms_train.json, and leaves them out.

    Raises:
      UserError: none there.
    """
    root = Path(root)
    if (root / "transforms_train.json").is_file():
        return {root.resolve().name: root}
    children = [c for c in sorted(root.iterdir()) if not c.name.startswith(".")] if root.is_dir() else []
    found = {c.name: c for c in children if (c / "transforms_train.json").is_file()}
    if broken := [c.name for c in children if c.name not in found and _is_part_of_a_capture(c)]:
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        _log.warning(
            "%s: %s%s left out: without transforms_train.json it is no capture; export it again, or move it away.",
            root,
            ", ".join(broken[:5]),
            more,
        )
    if not found:
        raise UserError(
            f"{root} is no capture and holds none; expected transforms_train.json in it or in its folders: check the "
            "path."
        )
    return found


def cameras_extent(viewmats: Float[np.ndarray, "N 4 4"]) -> float:
    """1.1 × the largest distance of a camera from the mean camera centre, metres (facts A.4).

    Of a single camera that would be zero, and nothing could move: its distance from the origin, where the head is,
    stands in (ours).
    """
    rotation, shift = viewmats[:, :3, :3].astype(np.float64), viewmats[:, :3, 3].astype(np.float64)
    centers = -np.einsum("nba,nb->na", rotation, shift)
    return float(1.1 * np.linalg.norm(centers - centers.mean(axis=0), axis=1).max()) if len(centers) else 0.0


def _is_part_of_a_capture(folder: Path) -> bool:
    return any(folder.glob("transforms*.json")) or any(
        (folder / name).exists() for name in ("images", "canonical_flame_param.npz")
    )


def _message(root: Path, problems: Sequence[str]) -> str:
    """What is wrong, by kind; names a file in the system's temporary folder with all of it if some is left out."""
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(_kind(problem), []).append(problem)
    few = max(_PRINTED_OF_A_KIND, _PRINTED_PROBLEMS // len(kinds))
    if len(problems) <= _PRINTED_PROBLEMS:
        few = len(problems)
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = [f"{root} is not a usable capture, {count}:"]
    for alike in kinds.values():
        lines += [f"  - {problem}" for problem in alike[:few]]
        if len(alike) > few:
            lines.append(f"    … and {len(alike) - few} more like these")
    if any(len(alike) > few for alike in kinds.values()):
        try:
            handle, path = tempfile.mkstemp(".txt", "capture-problems-")
            with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(" ".join(problem.splitlines()) + "\n" for problem in problems)
            lines.append(f"All {len(problems)}, a line each: {path}")
        except OSError as error:
            lines.append(f"The list of all {len(problems)} could not be written: {error}")
    return "\n".join(lines)


def _kind(problem: str) -> str:
    """A problem without what differs from file to file: words with numbers, paths and quoted values."""
    return " ".join(word for word in problem.split() if not re.search(r"[\d/\\'\"]|\w\.\w", word))


def _load_split(root: Path, split: str, cy_from_bottom: bool, problems: list[str]) -> list[Frame]:
    path = root / f"transforms_{split}.json"
    try:
        # A single camera leaves none to hold out: VHAP writes a split without frames then.
        if split != "train" and read_json(path, "a transforms.json").get("frames") == []:
            return []
        frames = load_transforms(path, cy_from_bottom=cy_from_bottom, problems=problems)
    except FileNotFoundError:
        problems.append(f"{path.name} is missing; export this split, or leave it out with splits=.")
        return []
    except FileFormatError as error:
        problems.append(str(error))
        return []
    return [
        dataclasses.replace(f, image_path=_with_suffix(f.image_path), mask_path=_with_suffix(f.mask_path))
        for f in frames
    ]


def _with_suffix(path: Path | None) -> Path | None:
    """NeRF files of other exporters name images without their suffix."""
    return path if path is None or path.suffix or path.exists() else path.with_suffix(".png")


def _check_timesteps(frames: dict[str, list[Frame]], problems: list[str]) -> None:
    """Timesteps and FLAME files have to belong together one to one; splits may be numbered independently."""
    every = [frame for split in frames.values() for frame in split]
    # VHAP always writes timestep_index. Without any, a single tracked head is what all the pictures show.
    single = len({f.flame_param_path for f in every}) <= 1 and all(f.timestep_index is None for f in every)
    timestep_of: dict[Path, tuple[int, str]] = {}
    for split, views in frames.items():
        flame_of: dict[int, Path] = {}
        seen: set[tuple[int, int]] = set()
        for frame in views:
            where, flame = f"transforms_{split}.json: frame {frame.index}", frame.flame_param_path
            t = 0 if single else frame.timestep_index
            if flame is None:
                problems.append(f"{where}: flame_param_path is missing; track the head first (VHAP writes it).")
            if t is None:
                problems.append(f"{where}: timestep_index is missing; number the timesteps of all frames (VHAP does).")
                continue
            if flame is not None and flame_of.setdefault(t, flame) != flame:
                problems.append(
                    f"{where}: timestep_index {t} stands for {flame.name} here and for {flame_of[t]} before; number "
                    "the timesteps of a split uniquely."
                )
            elif flame is not None and (first := timestep_of.setdefault(flame, (t, where)))[0] != t:
                problems.append(
                    f"{where}: {flame} belongs to timestep_index {t} here and to {first[0]} in {first[1]}; give each "
                    "its own."
                )
            if (view := (t, frame.camera_index)) in seen:
                problems.append(f"{where}: timestep {t} of camera {view[1]} appears twice; remove one.")
            seen.add(view)


_PER_TIMESTEP = ("expr", "rotation", "neck_pose", "jaw_pose", "eyes_pose", "translation")


def _load_params(
    files: Iterable[Path], model: FlameModel, identity: str, problems: list[str]
) -> tuple[FlameParams | None, list[FlameParams]]:
    """Parameters of all timesteps, and those of each sequence's first file."""
    loaded: list[FlameParams] = []
    # The sequences of a UNION set lie in folders of their own and may have been tracked apart.
    first_of: dict[Path, tuple[Path, FlameParams]] = {}
    for path in files:
        try:
            params = jax.tree.map(np.asarray, load_flame_params(path, model))
        except (UserError, OSError) as error:
            problems.append(str(error))
            continue
        if (timesteps := len(params.expr)) != 1:
            problems.append(f"{path} holds {timesteps} timesteps, expected the parameters of one.")
            continue
        first, theirs = first_of.setdefault(path.parent, (path, params))
        if identity == "check":
            problems += [
                f"{path}: {name} differs from the one in {first}; one sequence is one person: track it "
                'at once, or take the first with identity="first" (--identity=first).'
                for name in _differing(theirs, params)
            ]
        # Thousands of timesteps would otherwise hold thousands of copies of one offset.
        loaded.append(params if not loaded else params.replace(shape=None, static_offset=None))
    if not loaded:
        return None, []
    for path, params in first_of.values():
        if differing := _differing(loaded[0], params):
            _log.warning("%s: %s differs from the first sequence's, which is taken for all.", path, differing[0])
    fields = {name: np.concatenate([getattr(p, name) for p in loaded]) for name in _PER_TIMESTEP}
    return jax.tree.map(jnp.asarray, loaded[0].replace(**fields)), [params for _, params in first_of.values()]


def _load_canonical(
    path: Path, model: FlameModel, sequences: Sequence[FlameParams], identity: str, problems: list[str]
) -> FlameParams | None:
    try:
        canonical = load_flame_params(path, model)
    except (UserError, OSError) as error:
        problems.append(str(error))
        return None
    if (timesteps := len(canonical.expr)) != 1:
        problems.append(f"{path} holds {timesteps} timesteps, expected the one canonical pose.")
        return None
    if sequences and identity == "check":
        # The canonical pose of a UNION set is that of one of its sequences.
        differing = min((_differing(params, canonical) for params in sequences), key=len)
        problems += [
            f"{path}: {name} differs from the one of the timesteps; export the canonical pose again."
            for name in differing
        ]
    return canonical.replace(**{name: getattr(canonical, name)[0] for name in _PER_TIMESTEP})


def _differing(a: FlameParams, b: FlameParams) -> list[str]:
    """Which of shape and static offset make two parameters those of two people."""
    return [name for name in ("shape", "static_offset") if not _same(getattr(a, name), getattr(b, name))]


def _same(a: Any, b: Any) -> bool:
    """Whether two shapes or offsets are one person's; a missing offset is zero."""
    a, b = (np.zeros(()) if x is None else np.asarray(x) for x in (a, b))
    return bool(np.abs(a - b).max(initial=0) <= _SAME_IDENTITY)


def _check_images(frames: Sequence[Frame], problems: list[str]) -> None:
    """Headers of all images and masks. In threads: a capture has tens of thousands, often on a slow disk."""
    wanted: dict[Path, tuple[int, int]] = {}
    for frame in frames:
        size = (frame.camera.width, frame.camera.height)
        for path in (frame.image_path, frame.mask_path):
            if path is not None and wanted.setdefault(path, size) != size:
                problems.append(f"{path} is stated as {wanted[path]} and as {size} pixels by different frames.")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        problems.extend(found for found in pool.map(_image_problem, wanted, wanted.values()) if found)


def _image_problem(path: Path, size: tuple[int, int]) -> str | None:
    try:
        check_header(path, size)
    except (UserError, OSError) as error:
        return str(error)
    return None


def _make_split(
    name: str,
    frames: Sequence[Frame],
    rows: dict[Path | None, int],
    resize: tuple[int, int] | None,
    downscale: int,
    cache: ImageCache,
) -> CaptureSplit:
    file_sizes = np.array([(f.camera.width, f.camera.height) for f in frames], np.int32).reshape(-1, 2)
    if resize is None and len(file_sizes) and (smallest := int(file_sizes.min())) < downscale:
        raise UserError(f"downscale={downscale} leaves nothing of pictures whose side is {smallest} pixels.")
    sizes = file_sizes // downscale if resize is None else np.full_like(file_sizes, resize)
    factor = np.concatenate([sizes / file_sizes, np.ones((len(frames), 1))], axis=1)[:, :, None]
    return CaptureSplit(
        name=name,
        viewmats=np.array([f.camera.viewmats for f in frames], np.float32).reshape(-1, 4, 4),
        Ks=(np.array([f.camera.Ks for f in frames], np.float32).reshape(-1, 3, 3) * factor).astype(np.float32),
        sizes=sizes,
        timesteps=np.array([rows[f.flame_param_path] for f in frames], np.int32),
        camera_indices=np.array([f.camera_index for f in frames], np.int32),
        image_paths=tuple(f.image_path for f in frames),
        mask_paths=tuple(f.mask_path for f in frames),
        file_sizes=file_sizes,
        cache=cache,
    )
