"""What a run may change when it goes on from a checkpoint: how it computes and trains, never the function it learns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from pointillist_jax.configs import Config, config_from_json
from pointillist_jax.files import UserError

# Of a model: without influence on its function, or on the training of it.
_FREE = ("attention", "attention_block", "scan_layers", "remat", "max_points", "eval_views", "eval_people", "train")
# Set by the data, not by flags.
_FROM_DATA = ("num_faces", "bins", "lower", "upper", "space", "feature_width", "context_width", "context_tokens")


def check_same_model(meta: Mapping[str, Any], config: Config, part: str, where: str) -> str:
    """Raises UserError unless a checkpoint holds the model of this run; equal shapes alone do not say so.

    Args:
      meta: of the checkpoint, untrusted; its `config` is what `dataclasses.asdict` gave.
      config: of this run.
      part: "model", trained by `config.train`, or "decoder", by `config.decoder.train`.
      where: the workdir, for messages.

    Returns:
      The changed fields of `train` in words, "" if there are none.

    Raises:
      UserError: a field of the model differs, or an average is asked for that the checkpoint has not.
    """
    saved, new = meta.get("config"), getattr(config, part)
    saved = saved if isinstance(saved, Mapping) else {}
    old = config_from_json(type(new), saved.get(part), f"{where}/checkpoints")
    if found := list(_differences(old, new, part)):
        changes = ", ".join(f"{path}={_text(a)} (now {_text(b)})" for path, a, b in found)
        given = [f"--config.{path}={_text(a)}" for path, a, _ in found if path.rpartition(".")[2] not in _FROM_DATA]
        mend = " ".join(given) if given else "the data it was trained on"
        raise UserError(f"{where} was trained with {changes}: resume with {mend}, or start anew with --overwrite.")
    if part == "decoder":
        path, before, now = "decoder.train", old.train, new.train
    else:
        path, now = "train", config.train
        before = config_from_json(type(now), saved.get("train"), f"{where}/checkpoints")
    if now.ema_decay and not before.ema_decay:
        raise UserError(
            f"{where} was trained with {path}.ema_decay=0.0 (now {now.ema_decay}), so it has no average to go on with: "
            f"resume with --config.{path}.ema_decay=0, or start anew with --overwrite."
        )
    return ", ".join(f"{name} {_text(a)} → {_text(b)}" for name, a, b in _differences(before, now, path))


def _differences(old: Any, new: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    for field in dataclasses.fields(new):
        before, after, name = getattr(old, field.name), getattr(new, field.name), f"{path}.{field.name}"
        if field.name in _FREE:
            continue
        if dataclasses.is_dataclass(after):
            yield from _differences(before, after, name)
        elif before != after:
            yield name, before, after


def _text(value: Any) -> str:
    """As a flag takes it."""
    if isinstance(value, tuple):
        return ",".join(map(_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
