"""The store of artifacts: results of stages, found by what they depend on, written whole or not at all.

An artifact is a directory ``<store>/<kind>/<key>/``. Its key is a hash of everything that its content follows from, so a
sweep computes each once, and the same command again computes nothing. ``manifest.json`` holds those inputs and the hash of
every file; a directory whose files do not match is computed again.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from dive.errors import UserError, disk_trouble

log = logging.getLogger(__name__)

FORMAT = 1
"""Part of every key; raised when a stage computes something else from the same inputs."""
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Artifact:
    """A finished result."""

    key: str
    path: Path
    """Directory with its files."""
    seconds: float
    """What computing it took, whenever that was."""
    reused: bool
    """Whether it was there already."""


def plain(value: Any) -> Any:
    """Configuration objects as JSON values: dataclasses to dicts, enums to their values."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def key_of(kind: str, inputs: Mapping[str, Any]) -> str:
    """SHA-256 of the inputs, 20 hexadecimal digits."""
    text = json.dumps({"format": FORMAT, "kind": kind, "inputs": plain(inputs)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


class Store:
    """Artifacts under one directory, shared by runs and by the processes of a run."""

    finished: Callable[[str, Artifact], None] | None = None
    """Called with the kind of each artifact that :meth:`get` returns, and the artifact."""

    def __init__(self, root: Path) -> None:
        """
        Raises:
            UserError: the directory cannot be written.
        """
        self.root = root
        try:
            root.mkdir(parents=True, exist_ok=True)
            probe = root / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"store={root} cannot be written ({error.strerror}); set store=DIR") from error

    def get(self, kind: str, inputs: Mapping[str, Any], compute: Callable[[Path], float | None]) -> Artifact:
        """The artifact of these inputs; ``compute`` fills its directory if it is not there yet.

        Where several processes want the same one, the first computes it and the others wait.

        Args:
            compute: may return the seconds that interrupted attempts before it took.
        """
        key = key_of(kind, inputs)
        with self._lock(kind, key):
            found = self.find(kind, inputs)
            log.info("%s %s: %s", kind, key[:8], "computing" if found is None else "reused")
            artifact = found or self.put(kind, inputs, compute)
        if self.finished is not None:
            self.finished(kind, artifact)
        return artifact

    def find(self, kind: str, inputs: Mapping[str, Any]) -> Artifact | None:
        """The artifact of these inputs, if it is there and whole."""
        key = key_of(kind, inputs)
        path = self.root / kind / key
        if not (path / MANIFEST).is_file():
            return None
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            whole = all(_hash(path / name) == digest for name, digest in manifest["files"].items())
            seconds = float(manifest["seconds"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            log.warning("%s %s is damaged and will be computed again", kind, key[:8])
            shutil.rmtree(path, ignore_errors=True)
            return None
        return Artifact(key, path, seconds, reused=True)

    def put(self, kind: str, inputs: Mapping[str, Any], compute: Callable[[Path], float | None]) -> Artifact:
        """Compute an artifact into a directory beside its place, and move it there when it is whole.

        Raises:
            UserError: the disk is full.
        """
        key = key_of(kind, inputs)
        path = self.root / kind / key
        working = path.with_name(f".{key}-{os.getpid()}")
        for left in path.parent.glob(f".{key}-*"):  # by runs that were killed; who computes holds the lock
            shutil.rmtree(left, ignore_errors=True)
        start = time.monotonic()
        try:
            working.mkdir(parents=True)
            before = compute(working) or 0.0
            seconds = before + time.monotonic() - start
            files = {str(f.relative_to(working)): _hash(f) for f in sorted(working.rglob("*")) if f.is_file()}
            manifest = {"key": key, "kind": kind, "inputs": plain(inputs), "files": files, "seconds": seconds}
            write_json(working / MANIFEST, manifest)
            shutil.rmtree(path, ignore_errors=True)  # what a crash or a user left of it
            os.replace(working, path)
        except Exception as error:
            trouble = disk_trouble(error)
            if isinstance(error, OSError) and error.errno == errno.EACCES:
                trouble = str(error.strerror)
            if trouble is None:
                raise
            raise UserError(
                f"store={self.root}: writing {kind} failed ({trouble}); make room or set store=DIR, and run it again"
            ) from error
        finally:
            shutil.rmtree(working, ignore_errors=True)
        return Artifact(key, path, seconds, reused=False)

    def partial(self, kind: str, inputs: Mapping[str, Any]) -> Path:
        """Directory for what an unfinished artifact leaves behind to go on from; removed by :meth:`forget_partial`."""
        return self.root / "partial" / f"{kind}-{key_of(kind, inputs)}"

    def forget_partial(self, kind: str, inputs: Mapping[str, Any]) -> None:
        """Remove what :meth:`partial` holds."""
        shutil.rmtree(self.partial(kind, inputs), ignore_errors=True)

    @contextmanager
    def _lock(self, kind: str, key: str) -> Iterator[None]:
        directory = self.root / "locks"
        try:
            directory.mkdir(exist_ok=True)
            handle = (directory / f"{kind}-{key}").open("w")
        except OSError as error:
            raise UserError(f"store={self.root} cannot be written ({error.strerror}); set store=DIR") from error
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("%s %s: another process computes it, waiting", kind, key[:8])
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(file: Path, value: Any) -> None:
    """Write JSON so that a reader never sees half of it."""
    temporary = file.with_name(f".{file.name}-{os.getpid()}")
    temporary.write_text(json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, file)
