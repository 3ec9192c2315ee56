"""Collectives of `hand_count`'s two-layer model: those of the compiled step, and those counted by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from pointillist_jax.scaling import gpu_programs
from pointillist_jax.sharding import mesh_sizes
from tests.experiments.small_ar import ROOT
from tests.scaling.hand_count import BATCH, CONTEXT, MODEL


def compile_steps(compiler: str, settings: dict, *meshes: str) -> dict:
    """{mesh: inventory} of the step on 8 devices, by XLA's compiler for "cpu" or "gpu"."""
    simulated = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    environment = os.environ | (gpu_programs.environment() if compiler == "gpu" else simulated)
    command = [sys.executable, "-m", "tests.scaling.hand_count", compiler, json.dumps(settings), *meshes]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def by_hand(mesh: str, *, gpu: bool = False) -> dict[str, int]:
    """Numbers (of four bytes) that a device's collectives carry in a step, from the model's sizes.

    Args:
      gpu: of XLA's GPU compiler, which reduce-scatters what fsdp has cut and adds on a device what it can before it
        sums over devices.
    """
    sizes = mesh_sizes(mesh, 8)
    data, fsdp, tensor, context = sizes.values()
    D, F, L, H = MODEL.width, MODEL.mlp_width, MODEL.layers, MODEL.head_dim
    heads, classes = MODEL.heads * H, MODEL.tokenizer.padded_vocab_size
    windows, length = BATCH // data // fsdp, MODEL.window // context
    matrices = L * (8 * D * heads + 3 * D * F) // tensor
    norms, rows = L * (3 * D + 4 * H) + 2 * D, 4 * D
    # The embedding's, and the head's from each of the four slots.
    tables = (2 if gpu else 5) * classes * D // tensor
    few = 5 if gpu else 8  # The loss, and numbers of tokens.
    found = {}
    # Gradients, on every axis whose devices see other tokens; a slice of each matrix where fsdp has cut it already.
    whole = norms + rows + tables + few
    if fsdp == 1 and data > 1:
        found["all-reduce over data"] = whole + matrices
    if fsdp > 1:
        # Squares of 11 matrices' slices, for two norms of the gradient and one of the parameters.
        found["all-reduce over fsdp"] = 3 * 11 + (whole if data == 1 else 0) + (0 if gpu else matrices)
        found |= {"reduce-scatter over fsdp": matrices} if gpu else {}
        # Every matrix whole, forward and backward.
        found["all-gather over fsdp"] = 2 * matrices
    if fsdp > 1 and data > 1:
        found["all-reduce over data+fsdp"] = whole
        found["all-reduce over data"] = matrices // fsdp
    if context > 1:
        # Keys and values of the condition are the same on all devices: their gradients are summed, and what follows
        # from them is then known everywhere.
        condition = L * 2 * D * heads // tensor
        known = condition + L * H + D
        keys_values = L * 2 * windows * CONTEXT * heads // tensor
        found["all-reduce over context"] = whole + matrices - known + keys_values
        # Queries, keys, values and the result, there and back again.
        found["all-to-all over context"] = L * 8 * windows * length * heads // tensor
    if tensor > 1:
        states = windows * length * D
        # After attention, attention and feed-forward network, and before them in the backward pass; the embedding and
        # the gradient of the last states; the condition's gradient; of every token maximum, sum and label's logit.
        found["all-reduce over tensor"] = (
            6 * L * states
            + 2 * states
            + (1 if gpu else L) * windows * CONTEXT * D
            + 3 * windows * length
            + L * 4 * H
            + 3 * 13
        )
    return found
