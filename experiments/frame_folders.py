"""Folders of numbered files, one for each frame, with a card that says which of them are ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pointillist_jax.files import UserError, read_json

CARD = "animation.json"


def frame_name(i: int, suffix: str) -> str:
    """Of frame i: "00012.png"."""
    return f"{i:05d}{suffix}"


def write_card(folder: Path, made_by: str, frames: int, suffix: str, more: Mapping[str, Any]) -> None:
    """Writes the card that `check_frame_folder` asks before it lets a folder be replaced."""
    card = {"made_by": made_by, "frames": frames, "suffix": suffix, **more}
    (folder / CARD).write_text(json.dumps(card, indent=1) + "\n")


def check_frame_folder(folder: Path, made_by: str) -> None:
    """Raises UserError unless the folder is empty or all of it was written by this script, which may replace it."""
    if any(folder.iterdir()) and not _all_ours(folder, made_by):
        raise UserError(f"--output={folder} holds something that this script did not write; name another folder.")


def _all_ours(folder: Path, made_by: str) -> bool:
    if not (folder / CARD).is_file():
        return False
    card = read_json(folder / CARD, "the card of an animation")
    frames = card.get("frames") if card.get("made_by") == made_by else None
    suffix = card.get("suffix", ".png")

    def ours(path: Path) -> bool:
        number = int(path.stem) if path.stem.isdecimal() else -1
        return path.name == CARD or (path.name == frame_name(number, suffix) and number in range(frames))

    return isinstance(frames, int) and isinstance(suffix, str) and all(ours(path) for path in folder.iterdir())
