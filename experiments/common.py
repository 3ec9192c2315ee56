"""What every experiment script shares: user errors as sentences, and benchmarks that end in one JSON line."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import gc
import importlib.metadata
import json
import logging
import mmap
import multiprocessing
import os
import platform
import select
import shutil
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from tqdm import tqdm

from experiments import INTERRUPTED, leave_at_interrupt
from pointillist_jax import peers
from pointillist_jax.configs import Config
from pointillist_jax.files import UserError, require_writable
from pointillist_jax.interrupts import unheard_by_children


class Terminated(KeyboardInterrupt):
    """SIGTERM, in a script that takes it (`job.start_job`)."""


def run(main: Callable[[], None]) -> None:
    """Parses absl flags and runs `main()`. What ends it early becomes one sentence on stderr and an exit code.

    2 for errors the user can mend, 75 in a job whose other processes are lost (`peers`), 130 for Ctrl-C, 0 for SIGTERM
    in a training; 141 without a word when nobody reads stdout any more.
    """

    def guarded(argv: list[str]) -> None:
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        # absl shows INFO lines; JAX uses one per back end that this machine does not have.
        logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
        logging.getLogger("absl").setLevel(logging.WARNING)
        # Orbax reports every stage of every checkpoint; what fails it also raises.
        logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
        # TensorStore's writes that fail beside the one that is raised, one stack each.
        logging.getLogger("asyncio").addFilter(lambda record: "never retrieved" not in record.getMessage())
        sys.unraisablehook = _unraisable
        keep_freed_memory()
        try:
            if len(argv) > 1:
                raise UserError(f"unexpected argument {argv[1]!r}; flags are written --name=value (see --help).")
            main()
            sys.stdout.flush()
            said, code = "", 0
        except KeyboardInterrupt as error:
            _admit_drawn_bars()
            go_on = "; go on with --resume" if "resume" in flags.FLAGS else ""
            by, code = ("SIGTERM", 0) if isinstance(error, Terminated) else ("Ctrl-C", INTERRUPTED)
            said = f"stopped by {by}{go_on}."
        except Exception as error:
            if isinstance(error, BrokenPipeError) and _stdout_is_gone():
                said, code = "", 128 + signal.SIGPIPE
            elif (sentence := sentence_of(error)) is not None:
                said, code = f"error: {sentence}", 2
            else:
                # What a collective says when another process is gone is no defect, and that process is named soon.
                peers.wait_for_verdict()
                raise
        # The frames of `main` are gone, and so are their progress bars, also those in cycles: their lines have ended.
        if said:
            gc.collect()
        leave_at_interrupt()
        if said:
            with contextlib.suppress(BrokenPipeError):
                print(said, file=sys.stderr)
        if code:
            peers.fail(code)
            sys.exit(code)

    def parse(argv: list[str]) -> list[str]:
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            print(f"error: {error} (see --help)", file=sys.stderr)
            sys.exit(2)

    # absl's own parser also serves --help and its kin.
    asks = any(arg.lstrip("-") in ("help", "helpfull", "helpshort", "helpxml", "?") for arg in sys.argv[1:])
    app.run(guarded, **({} if asks else {"flags_parser": parse}))


def _admit_drawn_bars() -> None:
    """Ctrl-C between a bar's first drawing and the end of its `__init__` leaves one that would not end its line."""
    for bar in list(getattr(tqdm, "_instances", ())):
        if hasattr(bar, "pos") and not hasattr(bar, "start_t"):
            bar.start_t = bar.last_print_t = time.time()


def sentence_of(error: Exception) -> str | None:
    """What the user has to know of an error; None for a defect of the program, which deserves its traceback."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MemoryError) or (_of_xla(error) and "RESOURCE_EXHAUSTED" in str(error)):
        reason = f" ({str(error).splitlines()[0][:200]})" if str(error) else ""
        return f"there is not enough memory{reason}; make batches, pictures or clouds smaller."
    if not isinstance(error, OSError):
        return None
    if not error.strerror:  # A sentence of the library's.
        return str(error)
    where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    if error.errno == errno.EEXIST:
        return f"{where}is a file, and a folder is needed there; choose another path."
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{where}{error.strerror.lower()}; make space, or write to another disk."
    return f"{where}{error.strerror.lower()}; choose another path."


def _unraisable(found: sys.UnraisableHookArgs) -> None:
    """Errors in destructors and in callbacks of compiled code, which Python can only print."""
    if issubclass(found.exc_type, KeyboardInterrupt):  # Must not be lost there: once more, at another place.
        _send_again(signal.SIGTERM if found.exc_type is Terminated else signal.SIGINT)
    # TensorStore reports every write that ends after a save has failed.
    elif not (found.exc_type is RuntimeError and str(found.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(found)


def _send_again(number: signal.Signals) -> None:
    threading.Timer(0.1, os.kill, (os.getpid(), number)).start()


def _of_xla(error: Exception) -> bool:
    return type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")


def end_stopped(stopped: str, step: int) -> None:
    """Says that a training was stopped early. The exit code is 130 after Ctrl-C, else 0 (DESIGN §10).

    Args:
      stopped: what `training.loop.train` returns: the name of a signal, or "preemption".
      step: that was saved.
    """
    by = "Ctrl-C" if stopped == "SIGINT" else stopped
    print(f"\nstopped by {by} at step {step}; everything is saved: go on with --resume.", flush=True)
    if stopped == "SIGINT":
        sys.exit(INTERRUPTED)


def _stdout_is_gone() -> bool:
    """Whether the reader of stdout has closed it, as `… | head` does. Then what is still buffered goes nowhere."""
    poll = select.poll()
    poll.register(1, select.POLLOUT)
    gone = any(events & select.POLLERR for _, events in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return gone


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory for the next allocation, in huge pages; elsewhere nothing happens.

    By default it gives every large block back to the kernel, and XLA's CPU back end frees all temporaries of a program
    when it ends: each call then pays a page fault for every 4 KiB, a quarter of a `tiny` training step
    (experiments/LOG.md). One arena, because only the first may hold large blocks. To be called before JAX starts its
    threads.
    """
    m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8  # malloc.h
    try:
        libc = ctypes.CDLL(None)
        mallopt, malloc, free, madvise = libc.mallopt, libc.malloc, libc.free, libc.madvise
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        huge_pages = mmap.MADV_HUGEPAGE
    except (OSError, AttributeError, TypeError, ValueError):  # Not glibc, not Linux.
        return
    for parameter, value in ((m_arena_max, 1), (m_mmap_threshold, -1), (m_trim_threshold, -1)):  # -1: never.
        mallopt(parameter, value)
    # Room for what is to come, taken and freed untouched: the heap then has these addresses, and the kernel backs what
    # is used of them by pages of 2 MiB. What lies beyond, or a kernel without such pages, works as ever.
    malloc.restype, malloc.argtypes, free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    room, page = physical // 2, 2**21
    if start := malloc(room):
        madvise(start + -start % page, room - page, huge_pages)
        free(start)


def refuse_flags(names: Sequence[str], when: str) -> None:
    """Raises UserError if one of these flags stands on the command line: a flag that does nothing must not pass.

    Args:
      names: of flags.
      when: they do nothing, for the sentence ("with --capture, whose motion is taken").
    """
    if given := [name for name in names if flags.FLAGS[name].present]:
        raise UserError(f"--{given[0]} does nothing {when}: leave it out.")


def whole_numbers(flag: flags.FlagHolder, most: int = 10**7) -> list[int]:
    """Of a list flag. Raises UserError for anything but whole numbers from 1 to `most`."""
    if not flag.value or not all(text.isdecimal() and 0 < int(text[:20]) <= most for text in flag.value):
        raise UserError(f"--{flag.name}={','.join(flag.value)} must be whole numbers from 1 to {most}, with commas.")
    return [int(text) for text in flag.value]


@contextlib.contextmanager
def worker_pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of fresh processes (JAX must not be forked) that ends with the block, whatever ends the block.

    An exception in the block, Ctrl-C too, stops the workers where they are: their context managers clean up, so that
    nothing half-written stays, and none of them says anything. Functions have to be submitted by `submit`.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _begin_worker) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            _stop_workers()
            raise


def submit(pool: ProcessPoolExecutor, function: Callable[..., Any], *args: Any) -> Future:
    """`pool.submit` for a `worker_pool`."""
    # It may start a worker.
    with unheard_by_children():
        return pool.submit(_work, function, *args)


@contextlib.contextmanager
def manager() -> Iterator[SyncManager]:
    """A `multiprocessing` manager that Ctrl-C does not reach: it ends with the block, or with this process."""
    shared = SyncManager(ctx=multiprocessing.get_context("spawn"))
    with unheard_by_children():
        shared.start(end_with_parent)
    with shared:
        yield shared


def _work(function: Callable[..., Any], *args: Any) -> Any:
    with contextlib.suppress(_Stopped):
        return function(*args)
    # What the call still held has been let go of and cleaned up. The pool would go on with the next call.
    os._exit(0)


class _Stopped(SystemExit):
    """Raised in a worker by SIGTERM."""


def _begin_worker() -> None:
    def stop(number: int, frame: Any) -> None:
        # The pool sends a second one as soon as another worker has ended: it must not disturb cleaning up.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Stopped

    def unraisable(found: sys.UnraisableHookArgs) -> None:
        if found.exc_type is _Stopped:  # As of Ctrl-C, in `_unraisable`.
            signal.signal(signal.SIGTERM, stop)
            _send_again(signal.SIGTERM)
        else:
            sys.__unraisablehook__(found)

    sys.unraisablehook = unraisable
    signal.signal(signal.SIGTERM, stop)
    end_with_parent()


def _stop_workers(patience: float = 10.0) -> None:
    """Ends this process's children; those that do not end within `patience` seconds are killed."""
    workers = [child for child in multiprocessing.active_children() if child.name.startswith("SpawnProcess")]
    for worker in workers:
        worker.terminate()
    limit = time.monotonic() + patience
    for worker in workers:
        worker.join(max(limit - time.monotonic(), 0))
        worker.kill()


def end_with_parent() -> None:
    """In a child: it dies with the process that started it, even by SIGKILL.

    Else a killed run would go on writing behind the back of the one that resumes it, and its manager would never end.
    """

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def open_workdir(path: str | os.PathLike, made: Sequence[str], *, resume: bool, overwrite: bool) -> Path:
    """The folder a run writes to. One that holds something needs a word on what to do with it (DESIGN §10).

    Args:
      path: of the folder; created if it is not there.
      made: names of what the script writes there. `overwrite` deletes these and nothing else: a mistyped folder must
        not cost its contents.

    Raises:
      UserError: the folder is not empty and neither flag is given, both are, or the path is a file.
    """
    path = Path(path)
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other; give one.")
    if path.exists() and not path.is_dir():
        raise UserError(f"--workdir={path} is a file; name a folder.")
    if path.is_dir() and any(path.iterdir()) and not resume:
        if not overwrite:
            raise UserError(
                f"--workdir={path} is not empty; continue its run with --resume, replace it with --overwrite, or name "
                "another folder."
            )
        for entry in (path / name for name in made):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
    require_writable(path)
    return path


def open_shared_workdir(path: str | os.PathLike, made: Sequence[str], *, resume: bool, overwrite: bool) -> Path:
    """`open_workdir` by process 0 of a job; the others wait until it has deleted what it is to delete.

    Raises:
      UserError: as `open_workdir`, in every process.
      OSError: in process 0, the folder cannot be written; UserError in the others.
    """
    import jax
    from jax.experimental import multihost_utils

    problem = None
    if jax.process_index() == 0:
        try:
            path = open_workdir(path, made, resume=resume, overwrite=overwrite)
        except (UserError, OSError) as error:  # Told after the broadcast: the others wait for it.
            problem = error
    if jax.process_count() > 1 and not multihost_utils.broadcast_one_to_all(np.array(problem is None)):
        problem = problem or UserError(f"--workdir={path} cannot be used; process 0 says why.")
    if problem is not None:
        raise problem
    return Path(path)


def print_changes(meta: Mapping[str, Any], config: Config, part: str, workdir: Path) -> None:
    """Says in a line which training settings differ from those of the checkpoint that a run goes on from.

    Args:
      meta, part: as of `training.same_model.check_same_model`.
    """
    import jax

    from pointillist_jax.training.same_model import check_same_model

    changes = check_same_model(meta, config, part, str(workdir))
    if changes and jax.process_index() == 0:
        print(f"going on with other settings: {changes}", flush=True)


def json_line(name: str, figures: Mapping[str, Any]) -> None:
    """Prints a benchmark's last line: its figures with the versions and the machine they were measured on."""
    import jax

    packages = ("jax", "jaxlib", "flax", "numpy", "torch", "gsplat", "body-models")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    machine = {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "cpu": _cpu_name(),
        "device": device.device_kind,
        "devices": jax.device_count(),
        "platform": device.platform,
    }
    print(json.dumps({"bench": name, **figures, "versions": versions, "machine": machine}), flush=True)


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Medians over the runs of one case: by the wall clock, and of all its threads on the CPU."""

    wall: float
    cpu: float


def alternate(
    cases: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 2, turn_seconds: float = 0
) -> dict[str, float]:
    """Times the cases in turn, A B C A B C …, so that a noisy moment of the machine hits all of them alike.

    Each case must finish its work before it returns (`jax.block_until_ready`).

    Args:
      turn_seconds: about how long a turn is, if longer than a call; see `calls_in`.

    Returns:
      Case name → median seconds of a call over `repeats` turns.
    """
    in_a_row = calls_in(turn_seconds, cases) if turn_seconds else None
    return {name: seconds.wall for name, seconds in alternate_clocks(cases, repeats, warmup, in_a_row).items()}


def calls_in(seconds: float, cases: Mapping[str, Callable[[], Any]]) -> dict[str, int]:
    """How many calls of each case take about so long; at least one."""
    calls = {}
    for name, case in cases.items():
        case()
        start = time.perf_counter()
        case()
        calls[name] = max(round(seconds / (time.perf_counter() - start)), 1)
    return calls


def alternate_clocks(
    cases: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 2, in_a_row: Mapping[str, int] | None = None
) -> dict[str, Seconds]:
    """As `alternate`, with CPU seconds too: on a shared machine they vary less.

    Args:
      in_a_row: calls of each case that are timed together, behind one that is not: as in a long run, each of them then
        follows its own kind. (Behind another case's it finds the caches full of that one's arrays, and the cores busy
        with its threads, which spin for some milliseconds before they sleep.) None: one, behind another case's.
    """
    for case in cases.values():
        for _ in range(warmup):
            case()
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            if in_a_row:
                case()
            calls = in_a_row[name] if in_a_row else 1
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(calls):
                case()
            runs[name].append(((time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls))
    return {name: Seconds(*map(statistics.median, zip(*values, strict=True))) for name, values in runs.items()}


def milliseconds(times: Mapping[str, Seconds]) -> dict[str, float]:
    """{"<case>_ms", "<case>_cpu_ms"} of what `alternate_clocks` found, for a bench's JSON line."""
    both = (("ms", "wall"), ("cpu_ms", "cpu"))
    return {f"{n}_{suffix}": round(1e3 * getattr(t, clock), 3) for n, t in times.items() for suffix, clock in both}


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
