"""Texts from files: jsonl, txt and parquet."""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dive.errors import UserError
from dive.model.chat import Chat

SUFFIXES = (".jsonl", ".txt", ".parquet")


def read_documents(file: Path, *, field: str, where: str, chat: Chat | None = None) -> list[str]:
    """Documents of one file: a jsonl line or parquet row each; a txt file is one document.

    Args:
        file: .jsonl, .txt or .parquet; a byte order mark at the start of the first two is no text.
        field: text column of jsonl and parquet.
        where: override to name in errors.
        chat: what makes a document of a list of messages in that column; there may be none without it.

    Raises:
        UserError: the file cannot be read as what its name says, or lacks the column, or holds no text; or ``chat`` fails.
    """
    try:
        if not file.is_file() and file.exists():  # reading a pipe would wait for a writer
            raise UserError(f"{where}: {printable(file)} is not a file")
        if file.suffix == ".parquet":
            documents = _read_parquet(file, field, where, chat)
        elif file.suffix == ".jsonl":
            documents = _read_jsonl(file, field, where, chat)
        elif file.suffix == ".txt":
            documents = [file.read_text(encoding="utf-8-sig")]
            if "\0" in documents[0]:
                raise UserError(f"{where}: {file} is a binary file, not text (it has NUL bytes)")
        else:
            raise UserError(f"{where}: {file} is none of {', '.join(SUFFIXES)}")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: {file} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{where}: {file} cannot be read ({error.strerror or error})") from error
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise UserError(f"{where}: {file} holds no text")
    return documents


def _read_jsonl(file: Path, field: str, where: str, chat: Chat | None) -> list[str]:
    documents = []
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: {file}:{number} is not JSON ({getattr(error, 'msg', error)})") from error
            value = row.get(field) if isinstance(row, dict) else None
            if chat is not None and isinstance(value, list):
                value = chat(value, f"{where}: {file}:{number}")
            if not isinstance(value, str):
                columns = sorted(row) if isinstance(row, dict) else type(row).__name__
                raise UserError(
                    f"{where}: {file}:{number} has no text column {field!r} (it has {columns}); set the column's name by the "
                    f"override `text_field` beside the path"
                )
            if not _encodable(value):
                raise UserError(
                    f"{where}: {file}:{number} has half a surrogate pair (\\ud800 to \\udfff), which is no character"
                )
            documents.append(value)
    return documents


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(file: Path, field: str, where: str, chat: Chat | None) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.read_schema(file).names
        if field not in columns:
            raise UserError(f"{where}: {file} has no column {field!r} (it has {columns})")
        values = pyarrow.parquet.read_table(file, columns=[field])[field].to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{where}: {file} is not a readable parquet file ({str(error).splitlines()[0]})") from error
    if chat is not None:
        values = [
            chat(value, f"{where}: {file}, row {number}") if isinstance(value, list) else value
            for number, value in enumerate(values, start=1)
        ]
    if not all(value is None or isinstance(value, str) for value in values):
        raise UserError(f"{where}: column {field!r} of {file} is not text")
    return [value for value in values if value]


@contextmanager
def _reading(path: str | Path, where: str) -> Iterator[None]:
    """What the operating system refuses, as a user's error.

    Raises:
        UserError: names the path.
    """
    try:
        yield
    except OSError as error:
        refused = error.filename or path
        raise UserError(f"{where}: {printable(refused)} cannot be read ({error.strerror or error})") from error


def printable(path: str | Path) -> str:
    """A path for messages; bytes that are no UTF-8 as ``\\xe9``."""
    return os.fsencode(path).decode(errors="backslashreplace")


def text_files(path: str, *, where: str) -> list[Path]:
    """A file, or all jsonl, txt and parquet files below a directory, by their paths; maybe none.

    Raises:
        UserError: a directory cannot be read.
    """
    root = Path(path).expanduser()

    def refuse(error: OSError) -> None:
        raise error

    with _reading(path, where):
        if not _is_directory(root):
            return [root] if os.path.lexists(root) else []
        walk = os.walk(root, onerror=refuse)  # glob would leave out what it cannot read
        return sorted(Path(folder, name) for folder, _, names in walk for name in names if name.endswith(SUFFIXES))


def split_file(directory: Path, split: str, *, where: str) -> Path:
    """The one file of a split in a domain's directory.

    Raises:
        UserError: none, or more than one, or the directory cannot be read.
    """
    with _reading(directory, where):
        found = [directory / f"{split}{suffix}" for suffix in SUFFIXES if (directory / f"{split}{suffix}").is_file()]
    if len(found) != 1:
        what = "no" if not found else "more than one"
        raise UserError(f"{where}: {what} {split}.jsonl, {split}.txt or {split}.parquet in {directory}")
    return found[0]


def domain_directories(path: str, names: list[str] | None, *, where: str) -> dict[str, Path]:
    """{domain: directory} below ``path``, in the order of ``names``, or by name.

    Raises:
        UserError: no such directory, or one that cannot be read, or an unknown domain, or the files of a domain are misnamed.
    """
    root = Path(path).expanduser()
    option = f"{where}.path={path}"
    present = {}
    with _reading(path, f"{where}.path"):
        if not _is_directory(root):
            raise UserError(f"{option}: no such directory")
        for directory in sorted(root.iterdir()):
            if names is not None and directory.name not in names:
                continue
            if directory.is_symlink() and not directory.exists():
                raise UserError(f"{option}: {printable(directory)} is a link to nothing; mend it or take it away")
            if _is_directory(directory) and _is_domain(directory, option):
                present[directory.name] = directory
    if not present and names is None:
        raise UserError(f"{option}: no <domain>/train.jsonl|txt|parquet below it")
    unknown = sorted(set(names or []) - set(present))
    if unknown:
        raise UserError(f"{where}.domains: {unknown} not among {list(domain_directories(path, None, where=where))}")
    return {name: present[name] for name in (names or present)}


def _is_directory(path: Path) -> bool:
    """Whether there is a directory; unlike ``is_dir``, which says no, it raises OSError where that cannot be told."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _is_domain(directory: Path, option: str) -> bool:
    """Whether a directory has training text.

    Raises:
        UserError: it has, and cannot be a domain.
    """
    files = sorted(entry.name for entry in directory.iterdir())
    if not any(name.startswith("train.") for name in files):
        meant = [name for name in files if name.casefold() in [f"train{suffix}" for suffix in SUFFIXES]]
        if meant:
            raise UserError(f"{option}: {printable(directory / meant[0])} must be named {meant[0].casefold()}")
        return False
    try:
        directory.name.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{option}: the name of {printable(directory)} is not UTF-8; rename the folder, which names its domain"
        ) from error
    return True


def passed_over(path: str) -> list[str]:
    """Names of the directories below ``path`` that are no domain: they have no training text."""
    root = Path(path).expanduser()
    domains = domain_directories(path, None, where="calibration_domains")
    found = (entry.name for entry in sorted(root.iterdir()) if _is_directory(entry) and not entry.name.startswith("."))
    return [printable(name) for name in found if name not in domains]
