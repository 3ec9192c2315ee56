"""What a token store says of itself: `meta.json`, the spec all its subjects share, and how two specs differ."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pointillist_jax.data.template_space import SPACES
from pointillist_jax.files import FileFormatError, UserError, read_json
from pointillist_jax.tokens import TOKENIZER_VERSION, PointTokenizer

FORMAT, VERSION = "pointillist-tokens", 1
META = "meta.json"
NAME = re.compile(r"(?!\.)[^/\\\0]{1,200}")


@dataclasses.dataclass(frozen=True)
class StoreSpec:
    """What all subjects of a store have in common; stores of different specs cannot be mixed.

    Attributes:
      tokenizer: bins, faces and bounds.
      flame_sha256: of the head model's file.
      flame_source: its name, for people.
      canonical_jaw: radians by which the canonical mesh opens its mouth (DESIGN §3).
      portrait_size: side of the portraits in pixels.
      out_of_bounds: "error", or "clip" if points outside the cube were moved onto its border.
      keep: share of every fit's points that were taken (`DataConfig.keep`).
      space: "identity" or "template" (`DataConfig.space`).
    """

    tokenizer: PointTokenizer
    flame_sha256: str
    flame_source: str = ""
    canonical_jaw: float = 0.3
    portrait_size: int = 518
    out_of_bounds: str = "error"
    keep: float = 1.0
    space: str = "identity"

    def __post_init__(self):
        if self.space not in SPACES:
            raise UserError(f"data.space={self.space!r} must be one of {', '.join(SPACES)}.")
        if not 0 < self.keep <= 1:
            raise UserError(f"data.keep={self.keep} must lie above 0 and be at most 1.")

    def to_json(self) -> dict[str, Any]:
        t = self.tokenizer
        return {
            "tokenizer": {
                "version": TOKENIZER_VERSION,
                "bins": t.bins,
                "num_faces": t.num_faces,
                "lower": list(t.lower),
                "upper": list(t.upper),
            },
            "flame": {"sha256": self.flame_sha256, "source": self.flame_source},
            "canonical_jaw": self.canonical_jaw,
            "portrait_size": self.portrait_size,
            "out_of_bounds": self.out_of_bounds,
            "keep": self.keep,
            "space": self.space,
        }


def spec_difference(have: StoreSpec, want: StoreSpec) -> str | None:
    """How two specs differ, as "<name> <have>, not <want>", or None. Names of head models do not count."""

    def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        out = {}
        for key, value in content.items():
            out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return out

    have_flat, want_flat = flat(have.to_json()), flat(want.to_json())
    for key, value in have_flat.items():
        if key != "flame.source" and value != want_flat[key]:
            label = {"flame.sha256": "another head model, sha256"}.get(key, key.removeprefix("tokenizer."))
            name = f" ({have.flame_source})" if key == "flame.sha256" and have.flame_source else ""
            return f"{label} {value}{name}, not {want_flat[key]}"
    return None


def read_spec(path: Path, meta: dict[str, Any]) -> StoreSpec:
    """The inverse of `StoreSpec.to_json`; `path` is the folder whose meta.json holds it. Raises FileFormatError."""
    try:
        t = meta["tokenizer"]
        if t["version"] != TOKENIZER_VERSION:
            raise UserError(
                f"{path} was made with tokenizer version {t['version']}, not {TOKENIZER_VERSION}: tokenise again."
            )
        tokenizer = PointTokenizer(
            num_faces=t["num_faces"], bins=t["bins"], lower=tuple(t["lower"]), upper=tuple(t["upper"])
        )
        spec = StoreSpec(
            tokenizer=tokenizer,
            flame_sha256=str(meta["flame"]["sha256"]),
            flame_source=str(meta["flame"]["source"]),
            canonical_jaw=float(meta["canonical_jaw"]),
            portrait_size=int(meta["portrait_size"]),
            out_of_bounds=str(meta["out_of_bounds"]),
            # Stores from before these took all points, around the people's own heads.
            keep=float(meta.get("keep", 1.0)),
            space=str(meta.get("space", "identity")),
        )
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise FileFormatError(f"{path / META} is damaged ({error!s:.200}); copy the store again.") from None
    if not 1 <= spec.portrait_size <= 1 << 13:
        raise FileFormatError(f"{path / META}: portrait_size is {spec.portrait_size}, expected 1 to 8192.")
    return spec


def read_meta(path: Path) -> dict[str, Any]:
    """meta.json with every field that is used later checked; file sizes of the shards compared."""
    if not (path / META).is_file():
        raise FileNotFoundError(
            f"{path} is not a token store (no {META}); make one with `python -m experiments.tokenize`."
        )
    meta = read_json(path / META, "a token store's meta.json")
    source = path / META
    if (meta.get("format"), meta.get("version")) != (FORMAT, VERSION):
        raise FileFormatError(
            f"{source}: format {meta.get('format')!r} version {meta.get('version')!r}, expected {FORMAT!r} version "
            f"{VERSION}; tokenise again with this version of the program."
        )
    try:
        shards = {s["file"]: s for s in meta["shards"]}
        counts = dict.fromkeys(shards, 0)
        names = set()
        for entry in meta["subjects"]:
            good = (
                isinstance(entry["name"], str)
                and NAME.fullmatch(entry["name"])
                and entry["name"] not in names
                and all(type(entry[key]) is int and 0 <= entry[key] < 1 << 28 for key in ("num_points", "num_clipped"))
                and type(entry["portrait"]) is bool
                and isinstance(entry["fit_sha256"], str)
                and entry["record"] == counts[entry["shard"]]
            )
            if not good:
                raise ValueError(f"subject {entry['name']!r} is described wrongly")
            names.add(entry["name"])
            counts[entry["shard"]] += 1
        for name, shard in shards.items():
            if not re.fullmatch(r"tokens-\d{5,}\.array_record", name) or shard["num_records"] != counts[name]:
                raise ValueError(f"shard {name!r} is described wrongly")
        if type(meta["complete"]) is not bool:
            raise ValueError("complete must be true or false")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise FileFormatError(f"{source} is damaged ({said[:200]}); copy the store again.") from None
    for name, shard in shards.items():
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size != shard["bytes"]:
            found = "missing" if size is None else f"{size} bytes"
            raise FileFormatError(f"{path / name} is {found}, expected {shard['bytes']} bytes; copy the store again.")
    return meta
