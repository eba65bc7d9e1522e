"""The store: whole or not at all, each once, damaged ones again."""

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest

from dive.config import Compensation, PruningConfig
from dive.errors import UserError
from dive.store import MANIFEST, Place, Store, files_below, key_of, plain, step, write_json

INPUTS = {"pruning": PruningConfig(ratio=0.5), "domains": ["a", "b"]}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


class Compute:
    """Writes two files and counts how often it was asked to."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, place: Place) -> None:
        directory = place.directory
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
    def fail(place: Place) -> None:
        (place.directory / "half.txt").write_text("half")
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        store.get("masks", INPUTS, fail)
    assert store.find("masks", INPUTS) is None
    assert not list(store.root.rglob("half.txt"))
    assert not leftovers(store)
    assert store.get("masks", INPUTS, Compute()).reused is False


def test_a_full_disk_is_a_user_error(store: Store) -> None:
    def full(_: Place) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"store=.*: writing masks failed \(No space left on device\)"):
        store.get("masks", INPUTS, full)
    assert not leftovers(store)


def test_a_file_system_without_locks_is_a_user_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match=r"^store=.*: its file system has no locks \(Function not implemented\)"):
        store.get("masks", INPUTS, Compute())
    assert not (store.root / "masks").exists()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"store=.* cannot be written \(.*\); set store=DIR"):
        Store(tmp_path / "file" / "store")


def compute_slowly(root: Path, log: Path, started: "multiprocessing.synchronize.Event | None") -> None:
    def compute(place: Place) -> None:
        with log.open("a") as lines:
            lines.write(f"{os.getpid()}\n")
        if started is not None:
            started.set()
        time.sleep(0.3)
        (place.directory / "done.txt").write_text("done")

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


def test_what_an_interrupted_step_left_behind_is_there_again_and_then_gone(store: Store) -> None:
    left = store.partial("masks", INPUTS)
    assert left != store.partial("masks", {})

    def stop(place: Place) -> None:
        place.partial.mkdir(parents=True)
        (place.partial / "half.txt").write_text("half")
        raise KeyboardInterrupt

    def go_on(place: Place) -> float:
        assert (place.partial / "half.txt").read_text() == "half"
        return 100.0

    with pytest.raises(KeyboardInterrupt):
        store.get("masks", INPUTS, stop)
    assert store.get("masks", INPUTS, go_on).seconds > 100.0
    assert not left.exists()


class Bench:
    """What a step needs of a run."""

    def __init__(self, store: Store) -> None:
        self.store = store


@step("sums", "a sum", version=2)
def add(place: Place, run: Bench, calls: list[int], *, numbers: list[int], scale: float = 1.0) -> None:
    calls.append(len(numbers))
    write_json(place.directory / "sum.json", scale * sum(numbers))


def test_the_key_of_a_step_is_what_it_is_passed_by_keyword(store: Store) -> None:
    calls: list[int] = []
    run = Bench(store)
    assert add.find(run, numbers=[1, 2]) is None
    first = add(run, calls, numbers=[1, 2])
    assert first.read("sum.json") == 3.0
    assert add(run, [], numbers=[1, 2]).key == first.key  # how it is computed is no part of the key
    assert calls == [2]
    found = add.find(run, numbers=[1, 2])
    assert found is not None
    assert found.reused
    others = {add(run, calls, numbers=[1, 3]).key, add(run, calls, numbers=[1, 2], scale=2.0).key}
    assert len({first.key, *others}) == 3
    assert len(calls) == 3


def test_another_version_of_a_step_is_another_key(store: Store) -> None:
    later = step("sums", "a sum", version=3)(add.compute)
    calls: list[int] = []
    assert add(Bench(store), calls, numbers=[1]).key != later(Bench(store), calls, numbers=[1]).key
    assert len(calls) == 2


def test_what_nobody_can_tell_apart_is_refused(store: Store) -> None:
    with pytest.raises(TypeError, match="object has no identity"):
        add.find(Bench(store), numbers=[object()])


def test_packages_whose_arithmetic_differs_share_nothing(tmp_path: Path) -> None:
    compute = Compute()
    made = Store(tmp_path, versions={"torch": "2.13.0+cpu", "transformers": "5.24.0", "rich": "14.0"})
    first = made.get("masks", INPUTS, compute)
    patched = Store(tmp_path, versions={"torch": "2.13.1", "transformers": "5.24.7", "rich": "15.0"})
    again = patched.get("masks", INPUTS, compute)
    assert (again.reused, compute.calls) == (True, 1)
    assert again.versions == first.versions == made.versions  # those that made it, not those that found it
    for other in ({"torch": "2.14.0", "transformers": "5.24.0"}, {"torch": "2.13.0", "transformers": "5.25.0"}):
        assert not Store(tmp_path, versions=other).get("masks", INPUTS, compute).reused
    assert compute.calls == 3


@pytest.mark.parametrize("at", ["masks", "locks", "masks/KEY"])
def test_a_file_where_a_folder_belongs(store: Store, at: str) -> None:
    place = store.root / at.replace("KEY", store.key("masks", INPUTS))
    place.parent.mkdir(exist_ok=True)
    place.write_text("in the way")
    if at == "masks/KEY":  # what a crash left of an artifact is replaced
        assert not store.get("masks", INPUTS, Compute()).reused
        return
    with pytest.raises(UserError, match=r"store=.*(writing masks failed|cannot be written).*set store=DIR"):
        store.get("masks", INPUTS, Compute())


def test_files_that_another_run_takes_away_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for name in ("one", "two", "below/three"):
        (tmp_path / name).write_text("four")
    found = files_below(tmp_path)
    first, state = next(found)
    assert (first.parent, state.st_size) == (tmp_path, 4)
    for name in ("one", "two"):
        (tmp_path / name).unlink()
    shutil.rmtree(tmp_path / "below")
    assert list(found) == []


def test_links_that_lead_nowhere_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("four")
    assert [(file.name, state.st_size) for file, state in files_below(tmp_path)] == [("file", 4)]


def test_write_json(tmp_path: Path) -> None:
    file = tmp_path / "value.json"
    write_json(file, {"metric": Compensation.none, "name": "é"})
    write_json(file, {"metric": Compensation.bias, "name": "é"})
    assert json.loads(file.read_text(encoding="utf-8")) == {"metric": "bias", "name": "é"}
    assert [path.name for path in tmp_path.iterdir()] == ["value.json"]
