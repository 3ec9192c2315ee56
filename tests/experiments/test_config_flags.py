"""The config flags: presets, typed overrides, and errors that name the flag."""

from __future__ import annotations

import dataclasses

import pytest
from absl import flags

from experiments import config_flags
from pointillist_jax.files import UserError


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    on: bool = True
    box: tuple[float, float] = (1.0, 2.0)


@dataclasses.dataclass(frozen=True)
class Part:
    steps: int = 3
    name: str = "a"
    inner: Inner = Inner()


@dataclasses.dataclass(frozen=True)
class Whole:
    part: Part = Part()
    other: Part = Part()


@pytest.fixture
def parse(monkeypatch):
    """Parses a command line with the flags of `part` in a fresh set of flags."""
    presets = {"tiny": Whole(), "big": Whole(part=Part(steps=100))}
    monkeypatch.setattr(config_flags, "PRESETS", presets)
    monkeypatch.setattr(config_flags, "preset", presets.__getitem__)

    def run(*args: str) -> Whole:
        values = flags.FlagValues()
        monkeypatch.setattr(flags, "FLAGS", values)
        for kind in ("enum", "boolean", "integer", "float", "string", "list"):
            define = getattr(flags, f"DEFINE_{kind}")
            monkeypatch.setattr(flags, f"DEFINE_{kind}", _into(define, values))
        config = config_flags.define_config("part")
        values(["script", *args])
        return config()

    return run


def _into(define, values):
    define = getattr(define, "original", define)

    def defined(*args, **kwargs):
        return define(*args, **kwargs, flag_values=values)

    defined.original = define
    return defined


def test_presets_and_overrides_of_every_type(parse):
    assert parse() == Whole()
    assert parse("--config=big") == Whole(part=Part(steps=100))
    changed = parse("--config=big", "--config.part.name=b", "--noconfig.part.inner.on", "--config.part.inner.box=3,4.5")
    assert changed == Whole(part=Part(100, "b", Inner(on=False, box=(3.0, 4.5))))
    assert parse("--config.part.inner.rate=1e-3").part.inner.rate == 1e-3
    assert not parse("--config.part.inner.on=false").part.inner.on


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config=huge"], "config"),
        (["--config.part.steps=2.5"], "config.part.steps"),
        (["--config.other.steps=2"], "config.other.steps"),
        (["--config.part.stepz=2"], "config.part.stepz"),
    ],
)
def test_wrong_flags_are_named(parse, args, message):
    with pytest.raises(flags.Error, match=message):
        parse(*args)


@pytest.mark.parametrize("box", ["1", "1,2,3", "1,x"])
def test_a_tuple_of_the_wrong_length_or_kind(parse, box):
    with pytest.raises(UserError, match="box"):
        parse(f"--config.part.inner.box={box}")
