"""Token stores made of random sequences, without fits."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pointillist_jax.data.token_store import FLAME_FIELDS, StoreSpec, StoreWriter, SubjectRecord, TokenStore, open_store
from pointillist_jax.tokens import PointTokenizer

TOKENIZER = PointTokenizer(num_faces=50, bins=64)
SPEC = StoreSpec(TOKENIZER, flame_sha256="ab" * 32, flame_source="random", portrait_size=5)
_SIZES = {"shape": 7, "expr": 6, "rotation": 3, "neck_pose": 3, "jaw_pose": 3, "eyes_pose": 6, "translation": 3}


def random_record(
    rng: np.random.Generator, name: str, points: int, spec: StoreSpec = SPEC, portrait: bool = True
) -> SubjectRecord:
    t = spec.tokenizer
    tokens = t.encode(rng.uniform(t.lower, t.upper, (points, 3)), rng.integers(0, t.num_faces, points))
    side = spec.portrait_size
    return SubjectRecord(
        name=name,
        tokens=tokens,
        shape=rng.normal(size=_SIZES["shape"]).astype(np.float32),
        static_offset=rng.normal(size=(11, 3)).astype(np.float32) if points % 2 else None,
        portrait=rng.integers(0, 256, (side, side, 3), dtype=np.uint8) if portrait else None,
        flame={key: rng.normal(size=_SIZES[key]).astype(np.float32) for key in FLAME_FIELDS},
        fit_sha256=name,
    )


def write_store(
    path: Path, rng: np.random.Generator, points: list[int], *, shard: int = 3, portrait: bool = True
) -> tuple[TokenStore, list[SubjectRecord]]:
    """A complete store of subjects with the given numbers of points, and what was put in."""
    records = [random_record(rng, f"person_{i:04d}", n, portrait=portrait) for i, n in enumerate(points)]
    writer = StoreWriter(path, SPEC)
    for i in range(0, len(records), shard):
        writer.write_shard(records[i : i + shard])
    writer.finish()
    return open_store(path), records


class MemoryStore:
    """What `WindowSource` needs of a store, in memory: properties try hundreds of them."""

    def __init__(self, rng: np.random.Generator, points: list[int]):
        self.path, self.spec, self.tokenizer = Path("memory"), SPEC, TOKENIZER
        self._records = [random_record(rng, f"person_{i:04d}", n) for i, n in enumerate(points)]
        self.subjects = tuple(r.name for r in self._records)
        self.lengths = np.array([len(r.tokens) for r in self._records], np.int64)
        self.fit_sha256 = self.subjects
        self.has_portrait = np.ones(len(points), bool)

    def index(self, name: str) -> int:
        return self.subjects.index(name)

    def tokens(self, i: int) -> np.ndarray:
        return self._records[i].tokens

    def condition(self, i: int) -> dict:
        return {"portrait": self._records[i].portrait, "flame": self._records[i].flame}
