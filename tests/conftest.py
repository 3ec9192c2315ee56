"""Fixtures shared by the whole suite."""

from __future__ import annotations

import gc
import importlib.util
import os

import jax
import numpy as np
import pytest
from hypothesis import settings

from experiments.common import json_line
from experiments.random_flame import write_flame
from pointillist_jax.flame import FlameModel, FlameParams, load_flame
from tests.compiler import QUICK

# The first example of a property compiles JAX programs; a time limit per example would only measure the machine.
settings.register_profile("default", deadline=None)
settings.load_profile("default")


def pytest_configure(config):
    """The quick tests' own programs are compiled quickly. Those of the long tests, and of every process that a test
    starts, are compiled as a user's are: the flags are read once, here, and taken back."""
    accelerated = importlib.util.find_spec("jax_plugins") is not None
    if config.getoption("markexpr") == "not slow" and "XLA_FLAGS" not in os.environ and not accelerated:
        os.environ["XLA_FLAGS"] = QUICK
        jax.devices()
        del os.environ["XLA_FLAGS"]


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Frees what a file has compiled. A process may hold 65,530 memory mappings, and every program takes several.

    The suite's programs together passed that limit, where LLVM ends the process by a segmentation fault.
    """
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def rng(request) -> np.random.Generator:
    """Random numbers that differ between tests and repeat between runs."""
    return np.random.default_rng(list(request.node.nodeid.encode()))


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def one_torch_thread():
    """For thousands of small operations, for which torch's thread pool only costs time."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def flame_pickle(tmp_path_factory):
    """A random head in FLAME's layout, as a `.pkl`."""
    return write_flame(tmp_path_factory.mktemp("flame") / "random_flame.pkl")


@pytest.fixture(scope="session")
def flame_model(flame_pickle) -> FlameModel:
    """The same, loaded with teeth in float32."""
    return load_flame(flame_pickle)


def random_params(rng: np.random.Generator, model: FlameModel, batch: tuple[int, ...] = ()) -> FlameParams:
    """Parameters of a plausible size in every field, in the model's dtype; float64 NumPy underneath."""
    s, e, v = model.shape_dirs.shape[-1], model.expr_dirs.shape[-1], model.num_vertices
    params = FlameParams(
        shape=rng.normal(size=(*batch, s)),
        expr=rng.normal(size=(*batch, e)),
        rotation=rng.normal(0, 0.5, (*batch, 3)),
        neck_pose=rng.normal(0, 0.3, (*batch, 3)),
        jaw_pose=rng.normal(0, 0.3, (*batch, 3)),
        eyes_pose=rng.normal(0, 0.3, (*batch, 6)),
        translation=rng.normal(0, 0.1, (*batch, 3)),
        static_offset=rng.normal(0, 1e-3, (*batch, v, 3)),
    )
    return jax.tree.map(lambda x: jax.numpy.asarray(x, model.v_template.dtype), params)


def pytest_terminal_summary(terminalreporter):
    """One JSON line of what tests/endurance did: the sums of what its tests have counted, from all workers."""
    found: dict[str, float] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in getattr(report, "user_properties", ()) if report.when == "call" else ():
                if name.startswith("endurance."):
                    key = name.removeprefix("endurance.")
                    found[key] = found.get(key, 0) + value
    if found:
        json_line("endurance", found)
