"""The token store: every subject's token sequence and condition in ArrayRecord shards, behind one `meta.json`.

DESIGN §2. One record per subject (`data/records.py`): tokens, the person's identity, the portrait and its FLAME
parameters. Shards are written once and never touched again; `meta.json` says what they were made with and is replaced
atomically after each. Layout:

    <store>/meta.json
    <store>/tokens-00000.array_record …
    <store>/features/<kind>/                   (of frozen encoders, optional: data/condition_features.py)
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from pointillist_jax.data.byte_cache import ByteCache
from pointillist_jax.data.records import pack_record, unpack_record
from pointillist_jax.data.store_meta import (
    FORMAT,
    META,
    NAME,
    VERSION,
    StoreSpec,
    read_meta,
    read_spec,
    spec_difference,
)
from pointillist_jax.files import FileFormatError, UserError, WriteError, atomic_path, file_sha256
from pointillist_jax.tokens import PointTokenizer

FLAME_FIELDS = ("shape", "expr", "rotation", "neck_pose", "jaw_pose", "eyes_pose", "translation")
# One record per chunk, so that a subject is read alone; tokens and pictures gain little from compression, and
# uncompressed ones are read three times as fast.
_WRITER_OPTIONS = "group_size:1,uncompressed,max_parallelism:1"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


@dataclasses.dataclass(frozen=True)
class SubjectRecord:
    """One person, ready to be stored. All NumPy.

    Attributes:
      name: unique in a store.
      tokens: [T] int32, S S S S … E E E E.
      shape: [S] float32, the identity's.
      static_offset: [V, 3] float32 or None.
      portrait: [side, side, 3] uint8 or None.
      flame: the portrait's FLAME parameters, name → [n] float32 (`FLAME_FIELDS`), or None.
      num_clipped: points that lay outside the cube.
      fit_sha256: of the point_cloud.ply.
    """

    name: str
    tokens: Int[np.ndarray, "T"]
    shape: np.ndarray
    static_offset: np.ndarray | None = None
    portrait: np.ndarray | None = None
    flame: Mapping[str, np.ndarray] | None = None
    num_clipped: int = 0
    fit_sha256: str = ""


class TokenStore:
    """A store open for reading. Safe between threads; a copy in another process opens the files anew.

    Attributes:
      path: the folder.
      spec: what it was made with.
      subjects: names, in the order of the records.
      lengths: [N] int64 tokens of each subject.
      has_portrait: [N] bool.
      num_clipped: [N] int64 points that lay outside the cube.
      fit_sha256: of each subject's point_cloud.ply.
    """

    def __init__(self, path: str | os.PathLike, *, cache_bytes: int = 1 << 30):
        self.path = Path(path)
        self._cache = ByteCache(cache_bytes)
        self._meta = read_meta(self.path)
        self.spec: StoreSpec = read_spec(self.path, self._meta)
        entries = self._meta["subjects"]
        self.subjects = tuple(e["name"] for e in entries)
        self.lengths = np.array([4 * e["num_points"] + 8 for e in entries], np.int64)
        self.has_portrait = np.array([e["portrait"] for e in entries], bool)
        self.num_clipped = np.array([e["num_clipped"] for e in entries], np.int64)
        self.fit_sha256 = tuple(e["fit_sha256"] for e in entries)
        self._index = {name: i for i, name in enumerate(self.subjects)}
        self._reset()

    def _reset(self) -> None:
        self._readers: dict[str, Any] = {}
        self._checked: set[int] = set()

    def __getstate__(self) -> dict:
        return {key: value for key, value in vars(self).items() if key not in ("_readers", "_checked")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._reset()

    def __len__(self) -> int:
        return len(self.subjects)

    @property
    def tokenizer(self) -> PointTokenizer:
        return self.spec.tokenizer

    @property
    def num_points(self) -> np.ndarray:
        """[N] int64."""
        return (self.lengths - 8) // 4

    @property
    def complete(self) -> bool:
        """False while a build is under way or was interrupted."""
        return bool(self._meta["complete"])

    def index(self, name: str) -> int:
        """Number of the named subject. Raises UserError."""
        if name not in self._index:
            near = ", ".join(self.subjects[:5]) + (" …" if len(self) > 5 else "")
            raise UserError(f"{self.path} holds no subject {name!r}; it has {len(self)}: {near}.")
        return self._index[name]

    def tokens(self, i: int) -> Int[np.ndarray, "T"]:
        """[T] int32 read-only: S S S S, points, E E E E of subject i."""
        return self._record(i)["tokens"]

    def identity(self, i: int) -> dict[str, np.ndarray]:
        """Subject i's `shape` [S] and, where it has one, `static_offset` [V, 3]: float32, read-only."""
        record = self._record(i)
        return {key: record[key] for key in ("shape", "static_offset") if key in record}

    def condition(self, i: int) -> dict[str, Any]:
        """What subject i is generated from: `flame` (name → [n] float32) and, where it has one, `portrait`.

        The portrait is uint8 [side, side, 3]. Without one, the FLAME parameters are those of the canonical pose.
        """
        record = self._record(i)
        condition: dict[str, Any] = {"flame": {key: record[f"flame/{key}"] for key in FLAME_FIELDS}}
        if "portrait" in record:
            condition["portrait"] = record["portrait"]
        return condition

    def verify(self) -> None:
        """Reads every record and checks every token sequence against the grammar. Raises FileFormatError."""
        for i, name in enumerate(self.subjects):
            if error := self.tokenizer.first_error(self.tokens(i)):
                raise FileFormatError(f"{self.path}: tokens of {name}: {error}")

    def features_path(self, kind: str, i: int) -> Path:
        """Where `data.condition_features` keeps what frozen encoders computed for subject i; `kind` names them."""
        if not re.fullmatch(r"[\w.-]{1,100}", kind) or kind.startswith("."):
            raise UserError(f"features kind {kind!r} must be letters, digits, '.', '_' and '-'.")
        return self.path / "features" / kind / f"{self.subjects[i]}.npz"

    def _record(self, i: int) -> dict[str, np.ndarray]:
        i = range(len(self))[i]
        return self._cache.get(i, lambda: self._read(i))

    def _read(self, i: int) -> tuple[dict[str, np.ndarray], int]:
        entry = self._meta["subjects"][i]
        source = f"{self.path / entry['shard']}: record {entry['record']}"
        try:
            reader = self._readers.get(entry["shard"])
            if reader is None:
                reader = self._readers[entry["shard"]] = _reader(self.path / entry["shard"])
            data = reader.read([entry["record"]])[0]
        except (FileFormatError, FileNotFoundError):
            raise
        except Exception as error:  # The C++ reader raises RuntimeError, ValueError and IndexError alike.
            raise FileFormatError(f"{source} cannot be read ({str(error)[:200]}); copy the store again.") from None
        info, arrays = unpack_record(data, source)
        if i not in self._checked:
            _check_record(source, info, arrays, entry, self.spec)
            self._checked.add(i)
        return arrays, len(data)


def open_store(
    path: str | os.PathLike,
    tokenizer: PointTokenizer | None = None,
    *,
    flame_sha256: str | None = None,
    cache_bytes: int = 1 << 30,
    allow_incomplete: bool = False,
) -> TokenStore:
    """Opens a token store for reading.

    Args:
      path: its folder. Untrusted.
      tokenizer: what the caller works with; None takes the store's (`store.tokenizer`).
      flame_sha256: of the head the caller works with; None accepts any.
      cache_bytes: bound on the decoded records kept in memory.
      allow_incomplete: open a store whose build was interrupted.

    Raises:
      FileNotFoundError: no store there.
      FileFormatError: damaged.
      UserError: made with another tokenizer, bounds or head (the sentence names the difference), or unfinished.
    """
    store = TokenStore(path, cache_bytes=cache_bytes)
    wanted = store.spec
    if tokenizer is not None:
        wanted = dataclasses.replace(wanted, tokenizer=tokenizer)
    if flame_sha256 is not None:
        wanted = dataclasses.replace(wanted, flame_sha256=flame_sha256)
    if difference := spec_difference(store.spec, wanted):
        raise UserError(f"{store.path} was made with {difference}: tokenise again, or use what it was made with.")
    if not store.complete and not allow_incomplete:
        raise UserError(
            f"{store.path} is unfinished ({len(store)} subjects so far): finish it with "
            "`python -m experiments.tokenize … --resume`."
        )
    return store


class StoreWriter:
    """Adds subjects to a new or existing store, a whole shard at a time.

    A shard is written under a temporary name, renamed, and only then named in `meta.json`: a kill at any moment loses
    at most the shard being written, and the next run writes the same bytes.
    """

    def __init__(self, path: str | os.PathLike, spec: StoreSpec):
        self.path = Path(path)
        self.spec = spec
        for pattern in (".tokens-*.tmp-*", ".meta.tmp-*"):  # What a killed build left.
            for leftover in self.path.glob(pattern):
                leftover.unlink()
        if (self.path / META).exists():
            store = TokenStore(self.path)
            if difference := spec_difference(store.spec, spec):
                raise UserError(
                    f"{self.path} was made with {difference}: use the same to add subjects, or tokenise into another "
                    "folder."
                )
            self._meta = store._meta
        else:
            self._meta = {"format": FORMAT, "version": VERSION, **spec.to_json(), "complete": False}
            self._meta |= {"shards": [], "subjects": []}

    @property
    def subjects(self) -> dict[str, str]:
        """Subjects already stored → sha256 of the fit they came from."""
        return {entry["name"]: entry["fit_sha256"] for entry in self._meta["subjects"]}

    def write_shard(self, records: Sequence[SubjectRecord]) -> Path:
        """Writes one new shard and names it in meta.json. The store counts as unfinished until `finish`."""
        from array_record.python.array_record_module import ArrayRecordWriter

        names = [r.name for r in records]
        if twice := sorted({n for n in names if names.count(n) > 1 or n in self.subjects}):
            raise UserError(f"{self.path} already holds {twice[0]!r}; a subject is stored once.")
        if bad := [n for n in names if not NAME.fullmatch(n)]:
            raise UserError(f"{bad[0]!r} cannot be a subject's name: no slashes, no leading dot, 1 to 200 letters.")
        shard = f"tokens-{len(self._meta['shards']):05d}.array_record"
        with atomic_path(self.path / shard) as temporary:
            packed, entries = [], []
            for i, record in enumerate(records):
                packed.append(_pack(record, self.spec))
                entries.append(
                    {
                        "name": record.name,
                        "num_points": (len(record.tokens) - 8) // 4,
                        "portrait": record.portrait is not None,
                        "num_clipped": record.num_clipped,
                        "fit_sha256": record.fit_sha256,
                        "shard": shard,
                        "record": i,
                    }
                )
            try:
                writer = ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
                for data in packed:
                    writer.write(data)
                writer.close()
            except RuntimeError as error:  # Of the C++ writer.
                raise WriteError(self.path / shard, error) from None
        path = self.path / shard
        self._meta["shards"].append(
            {"file": shard, "num_records": len(records), "bytes": path.stat().st_size, "sha256": file_sha256(path)}
        )
        self._meta["subjects"] += entries
        self._meta["complete"] = False
        self._write_meta()
        return path

    def finish(self) -> None:
        """Marks the store as complete."""
        if not self._meta["subjects"]:
            raise UserError(f"{self.path} would hold no subject; give at least one fit.")
        if not self._meta["complete"]:
            self._meta["complete"] = True
            self._write_meta()

    def _write_meta(self) -> None:
        with atomic_path(self.path / META) as temporary:
            temporary.write_text(json.dumps(self._meta, indent=1) + "\n")


def _pack(record: SubjectRecord, spec: StoreSpec) -> bytes:
    flame = record.flame
    if flame is None:
        raise TypeError("a record needs FLAME parameters; without a portrait, those of the canonical pose")
    arrays = {"tokens": np.asarray(record.tokens, np.int32), "shape": np.asarray(record.shape, np.float32)}
    if record.static_offset is not None:
        arrays["static_offset"] = np.asarray(record.static_offset, np.float32)
    arrays |= {f"flame/{key}": np.asarray(flame[key], np.float32) for key in FLAME_FIELDS}
    if record.portrait is not None:
        arrays["portrait"] = np.asarray(record.portrait, np.uint8)
    info = {"subject": record.name, "num_points": (len(record.tokens) - 8) // 4, "format": FORMAT, "version": VERSION}
    return pack_record(info | _bounds(spec), arrays)


def _bounds(spec: StoreSpec) -> dict[str, list[float]]:
    """The cube, which every record carries too: a shard that strays into another store is found out."""
    return {name: list(getattr(spec.tokenizer, name)) for name in ("lower", "upper")}


def _reader(path: Path):
    from array_record.python.array_record_module import ArrayRecordReader

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, but meta.json names it; copy the whole store.")
    return ArrayRecordReader(str(path), _READER_OPTIONS)


def _check_record(source: str, info: dict, arrays: dict[str, np.ndarray], entry: dict, spec: StoreSpec) -> None:
    """What readers rely on. The grammar of the whole sequence is checked by `TokenStore.verify`."""
    tokens, side, t = arrays.get("tokens"), spec.portrait_size, spec.tokenizer

    def fits(name: str, dtype: str, *shape: int | None) -> bool:
        a = arrays.get(name)
        same = a is not None and a.dtype == dtype and a.ndim == len(shape)
        return same and all(w in (None, h) for h, w in zip(a.shape, shape, strict=True))

    sizes = {"rotation": 3, "neck_pose": 3, "jaw_pose": 3, "eyes_pose": 6, "translation": 3}
    good = (
        info.get("subject") == entry["name"]
        # Records of before carry no bounds.
        and all(info.get(key, bound) == bound for key, bound in _bounds(spec).items())
        and fits("tokens", "int32", 4 * entry["num_points"] + 8)
        and fits("shape", "float32", None)
        and ("static_offset" not in arrays or fits("static_offset", "float32", None, 3))
        and all(fits(f"flame/{key}", "float32", sizes.get(key)) for key in FLAME_FIELDS)
        and ("portrait" in arrays) == entry["portrait"]
        and ("portrait" not in arrays or fits("portrait", "uint8", side, side, 3))
    )
    if good:
        body = tokens[4:-4]
        good = (tokens[:4] == t.bos).all() and (tokens[-4:] == t.eos).all()
        good = good and (not body.size or (body.min() >= 0 and body.max() < t.bos))
        good = good and all(np.isfinite(a).all() for a in arrays.values() if a.dtype.kind == "f")
    if not good:
        raise FileFormatError(f"{source} is not what {META} says about {entry['name']!r}; tokenise again.")
