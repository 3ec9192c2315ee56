"""Runs scripts in forks of one process that has imported everything: a case costs tenths of a second, not an import.

Reads requests as JSON lines and answers each with one: see `forked.Forks`, which starts it. The process itself never
touches a device: JAX's back ends must not be forked.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import json
import os
import pkgutil
import re
import resource
import select
import signal
import struct
import sys
import time
import traceback
from pathlib import Path
from typing import Any

_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x20000, 0x4000, 1 << 18  # linux/sched.h, linux/mount.h
_CAPABILITY_VERSION = 0x20080522  # linux/capability.h
# CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER: what lets root write where permissions forbid it.
_OVERRIDES = 1 << 1 | 1 << 2 | 1 << 3
_PAGE, _FILLER = 4096, ".filler"


def warm() -> None:
    """Imports what scripts import, but none of the modules that define flags."""
    import pointillist_jax
    import renderer_bridge

    for package in (pointillist_jax, renderer_bridge):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            with contextlib.suppress(ImportError):  # Optional packages.
                importlib.import_module(module.name)
    for name in ("imageio.v3", "tqdm", "matplotlib.pyplot", "scipy.spatial", "torch", "safetensors.torch"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def serve() -> None:
    warm()
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Runs one script and says how it ended."""
    out, err, said = os.pipe(), os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        for pipe in (out, err, said):
            os.close(pipe[0])
        _run(request, out[1], err[1], said[1])
    for pipe in (out, err, said):
        os.close(pipe[1])
    return _watch(child, request, {out[0]: "out", err[0]: "err", said[0]: "said"})


def _watch(child: int, request: dict[str, Any], pipes: dict[int, str]) -> dict[str, Any]:
    """Reads until the child and its children have closed everything; sends the signal when its moment has come."""
    found, moment = dict.fromkeys(pipes.values(), b""), request.get("interrupt")
    limit, sent = time.monotonic() + request["timeout"], None
    while pipes and time.monotonic() < limit:
        for pipe in select.select(list(pipes), [], [], 0.005)[0]:
            data = os.read(pipe, 1 << 16)
            found[pipes[pipe]] += data
            if not data:
                os.close(pipe)
                del pipes[pipe]
        if moment and sent is None and _come(moment, found):
            time.sleep(moment.get("after", 0))
            sent = time.monotonic()
            with contextlib.suppress(ProcessLookupError):  # It was faster.
                os.killpg(child, signal.Signals[moment["signal"]])
    timed_out = bool(pipes)
    if timed_out:
        os.killpg(child, signal.SIGKILL)
        for pipe in pipes:
            os.close(pipe)
    _, status = os.waitpid(child, 0)
    said = json.loads(found["said"] or b"{}")
    return {
        "code": os.waitstatus_to_exitcode(status),
        "out": found["out"].decode(errors="replace"),
        "err": found["err"].decode(errors="replace"),
        "files": said.get("files", []),
        "broken": said.get("broken", []),
        "full": said.get("full", ""),
        "timed_out": timed_out,
        "seconds_after_signal": None if sent is None else round(time.monotonic() - sent, 2),
    }


def _come(moment: dict[str, Any], found: dict[str, bytes]) -> bool:
    if "seen" in moment:
        return re.search(moment["seen"].encode(), found["out"] + found["err"]) is not None
    root, pattern = moment["exists"]
    return any(Path(root).glob(pattern))


def _run(request: dict[str, Any], out: int, err: int, said: int) -> None:
    """In the child; does not return."""
    code, answer = 70, {}
    try:
        os.setpgid(0, 0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        # As for a script that is started: the text layers belong to the new descriptors.
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        import jax

        from experiments.common import run

        module = importlib.import_module(request["script"])
        if request.get("space") is not None:
            answer["full"] = _small_disk(request["where"], request["space"])
        if request.get("limit") is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
        if request.get("obey_permissions"):
            _drop_overrides()
        sys.argv = [request["script"].rpartition(".")[2], *request["arguments"]]
        try:
            run(module.main)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if jax.distributed.is_initialized():  # The others of the job wait for what Python does at its end.
            atexit._run_exitfuncs()
        where = request.get("where")
        files = sorted(p for p in Path(where).rglob("*") if not p.is_dir() and p.name != _FILLER) if where else []
        answer |= {"files": [str(p) for p in files], "broken": [str(p) for p in files if not _whole(p)]}
    except BaseException:
        code = 1
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os.write(said, json.dumps(answer).encode())
        os._exit(code)


def _whole(path: Path) -> bool:
    """Whether a file can be read to its end, as far as its kind is known; empty ones count as begun."""
    import imageio.v3 as iio
    import numpy as np

    try:
        match path.suffix:
            case ".json":
                json.loads(path.read_text())
            case ".npz":
                with np.load(path) as file:
                    [file[key] for key in file.files]
            case ".png" | ".mp4":
                iio.imread(path)
        return path.stat().st_size > 0
    except Exception:
        return False


def _small_disk(where: str, space: int) -> str:
    """Leaves so many bytes for what is written below `where`, which exists; returns how.

    A tmpfs of that size where this process may mount one, else a limit on the size of any file.
    """
    if mount_small_disk(where, space):
        return "tmpfs"
    # Python ignores SIGXFSZ: writing fails with EFBIG.
    resource.setrlimit(resource.RLIMIT_FSIZE, (space, space))
    return "limit"


def mount_small_disk(where: str, space: int) -> bool:
    """Mounts a tmpfs for this process and its children alone, in a mount namespace of their own, if it may."""
    libc = ctypes.CDLL(None, use_errno=True)
    size = f"size={_PAGE + space // _PAGE * _PAGE}".encode()
    if (
        libc.unshare(_CLONE_NEWNS) == 0
        and libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) == 0
        and libc.mount(b"tmpfs", where.encode(), b"tmpfs", 0, size) == 0
    ):
        (Path(where) / _FILLER).write_bytes(b"\0" * _PAGE)
        return True
    return False


def _drop_overrides() -> None:
    """Takes root's right to write where permissions forbid it from this process, so that folders can be read-only."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION, 0)), (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    for i in range(3):  # Effective, permitted, inheritable, of the lower 32 capabilities.
        sets[i] &= ~_OVERRIDES & 0xFFFFFFFF
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


if __name__ == "__main__":
    serve()
