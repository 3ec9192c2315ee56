"""Weights out of PyTorch's files, without running anything in them (DESIGN §13).

torch and safetensors are imported only when a file is read: neither is needed to use this project.
"""

from __future__ import annotations

import os
import pickle  # For the class of its error only.
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pointillist_jax.files import FileFormatError, UnsafeFileError, UserError, require_file

TORCH_SUFFIXES, SAFETENSORS_SUFFIX = (".pth", ".pt", ".ckpt", ".bin"), ".safetensors"
# The largest published encoder, vitg14 in float32, is 4.6 GB.
MAX_WEIGHT_BYTES = 16 << 30
# Where training programs put the model beside the optimiser's state.
_WRAPPERS = ("state_dict", "model", "teacher")


def load_torch_file(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads a checkpoint as a flat dictionary of arrays.

    Args:
      path: `.safetensors`, or PyTorch's `.pth`, `.pt`, `.ckpt`, `.bin`, which are read with `weights_only=True`. A
        model under the key "state_dict", "model" or "teacher" is unwrapped. What is no tensor is left out.

    Returns:
      Name → array; bfloat16, which NumPy does not have, as float32. Values are not checked here.

    Raises:
      FileNotFoundError: no such file.
      UnsafeFileError: the file asks for code to be run. Nothing of it was executed.
      FileFormatError: damaged, truncated, of another format, or it claims more than it holds.
      UserError: torch or safetensors is not installed.
    """
    path = require_file(path, "a PyTorch or safetensors checkpoint")
    suffix, size = path.suffix.lower(), path.stat().st_size
    if suffix not in (*TORCH_SUFFIXES, SAFETENSORS_SUFFIX):
        known = ", ".join((SAFETENSORS_SUFFIX, *TORCH_SUFFIXES))
        raise FileFormatError(f"{path} ends in {suffix or 'nothing'}; checkpoints end in {known}.")
    if size > MAX_WEIGHT_BYTES:
        raise FileFormatError(f"{path} is {size >> 30} GiB, more than any encoder; check the path.")
    tensors = _read_safetensors(path) if suffix == SAFETENSORS_SUFFIX else _read_torch(path)
    if not tensors:
        raise FileFormatError(f"{path} holds no tensors; is this a checkpoint of a model?")
    return tensors


def as_numpy(name: str, value: Any, source: str = "the state dict") -> np.ndarray:
    """A torch tensor, JAX or NumPy array → NumPy, without torch. bfloat16 becomes float32.

    Raises:
      FileFormatError: not a dense array of numbers, or it claims more elements than it stores.
    """
    try:
        if hasattr(value, "detach"):  # torch.Tensor
            value = value.detach().cpu()
            # A stride of zero lets a few bytes claim any size.
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError("it claims more elements than it stores")
            value = value.float() if str(value.dtype) == "torch.bfloat16" else value
            value = value.numpy()
        array = np.asarray(value)
        if array.dtype.name == "bfloat16":
            array = array.astype(np.float32)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"it has dtype {array.dtype}")
    except Exception as error:  # Whatever a sparse, quantised or hostile tensor makes torch say.
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise FileFormatError(f"{source}: {name[:100]} is not a plain array ({reason}).") from None
    return array


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        from safetensors import safe_open
    except ImportError:
        raise UserError(
            f"{path} needs the safetensors package: pip install safetensors (or the extra `torch`)."
        ) from None
    try:
        # The header is checked against the file's length before anything is read.
        with safe_open(path, framework="numpy") as file:
            return {name: as_numpy(name, file.get_tensor(name), str(path)) for name in file.keys()}  # noqa: SIM118
    except FileFormatError:
        raise
    except Exception as error:
        raise FileFormatError(f"{path} is damaged or no safetensors file ({_reason(error)}); copy it again.") from None


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} needs PyTorch to be read: pip install torch (the extra `torch`), or take the .safetensors file."
        ) from None
    zipped = check_torch_zip(path)
    try:
        # Mapped, so that the parts nobody asks for (an optimiser, a CLIP model) are never read.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # Damaged pickles and archives raise nearly anything.
        if name := _refused(error):
            raise UnsafeFileError(
                f"{path} holds more than tensors ({name}), which could run code; nothing was executed: if you trust "
                "it, open it where that does no harm and save its state_dict alone."
            ) from None
        # What torch advises when it cannot unpickle is to load the file unsafely.
        reason = "no pickle of tensors" if isinstance(error, pickle.UnpicklingError) else _reason(error)
        raise FileFormatError(f"{path} is damaged or no PyTorch checkpoint ({reason}); copy it again.") from None
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise FileFormatError(f"{path} holds a {type(content).__name__}, expected a dictionary of tensors.")
    return {
        name: as_numpy(name, value, str(path))
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, torch.Tensor)
    }


def check_torch_zip(path: Path) -> bool:
    """Whether it is a zip archive (torch ≥ 1.6); FileFormatError for one that would unpack to more than it is."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception as error:
        raise FileFormatError(f"{path} is a damaged archive ({_reason(error)}); copy it again.") from None
    # torch stores members as they are; one that is compressed is not its work, and may be a bomb.
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise FileFormatError(f"{path} is a compressed archive, which PyTorch never writes; is this a checkpoint?")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise FileFormatError(f"{path} claims more data than it has bytes; copy it again.")
    return True


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def _refused(error: Exception) -> str:
    """What torch's restricted unpickler refused to make or to call; "" if it failed for another reason."""
    if not isinstance(error, pickle.UnpicklingError):
        return ""
    match = re.search(r"GLOBAL (\S+)|unrecognized function (.+)|but got (<class .+)", str(error))
    return next(name for name in match.groups() if name)[:100] if match else ""
