"""Which head a script works with: the user's FLAME, or the open head that the data name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pointillist_jax.files import UserError, read_json
from pointillist_jax.flame import FlameModel, load_flame, open_head

DETAILS = ("coarse", "full")


def choose_head(flame: str | None, detail: str | None, *cards: str | os.PathLike) -> FlameModel:
    """The head of `--flame`, else of `--detail`, else the one that a card names, else the full open head.

    Args:
      flame: path of a FLAME .pkl, or None.
      detail: "coarse" or "full", or None.
      cards: JSON files with {"head": {"source": …, "sha256": …}}, such as identities.json or a fit's report.json. The
        first that is there counts.

    Raises:
      UserError: both flags, or a card that names a head which is not the open one.
    """
    if flame:
        if detail:
            raise UserError("--flame and --detail exclude each other; give one.")
        return load_flame(flame)
    card = next((card for card in cards if os.path.isfile(card)), None)
    if detail or card is None:
        return open_head(detail or "full")
    named: Any = read_json(card, "a card that names its head").get("head")
    named = named if isinstance(named, dict) else {}
    return named_head(named.get("source"), named.get("sha256"), str(card))


def named_head(source: Any, sha256: Any, where: str, flame: str | None = None) -> FlameModel:
    """The head with this sha256: the one of `--flame`, or one of the two open heads.

    Raises:
      UserError: it is none of them; the sentence names what `where` was made with.
    """
    candidates = [load_flame(flame)] if flame else [open_head(detail) for detail in DETAILS]
    for model in candidates:
        # Both open heads lie in one file, so the sha256 alone does not tell them apart.
        if model.sha256 == sha256 and (flame or model.source == source):
            return model
    raise UserError(f"{where} was made with the head {source!r}: name its file with --flame.")


def head_of_avatar(bundle: str | os.PathLike, flame: str | None) -> FlameModel:
    """The head an avatar bundle was made for. Raises UserError if it is neither --flame nor an open head."""
    if flame:
        return load_flame(flame)
    card = read_json(Path(bundle) / "avatar.json", "an avatar bundle's card").get("flame")
    card = card if isinstance(card, dict) else {}
    for head in map(open_head, DETAILS):
        if (head.sha256, head.num_faces) == (card.get("sha256"), card.get("num_faces")):
            return head
    return named_head(f"a head of {card.get('num_faces')} faces", card.get("sha256"), str(bundle))
