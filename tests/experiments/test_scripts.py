"""The scripts as a user starts them: what they write, how they end, and how they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import experiments
from experiments.common import alternate

ROOT = Path(experiments.__file__).parent.parent


def start(*command: str, timeout: float = 1200) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--train", "--flame=nowhere.pkl"), "nowhere.pkl does not exist"),
        (("--flame=nowhere.npz",), "--flame does nothing without --portrait"),
        (("--portrait=nowhere.jpg",), "nowhere.jpg does not exist"),
        (("--workdir=README.md",), "is a file"),
        (("extra",), "unexpected argument 'extra'"),
        (("--people=4",), "--people does nothing without --train"),
        (("--train", "--people=abc"), "people=abc"),
        (("--nope=1",), "nope"),
        (("--workdir=README.md/sub",), "choose another path"),
    ],
)
def test_user_errors_are_one_sentence_and_exit_code_2(arguments, message):
    done = start("-m", "experiments.quickstart", "--smoke", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_bench_flame_ends_in_one_json_line():
    done = start("-m", "experiments.bench_flame", "--poses=2", "--points=200", "--repeats=1")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    assert figures["bench"] == "flame"
    assert figures["jax_ms"] > 0
    assert figures["torch_over_jax"] == pytest.approx(figures["torch_ms"] / figures["jax_ms"], rel=0.02)
    assert {"versions", "machine", "animate_ms", "encode_ms"} <= set(figures)


def test_doctor_reports_every_part():
    done = start("-m", "pointillist_jax.doctor")
    assert done.returncode == 0, done.stdout
    for name in ("python", "packages", "device", "jit", "open head", "video", "torch", "dlpack", "gsplat"):
        assert name in done.stdout


def test_doctor_works_without_torch_and_names_what_is_broken():
    block = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {blocked}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Block())
from pointillist_jax import doctor
sys.exit(doctor.main())
"""
    done = start("-c", block.format(blocked=["torch"]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "optional  torch" in done.stdout
    assert "pip install -e '.[torch]'" in done.stdout
    broken = start("-c", block.format(blocked=["optax"]))
    assert broken.returncode == 1
    assert "optax" in broken.stdout
    assert "fix: pip install -e ." in broken.stdout
    assert "Traceback" not in broken.stderr


def test_alternate_takes_turns_and_reports_medians():
    calls = []
    seconds = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warmup=1)
    assert calls == ["a", "b"] + ["a", "b"] * 3
    assert set(seconds) == {"a", "b"}
