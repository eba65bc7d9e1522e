"""List or clean the store of artifacts: results of steps, found by what they follow from, written whole or not at all.

An artifact is a directory ``<store>/<kind>/<key>/``. Its key is a hash of everything that its content follows from, so a
sweep computes each once, and the same command again computes nothing. ``manifest.json`` holds those inputs, the hash of
every file, and the versions of the packages that made it; a directory whose files do not match is computed again.

A step is a function under :func:`step`. Its keyword arguments are its key, so a key can forget nothing that the step reads.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from enum import Enum
from functools import cache, singledispatch, update_wrapper
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

from dive.errors import UserError, disk_trouble

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
DECISIVE = ("torch", "transformers")
"""Packages whose minor version is part of every key: their arithmetic is what results follow from."""
PACKAGES = (
    "dive-moe",
    "torch",
    "transformers",
    "tokenizers",
    "lightning",
    "datasets",
    "safetensors",
    "numpy",
    "scipy",
    "lm-eval",
)
"""Packages whose versions every artifact records."""


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
    versions: Mapping[str, str] = field(default_factory=dict)
    """{package: version} that made it, whenever that was."""

    def read(self, name: str) -> Any:
        """Content of one of its JSON files."""
        return json.loads((self.path / name).read_text(encoding="utf-8"))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a step writes."""

    directory: Path
    """Of the artifact's files; it is moved to its place once the step returns."""
    partial: Path
    """For what an interrupted step leaves behind to go on from; not made, and removed once the artifact is whole."""
    writes: bool = True
    """Whether the files of this process count; see :func:`dive.together.shared_step`."""


# -------------------------------------------------------------------------------------------------------------- identity


@singledispatch
def identity(value: object) -> Any:
    """What a value is in a key: JSON values that differ wherever the value does.

    Modules register their own types. A type that nobody registered is refused: it might be told apart by nothing, or by its
    address.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: identity(getattr(value, f.name)) for f in fields(value)}
    raise TypeError(f"{type(value).__name__} has no identity: register it with dive.store.identity")


@identity.register(type(None))
@identity.register(bool)
@identity.register(int)
@identity.register(float)
@identity.register(str)
def _(value: Any) -> Any:
    return value


@identity.register
def _(value: Enum) -> Any:
    return value.value


@identity.register
def _(value: Artifact) -> str:
    return value.key


@identity.register
def _(value: Mapping) -> dict[str, Any]:  # type: ignore[type-arg]  # singledispatch wants the bare class
    return {str(key): identity(item) for key, item in value.items()}


@identity.register(list)
@identity.register(tuple)
def _(value: Sequence[Any]) -> list[Any]:
    return [identity(item) for item in value]


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
    """SHA-256 of the inputs' identities, 20 hexadecimal digits."""
    text = json.dumps({"kind": kind, "inputs": identity(inputs)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


@cache
def installed(packages: tuple[str, ...] = PACKAGES) -> Mapping[str, str]:
    """{package: version} of those that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def minor(number: str) -> str:
    """``2.13.0+cpu`` as ``2.13``: releases that differ behind it are held to compute the same."""
    return ".".join(number.partition("+")[0].split(".")[:2])


# ----------------------------------------------------------------------------------------------------------------- store


class Store:
    """Artifacts under one directory, shared by runs and by the processes of a run."""

    finished: Callable[[str, Artifact], None] | None = None
    """Called with the kind of each artifact that :meth:`get` returns, and the artifact."""
    stage: str = ""
    """What the log says it is computed for."""

    def __init__(self, root: Path, *, versions: Mapping[str, str] | None = None) -> None:
        """
        Args:
            versions: {package: version}; those that are installed if none.

        Raises:
            UserError: the directory cannot be written.
        """
        self.root = root
        self._inner = 0.0
        """Seconds of what was computed so far, to be taken from those of an artifact that it was computed within."""
        self.versions = dict(installed() if versions is None else versions)
        self._decisive = {name: minor(self.versions[name]) for name in DECISIVE if name in self.versions}
        try:
            root.mkdir(parents=True, exist_ok=True)
            probe = root / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"store={root} cannot be written ({error.strerror}); set store=DIR") from error

    def key(self, kind: str, inputs: Mapping[str, Any]) -> str:
        """Key of an artifact: of its inputs, and of the packages whose arithmetic it follows from."""
        return key_of(kind, {"inputs": inputs, "packages": self._decisive})

    def get(
        self, kind: str, inputs: Mapping[str, Any], compute: Callable[[Place], float | None], *, what: str = "it"
    ) -> Artifact:
        """The artifact of these inputs; ``compute`` fills its directory if it is not there yet.

        Where several processes want the same one, the first computes it and the others wait.

        Args:
            compute: may return the seconds that interrupted attempts before it took.
            what: is computed, for the log.

        Raises:
            UserError: the disk is full, or something stands where a directory belongs.
        """
        key = self.key(kind, inputs)
        with self._lock(kind, key):
            found = self.find(kind, inputs)
            said = f"computing {what}" if found is None else "reused"
            log.info("%s%s %s: %s", *self._for(), kind, key[:8], said)
            artifact = found or self._put(kind, key, inputs, compute)
        if self.finished is not None:
            self.finished(kind, artifact)
        return artifact

    def find(self, kind: str, inputs: Mapping[str, Any]) -> Artifact | None:
        """The artifact of these inputs, if it is there and whole; one that is not is removed."""
        key = self.key(kind, inputs)
        path = self.root / kind / key
        if not (path / MANIFEST).is_file():
            return None
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            whole = all(_hash(path / name) == digest for name, digest in manifest["files"].items())
            seconds, versions = float(manifest["seconds"]), dict(manifest["versions"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            log.warning("%s %s is damaged and will be computed again", kind, key[:8])
            shutil.rmtree(path, ignore_errors=True)
            return None
        with _unwritable_is_fine():
            os.utime(path / MANIFEST)  # when it was last of use, for `python -m dive.store`
        return Artifact(key, path, seconds, reused=True, versions=versions)

    def exists(self, kind: str, inputs: Mapping[str, Any]) -> bool:
        """Whether the artifact of these inputs is there; :meth:`find` also looks whether it is whole, which reads all of it."""
        return (self.root / kind / self.key(kind, inputs) / MANIFEST).is_file()

    def _put(
        self, kind: str, key: str, inputs: Mapping[str, Any], compute: Callable[[Place], float | None]
    ) -> Artifact:
        """Compute an artifact into a directory beside its place, and move it there when it is whole."""
        path = self.root / kind / key
        working = path.with_name(f".{key}-{os.getpid()}")
        place = Place(working, self.partial(kind, inputs))
        for left in path.parent.glob(f".{key}-*"):  # by runs that were killed; who computes holds the lock
            shutil.rmtree(left, ignore_errors=True)
        start, inner = time.monotonic(), self._inner
        try:
            working.mkdir(parents=True)
            before = compute(place) or 0.0
            took = time.monotonic() - start
            seconds = before + took - (self._inner - inner)
            self._inner = inner + took
            files = {str(f.relative_to(working)): _hash(f) for f in sorted(working.rglob("*")) if f.is_file()}
            manifest = {
                "key": key,
                "kind": kind,
                "inputs": identity(inputs),
                "versions": self.versions,
                "files": files,
                "seconds": seconds,
            }
            write_json(working / MANIFEST, manifest)
            shutil.rmtree(path, ignore_errors=True)  # what a crash or a user left of it
            if path.is_file():
                path.unlink()
            os.replace(working, path)
        except UserError:  # of what was computed within, which says its own name
            raise
        except Exception as error:
            trouble = disk_trouble(error)
            if trouble is None and isinstance(error, OSError) and self._inside(error):
                trouble = f"{error.filename}: {error.strerror}"
            if trouble is None:
                raise
            raise UserError(
                f"store={self.root}: writing {kind} failed ({trouble}); make room or set store=DIR, and run it again"
            ) from error
        finally:
            shutil.rmtree(working, ignore_errors=True)
        shutil.rmtree(place.partial, ignore_errors=True)
        return Artifact(key, path, seconds, reused=False, versions=self.versions)

    def partial(self, kind: str, inputs: Mapping[str, Any]) -> Path:
        """:attr:`Place.partial` of an artifact."""
        return self.root / "partial" / f"{kind}-{self.key(kind, inputs)}"

    def _for(self) -> tuple[str]:
        return (f"{self.stage}: " if self.stage else "",)

    def _inside(self, error: OSError) -> bool:
        """Whether the store's own files are in the way: no permission, or a file where a directory belongs."""
        if error.errno not in (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            return False
        return error.filename is not None and Path(os.fsdecode(error.filename)).is_relative_to(self.root)

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
                log.info("%s%s %s: another process computes it, waiting", *self._for(), kind, key[:8])
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError as error:  # ENOSYS of Lustre without `flock`, ENOLCK of NFS without its lock daemon
                raise UserError(
                    f"store={self.root}: its file system has no locks ({error.strerror}), so two jobs would compute over each "
                    "other; mount it with flock, or set store=DIR on another"
                ) from error
            yield


def files_below(directory: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Files at any depth below a directory, and their states; what another run takes away meanwhile, or nobody can look at, is
    left out."""
    for folder, _, names in os.walk(directory):
        for file in (Path(folder) / name for name in names):
            with suppress(OSError):
                yield file, file.stat()


# ----------------------------------------------------------------------------------------------------------------- steps


class HasStore(Protocol):
    """What a step needs of a run."""

    store: Store


@dataclass(slots=True)
class WithStore:
    """What a step needs where there is no run."""

    store: Store


class HasStages(HasStore, Protocol):
    """What a function of several steps needs of a run."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Everything inside belongs to the stage of this name, in the log and in the account of what the run took."""


R = TypeVar("R", bound=HasStore)
P = ParamSpec("P")


class Step(Generic[R, P]):
    """A function whose result rests in the store; see :func:`step`."""

    def __init__(
        self, compute: Callable[Concatenate[Place, R, P], float | None], kind: str, what: str, version: int
    ) -> None:
        self.kind, self.what, self.version, self.compute = kind, what, version, compute
        update_wrapper(self, compute)

    def __call__(self, run: R, *how: P.args, **inputs: P.kwargs) -> Artifact:
        """The artifact of these inputs, computed if it is not in the run's store."""
        return run.store.get(
            self.kind,
            self.depends(**inputs),
            lambda place: self.compute(place, run, *how, **inputs),
            what=self.what,
        )

    def find(self, run: R, **inputs: Any) -> Artifact | None:
        """The artifact of these inputs, if it is in the run's store."""
        return run.store.find(self.kind, self.depends(**inputs))

    def exists(self, run: R, **inputs: Any) -> bool:
        """Whether the artifact of these inputs is in the run's store, be it damaged; see :meth:`Store.exists`."""
        return run.store.exists(self.kind, self.depends(**inputs))

    def partial(self, run: R, **inputs: Any) -> Path:
        """:attr:`Place.partial` of these inputs."""
        return run.store.partial(self.kind, self.depends(**inputs))

    def depends(self, **inputs: Any) -> dict[str, Any]:
        """What the key is made of."""
        return {"step": self.version, **inputs}


def step(
    kind: str, what: str, *, version: int = 1
) -> Callable[[Callable[Concatenate[Place, R, P], float | None]], Step[R, P]]:
    """Let a function's result rest in the store, under a key of all its keyword arguments.

    The function is ``compute(place, run, *how, **inputs)``: it fills ``place.directory``, and may return the seconds that
    interrupted attempts before it took. Called without ``place`` it gives the artifact. What is passed by position says how
    (the run, batch sizes, devices) and changes no result but by rounding. What is passed by keyword is the key. A function
    cannot read what it is not passed, so its key cannot forget anything.

    Args:
        kind: folder in the store.
        what: it computes, in a few words for the log.
        version: raise it when the function computes something else from the same inputs.
    """

    def wrap(compute: Callable[Concatenate[Place, R, P], float | None]) -> Step[R, P]:
        return Step(compute, kind, what, version)

    return wrap


# ----------------------------------------------------------------------------------------------------------------- files


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _unwritable_is_fine() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        log.debug("%s", error)


def write_json(file: Path, value: Any) -> None:
    """Write JSON so that a reader never sees half of it."""
    temporary = file.with_name(f".{file.name}-{os.getpid()}")
    temporary.write_text(json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, file)


if __name__ == "__main__":
    from dive.prune import command

    command()
