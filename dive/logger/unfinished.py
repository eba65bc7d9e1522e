"""Which run of a tracker an interrupted run had, so that the same command goes on in it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dive.store import key_of, write_json


def note_of(tracker: str, settings: Mapping[str, Any], store: Path) -> Path:
    """Where the id of an unfinished run of this configuration stands; loggers and places make it no other run."""
    defining = {name: value for name, value in settings.items() if name not in ("logger", "store", "plan")}
    return store / tracker / f"{key_of(tracker, defining)}.json"


def read_id(note: Path) -> str | None:
    """The id that stands there, if one does."""
    try:
        found = json.loads(note.read_text())["id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) and found.isalnum() else None


def write_id(note: Path, run: str) -> None:
    """Note the run down."""
    note.parent.mkdir(parents=True, exist_ok=True)
    write_json(note, {"id": run})
