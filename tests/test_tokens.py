"""The token language: round trips, order independence, and the grammar against an independent one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointillist_jax.files import UserError
from pointillist_jax.tokens import GrammarState, MalformedTokens, PointTokenizer

# Few bins and faces make ties and borders common.
SMALL = PointTokenizer(num_faces=5, bins=4, lower=0.0, upper=1.0)
FLAME = PointTokenizer()


def sequence(tokenizer: PointTokenizer, points: list[tuple[int, int, int, int]]) -> np.ndarray:
    """The legal sequence of (x, y, z, face) cells, by a plain Python sort."""
    points = sorted(points, key=lambda p: (p[1], p[2], p[0], p[3]))
    body = [t for x, y, z, b in points for t in (x, y, z, tokenizer.bins + b)]
    return np.array([tokenizer.bos] * 4 + body + [tokenizer.eos] * 4)


def is_legal(tokenizer: PointTokenizer, tokens: np.ndarray) -> bool:
    """DESIGN §5 read as a definition: well-formed, and (y, z, x, b) never decreases."""
    tokens = tokens.tolist()
    if len(tokens) < 8 or len(tokens) % 4 or tokens[:4] != [tokenizer.bos] * 4 or tokens[-4:] != [tokenizer.eos] * 4:
        return False
    points = [tokens[i : i + 4] for i in range(4, len(tokens) - 4, 4)]
    for x, y, z, b in points:
        if not (0 <= min(x, y, z) <= max(x, y, z) < tokenizer.bins <= b < tokenizer.bos):
            return False
    keys = [(y, z, x, b) for x, y, z, b in points]
    return keys == sorted(keys)


def cells(tokenizer):
    edge = st.sampled_from([0, tokenizer.bins - 1])
    coordinate = edge | st.integers(0, tokenizer.bins - 1)
    return st.tuples(coordinate, coordinate, coordinate, st.integers(0, tokenizer.num_faces - 1))


def clouds(tokenizer, max_size=12):
    return st.lists(cells(tokenizer), max_size=max_size)


TOKENIZERS = st.sampled_from(
    [SMALL, FLAME, PointTokenizer(num_faces=1, bins=2), PointTokenizer(num_faces=300, bins=1000)]
)


def test_vocabulary_is_the_papers():
    assert (FLAME.bos, FLAME.eos, FLAME.pad) == (11168, 11169, 11170)
    assert (FLAME.vocab_size, FLAME.padded_vocab_size) == (11171, 11264)
    assert PointTokenizer(num_faces=512 - 1024 % 512 - 3 + 1024, bins=1024).padded_vocab_size == 2560
    np.testing.assert_allclose(FLAME.cell, 0.6 / 1024)


@given(st.data())
def test_encode_is_the_sorted_sequence_and_decode_its_inverse(data):
    tokenizer = data.draw(TOKENIZERS)
    cloud = data.draw(clouds(tokenizer))
    points = tokenizer.dequantize(np.array(cloud).reshape(-1, 4)[:, :3])
    binding = np.array([b for *_, b in cloud], np.int32)
    tokens = tokenizer.encode(points, binding)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, sequence(tokenizer, cloud))
    order = data.draw(st.permutations(range(len(cloud))))
    np.testing.assert_array_equal(tokenizer.encode(points[order], binding[order]), tokens)
    np.testing.assert_array_equal(tokenizer.encode(*tokenizer.decode(tokens)), tokens)


@given(st.data())
def test_round_trip_error_is_at_most_half_a_cell(data):
    tokenizer = data.draw(TOKENIZERS)
    n = data.draw(st.integers(0, 20))
    unit = data.draw(st.lists(st.tuples(*[st.floats(0, 1)] * 3), min_size=n, max_size=n))
    lower, upper = np.array(tokenizer.lower), np.array(tokenizer.upper)
    points = np.clip(lower + np.array(unit).reshape(-1, 3) * (upper - lower), lower, upper)
    # Distinct bindings tie each decoded point to its original.
    binding = np.arange(n) % tokenizer.num_faces
    for i in range(n):
        decoded, face = tokenizer.decode(tokenizer.encode(points[i : i + 1], binding[i : i + 1]))
        assert face.tolist() == [binding[i]]
        assert (np.abs(decoded[0] - points[i]) <= tokenizer.cell / 2 + 2e-7).all()


def test_known_errors_of_a_large_cloud(rng):
    points = rng.uniform(FLAME.lower, FLAME.upper, (100_000, 3))
    binding = rng.integers(0, 10144, 100_000)
    decoded, faces = FLAME.decode(FLAME.encode(points, binding))
    want = FLAME.quantize(points)
    order = np.lexsort((binding, want[:, 0], want[:, 2], want[:, 1]))
    np.testing.assert_array_equal(faces, binding[order])
    assert np.abs(decoded - points[order]).max() <= FLAME.cell[0] / 2 + 1e-7


# Tokenizers are hashable, so that jitted functions can take them as static arguments.
MASK = jax.jit(PointTokenizer.legal_mask, static_argnums=0)
RANGE = jax.jit(PointTokenizer.legal_range, static_argnums=0)
ADVANCE = jax.jit(PointTokenizer.advance, static_argnums=0)


def legal_ids(tokenizer, state) -> set[int]:
    return set(np.flatnonzero(MASK(tokenizer, state)).tolist())


@settings(max_examples=40)
@given(st.data())
def test_mask_is_exactly_the_set_of_ids_that_can_be_continued(data):
    """For every prefix: an id is in the mask if and only if some legal sequence goes on with it (brute force)."""
    cloud = data.draw(clouds(SMALL, 3))
    tokens = sequence(SMALL, cloud)
    last = SMALL.bins - 1
    state = SMALL.start()
    for position in range(4, len(tokens)):
        prefix = tokens[4:position].tolist()
        want = set()
        for token in range(SMALL.vocab_size + 2):
            tried = [*prefix, token]
            if SMALL.eos in tried:
                padded = tried + [SMALL.eos] * (-len(tried) % 4)
                ok = tried.index(SMALL.eos) % 4 == 0 and len(tried) - tried.index(SMALL.eos) <= 4
            else:
                # The greatest completion of a point is the easiest to keep in order.
                rest = [last, last, last, SMALL.bos - 1][len(tried) % 4 :] if len(tried) % 4 else []
                padded = tried + rest + [SMALL.eos] * 4
                ok = True
            if ok and is_legal(SMALL, np.array([SMALL.bos] * 4 + padded)):
                want.add(token)
        assert legal_ids(SMALL, state) == want, prefix
        state = ADVANCE(SMALL, state, tokens[position])
    assert legal_ids(SMALL, state) == set()


@settings(max_examples=60)
@given(st.data())
def test_every_encoded_sequence_is_accepted_by_mask_and_decoder(data):
    tokenizer = data.draw(st.sampled_from([SMALL, FLAME]))
    tokens = sequence(tokenizer, data.draw(clouds(tokenizer, 6)))
    assert tokenizer.first_error(tokens) is None
    state = tokenizer.start()
    for token in tokens[4:]:
        low, high, eos_legal = RANGE(tokenizer, state)
        assert low <= token <= high or (token == tokenizer.eos and eos_legal)
        state = ADVANCE(tokenizer, state, token)
    assert int(state.num_eos) == 4


@settings(max_examples=400)
@given(st.data())
def test_changed_sequences_are_judged_as_the_definition_says(data):
    tokenizer = data.draw(TOKENIZERS)
    tokens = sequence(tokenizer, data.draw(clouds(tokenizer, 5)))
    change = data.draw(st.sampled_from(["replace", "delete", "insert", "swap", "cut", "append"]))
    i = data.draw(st.integers(0, len(tokens) - 1))
    any_id = st.integers(-1, tokenizer.padded_vocab_size) | st.sampled_from(
        [tokenizer.bos, tokenizer.eos, tokenizer.pad]
    )
    if change == "replace":
        tokens[i] = data.draw(any_id)
    elif change == "delete":
        tokens = np.delete(tokens, i)
    elif change == "insert":
        tokens = np.insert(tokens, i, data.draw(any_id))
    elif change == "swap":
        j = data.draw(st.integers(0, len(tokens) - 1))
        tokens[[i, j]] = tokens[[j, i]]
    elif change == "cut":
        tokens = tokens[:i]
    else:
        tokens = np.append(tokens, data.draw(any_id))
    error = tokenizer.first_error(tokens)
    assert (error is None) == is_legal(tokenizer, tokens)
    if error is None:
        return
    with pytest.raises(MalformedTokens) as caught:
        tokenizer.decode(tokens)
    assert caught.value.position == error.position
    assert str(error.position) in str(caught.value)
    # Everything before the named position can still be continued legally; with the named token it cannot.
    with pytest.warns(UserWarning, match="malformed"):
        points, binding = tokenizer.decode(tokens, strict=False)
    kept = max(error.position // 4 - 1, 0)
    assert len(points) == len(binding) <= kept
    rebuilt = tokenizer.encode(points, binding)
    assert is_legal(tokenizer, rebuilt)
    np.testing.assert_array_equal(rebuilt[4:-4], np.asarray(tokens[4 : 4 + 4 * len(points)]))


def test_each_single_broken_rule_is_named():
    base = sequence(SMALL, [(1, 2, 2, 3), (1, 2, 2, 4), (3, 3, 3, 0)])
    assert SMALL.first_error(base) is None

    def broken(position, value):
        tokens = base.copy()
        tokens[position] = value
        error = SMALL.first_error(tokens)
        assert error is not None
        return error.position, error.rule

    assert broken(0, 0)[0] == 0
    assert broken(4, SMALL.eos) == (5, f"a sequence ends with four E ({SMALL.eos})")
    assert broken(5, SMALL.eos)[0] == 5
    assert broken(5, SMALL.eos)[1].startswith("E can only stand at an x slot")
    assert broken(6, SMALL.bos)[1].startswith("S cannot")
    assert broken(7, SMALL.pad)[1].startswith("P cannot")
    assert broken(7, 2)[1].startswith("2 cannot")
    assert broken(9, 1) == (9, "y is 1, must be at least 2: points are ordered by (y, z, x), ties by binding")
    assert broken(10, 1)[0] == 10
    assert broken(8, 0) == (10, "z is 2, must be at least 3: points are ordered by (y, z, x), ties by binding")
    assert broken(11, SMALL.bins + 2)[1].startswith(f"b is {SMALL.bins + 2}, must be at least {SMALL.bins + 3}")
    assert broken(19, 0)[0] == 19
    after_the_corner = sequence(SMALL, [(3, 3, 3, 0), (3, 3, 3, 1)])
    after_the_corner[8] = 2
    assert SMALL.first_error(after_the_corner).position == 8


def test_empty_and_single_clouds():
    none = FLAME.encode(np.zeros((0, 3)), np.zeros(0, int))
    assert none.tolist() == [11168] * 4 + [11169] * 4
    points, binding = FLAME.decode(none)
    assert points.shape == (0, 3)
    assert binding.shape == (0,)
    corner = FLAME.encode(np.array([FLAME.upper]), np.array([10143]))
    assert corner.tolist() == [11168] * 4 + [1023, 1023, 1023, 11167] + [11169] * 4
    assert FLAME.encode(np.array([FLAME.lower]), np.array([0])).tolist()[4:8] == [0, 0, 0, 1024]


def test_grammar_runs_batched_inside_scan(rng):
    """A random walk that samples only legal ids is always a legal sequence, in a batch, inside one jitted scan."""

    @jax.jit
    def walk(key):
        def step(carry, key):
            state = carry
            mask = SMALL.legal_mask(state)
            logits = jnp.where(mask, 0.0, -jnp.inf)
            ended = state.num_eos == 4
            token = jnp.where(ended, SMALL.pad, jax.random.categorical(key, logits))
            following = SMALL.advance(state, token)
            state = jax.tree.map(lambda a, b: jnp.where(ended.reshape(-1, *[1] * (a.ndim - 1)), b, a), following, state)
            return GrammarState(*state), token

        return jax.lax.scan(step, SMALL.start((64,)), jax.random.split(key, 400))[1].T

    for tokens in np.asarray(walk(jax.random.key(int(rng.integers(1 << 30))))):
        body = tokens[tokens != SMALL.pad]
        whole = np.concatenate([[SMALL.bos] * 4, body])
        if (body == SMALL.eos).sum() == 4:
            assert is_legal(SMALL, whole)
        else:
            whole = np.concatenate([whole[: len(whole) - len(whole) % 4], [SMALL.eos] * 4])
            assert is_legal(SMALL, whole[whole != SMALL.eos].tolist() and whole)


def test_points_outside_the_box():
    points = np.array([[0, 0, 0], [0.31, 0, 0], [0, -5, 0]])
    binding = np.array([1, 2, 3])
    with pytest.raises(UserError, match=r"2 of 3 points lie outside.*--bounds"):
        FLAME.encode(points, binding)
    with pytest.warns(UserWarning, match="2 of 3 points.*clipped"):
        tokens = FLAME.encode(points, binding, out_of_bounds="clip")
    np.testing.assert_array_equal(np.sort(FLAME.decode(tokens)[1]), binding)
    with pytest.raises(UserError, match="out_of_bounds"):
        FLAME.encode(points, binding, out_of_bounds="wrap")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_border_itself_is_inside_in_every_dtype(dtype):
    corners = np.array([FLAME.lower, FLAME.upper], dtype)
    np.testing.assert_array_equal(FLAME.quantize(corners), [[0] * 3, [1023] * 3])
    with pytest.raises(UserError, match="1 of 2 points"):
        FLAME.quantize(corners * np.array([[1], [1.001]], dtype))


def test_empty_lists_and_numpy_integers():
    assert len(FLAME.encode(np.zeros((0, 3)), [])) == 8
    assert PointTokenizer(bins=np.int64(1024)) == PointTokenizer()


@pytest.mark.parametrize(
    ("points", "binding", "message"),
    [
        (np.zeros((2, 3)), np.array([0, 10144]), "outside the mesh's faces 0..10143"),
        (np.zeros((2, 3)), np.array([0, -1]), "outside the mesh"),
        (np.zeros((2, 3)), np.zeros(2), "integers"),
        (np.zeros((2, 2)), np.zeros(2, int), r"must be \[P, 3\]"),
        (np.zeros((2, 3)), np.zeros(3, int), r"must be \[P, 3\]"),
        (np.array([[0, np.nan, 0]]), np.zeros(1, int), "1 of 1 points are NaN"),
    ],
)
def test_bad_points_are_refused_in_a_sentence(points, binding, message):
    with pytest.raises(UserError, match=message):
        FLAME.encode(points, binding)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"bins": 1},
        {"num_faces": 0},
        {"lower": 1.0, "upper": 0.0},
        {"upper": float("nan")},
        {"bins": 1 << 20},
        {"bins": 10.5},
        {"lower": (0, 1)},
    ],
)
def test_impossible_tokenizers(kwargs):
    with pytest.raises(UserError):
        PointTokenizer(**kwargs)


@pytest.mark.parametrize("tokens", [np.zeros((2, 8), int), np.zeros(8), np.array(["a"])])
def test_decode_refuses_other_arrays(tokens):
    with pytest.raises(UserError):
        FLAME.decode(tokens)


def test_tokenizers_are_hashable_and_comparable():
    assert PointTokenizer(lower=-1, upper=[1, 1, 1]) == PointTokenizer(lower=(-1.0, -1.0, -1.0), upper=1.0)
    assert len({PointTokenizer(), PointTokenizer(bins=512)}) == 2
