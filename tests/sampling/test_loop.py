"""The compiled loop itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pointillist_jax.sampling import choose, generate, loop
from pointillist_jax.sampling.steppers import make_stepper
from tests.models.tiny_ar import changed, random_params
from tests.sampling.small import contexts, params_without_end

# A window of a size that nothing else has.
CONFIG = changed(window=52, layers=1)


@pytest.mark.parametrize("batch", [1, 3])
def test_caches_are_written_in_place(batch, rng):
    """XLA's program copies no cache inside its loop, and chunk by chunk the buffers stay where they are."""
    program = loop.Program(make_stepper(CONFIG), CONFIG.tokenizer, 3, keep_hidden=False)
    weights = loop.make_weights(program.stepper, random_params(CONFIG))
    lengths, limits = np.full(batch, 11, np.int32), np.full(batch, 99, np.int32)
    keys = np.zeros((batch, 2), np.uint32)
    state = loop.start(program.stepper, weights, contexts(rng, CONFIG, batch), lengths, keys, limits)
    filters, forced = choose.Filters(jnp.float32(1), None, None), np.full((batch, 3, 4), -1, np.int32)
    compiled = loop.run_chunk.lower(program, weights, state, filters, forced, batch).compile()
    lines = compiled.as_text().splitlines()
    writes = [line for line in lines if "dynamic-update-slice" in line and "52,8]" in line]
    copies = [line for line in lines if " copy(" in line and "52,8]" in line.split(" copy(")[0]]
    assert writes or batch > 1  # Rows of different age are scattered.
    assert copies == []
    places = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state.cache)]
    state, _ = compiled(weights, state, filters, forced, batch)
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state.cache)] == places


def test_one_program_for_all_chunks_and_settings(rng):
    """A cloud of many chunks, other temperatures, keys, prefixes and limits: the loop is traced once."""
    config = changed(window=20, layers=1)
    params, context = params_without_end(config), contexts(rng, config, 1)
    before = loop.run_chunk._cache_size()
    for temperature, points in ((1.0, 11), (0.5, 7)):
        options = {"max_points": points, "chunk": 3, "temperature": temperature}
        found = generate(params, config, config.tokenizer, context, key=jax.random.PRNGKey(points), **options)
        assert found.num_points[0] > 3
    assert loop.run_chunk._cache_size() == before + 1
