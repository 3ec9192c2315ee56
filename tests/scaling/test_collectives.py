"""Collectives of compiled programs: how they are read, and that a training step has those it needs and no others."""

from __future__ import annotations

import pytest

from pointillist_jax.files import UserError
from pointillist_jax.scaling.collectives import Collective, collectives, inventory
from tests.scaling.counts import by_hand, compile_steps
from tests.scaling.hand_count import MODEL

MESHES = ("data:8", "fsdp:8", "tensor:8", "context:8", "data:2,fsdp:4", "data:4,tensor:2", "data:4,context:2",
          "fsdp:4,tensor:2", "data:2,tensor:2,context:2")  # fmt: skip
PROGRAM = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {{
  ROOT %sum = f32[] add(%a, %b)
}}

%body.1 (state: (s32[], f32[4,6])) -> (s32[], f32[4,6]) {{
  {instruction}
}}

%condition.1 (state: (s32[], f32[4,6])) -> pred[] {{
  ROOT %less = pred[] compare(%i, %n), direction=LT
}}

ENTRY %main.9 (x: f32[4,6]) -> f32[4,6] {{
  %loop = (s32[], f32[4,6]) while(%start), condition=%condition.1, body=%body.1{count}
}}
"""
COUNT = ', backend_config={"known_trip_count":{"n":"3"},"x":[]}'
SIZES = {"data": 2, "fsdp": 1, "tensor": 4, "context": 1}


def read(instruction: str, count: str = COUNT):
    return collectives(PROGRAM.format(instruction=instruction, count=count), SIZES)


@pytest.mark.parametrize(
    ("groups", "axes", "group", "spread"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", ("tensor",), 4, 3),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("data",), 2, 4),
        ("replica_groups={}", ("data", "tensor"), 8, 7),
        ("replica_groups=[2,4]<=[8]", ("tensor",), 4, 3),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",), 2, 4),
        ("replica_groups=[1,8]<=[8]", ("data", "tensor"), 8, 7),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", ("tensor",), 4, 3),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", ("data",), 2, 4),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", ("tensor",), 4, 3),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", ("data", "tensor"), 8, 7),
    ],
)
def test_every_form_of_device_groups(groups, axes, group, spread):
    line = f"%r = f32[4,6]{{1,0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add"
    (one,) = read(line + ', metadata={op_name="jit(step)/sum"}')
    assert one == Collective("all-reduce", axes, group, spread, 96, 24, 3, "jit(step)/sum")
    assert one.bytes == 288
    assert one.wire == pytest.approx(288 * 2 * (group - 1) / group)


@pytest.mark.parametrize(
    ("instruction", "kind", "payload"),
    [
        ("(f32[4,6]{1,0}, bf16[8]{0}, /*index=5*/s32[]) all-reduce(%x, %y, %z)", "all-reduce", 96 + 16 + 4),
        ("f32[4,24]{1,0} all-gather(%x), dimensions={1}", "all-gather", 384),
        ("(f32[4,6]{1,0}, f32[4,24]{1,0}) all-gather-start(%x), dimensions={1}", "all-gather", 384),
        ("f32[4,6]{1,0} reduce-scatter(%x), dimensions={1}", "reduce-scatter", 384),
        # As XLA's GPU compiler starts them: what goes in, and what comes out.
        ("((f32[4,24], f32[8]), (f32[4,6], f32[2])) reduce-scatter-start(%x, %y)", "reduce-scatter", 384 + 32),
        ("((f32[4,6]), f32[4,6]) all-to-all-start(%x), dimensions={1}", "all-to-all", 96),
        ("(f32[4,6], f32[4,6], u32[], u32[]) all-to-all-start(%x)", "all-to-all", 96),
        ("f32[4,6] all-reduce-start(%x)", "all-reduce", 96),
        ("(f32[1,6], f32[1,6], f32[1,6], f32[1,6]) all-to-all(%a, %b, %c, %d)", "all-to-all", 96),
    ],
)
def test_payloads(instruction, kind, payload):
    (one,) = read(f"%r = {instruction}, replica_groups={{{{0,1,2,3}},{{4,5,6,7}}}}, to_apply=%add")
    assert (one.kind, one.payload) == (kind, payload)


def test_permutations_and_what_never_leaves_a_device():
    pairs = "collective-permute(%x), source_target_pairs={{0,1},{1,0},{4,5},{5,4}}"
    (one,) = read(f"%r = f32[4,6]{{1,0}} {pairs}")
    assert (one.kind, one.axes, one.group, one.wire) == ("collective-permute", ("tensor",), 2, 288)
    assert read("%r = f32[4,6]{1,0} all-reduce(%x), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}") == []
    assert read("%r = f32[4,6]{1,0} all-reduce-done(%x)") == []


def test_what_cannot_be_counted_is_said():
    line = "%r = f32[4,6]{1,0} all-reduce(%x), replica_groups=[1,8]<=[8]"
    with pytest.raises(UserError, match="a loop whose length XLA does not know"):
        read(line, count="")
    with pytest.raises(UserError, match="unknown form"):
        read("%r = f32[4,6]{1,0} all-reduce(%x), replica_groups=torus(2,4)")
    assert inventory([]) == {}


@pytest.fixture(scope="module")
def compiled():
    return compile_steps("cpu", {}, *MESHES)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_step_has_the_collectives_that_are_counted_by_hand_and_no_others(compiled, mesh):
    found = {name: row["bytes"] / 4 for name, row in compiled[mesh].items()}
    assert found == by_hand(mesh)


def test_pure_data_parallelism_sums_gradients_once_and_gathers_nothing(compiled):
    # The other sum is that of the tokens' numbers, which the loss is divided by.
    assert set(compiled["data:8"]) == {"all-reduce over data"}
    assert compiled["data:8"]["all-reduce over data"]["count"] == 2


def test_micro_batches_add_up_on_their_device_and_are_summed_once():
    parts = compile_steps("cpu", {"accumulate": 2}, "data:8")["data:8"]
    assert set(parts) == {"all-reduce over data"}
    row = parts["all-reduce over data"]
    # The head's gradients of the four slots are one by then; beside them the loss and the number of tokens.
    heads, few = 3 * MODEL.tokenizer.padded_vocab_size * MODEL.width, 8 - 2
    assert (row["count"], row["bytes"] / 4) == (1, by_hand("data:8")["all-reduce over data"] - heads - few)
