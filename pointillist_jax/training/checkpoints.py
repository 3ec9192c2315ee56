"""Checkpoints of a training run: Orbax, one folder per step, with the data position inside (DESIGN §10).

<workdir>/checkpoints/<step>/params   the parameters the optimiser moves
                             ema      their average, if the run keeps one: what evaluation and generation read then
                             state    what else a step changes: optimiser, step, key
                             data     the Grain iterator of every process
                             meta     config, tokenizer, versions (JSON)
                             sums     checksums of all of these (JSON)
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from pointillist_jax.files import FileFormatError, UserError, WriteError, atomic_folder
from pointillist_jax.training.checksums import check_sums, checksums
from pointillist_jax.training.state import TrainState
from pointillist_jax.training.weights import load_weights

_log = logging.getLogger(__name__)


class Checkpoints:
    """Saves and restores a run's state. Use as a context manager: leaving it waits for what is still being written.

    Args:
      workdir: of the run; checkpoints lie in `checkpoints/` below it.
      keep: how many of the newest stay.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int = 3):
        self.folder = Path(workdir).resolve() / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=True,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,  # What a killed run was writing.
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, _type, error: BaseException | None, _traceback) -> None:
        failed = isinstance(error, WriteError)
        try:
            with _writing(self.folder):
                try:
                    self._manager.wait_until_finished()
                finally:
                    self._manager.close()
        except WriteError:
            failed = True
            raise
        finally:
            if failed and jax.process_index() == 0:
                _remove_rests(self.folder)

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, data: Any, meta: dict[str, Any]) -> None:
        """Writes a checkpoint in the background. `data` is the training iterator.

        Its state goes into JSON, not through Grain's own handler, which ties it to the number of processes.

        Raises:
          UserError: there is a checkpoint of this step or of a later one.
          WriteError: this one or the one before cannot be written.
        """
        step = int(state.step)
        arrays, texts = _items(state), {"data": data.get_state(), "meta": meta}
        items = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
        items |= {name: ocp.args.JsonSave(text) for name, text in texts.items()}
        items["sums"] = ocp.args.JsonSave(checksums(arrays, texts))
        with _writing(self.folder):
            saved = self._manager.save(step, args=ocp.args.Composite(**items))
        if not saved:
            raise UserError(
                f"step {step} is not saved: {self.folder} has a checkpoint of step {self.steps[-1]} already; "
                "remove what is newer than this run, or give the run a folder of its own."
            )

    def reached_preemption(self, step: int) -> bool:
        """True when the machine's scheduler has announced that it takes this job's machines away."""
        return jax.process_count() > 1 and self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Returns when everything is on disk. Raises WriteError if it cannot be written."""
        with _writing(self.folder):
            self._manager.wait_until_finished()

    def restore(
        self, abstract: TrainState, data: Any, check: Callable[[dict[str, Any]], None] | None = None
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that can be read, or None if there is none; moves `data` to its position.

        Newer ones, which cannot be read, are deleted then: the run makes these steps again and saves them.

        Args:
          abstract: ShapeDtypeStructs with shardings, of this run's mesh: it may differ from the one that saved.
          data: the training iterator, of any number of processes.
          check: is given the checkpoint's meta first, and raises UserError if this run must not go on from it.

        Raises:
          UserError: none of the checkpoints there can be read into this state, the data are others, or what `check`
            raises.
        """
        problems = []
        for step in reversed(self.steps):
            try:
                texts, sums = self._restore_texts(step)
            except Exception as error:  # Orbax and TensorStore raise many kinds for damaged or missing files.
                problems.append(self._skip(step, error))
                continue
            if check is not None:
                check(texts["meta"])
            try:
                data.set_state(texts["data"])
            except Exception as error:
                # What its checksum vouches for is no damage, and older checkpoints are of the same data.
                if sums is not None and isinstance(error, UserError):
                    raise UserError(f"{self.folder} belongs to other data: {error}") from None
                problems.append(self._skip(step, error))
                continue
            try:
                state = self._restore(step, abstract, sums)
            except Exception as error:
                problems.append(self._skip(step, error))
                continue
            # Orbax saves nothing below its newest step, and others load the newest.
            for newer in [other for other in self.steps if other > step]:
                self._manager.delete(newer)  # By process 0; the others wait for it.
                _log.warning("checkpoint %s of %s is deleted: the run goes on from step %s", newer, self.folder, step)
            return state, texts["meta"]
        if problems:
            raise UserError(
                f"none of the {len(problems)} checkpoints in {self.folder} fits this run ({problems[0].rstrip('.')}): "
                "resume with the config they were made with, or start again with --overwrite."
            )
        return None

    def _skip(self, step: int, error: Exception) -> str:
        _log.warning("checkpoint %s of %s is skipped: %s", step, self.folder, _reason(error))
        return f"step {step}: {_reason(error)}"

    def _restore_texts(self, step: int) -> tuple[dict[str, Any], dict[str, int] | None]:
        """The JSON items of a checkpoint, and its checksums: None in one that was made before there were any."""
        named = {"meta", "data"} | ({"sums"} if (self.folder / str(step) / "sums").is_dir() else set())
        found = self._manager.restore(step, args=ocp.args.Composite(**dict.fromkeys(named, ocp.args.JsonRestore())))
        texts, sums = {name: found[name] for name in ("meta", "data")}, found.get("sums")
        if sums is not None:
            check_sums(sums, {}, texts)
        return texts, sums

    def _restore(self, step: int, abstract: TrainState, sums: dict[str, int] | None) -> TrainState:
        items = {name: ocp.args.StandardRestore(tree) for name, tree in _items(abstract).items()}
        found = dict(self._manager.restore(step, args=ocp.args.Composite(**items)).items())
        if sums is not None:
            check_sums(sums, found, {})
        return TrainState(params=found["params"], ema=found.get("ema"), **found["state"])


def load_params(workdir: str | os.PathLike, step: int | None = None, *, ema: bool = True) -> tuple[Any, dict[str, Any]]:
    """Parameters and meta of a run's newest (or given) checkpoint, as NumPy, without its optimiser state.

    Args:
      workdir: of the run, made on any mesh; or a file of weights (`weights.save_weights`), which has one step.
      ema: their average where the run kept one; False takes the parameters themselves.

    Raises:
      FileNotFoundError: no checkpoint there.
      FileFormatError: it is damaged.
    """
    if _is_weights(workdir):
        params, meta, only = load_weights(workdir)
        if step not in (None, only):
            raise FileNotFoundError(f"{workdir} holds step {only}, not {step}: leave the step out.")
        return params, meta
    folder, steps = _steps_in(workdir)
    if not steps or (step is not None and step not in steps):
        raise FileNotFoundError(f"{folder} has no checkpoint{'' if step is None else f' {step}'}: check the path.")
    folder = folder / str(steps[-1] if step is None else step)
    item = arrays = folder / ("ema" if ema and (folder / "ema").is_dir() else "params")
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            tree = reader.metadata(item).item_metadata.tree
            # As NumPy: arrays would ask for the devices they were saved from.
            how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            params = reader.restore(item, args=ocp.args.PyTreeRestore(restore_args=how))
        texts = {}
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            for item in (folder / "meta", folder / "sums"):
                if item.name == "meta" or item.is_dir():  # Earlier versions saved no checksums.
                    texts[item.name] = reader.restore(item)
        if "sums" in texts:
            check_sums(texts["sums"], {arrays.name: params}, {"meta": texts["meta"]})
    except Exception as error:  # Orbax and TensorStore raise many kinds for damaged or missing files.
        raise FileFormatError(f"{item} cannot be read ({_reason(error)}): name an earlier step.") from None
    return params, texts["meta"]


def newest_step(workdir: str | os.PathLike) -> int:
    """The step that `load_params` reads if none is named. Raises FileNotFoundError without any."""
    if _is_weights(workdir):
        return load_weights(workdir)[2]
    folder, steps = _steps_in(workdir)
    if not steps:
        raise FileNotFoundError(f"{folder} has no checkpoint: check the path.")
    return steps[-1]


def meta_path(workdir: str | os.PathLike, step: int) -> Path:
    """Where the meta of a checkpoint lies, for messages: its own folder, or the file of weights."""
    return Path(workdir) if _is_weights(workdir) else _steps_in(workdir)[0] / str(step) / "meta"


def save_params(
    workdir: str | os.PathLike, step: int, params: Any, meta: dict[str, Any], *, overwrite: bool = False
) -> None:
    """Writes a checkpoint of parameters alone, which `load_params` reads; no training goes on from it.

    Args:
      params: nested dicts of NumPy arrays.
      overwrite: replace the checkpoints that are there.

    Raises:
      UserError: there are checkpoints, and `overwrite` is off.
      WriteError: the disk is full, or the folder cannot be written.
    """
    folder, steps = _steps_in(workdir)
    if steps and not overwrite:
        raise UserError(f"{folder} has checkpoints; replace them with --overwrite, or name another folder.")
    with _writing(folder), atomic_folder(folder) as temporary:
        # Orbax writes to absolute paths only.
        target = temporary.resolve() / str(step)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
            writer.save(target / "params", args=ocp.args.PyTreeSave(params))
        sums = checksums({"params": params}, {"meta": meta})
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
            for name, text in {"meta": meta, "sums": sums}.items():
                writer.save(target / name, args=ocp.args.JsonSave(text))


def model_kind(meta: Mapping[str, Any], where: str | os.PathLike) -> str:
    """Which model a checkpoint with this meta holds: "ar" (its meta name a store) or "decoder" (they name features).

    Raises:
      UserError: neither.
    """
    if isinstance(meta.get("store"), dict):
        return "ar"
    if isinstance(meta.get("features"), dict) and "tokenizer" in meta["features"]:
        return "decoder"
    raise UserError(f"{where} is a run of neither experiments.train_ar nor experiments.train_decoder: check the path.")


def _is_weights(path: str | os.PathLike) -> bool:
    return os.fspath(path).endswith(".npz")


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turns what Orbax and TensorStore raise for full and read-only disks into WriteError."""
    try:
        yield
    except Exception as error:
        # TensorStore raises ValueError with the name of a status: "RESOURCE_EXHAUSTED: Error writing …". So do
        # collectives when another process of the job is gone.
        status = isinstance(error, ValueError) and re.match(r"[A-Z_]{4,}: (?!Gloo|NCCL)", str(error))
        if isinstance(error, OSError) or status:
            raise WriteError(folder, error) from None
        raise


def _remove_rests(folder: Path, patience: float = 5.0) -> None:
    """Removes what a failed save has left. TensorStore's other writes may still go on, and make files again."""
    limit = time.monotonic() + patience
    while (rests := list(folder.glob("*.orbax-checkpoint-tmp*"))) and time.monotonic() < limit:
        for rest in rests:
            shutil.rmtree(rest, ignore_errors=True)
        time.sleep(0.2)


def _steps_in(workdir: str | os.PathLike) -> tuple[Path, list[int]]:
    """The folder of a run's checkpoints and their steps, ascending."""
    folder = Path(workdir).resolve()
    folder = folder if folder.name == "checkpoints" else folder / "checkpoints"
    return folder, sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit()) if folder.is_dir() else []


def _items(state: TrainState) -> dict[str, Any]:
    """The parts of a state that lie in a folder each."""
    rest = {name: getattr(state, name) for name in ("step", "opt_state", "key")}
    items = {"params": state.params, "state": rest}
    return items if state.ema is None else {**items, "ema": state.ema}


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
