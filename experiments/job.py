"""What the training scripts share: the flags of a run over one or several processes, and the folder it goes to."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from experiments.common import Terminated, open_shared_workdir
from pointillist_jax.sharding import start_processes
from pointillist_jax.training.checkpoints import newest_step

SEED = flags.DEFINE_integer("seed", 0, "Of the initial parameters and the order of batches.", lower_bound=0)
MESH = flags.DEFINE_string("mesh", "", "Sizes of data, fsdp, tensor, context; data takes what is left.")
_RESUME = flags.DEFINE_boolean("resume", False, "Go on from the newest checkpoint in --workdir.")
_OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Delete --workdir first.")
_COORDINATOR = flags.DEFINE_string("coordinator", "", "host:port of process 0, or auto; for jobs of several processes.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator.")
_LOST_AFTER = flags.DEFINE_integer(
    "lost_after", 30, "With --coordinator: seconds without a sign of life of another process until this one stops.",
    lower_bound=3,
)  # fmt: skip


def start_job() -> None:
    """Joins the other processes of the job, if there are any; to be called before anything touches a device.

    From here on SIGTERM ends a lone process as a scheduler expects it: with a sentence and exit code 0. While there are
    steps to save, `training.loop.train` hears it.
    """
    start_processes(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _LOST_AFTER.value)
    if not _COORDINATOR.value and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)


def open_job(workdir: str | Path, outputs: Sequence[str]) -> Path:
    """The run's folder, opened once for all processes by --resume and --overwrite (`common.open_shared_workdir`)."""
    return open_shared_workdir(Path(workdir), outputs, resume=_RESUME.value, overwrite=_OVERWRITE.value)


def goes_on(workdir: str | Path) -> bool:
    """Whether --resume finds a checkpoint there, so that nothing is initialised."""
    try:
        return _RESUME.value and newest_step(workdir) >= 0
    except FileNotFoundError:
        return False


def _terminate(_number: int, _frame: object) -> None:
    raise Terminated
