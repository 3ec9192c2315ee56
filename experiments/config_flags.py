"""`--config=<preset>` and `--config.<part>.<field>=<value>` as absl flags, from the dataclasses of `configs.py`."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any

from absl import flags

from pointillist_jax.configs import PRESETS, Config, preset
from pointillist_jax.files import UserError


def define_config(*parts: str, default: str = "tiny") -> Callable[[], Config]:
    """Defines the flags of the named parts of `Config`; call at import. The result, called in `main`, is the config.

    Args:
      parts: fields of Config whose own fields can be changed, e.g. "fit" or "model.encoder". A script offers only
        those it reads.
      default: the preset without `--config`.
    """
    flags.DEFINE_enum("config", default, list(PRESETS), "Preset of hyper-parameters.")
    names = {}
    for part in parts:
        for path, value in _leaves(operator.attrgetter(part)(PRESETS[default]), part):
            names[path] = f"config.{path}"
            _define(names[path], value)

    def config() -> Config:
        chosen = preset(flags.FLAGS["config"].value)
        for path, name in names.items():
            if (value := flags.FLAGS[name].value) is not None:
                if isinstance(value, float) and not math.isfinite(value):
                    raise UserError(f"--{name}={value} must be a finite number.")
                if path.endswith("dtype") and value == "float64":
                    _require_float64(name)
                chosen = _replaced(chosen, path.split("."), value)
        return chosen

    return config


def _leaves(part: Any, prefix: str) -> list[tuple[str, Any]]:
    leaves = []
    for field in dataclasses.fields(part):
        value, path = getattr(part, field.name), f"{prefix}.{field.name}"
        leaves += _leaves(value, path) if dataclasses.is_dataclass(value) else [(path, value)]
    return leaves


def _define(name: str, value: Any) -> None:
    """A flag without a default, of the type of the preset's value: absent means the preset's."""
    said = f"(default preset: {value!r})"
    match value:
        case bool():
            flags.DEFINE_boolean(name, None, said)
        case int():
            flags.DEFINE_integer(name, None, said)
        case float():
            flags.DEFINE_float(name, None, said)
        case str():
            flags.DEFINE_string(name, None, said)
        case tuple() if value and all(isinstance(x, (int, float)) for x in value):
            flags.DEFINE_list(name, None, f"{said}, {len(value)} numbers with commas")
        case _:
            raise TypeError(f"{name} = {value!r}: a config field must be a bool, int, float, str or tuple of numbers")


def _require_float64(name: str) -> None:
    import jax

    if not jax.config.jax_enable_x64:  # JAX would compute in float32 and only warn.
        raise UserError(f"--{name}=float64 needs JAX's 64-bit mode: set JAX_ENABLE_X64=1, or leave the flag out.")


def _replaced(config: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    old = getattr(config, name)
    if rest:
        return dataclasses.replace(config, **{name: _replaced(old, rest, value)})
    if isinstance(old, tuple):
        try:
            value = tuple(type(x)(v) for x, v in zip(old, value, strict=True))
        except ValueError:
            kinds = ",".join(type(x).__name__ for x in old)
            raise UserError(f"--config...{name}={','.join(value)} must be {kinds}.") from None
    return dataclasses.replace(config, **{name: value})
