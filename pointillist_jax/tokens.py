"""The token language: a bound point cloud as one integer sequence, and the grammar of such sequences.

DESIGN §5; paper §3.2. A point is four tokens x, y, z, b. Points are sorted by (y, z, x), ties by b, so a sequence is
legal exactly when the tuples (y, z, x, b) never decrease: every multiset of points has one legal sequence.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import warnings
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from pointillist_jax.files import UserError

TOKENIZER_VERSION = 1
# DESIGN §5 (ours): a cube around FLAME's head, hair and shoulders included, in metres.
DEFAULT_LOWER, DEFAULT_UPPER = (-0.3, -0.3, -0.34), (0.3, 0.3, 0.26)
SLOTS = "xyzb"


class MalformedTokens(UserError):
    """A sequence that breaks the grammar.

    Attributes:
      position: index of the first token that cannot stand where it stands.
      rule: the rule it breaks, in words.
    """

    def __init__(self, position: int, rule: str):
        super().__init__(f"token {position}: {rule}. decode(strict=False) keeps the points before it.")
        self.position = position
        self.rule = rule


class GrammarState(NamedTuple):
    """Where a sequence stands, after S S S S and any number of legal tokens. Leading axes are a batch.

    Attributes:
      slot: [...] int32, 0–3 for x, y, z, b: what comes next.
      previous: [..., 4] int32 last complete point (x, y, z, face); zeros at the start, which forbid nothing.
      current: [..., 3] int32 x, y, z of the point being written; entries of slots to come are zero.
      num_eos: [...] int32 how many E have been written; 4 is the end.
    """

    slot: Int[Array, "*b"]
    previous: Int[Array, "*b 4"]
    current: Int[Array, "*b 3"]
    num_eos: Int[Array, "*b"]


@dataclasses.dataclass(frozen=True)
class PointTokenizer:
    """Quantises, orders and writes bound points as tokens, and reads them back.

    Ids: coordinates 0 … bins-1, bindings bins … bins+num_faces-1, then S (`bos`), E (`eos`), P (`pad`). Instances are
    hashable and can be closed over or passed as static arguments of jitted functions.

    Attributes:
      num_faces: faces of the head; 10144 is FLAME with teeth.
      bins: quantisation levels per axis (paper: 1024).
      lower, upper: corners of the quantised box in metres, one number or three.
    """

    num_faces: int = 10144
    bins: int = 1024
    lower: tuple[float, float, float] = DEFAULT_LOWER
    upper: tuple[float, float, float] = DEFAULT_UPPER

    def __post_init__(self):
        for name in ("num_faces", "bins"):
            try:
                object.__setattr__(self, name, operator.index(getattr(self, name)))
            except TypeError:
                raise UserError(f"{name}={getattr(self, name)!r} must be an integer.") from None
        for name in ("lower", "upper"):
            value = np.asarray(getattr(self, name), np.float64)
            if value.shape not in ((), (1,), (3,)):
                raise UserError(f"{name}={getattr(self, name)!r} must be one number or three.")
            object.__setattr__(self, name, tuple(float(x) for x in np.broadcast_to(value, (3,))))
        if self.num_faces < 1 or self.bins < 2:
            raise UserError(f"num_faces={self.num_faces} must be at least 1 and bins={self.bins} at least 2.")
        if not all(
            math.isfinite(a) and math.isfinite(b) and a < b for a, b in zip(self.lower, self.upper, strict=True)
        ):
            raise UserError(f"lower={self.lower} must be below upper={self.upper} on every axis.")
        if 3 * self._coordinate_bits + self._face_bits > 63 or self.padded_vocab_size >= 1 << 31:
            raise UserError(
                f"bins={self.bins} and num_faces={self.num_faces} are too large to be sorted as one integer."
            )

    @property
    def bos(self) -> int:
        return self.bins + self.num_faces

    @property
    def eos(self) -> int:
        return self.bos + 1

    @property
    def pad(self) -> int:
        return self.bos + 2

    @property
    def vocab_size(self) -> int:
        return self.bos + 3

    @property
    def padded_vocab_size(self) -> int:
        """Vocabulary rounded up to a multiple of 512, so that the embedding table shards. The rest is never used."""
        return -(-self.vocab_size // 512) * 512

    @property
    def cell(self) -> np.ndarray:
        """[3] float64: size of a cell in metres."""
        return (np.array(self.upper) - np.array(self.lower)) / self.bins

    def encode(self, points, binding, *, out_of_bounds: str = "error") -> Int[np.ndarray, T]:
        """Bound points → S S S S, points, E E E E. The same for every order of the input.

        Args:
          points: [P, 3] metres.
          binding: [P] integers, the face of each point.
          out_of_bounds: "error", or "clip" to move points outside the box onto its border, with a warning that counts
            them.

        Returns:
          [4P + 8] int32.

        Raises:
          UserError: wrong shapes or dtypes, NaN, a binding outside the mesh, points outside the box.
        """
        points, binding = np.asarray(points), np.asarray(binding)
        binding = binding.astype(np.int64) if binding.size == 0 else binding  # An empty list is an array of floats.
        if points.ndim != 2 or points.shape[1] != 3 or binding.shape != points.shape[:1]:
            raise UserError(f"points {points.shape} and binding {binding.shape} must be [P, 3] and [P].")
        if binding.dtype.kind not in "iu":
            raise UserError(f"binding has dtype {binding.dtype}; face indices must be integers.")
        if binding.size and not 0 <= binding.min() <= binding.max() < self.num_faces:
            raise UserError(
                f"bindings {binding.min()}..{binding.max()} lie outside the mesh's faces 0..{self.num_faces - 1}: "
                "the points belong to another head model, or the tokenizer was made for one."
            )
        x, y, z = self.quantize(points, out_of_bounds=out_of_bounds).T
        # One integer per point, most significant key first: sorting them is sorting by (y, z, x, b).
        bits, face_bits = self._coordinate_bits, self._face_bits
        keys = np.sort((((y << bits | z) << bits | x) << face_bits) | binding.astype(np.int64))
        tokens = np.empty(4 * len(keys) + 8, np.int32)
        tokens[:4], tokens[-4:] = self.bos, self.eos
        body = tokens[4:-4].reshape(-1, 4)
        mask = (1 << bits) - 1
        body[:, 0] = keys >> face_bits & mask
        body[:, 1] = keys >> (face_bits + 2 * bits)
        body[:, 2] = keys >> (face_bits + bits) & mask
        body[:, 3] = (keys & (1 << face_bits) - 1) + self.bins
        return tokens

    def decode(self, tokens, strict: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Tokens → (points [P, 3] float32 cell centres in metres, binding [P] int32).

        Args:
          tokens: [4P + 8] integers, S S S S … E E E E.
          strict: True raises for any broken rule; False keeps the whole points before the first one and warns.

        Raises:
          MalformedTokens: with the position and the rule.
        """
        tokens = np.asarray(tokens)
        if error := self.first_error(tokens):
            if strict:
                raise error
            ends = np.flatnonzero(tokens == self.eos)
            kept = max(min([error.position, *ends[:1].tolist()]) // 4 - 1, 0)
            warnings.warn(
                f"kept {kept} points of a malformed sequence: token {error.position}: {error.rule}.", stacklevel=2
            )
        else:
            kept = len(tokens) // 4 - 2
        body = tokens[4 : 4 + 4 * kept].reshape(-1, 4).astype(np.int64)
        return self.dequantize(body[:, :3]), (body[:, 3] - self.bins).astype(np.int32)

    def quantize(self, points: np.ndarray, *, out_of_bounds: str = "error") -> Int[np.ndarray, "P 3"]:
        """[P, 3] metres → [P, 3] int64 cells. The upper border belongs to the last cell. Raises as `encode`."""
        if out_of_bounds not in ("error", "clip"):
            raise UserError(f'out_of_bounds={out_of_bounds!r}: it must be "error" or "clip".')
        points = np.asarray(points)
        # A float32 point on the border is up to half a float32 step beyond the border in float64.
        slack = np.abs([self.lower, self.upper]).max() * (1e-7 if points.dtype == np.float32 else 1e-15)
        points = points.astype(np.float64)
        if not np.isfinite(points).all():
            bad = int((~np.isfinite(points)).any(axis=1).sum())
            raise UserError(f"{bad} of {len(points)} points are NaN or infinite; remove them before tokenising.")
        lower, upper = np.array(self.lower), np.array(self.upper)
        if outside := int(((points < lower - slack) | (points > upper + slack)).any(axis=1).sum()):
            low, high = np.round(points.min(axis=0), 4).tolist(), np.round(points.max(axis=0), 4).tolist()
            said = (
                f"{outside} of {len(points)} points lie outside the box {self.lower} to {self.upper} "
                f"(the points span {low} to {high})"
            )
            if out_of_bounds == "error":
                raise UserError(f'{said}: widen it with --bounds, or pass out_of_bounds="clip".')
            warnings.warn(f"{said}: they were clipped onto its border.", stacklevel=3)
        cells = np.floor((points - lower) * (self.bins / (upper - lower))).astype(np.int64)
        return np.clip(cells, 0, self.bins - 1)

    def dequantize(self, cells) -> np.ndarray:
        """[..., 3] cells → float32 cell centres in metres."""
        return (np.array(self.lower) + (np.asarray(cells) + 0.5) * self.cell).astype(np.float32)

    def first_error(self, tokens) -> MalformedTokens | None:
        """The first broken rule of a complete sequence, or None if it is legal."""
        tokens = np.asarray(tokens)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise UserError(f"tokens have shape {tokens.shape} and dtype {tokens.dtype}; expected [T] integers.")
        n = len(tokens)
        start = np.flatnonzero(tokens[:4] != self.bos)
        if start.size or n < 4:
            return MalformedTokens(int(start[0]) if start.size else n, f"a sequence begins with four S ({self.bos})")
        tokens = tokens.astype(np.int64)
        # Up to the first token that is no part of a whole, in-range point.
        slots = np.arange(n - 4) % 4
        low = np.where(slots == 3, self.bins, 0)
        high = np.where(slots == 3, self.bos, self.bins)
        wrong = np.flatnonzero((tokens[4:] < low) | (tokens[4:] >= high))
        stop = 4 + int(wrong[0]) if wrong.size else n
        points = tokens[4 : stop - stop % 4].reshape(-1, 4) - np.array([0, 0, 0, self.bins])
        x, y, z, b = points.T
        bits = self._coordinate_bits
        keys = (((y << bits | z) << bits | x) << self._face_bits) | b
        decreasing = np.flatnonzero(np.diff(keys) < 0)
        if decreasing.size:
            i = int(decreasing[0])
            return self._order_error(points[i].tolist(), points[i + 1].tolist(), 8 + 4 * i)
        if error := self._partial_order_error(points, tokens[stop - stop % 4 : stop].tolist(), stop - stop % 4):
            return error
        return self._ending_error(tokens, stop)

    def _order_error(self, previous: list[int], point: list[int], position: int) -> MalformedTokens | None:
        for slot, value in enumerate(point):
            low = _lowest(slot, previous, point, self.bins - 1)
            if value < low:
                why = "points are ordered by (y, z, x), ties by binding"
                low, value = (low + self.bins, value + self.bins) if slot == 3 else (low, value)
                return MalformedTokens(position + slot, f"{SLOTS[slot]} is {value}, must be at least {low}: {why}")
        return None

    def _partial_order_error(self, points: np.ndarray, rest: list[int], position: int) -> MalformedTokens | None:
        """An unfinished last point may break the order before it breaks off."""
        if not len(points) or not rest:
            return None
        return self._order_error(points[-1].tolist(), rest, position)

    def _ending_error(self, tokens: np.ndarray, stop: int) -> MalformedTokens | None:
        n = len(tokens)
        if stop == n:
            what = "inside a point" if n % 4 else "without its four E"
            return MalformedTokens(n, f"the sequence breaks off {what} ({self.eos})")
        token, slot = int(tokens[stop]), SLOTS[stop % 4]
        if token != self.eos:
            names = {self.bos: "S", self.pad: "P"}
            found = names.get(token, str(token))
            legal = f"{self.bins}..{self.bos - 1}" if slot == "b" else f"0..{self.bins - 1}"
            return MalformedTokens(stop, f"{found} cannot stand at a {slot} slot, which holds {legal}")
        if stop % 4:
            return MalformedTokens(stop, f"E can only stand at an x slot, not at {slot}")
        wrong = np.flatnonzero(tokens[stop : stop + 4] != self.eos)
        if wrong.size or n < stop + 4:
            at = stop + int(wrong[0]) if wrong.size else n
            return MalformedTokens(at, f"a sequence ends with four E ({self.eos})")
        if n > stop + 4:
            return MalformedTokens(stop + 4, "nothing may follow the four E")
        return None

    def start(self, batch_shape: tuple[int, ...] = ()) -> GrammarState:
        """The state after S S S S."""

        def zeros(*tail: int) -> Array:
            return jnp.zeros((*batch_shape, *tail), jnp.int32)

        return GrammarState(zeros(), zeros(4), zeros(3), zeros())

    def advance(self, state: GrammarState, token: Int[Array, "*b"]) -> GrammarState:
        """The state after one more legal token; usable inside jit. After the end it stays as it is."""
        token = jnp.asarray(token, jnp.int32)
        is_eos = token == self.eos
        value = jnp.where(state.slot == 3, token - self.bins, token)[..., None]
        point = jnp.where(jnp.arange(4) == state.slot[..., None], value, _with_slot_b(state.current))
        closes = (state.slot == 3) & ~is_eos & (state.num_eos == 0)
        writes = ~is_eos & (state.num_eos == 0)
        return GrammarState(
            slot=jnp.where(writes, (state.slot + 1) % 4, state.slot),
            previous=jnp.where(closes[..., None], point, state.previous),
            current=jnp.where(closes[..., None], 0, jnp.where(writes[..., None], point[..., :3], state.current)),
            num_eos=jnp.where(is_eos, jnp.minimum(state.num_eos + 1, 4), state.num_eos),
        )

    def legal_range(self, state: GrammarState) -> tuple[Array, Array, Array]:
        """The grammar as intervals: (low, high, eos_legal), each [...].

        Ids in low … high are legal, none if low > high. Every slot's legal ids are one interval, plus E at
        an x slot. Usable inside jit; constant cost.
        """
        last = self.bins - 1
        previous, current = jnp.moveaxis(state.previous, -1, 0), jnp.moveaxis(state.current, -1, 0)
        lows = jnp.stack([_lowest(slot, previous, current, last) for slot in range(4)])
        low = jnp.take_along_axis(lows, state.slot[None], axis=0)[0]
        is_b = state.slot == 3
        ended = state.num_eos > 0
        low = jnp.where(ended, 1, jnp.where(is_b, low + self.bins, low))
        high = jnp.where(ended, 0, jnp.where(is_b, self.bos - 1, last))
        return low, high, (state.slot == 0) & (state.num_eos < 4)

    def legal_mask(self, state: GrammarState) -> Bool[Array, "*b padded_vocab"]:
        """Which of the `padded_vocab_size` ids may come next; usable inside jit.

        S, P and the padding ids never may. After the first E only E may, and after the fourth nothing.
        """
        low, high, eos_legal = self.legal_range(state)
        ids = jnp.arange(self.padded_vocab_size)
        return ((ids >= low[..., None]) & (ids <= high[..., None])) | ((ids == self.eos) & eos_legal[..., None])

    @property
    def _coordinate_bits(self) -> int:
        return (self.bins - 1).bit_length()

    @property
    def _face_bits(self) -> int:
        return max((self.num_faces - 1).bit_length(), 1)


def _lowest(slot: int, previous, current, last: int):
    """Lowest legal value of a slot (a face for b) after `previous`; ints and arrays alike (DESIGN §5, grammar)."""
    xp, yp, zp, bp = previous
    if slot == 0:
        return ((yp == last) & (zp == last)) * xp
    x = current[0]
    if slot == 1:
        return yp + ((zp == last) & (x < xp))
    y = current[1]
    if slot == 2:
        return (y == yp) * (zp + (x < xp))
    return ((x == xp) & (y == yp) & (current[2] == zp)) * bp


def _with_slot_b(current):
    return jnp.concatenate([current, jnp.zeros_like(current[..., :1])], axis=-1)
