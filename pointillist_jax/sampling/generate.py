"""Clouds from contexts: one batch (`generate`), or a queue that keeps every row busy (`generate_many`).

DESIGN §6. What a subject becomes depends on its context, key, prefix and settings only, not on the batch it runs in.
In exact arithmetic, that is: a product of one row and a product of seven may round differently, and once in a million
draws that decides. `slots` pads a batch to a fixed number of rows, so that any number of subjects up to it runs the
very same program (bf16, where rounding decides far more often, wants it). Results are then equal bit for bit wherever
a product rounds all its rows alike; on CPUs with AVX-512 a row's place in the batch may show in the seventh digit.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from pointillist_jax.configs import ModelConfig
from pointillist_jax.files import UserError
from pointillist_jax.models.ar import accumulator
from pointillist_jax.models.layers import Params
from pointillist_jax.sampling import choose, loop
from pointillist_jax.sampling.steppers import make_stepper
from pointillist_jax.tokens import PointTokenizer

CHUNK = 256


@dataclasses.dataclass(frozen=True)
class Generation:
    """Clouds of B subjects; P is the largest `num_points` of the batch, T = 4 · max_points + 8. NumPy arrays.

    Attributes:
      tokens: [B, T] int32 S S S S, points, E E E E, then P.
      points: [B, P, 3] float32 metres, zeros beyond `num_points`. binding: [B, P] int32 faces.
      num_points: [B] int32, those of a prefix included.
      stop_reason: "eos" or "max_points" of each subject.
      log_prob: [B] float64 nats, Σ of `token_log_probs`.
      token_log_probs: [B, T] of each token given those before it, as `choose.Draw.log_prob`; 0 for S, P, a forced E and
        the last three E, which are certain. Tokens of a prefix have theirs. A softmax over the classes of the slot,
        also for models trained with loss_support="vocab": logits of other slots' ids are never computed.
      masked_mass: [B] float64 mean over its tokens of the probability that the grammar removed.
      token_masked_mass: [B, T] the same by token.
      hidden: [B, P, 4, D] in the dtype of the computation: the final hidden state at each token of a point, after the
        last norm (`models.ar.hidden_states` at 4 + 4p + s); zeros beyond `num_points`. None if not asked for.
    """

    tokens: Int[np.ndarray, "B T"]
    points: Float[np.ndarray, "B P 3"]
    binding: Int[np.ndarray, "B P"]
    num_points: Int[np.ndarray, "B"]
    stop_reason: list[str]
    log_prob: Float[np.ndarray, "B"]
    token_log_probs: Float[np.ndarray, "B T"]
    masked_mass: Float[np.ndarray, "B"]
    token_masked_mass: Float[np.ndarray, "B T"]
    hidden: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Request:
    """One subject of a queue.

    Attributes:
      name: handed back with the result.
      context: [S, D].
      key: [2] of `jax.random.PRNGKey`, or a typed key.
      max_points: of this subject; None is the call's.
      prefix: [4P + 4] tokens S S S S, points, to be continued; E and P at its end are dropped.
    """

    name: Any
    context: Float[Array, "S D"]
    key: Array
    max_points: int | None = None
    prefix: Any = None


def generate(
    params: Params,
    config: ModelConfig,
    tokenizer: PointTokenizer,
    context: Float[Array, "B S D"],
    *,
    key: Array,
    max_points: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    constrain: bool = True,
    prefix: Any = None,
    context_lengths: Int[Array, "B"] | None = None,
    cache_dtype: str = "",
    return_hidden: bool = True,
    progress: Callable[[Int[np.ndarray, "B"]], None] | None = None,
    chunk: int = CHUNK,
    slots: int = 0,
    mesh: Mesh | None = None,
) -> Generation:
    """Samples bound point clouds.

    Args:
      params: of `PointTransformer` (`params["transformer"]` of a checkpoint), in any dtype.
      tokenizer: whose grammar and box; must have the model's bins and faces.
      context: `training.ar.encode`'s.
      key: one for every row (equal contexts then give equal clouds), or [B, 2], one per row.
      max_points: hard limit, a prefix included; then E E E E is forced.
      temperature: of the logits; 0 takes the likeliest token.
      top_p, top_k: keep the smallest set of tokens of that mass, and the k likeliest ones; 1 and 0 are off. top_k comes
        first, as everywhere.
      constrain: False leaves the order of points to the model (slots always hold their own kind of token): the
        result may then be refused by `tokenizer.decode`.
      prefix: tokens S S S S, points (E and P at the end are dropped), of all rows [T], or a list of one per row; its
        points are kept and continued.
      context_lengths: for contexts padded to one length.
      cache_dtype: "float32", "bfloat16" or "int8" keys and values; that of the computation by default.
      return_hidden: the hidden states take 4 · D numbers per point.
      progress: called after every chunk with the points of each row so far.
      chunk: points per call of the compiled loop.
      slots: pads the batch to so many rows (see the module); 0 is no padding.
      mesh: rows over `data` and `fsdp`, heads over `tensor` (`sharding.make_mesh`).

    Raises:
      UserError: settings out of range, shapes that do not fit, a malformed prefix.
    """
    context = np.asarray(context)
    if context.ndim != 3 or context.shape[2] != config.width:
        raise UserError(f"context has shape {context.shape}; expected [B, S, {config.width}].")
    batch = context.shape[0]
    lengths = np.full(batch, context.shape[1]) if context_lengths is None else np.asarray(context_lengths)
    if lengths.shape == (batch,) and not ((lengths >= 1) & (lengths <= context.shape[1])).all():
        raise UserError(
            f"context_lengths {lengths.tolist()} must lie in 1 … {context.shape[1]}, as the context has it."
        )
    keys = _rows_of_keys(key, batch)
    if prefix is None or not isinstance(prefix, (list, tuple)):
        prefix = [prefix] * batch
    if len(prefix) != batch or lengths.shape != (batch,):
        raise UserError(
            f"{len(prefix)} prefixes and {lengths.shape} context lengths for {batch} contexts: need {batch}."
        )
    requests = (Request(i, context[i, : lengths[i]], keys[i], prefix=prefix[i]) for i in range(batch))
    found: dict[int, _Row] = {}
    counts = dict.fromkeys(range(batch), 0)

    def report(busy: dict[int, int]) -> None:
        counts.update(busy)  # Rows that ended in an earlier chunk keep theirs.
        progress(np.array(list(counts.values())))

    for row in _run(
        params, config, tokenizer, requests, max_points=max_points, temperature=temperature, top_p=top_p, top_k=top_k,
        constrain=constrain, cache_dtype=cache_dtype, return_hidden=return_hidden, chunk=chunk, mesh=mesh,
        progress=progress and report, slots=max(slots, batch), context_size=context.shape[1],
    ):  # fmt: skip
        found[row.request.name] = row
    return _gather([found[i] for i in range(batch)], tokenizer, max_points)


def generate_many(
    params: Params,
    config: ModelConfig,
    tokenizer: PointTokenizer,
    requests: Iterable[Request],
    *,
    slots: int,
    max_points: int,
    context_size: int = 0,
    progress: Callable[[dict[Any, int]], None] | None = None,
    **options: Any,
) -> Iterator[tuple[Any, Generation]]:
    """Continuous batching: yields (name, Generation of one subject) as subjects finish; a freed row takes the next one.

    Nothing is recompiled on the way, and no row waits for another.

    Args:
      requests: read only as rows become free.
      slots: rows of the batch.
      max_points: of subjects that name none.
      context_size: longest context of the queue; 0 is the first one's. Shorter ones are padded.
      progress: called after every chunk with name → points so far, of the subjects in work.
      **options: temperature … chunk and mesh, as `generate`.

    Raises:
      UserError: as `generate`; a context longer than `context_size`.
    """
    options = {"progress": progress, "max_points": max_points, "slots": slots, "context_size": context_size} | options
    for row in _run(params, config, tokenizer, requests, **options):
        yield row.request.name, _gather([row], tokenizer, row.limit)


class _Row:
    """One subject in work: what its chunks have brought."""

    def __init__(self, request: Request, tokenizer: PointTokenizer, max_points: int, start: int):
        self.request, self.start = request, start
        self.limit = max_points if request.max_points is None else request.max_points
        self.forced = _forced_points(request, tokenizer, self.limit)
        self.parts: list[tuple[np.ndarray, ...]] = []
        self.num_points, self.done = 0, False

    @property
    def by_eos(self) -> bool:
        """Whether E ended it. At its limit a row is done before it could draw one."""
        return self.done and self.num_points < self.limit

    def take(self, chunk: loop.Chunk, row: int, first_step: int, num_points: int, done: bool) -> None:
        """Adds a chunk that began at `first_step`. The row's own first step is S S S S and carries nothing."""
        self.num_points, self.done = num_points, done
        begin = max(self.start + 1 - first_step, 0)
        # The loop goes on for other rows: what this one made after its end is no part of it.
        stop = self.start + 1 + num_points + self.by_eos - first_step if done else int(chunk.steps)
        self.parts.append(tuple(None if x is None else np.array(x[row, begin:stop]) for x in chunk[1:]))

    def arrays(self) -> list[np.ndarray | None]:
        """Classes, log-probs, masked mass and hidden states of all points, and of the E drawn after them, if any."""
        return [None if x[0] is None else np.concatenate(x) for x in zip(*self.parts, strict=True)]


def _run(
    params, config, tokenizer, requests, *, max_points, slots, context_size=0, temperature=1.0, top_p=1.0, top_k=0,
    constrain=True, cache_dtype="", return_hidden=True, progress=None, chunk=CHUNK, mesh=None,
) -> Iterator[_Row]:  # fmt: skip
    """The queue behind both public functions."""
    _check(config, tokenizer, max_points, temperature, top_p, top_k, chunk, slots)
    requests = iter(requests)
    if (upcoming := next(requests, None)) is None:
        return
    size = context_size or np.shape(upcoming.context)[0]
    stepper = make_stepper(config, cache_dtype)
    program = loop.Program(stepper, tokenizer, chunk, constrain, return_hidden)
    filters = choose.Filters(
        temperature=jnp.asarray(temperature, accumulator(config)),
        top_k=jnp.asarray(top_k, jnp.int32) if top_k else None,
        top_p=jnp.asarray(top_p, accumulator(config)) if top_p < 1 else None,
    )

    def on_mesh():
        # Entered for each computation, never across a yield: the caller's own code is not on the mesh.
        return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)

    with on_mesh():
        weights = loop.make_weights(stepper, params)
    rows: list[_Row | None] = [None] * slots
    state, step = None, 0
    while True:
        waiting = []
        for i in range(slots):
            if rows[i] is None and upcoming is not None:
                rows[i] = _Row(upcoming, tokenizer, max_points, step)
                waiting.append(i)
                upcoming = next(requests, None)
        busy = [i for i in range(slots) if rows[i] is not None]
        if not busy:
            return
        # While subjects wait, the loop ends as soon as one row is free; then only when all are.
        stop_at = jnp.asarray(slots - len(busy) + 1 if upcoming is not None else slots)
        with on_mesh():
            state = _admit(stepper, weights, state, rows, waiting, size)
            state, made = loop.run_chunk(program, weights, state, filters, _forced_chunk(rows, step, chunk), stop_at)
        made, counts, done = jax.device_get((made, state.num_points, state.done))
        for i in busy:
            rows[i].take(made, i, step, int(counts[i]), bool(done[i]))
        step += int(made.steps)
        if progress is not None:
            progress({rows[i].request.name: rows[i].num_points for i in busy})
        for i in busy:
            if rows[i].done:
                yield rows[i]
                rows[i] = None


def _admit(stepper, weights, state, rows, waiting, size):
    """The state with the rows in `waiting` begun; the first call makes it."""

    def padded(request):
        context = np.asarray(request.context)
        if context.ndim != 2 or context.shape[1] != stepper.config.width or not 0 < context.shape[0] <= size:
            raise UserError(
                f"{request.name}: a context of shape {context.shape} does not fit into "
                f"[{size}, {stepper.config.width}]; give context_size= of the longest one."
            )
        return np.pad(context, ((0, size - context.shape[0]), (0, 0))), context.shape[0]

    if state is None:
        blank = np.zeros((size, stepper.config.width), np.float32), size
        contexts = [blank if row is None else padded(row.request) for row in rows]
        return loop.start(
            stepper,
            weights,
            np.stack([c for c, _ in contexts]),
            np.array([n for _, n in contexts], np.int32),
            np.stack([np.zeros(2, np.uint32) if row is None else _key_data(row.request.key) for row in rows]),
            np.array([-1 if row is None else row.limit for row in rows], np.int32),
        )
    for i in waiting:
        request = rows[i].request
        context, length = padded(request)
        state = loop.admit(
            stepper, weights, state, jnp.asarray(i), context, jnp.asarray(length), _key_data(request.key),
            jnp.asarray(rows[i].limit),
        )  # fmt: skip
    return state


def _forced_points(request: Request, tokenizer: PointTokenizer, limit: int) -> np.ndarray:
    """[P, 4] classes of a request's prefix."""
    if limit < 0:
        raise UserError(f"max_points={limit} must not be negative.")
    if request.prefix is None:
        return np.zeros((0, 4), np.int32)
    tokens = np.asarray(request.prefix)
    if tokens.ndim != 1:
        raise UserError(f"prefix of {request.name}: tokens have shape {tokens.shape}; expected [T].")
    kept = len(tokens)
    while kept and tokens[kept - 1] in (tokenizer.eos, tokenizer.pad):
        kept -= 1
    ended = np.append(tokens[:kept], [tokenizer.eos] * 4)
    if error := tokenizer.first_error(ended):
        at = "its end" if error.position >= kept else f"token {error.position}"
        raise UserError(f"prefix of {request.name}: at {at}, {error.rule}. A prefix is S S S S and whole points.")
    classes = ended[4:-4].reshape(-1, 4).astype(np.int32) - np.array([0, 0, 0, tokenizer.bins], np.int32)
    if len(classes) > limit:
        raise UserError(f"prefix of {request.name}: {len(classes)} points are more than max_points={limit}.")
    return classes


def _forced_chunk(rows: list[_Row | None], step: int, chunk: int) -> np.ndarray:
    """[B, Q, 4] classes to force in a chunk that begins at `step`."""
    forced = np.full((len(rows), chunk, 4), -1, np.int32)
    for i, row in enumerate(rows):
        if row is not None and len(row.forced):
            # Step start + 1 + p makes point p.
            first = max(step - row.start - 1, 0)
            at = row.start + 1 + first - step
            part = row.forced[first : first + max(chunk - at, 0)]
            forced[i, at : at + len(part)] = part
    return forced


def _gather(rows: list[_Row], tokenizer: PointTokenizer, max_points: int) -> Generation:
    ids, B, T = tokenizer, len(rows), 4 * max_points + 8
    num_points = np.array([row.num_points for row in rows], np.int32)
    P = int(num_points.max())
    tokens = np.full((B, T), ids.pad, np.int32)
    cells, binding = np.zeros((B, P, 3), np.int64), np.zeros((B, P), np.int32)
    log_probs, masked = np.zeros((B, T)), np.zeros((B, T))
    hidden, reasons, mean_masked = None, [], np.zeros(B)
    for i, row in enumerate(rows):
        n, by_eos = row.num_points, row.by_eos
        classes, logs, mass, states = row.arrays()
        stop = 4 + 4 * n
        tokens[i, :4], tokens[i, stop : stop + 4] = ids.bos, ids.eos
        tokens[i, 4:stop] = (classes[:n] + np.array([0, 0, 0, ids.bins], np.int32)).reshape(-1)
        cells[i, :n], binding[i, :n] = classes[:n, :3], classes[:n, 3]
        reasons.append("eos" if by_eos else "max_points")
        for out, values in ((log_probs, logs), (masked, mass)):
            out[i, 4 : stop + by_eos] = values.reshape(-1)[: 4 * n + by_eos]
        mean_masked[i] = masked[i].sum() / max(4 * n + by_eos, 1)
        if states is not None:
            hidden = np.zeros((B, P, *states.shape[1:]), states.dtype) if hidden is None else hidden
            hidden[i, :n] = states[:n]
    points = np.where((np.arange(P) < num_points[:, None])[..., None], tokenizer.dequantize(cells), 0)
    return Generation(
        tokens=tokens, points=points.astype(np.float32), binding=binding, num_points=num_points, stop_reason=reasons,
        log_prob=log_probs.sum(axis=1), token_log_probs=log_probs, masked_mass=mean_masked, token_masked_mass=masked,
        hidden=hidden,
    )  # fmt: skip


def _check(config, tokenizer, max_points, temperature, top_p, top_k, chunk, slots):
    if (tokenizer.bins, tokenizer.num_faces) != (config.bins, config.num_faces):
        raise UserError(
            f"the tokenizer has {tokenizer.bins} bins and {tokenizer.num_faces} faces, the model {config.bins} and "
            f"{config.num_faces}: use the tokenizer of the model's token store."
        )
    if max_points < 0:
        raise UserError(f"max_points={max_points} must not be negative.")
    if not 0 <= temperature < np.inf or not 0 < top_p <= 1 or top_k < 0:
        raise UserError(
            f"temperature={temperature} must be at least 0, top_p={top_p} in (0, 1], top_k={top_k} at least 0."
        )
    if chunk < 1 or slots < 1:
        raise UserError(f"chunk={chunk} and slots={slots} must be at least 1.")


def _key_data(key: Array) -> np.ndarray:
    """A raw or typed key → [..., 2] uint32."""
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(key) if typed else key)


def _rows_of_keys(key: Array, batch: int) -> np.ndarray:
    keys = _key_data(key)
    if keys.dtype != np.uint32 or keys.shape not in ((2,), (batch, 2)):
        raise UserError(f"key must be one key, or {batch}: got {keys.dtype} {keys.shape}.")
    return np.broadcast_to(keys, (batch, 2))
