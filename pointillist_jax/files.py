"""What every reader and writer of files shares: errors that are sentences, atomic writes, checked `.npz` reading.

Files from outside are untrusted (DESIGN §13): nothing in them is executed, sizes are checked before memory is
allocated, and truncated, oversized or non-finite data are refused by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np

# No .npz this project reads unpacks to more; one that claims to is damaged or hostile.
MAX_FILE_BYTES = 4 << 30


class UserError(ValueError):
    """Something the user can mend. The message is one sentence: what, where, what was expected, how to fix it."""


class FileFormatError(UserError):
    """A file that is damaged, truncated, of another format, or whose contents are out of range."""


class UnsafeFileError(FileFormatError):
    """A file that asks for code to be run. Nothing of it was executed."""


class WriteError(UserError):
    """An output that could not be written.

    Args:
      path: of it.
      reason: what the writer said, an exception or its words. For writers that raise no OSError.
    """

    def __init__(self, path: str | os.PathLike, reason: Exception | str):
        said = (getattr(reason, "strerror", None) or str(reason)).strip() or type(reason).__name__
        # What an operating system says of a full disk stands somewhere in what TensorStore says.
        full = os.strerror(errno.ENOSPC)
        said = full if full in said else said.splitlines()[0][:300]
        super().__init__(f"{path} could not be written ({said}): make space, or write to another disk.")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path` that is renamed to `path` when the block ends without an exception.

    A kill at any moment leaves either the old file or the new one under the final name, never half of one. The
    temporary name keeps the final suffix, because image and video writers choose their format by it.

    Raises:
      OSError: names `path`, also where the system names no file (a full disk) or the temporary one.
    """
    path, temporary = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Named before it exists: an exception that a signal raises at any moment finds it below.
        temporary = path.with_name(f".{path.stem}.tmp-{_at_random()}{path.suffix}")
        temporary.touch(exist_ok=False)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        _name(error, path, path.stem)
        raise
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Around writing to an open file: lets an OSError name it, which the system does not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def _name(error: OSError, path: Path, stem: str) -> None:
    """Lets an error name the file that the user knows of, not a temporary one nor none at all."""
    named = "" if error.filename is None else str(error.filename)
    if error.errno is not None and (not named or named.startswith(str(path.with_name(f".{stem}.tmp-")))):
        error.filename, error.filename2 = str(path), None


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yields an empty temporary folder that takes the place of `path` when the block ends without an exception.

    Folders cannot be exchanged in one step: a kill between the two renames leaves the old folder under a hidden name
    beside the new one, never half of either. Any other failure puts the old one back.

    Raises:
      OSError: as `atomic_path`.
    """
    path, new = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.tmp-{_at_random()}")
        old = new.with_name(new.name + "-old")
        new.mkdir()
        yield new
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(new, path)
        except BaseException:
            if old.exists():
                os.replace(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        _name(error, path, path.name)
        raise
    finally:
        if new is not None:
            shutil.rmtree(new, ignore_errors=True)


def require_writable(folder: str | os.PathLike) -> None:
    """Makes the folder if it is not there. To be called before the work whose results go there.

    Raises:
      OSError: names the folder, if no file can be made in it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        error.filename = str(folder)
        raise


def read_json(path: str | os.PathLike, what: str, max_bytes: int = 256 << 20) -> dict[str, Any]:
    """Reads an untrusted JSON object.

    Raises:
      FileNotFoundError: no such file.
      FileFormatError: too large, not JSON, not an object; NaN and Infinity, which are not JSON, are refused too.
    """
    path = require_file(path, what)
    if path.stat().st_size > max_bytes:
        raise FileFormatError(f"{path} is larger than {max_bytes >> 20} MiB, too much for {what}; check the path.")

    def refuse(constant: str):
        raise ValueError(f"{constant} is not a JSON number")

    try:
        content = json.loads(path.read_bytes(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} is not valid JSON ({error}); write it again.") from None
    if not isinstance(content, dict):
        raise FileFormatError(f"{path} holds a JSON {type(content).__name__}, expected an object: is this {what}?")
    return content


def require_file(path: str | os.PathLike, what: str) -> Path:
    """Returns `path` as a Path, or raises FileNotFoundError with a sentence that says what was looked for."""
    path = Path(path)
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {kind}; expected {what}: check the path.")
    return path


def file_sha256(path: str | os.PathLike) -> str:
    """Hex sha256 of a file's bytes, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """What one array of a file has to be.

    Attributes:
      shape: one entry per axis: an int (exactly), a letter (any length, the same for every array of the file that
        uses the letter) or None (any length). A first entry `...` allows any further leading axes.
      kind: "float" (any real float), "int" (any integer), "bool" or "str".
      optional: the array may be absent.
      low, high: inclusive bounds of the values, checked when given. Floats have to be finite in any case.
    """

    shape: tuple[int | str | EllipsisType | None, ...]
    kind: str = "float"
    optional: bool = False
    low: float | None = None
    high: float | None = None


_KINDS = {"float": "f", "int": "iu", "bool": "b", "str": "U"}


def check_array(source: str, key: str, array: np.ndarray, spec: ArraySpec, letters: dict[str, int]) -> None:
    """Raises FileFormatError, naming file and key, unless `array` is what `spec` says. `letters` binds axis names."""
    check_header(source, key, array.shape, array.dtype, spec, letters)
    if spec.kind == "float":
        # Everything is used as float32 sooner or later: a float64 beyond it would become infinite.
        with np.errstate(over="ignore"):
            finite = np.isfinite(array.astype(np.float32))
        if bad := int((~finite).sum()):
            raise FileFormatError(
                f"{source}: {key} holds {bad} NaN or infinite values; write the file again without them."
            )
    if spec.kind == "str" and array.size and array.view(np.uint32).max() > 0x10FFFF:
        raise FileFormatError(f"{source}: {key} holds characters that do not exist; the file is damaged.")
    if array.size and spec.kind != "str":
        low, high = array.min(), array.max()
        if (spec.low is not None and low < spec.low) or (spec.high is not None and high > spec.high):
            raise FileFormatError(
                f"{source}: {key} has values in [{low}, {high}], expected [{spec.low}, {spec.high}]; "
                "the file is damaged or belongs to another model."
            )


def check_header(source: str, key: str, shape, dtype: np.dtype, spec: ArraySpec, letters: dict[str, int]) -> None:
    """The part of `check_array` that needs no data, so it can run before anything is allocated."""
    if dtype.kind not in _KINDS[spec.kind]:
        raise FileFormatError(f"{source}: {key} has dtype {dtype}, expected {spec.kind}; convert it and save again.")
    axes = spec.shape
    if axes[:1] == (...,):
        axes = (None,) * (len(shape) - len(axes) + 1) + axes[1:]
    expected = tuple(letters.get(n, n) if isinstance(n, str) else n for n in axes)
    fits = len(shape) == len(expected) and all(
        type(have) is int and have >= 0 and (not isinstance(want, int) or have == want)
        for have, want in zip(shape, expected, strict=True)
    )
    if not fits:
        named = (letters.get(n, n) if isinstance(n, str) else n for n in spec.shape)
        want = ", ".join({None: "any", ...: "..."}.get(n) or str(n) for n in named)
        raise FileFormatError(
            f"{source}: {key} has shape {tuple(shape)}, expected ({want}); the file is damaged or of another layout."
        )
    if math.prod(shape) * dtype.itemsize > MAX_FILE_BYTES:
        raise FileFormatError(f"{source}: {key} claims {tuple(shape)} values, more than this program ever reads.")
    letters.update({n: have for n, have in zip(axes, shape, strict=True) if isinstance(n, str)})


def read_npz(
    path: str | os.PathLike, specs: Mapping[str, ArraySpec], what: str, *, max_bytes: int = MAX_FILE_BYTES
) -> dict[str, np.ndarray]:
    """Reads the arrays named in `specs` from an untrusted `.npz`; other members are left unread.

    Headers are checked before any array is allocated, nothing is unpickled, floats have to be finite.

    Args:
      path: the file.
      specs: key → ArraySpec. Letters in shapes bind in the order of the mapping.
      what: for messages, e.g. "a FLAME parameter file".
      max_bytes: refuse a file whose named arrays unpack to more, before anything is unpacked.

    Raises:
      FileNotFoundError: no such file.
      FileFormatError: names file, key, expected and found.
    """
    path = require_file(path, what)
    arrays: dict[str, np.ndarray] = {}
    letters: dict[str, int] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = {Path(i.filename).stem: i for i in archive.infolist() if i.filename.endswith(".npy")}
            # A member's data never exceed what its entry claims (`_read_member`), so the claims can be believed here.
            if sum(members[key].file_size for key in specs if key in members) > max_bytes:
                raise FileFormatError(f"{path} unpacks to more than {max_bytes >> 20} MiB; is this {what}?")
            for key, spec in specs.items():
                if key not in members:
                    if spec.optional:
                        continue
                    found = ", ".join(sorted(members)[:12]) or "no arrays"
                    raise FileFormatError(f"{path}: {key} is missing (found: {found}); is this {what}?")
                arrays[key] = _read_member(archive, members[key], str(path), key, spec, letters)
    except FileFormatError:
        raise
    except Exception as error:  # Damaged zip, deflate or NumPy headers raise a dozen different errors.
        reason = str(error)[:200] or type(error).__name__
        raise FileFormatError(f"{path} cannot be read as .npz ({reason}); copy or write it again.") from None
    return arrays


def _at_random() -> str:
    return os.urandom(8).hex()


def _read_member(archive, info: zipfile.ZipInfo, source: str, key: str, spec: ArraySpec, letters) -> np.ndarray:
    with archive.open(info) as member:
        try:
            version = np.lib.format.read_magic(member)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = read_header(member)
        except Exception as error:  # NumPy evaluates the header as a literal: whatever Python's parser may say.
            reason = str(error)[:200] or type(error).__name__
            raise FileFormatError(f"{source}: {key} has a damaged header ({reason}); write the file again.") from None
        check_header(source, key, shape, dtype, spec, letters)
        size = math.prod(shape) * dtype.itemsize
        if info.file_size < size:
            raise FileFormatError(
                f"{source}: {key} is truncated ({info.file_size} bytes for {tuple(shape)} {dtype}); copy it again."
            )
        data = member.read(size)
    if len(data) != size:
        raise FileFormatError(f"{source}: {key} is truncated ({len(data)} of {size} bytes); copy it again.")
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    check_array(source, key, array, spec, letters)
    return array


def write_npz(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a compressed `.npz` atomically, byte for byte the same for the same arrays (fixed member times)."""
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for key, value in arrays.items():
            info = zipfile.ZipInfo(f"{key}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o644 << 16
            with archive.open(info, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(value), allow_pickle=False)
