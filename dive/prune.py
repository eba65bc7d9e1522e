"""What a store holds, and what of it no run needs any more: ``python -m dive.store``, ``python -m dive.store prune``."""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dive.errors import UserError
from dive.store import MANIFEST, files_below
from dive.units import size

FRESH = 24.0
"""Hours in which an entry counts as needed, whoever used it: a run that is under way may not have named it yet."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One artifact, or what an interrupted step left behind."""

    name: str
    """``<kind>/<key>``, as results.json names it."""
    path: Path
    bytes: int
    used: float
    """When it was made or last found again, seconds since the epoch."""

    @property
    def kind(self) -> str:
        """Folder in the store."""
        return self.name.partition("/")[0]


def entries(store: Path) -> Iterator[Entry]:
    """Everything in a store, in the order of kinds and keys.

    Raises:
        UserError: there is no store.
    """
    if not store.is_dir():
        raise UserError(f"--store={store}: no such directory")
    others = ("locks", "wandb", "mlflow")
    for kind in sorted(folder for folder in store.iterdir() if folder.is_dir() and folder.name not in others):
        for path in sorted(folder for folder in kind.iterdir() if folder.is_dir() and not folder.name.startswith(".")):
            states = dict(files_below(path))
            try:
                stamp = states.get(path / MANIFEST) or path.stat()
            except FileNotFoundError:
                continue  # another run's, whole by now
            used = max([stamp.st_mtime, *(state.st_mtime for state in states.values() if kind.name == "partial")])
            yield Entry(f"{kind.name}/{path.name}", path, sum(state.st_size for state in states.values()), used)


def needed(runs: Sequence[Path]) -> tuple[set[str], int]:
    """(names of the entries that the runs below these directories were made of, number of runs).

    Raises:
        UserError: a run does not say what it was made of.
    """
    found: set[str] = set()
    count = 0
    for root in runs:
        for file in sorted(root.rglob("results.json")):
            try:
                found.update(json.loads(file.read_text(encoding="utf-8"))["run"]["artifacts"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{file} does not say which artifacts it was made of; run it again, which finds them, or remove it"
                ) from error
            count += 1
    return found, count


def unneeded(store: Path, runs: Sequence[Path], *, now: float) -> list[Entry]:
    """Entries that no run below these directories was made of, and that nobody used in the last :data:`FRESH` hours.

    Raises:
        UserError: there is no store, or a run does not say what it was made of.
    """
    keep, _ = needed(runs)
    return [entry for entry in entries(store) if entry.name not in keep and now - entry.used > FRESH * 3600.0]


def show(store: Path) -> None:
    """Print kinds, sizes and when each was last of use."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Store {store}")
    table.add_column("kind")
    for name in ("entries", "size", "last used"):
        table.add_column(name, justify="right")
    by_kind: dict[str, list[Entry]] = {}
    for entry in entries(store):
        by_kind.setdefault(entry.kind, []).append(entry)
    for kind, found in by_kind.items():
        last = time.strftime("%Y-%m-%d %H:%M", time.localtime(max(entry.used for entry in found)))
        table.add_row(kind, str(len(found)), size(sum(entry.bytes for entry in found)), last)
    table.add_section()
    every = [entry for found in by_kind.values() for entry in found]
    table.add_row("all", str(len(every)), size(sum(entry.bytes for entry in every)), "")
    Console().print(table)


def command(arguments: Sequence[str] | None = None) -> None:
    """List what a store holds by kind, size and last use; ``prune`` removes what no kept run was made of."""
    parser = argparse.ArgumentParser(prog="python -m dive.store", description=command.__doc__)
    parser.add_argument("action", nargs="?", choices=("list", "prune"), default="list")
    parser.add_argument("--store", metavar="DIR", type=Path, default=Path("outputs/store"), help="default: %(default)s")
    parser.add_argument(
        "--runs",
        metavar="DIR",
        type=Path,
        action="append",
        help="prune: keep what the runs below it were made of; may be given several times (default: outputs)",
    )
    parser.add_argument("--dry-run", action="store_true", help="prune: say what would go, and remove nothing")
    chosen = parser.parse_args(arguments)
    runs: list[Path] = chosen.runs or [Path("outputs")]
    try:
        if chosen.action == "prune":
            going = unneeded(chosen.store, runs, now=time.time())
            for entry in going:
                print(f"{size(entry.bytes):>8}  {entry.name}")
                if not chosen.dry_run:
                    shutil.rmtree(entry.path, ignore_errors=True)
            _, count = needed(runs)
            said = "would go" if chosen.dry_run else "removed"
            print(f"{len(going)} entries {said}, {size(sum(entry.bytes for entry in going))}; {count} runs keep theirs")
        else:
            show(chosen.store)
    except UserError as error:
        sys.exit(f"error: {error}")
