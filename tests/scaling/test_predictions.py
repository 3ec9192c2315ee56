"""Memory by shapes against XLA's own figures, and the roofline against arithmetic by hand."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from experiments.step_programs import stage_one
from pointillist_jax.configs import TrainConfig
from pointillist_jax.flops import Peak
from pointillist_jax.scaling.collectives import Collective
from pointillist_jax.scaling.hardware import HARDWARE, Hardware
from pointillist_jax.scaling.memory import Memory, device_model, fit_factors, residual_bytes, stage_one_memory
from pointillist_jax.scaling.roofline import StepCost, step_time
from pointillist_jax.sharding import abstract_mesh, make_mesh
from tests.scaling.hand_count import BATCH, CONTEXT, MODEL

TRAIN = TrainConfig(warmup_steps=0)
TOY = Hardware(Peak(1e12, 1e11), 1e9, 1e9, 1e8, per_machine=8, latency=(1e-3, 2e-3))


def collective(kind: str, axes: tuple[str, ...], group: int, spread: int, payload: int, times: int = 1) -> Collective:
    return Collective(kind, axes, group, spread, payload, payload // 4, times, "")


def test_arguments_are_exactly_state_and_batch():
    program = stage_one(MODEL, TRAIN, make_mesh("", jax.devices()[:1]), 2, CONTEXT)
    memory = stage_one_memory(dataclasses.replace(MODEL), TRAIN, {"data": 1}, 2)
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.state))
    assert memory.state == state
    assert memory.gradients == sum(x.size * 4 for x in jax.tree.leaves(program.state.params)) == memory.whole


def test_what_a_mesh_divides():
    one = stage_one_memory(MODEL, TRAIN, {"data": 1}, BATCH)
    cut = {axis: stage_one_memory(MODEL, TRAIN, {axis: 8}, BATCH) for axis in ("data", "fsdp", "tensor", "context")}
    assert cut["data"].state == one.state
    assert cut["data"].kept * 8 == cut["fsdp"].kept * 8 == one.kept
    assert cut["fsdp"].state < one.state / 2
    assert cut["fsdp"].whole == one.whole
    assert cut["tensor"].whole * 8 == one.whole
    assert one.kept / 8 < cut["tensor"].kept < one.kept  # The states between branches are whole everywhere.
    assert one.kept / 8 <= cut["context"].kept < one.kept / 4
    halves = stage_one_memory(MODEL, dataclasses.replace(TRAIN, accumulate=2), {"data": 1}, BATCH)
    assert halves.kept * 2 == one.kept
    assert device_model(MODEL, abstract_mesh({"tensor": 2, "context": 4})).heads == MODEL.heads // 2
    assert residual_bytes(MODEL, 2) < 2 * residual_bytes(MODEL, 1)


@pytest.mark.parametrize("remat", ["none", "dots", "attention", "full"])
def test_a_mesh_changes_nothing_about_what_is_kept(remat):
    # With `tensor` the products of a layer are made another way, and "dots" once saved none of them.
    model = dataclasses.replace(MODEL, remat=remat, scan_layers=True)
    with jax.sharding.use_abstract_mesh(abstract_mesh({"data": 8})):
        expected = residual_bytes(model, 8)
    with jax.sharding.use_abstract_mesh(abstract_mesh({"data": 4, "tensor": 2})):
        assert residual_bytes(model, 8) == pytest.approx(expected, rel=0.01)


def test_factors_are_found_again(rng):
    memories = [Memory(0, 0, *map(int, rng.integers(1 << 20, 1 << 30, 4))) for _ in range(9)]
    truth = {"kept": 1.5, "gradients": 0.0, "whole": 2.0, "table": 0.25}
    found = fit_factors(memories, [memory.temporary(truth) for memory in memories])
    assert found == pytest.approx(truth, abs=1e-6)


def test_a_step_by_hand():
    cost = StepCost(
        flops=2e11,
        traffic=1e9,
        collectives=(
            collective("all-reduce", ("data",), 8, 7, 8 * 10**7),
            collective("all-gather", ("fsdp",), 2, 8, 2 * 10**6, times=3),
            collective("all-to-all", ("context",), 4, 3, 4 * 10**6),
        ),
    )
    found = step_time(cost, TOY, utilisation=0.5)
    assert found.compute == pytest.approx(0.4)
    # 2 · 7/8 · 80 MB at 1 GB/s and 6 rounds of 1 ms; 3 · 1 MB at 0.1 GB/s, in another machine, and 3 of 2 ms.
    assert found.beside == pytest.approx(0.14 + 0.006 + 0.03 + 0.006)
    assert found.exposed == pytest.approx(0.003 + 0.002)
    assert found.best == pytest.approx(0.4 + 0.005)
    assert found.worst == pytest.approx(0.4 + 0.182 + 0.005)
    assert found.best < found.middle < found.worst
    slow = dataclasses.replace(cost, traffic=1e11)
    assert step_time(slow, TOY).compute == pytest.approx(1.0)  # Memory, not arithmetic.


def test_profiles_are_complete():
    assert set(HARDWARE) == {"A100", "H100", "H200", "H20"}
    for device in HARDWARE.values():
        assert device.network < device.link < device.peak.bandwidth
        assert np.isfinite(dataclasses.astuple(device.peak)).all()
