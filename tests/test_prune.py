"""What a store holds, and what goes."""

import json
import os
import time
from pathlib import Path

import pytest

from dive.errors import UserError
from dive.prune import FRESH, command, entries, needed, unneeded
from dive.store import MANIFEST, Place, Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Three artifacts of two kinds, and one that an interrupted step left behind; all of them old."""
    store = Store(tmp_path / "store")
    for kind, number in (("experts", 1), ("experts", 2), ("matrix", 1)):
        store.get(kind, {"number": number}, fill)
    left = store.partial("experts", {"number": 3})
    left.mkdir(parents=True)
    (left / "layer").write_bytes(bytes(50))
    long_ago = time.time() - 2 * FRESH * 3600.0
    for file in [*store.root.rglob(MANIFEST), left, left / "layer"]:
        os.utime(file, (long_ago, long_ago))
    return store


def fill(place: Place) -> None:
    (place.directory / "numbers").write_bytes(bytes(100))


def keep(directory: Path, *names: str) -> Path:
    """A run that was made of these entries."""
    directory.mkdir(parents=True)
    (directory / "results.json").write_text(json.dumps({"run": {"artifacts": names}}))
    return directory


def name(store: Store, kind: str, number: int) -> str:
    return f"{kind}/{store.key(kind, {'number': number})}"


def test_everything_is_listed_with_its_size(store: Store) -> None:
    found = {entry.name: entry for entry in entries(store.root)}
    kept = {name(store, "experts", 1), name(store, "experts", 2), name(store, "matrix", 1)}
    left = f"partial/{store.partial('experts', {'number': 3}).name}"
    assert found.keys() == {*kept, left}
    assert found[left].bytes == 50
    assert all(100 < found[entry].bytes < 2000 for entry in kept)  # and the manifest


def test_what_no_run_was_made_of_goes(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, matrix = name(store, "experts", 1), name(store, "experts", 2), name(store, "matrix", 1)
    runs = tmp_path / "runs"
    keep(runs / "one", first)
    keep(runs / "below" / "two", first, matrix)
    command(["prune", "--store", str(store.root), "--runs", str(runs), "--dry-run"])
    assert "2 entries would go" in capsys.readouterr().out
    assert len(list(entries(store.root))) == 4
    command(["prune", "--store", str(store.root), "--runs", str(runs)])
    said = capsys.readouterr().out
    assert second in said
    assert "2 entries removed" in said
    assert "2 runs keep theirs" in said
    assert {entry.name for entry in entries(store.root)} == {first, matrix}
    assert store.find("experts", {"number": 1}) is not None


def test_what_was_of_use_lately_stays(store: Store, tmp_path: Path) -> None:
    assert store.find("experts", {"number": 2}) is not None  # marks it as used
    going = {entry.name for entry in unneeded(store.root, [keep(tmp_path / "run")], now=time.time())}
    assert name(store, "experts", 2) not in going
    assert name(store, "experts", 1) in going


def test_a_run_that_does_not_say_what_it_was_made_of_stops_it(store: Store, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "results.json").write_text('{"run": {}}')
    with pytest.raises(UserError, match=r"results\.json does not say which artifacts"):
        needed([tmp_path / "old"])
    with pytest.raises(SystemExit, match=r"^error: .*does not say"):
        command(["prune", "--store", str(store.root), "--runs", str(tmp_path)])
    assert len(list(entries(store.root))) == 4


def test_the_list(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    command(["--store", str(store.root)])
    said = capsys.readouterr().out
    assert "experts" in said
    assert "matrix" in said
    with pytest.raises(SystemExit, match=r"^error: --store=.*no such directory"):
        command(["--store", str(store.root / "nowhere")])
