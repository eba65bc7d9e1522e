"""The store: whole or not at all, each once, damaged ones again."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from dive.artifacts import MANIFEST, Store, key_of, plain, write_json
from dive.config import Compensation, PruningConfig
from dive.errors import UserError

INPUTS = {"pruning": PruningConfig(ratio=0.5), "domains": ["a", "b"]}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


class Compute:
    """Writes two files and counts how often it was asked to."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, directory: Path) -> None:
        self.calls += 1
        (directory / "numbers.txt").write_text(f"run {self.calls}")
        (directory / "below").mkdir()
        (directory / "below" / "more.txt").write_text("more")


def leftovers(store: Store) -> list[str]:
    return [path.name for path in store.root.rglob(".*")]


def test_computed_once_then_reused(store: Store) -> None:
    compute = Compute()
    first = store.get("masks", INPUTS, compute)
    second = Store(store.root).get("masks", INPUTS, compute)
    assert (compute.calls, first.reused, second.reused) == (1, False, True)
    assert first.path == second.path == store.root / "masks" / first.key
    assert second.seconds == first.seconds
    assert (first.path / "numbers.txt").read_text() == "run 1"
    manifest = json.loads((first.path / MANIFEST).read_text())
    assert manifest["inputs"]["pruning"]["compensation"] == "least_squares"
    assert sorted(manifest["files"]) == ["below/more.txt", "numbers.txt"]
    assert not leftovers(store)


def test_the_key_follows_from_every_input() -> None:
    keys = {
        key_of("masks", INPUTS),
        key_of("experts", INPUTS),
        key_of("masks", {**INPUTS, "pruning": PruningConfig(ratio=0.75)}),
        key_of("masks", {**INPUTS, "pruning": PruningConfig(ratio=0.5, compensation=Compensation.bias)}),
        key_of("masks", {**INPUTS, "domains": ["b", "a"]}),
        key_of("masks", {**INPUTS, "more": None}),
    }
    assert len(keys) == 6
    assert key_of("masks", dict(reversed(INPUTS.items()))) == key_of("masks", INPUTS)
    assert len(key_of("masks", INPUTS)) == 20


def test_plain() -> None:
    value = {"a": (Compensation.bias, PruningConfig(ratio=0.5)), 3: None}
    assert plain(value)["a"][0] == "bias"
    assert plain(value)["a"][1]["metric"] == "wifv"
    assert plain(value)["3"] is None
    json.dumps(plain(value))


def damage(artifact: Path, how: str) -> None:
    if how == "changed":
        (artifact / "numbers.txt").write_text("run 9")
    elif how == "truncated":
        (artifact / "numbers.txt").write_bytes(b"")
    elif how == "missing":
        (artifact / "below" / "more.txt").unlink()
    elif how == "manifest truncated":
        (artifact / MANIFEST).write_text('{"files": ')
    elif how == "manifest of something else":
        (artifact / MANIFEST).write_text("[]")
    else:
        (artifact / MANIFEST).unlink()


@pytest.mark.parametrize(
    "how",
    ["changed", "truncated", "missing", "manifest truncated", "manifest of something else", "manifest missing"],
)
def test_a_damaged_entry_is_computed_again(store: Store, how: str) -> None:
    compute = Compute()
    damage(store.get("masks", INPUTS, compute).path, how)
    assert store.find("masks", INPUTS) is None
    again = store.get("masks", INPUTS, compute)
    assert (compute.calls, again.reused) == (2, False)
    assert (again.path / "numbers.txt").read_text() == "run 2"
    found = store.find("masks", INPUTS)
    assert found is not None
    assert found.reused


def test_a_failure_leaves_nothing(store: Store) -> None:
    def fail(directory: Path) -> None:
        (directory / "half.txt").write_text("half")
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        store.get("masks", INPUTS, fail)
    assert store.find("masks", INPUTS) is None
    assert not list(store.root.rglob("half.txt"))
    assert not leftovers(store)
    assert store.get("masks", INPUTS, Compute()).reused is False


def test_a_full_disk_is_a_user_error(store: Store) -> None:
    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"store=.*: writing masks failed \(No space left on device\)"):
        store.get("masks", INPUTS, full)
    assert not leftovers(store)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"store=.* cannot be written \(.*\); set store=DIR"):
        Store(tmp_path / "file" / "store")


def compute_slowly(root: Path, log: Path, started: "multiprocessing.synchronize.Event | None") -> None:
    def compute(directory: Path) -> None:
        with log.open("a") as lines:
            lines.write(f"{os.getpid()}\n")
        if started is not None:
            started.set()
        time.sleep(0.3)
        (directory / "done.txt").write_text("done")

    found = Store(root).get("masks", INPUTS, compute)
    assert (found.path / "done.txt").read_text() == "done"


def test_of_two_processes_one_computes(store: Store, tmp_path: Path) -> None:
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    started = context.Event()
    other = context.Process(target=compute_slowly, args=(store.root, log, started))
    other.start()
    assert started.wait(20)
    compute_slowly(store.root, log, None)  # waits for the other's result
    other.join(20)
    assert other.exitcode == 0
    assert log.read_text().split() == [str(other.pid)]


def test_partial_results(store: Store) -> None:
    partial = store.partial("retrain", INPUTS)
    assert partial != store.partial("retrain", {})
    partial.mkdir(parents=True)
    (partial / "last.ckpt").write_text("x")
    store.forget_partial("retrain", INPUTS)
    assert not partial.exists()
    store.forget_partial("retrain", INPUTS)


def test_write_json(tmp_path: Path) -> None:
    file = tmp_path / "value.json"
    write_json(file, {"metric": Compensation.none, "name": "é"})
    write_json(file, {"metric": Compensation.bias, "name": "é"})
    assert json.loads(file.read_text(encoding="utf-8")) == {"metric": "bias", "name": "é"}
    assert [path.name for path in tmp_path.iterdir()] == ["value.json"]
