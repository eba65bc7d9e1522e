"""Texts from files: jsonl, txt and parquet."""

import json
from pathlib import Path

from dive.errors import UserError

SUFFIXES = (".jsonl", ".txt", ".parquet")


def read_documents(file: Path, *, field: str, where: str) -> list[str]:
    """Documents of one file: a jsonl line or parquet row each; a txt file is one document.

    Args:
        file: .jsonl, .txt or .parquet.
        field: text column of jsonl and parquet.
        where: override to name in errors.

    Raises:
        UserError: the file cannot be read as what its name says, or lacks the column, or holds no text.
    """
    try:
        if file.suffix == ".parquet":
            documents = _read_parquet(file, field, where)
        elif file.suffix == ".jsonl":
            documents = _read_jsonl(file, field, where)
        elif file.suffix == ".txt":
            documents = [file.read_text(encoding="utf-8")]
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


def _read_jsonl(file: Path, field: str, where: str) -> list[str]:
    documents = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: {file}:{number} is not JSON ({getattr(error, 'msg', error)})") from error
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                columns = sorted(row) if isinstance(row, dict) else type(row).__name__
                raise UserError(
                    f"{where}: {file}:{number} has no text column {field!r} (it has {columns}); set the column's name by the "
                    f"override `text_field` beside the path"
                )
            if not _encodable(row[field]):
                raise UserError(
                    f"{where}: {file}:{number} has half a surrogate pair (\\ud800 to \\udfff), which is no character"
                )
            documents.append(row[field])
    return documents


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(file: Path, field: str, where: str) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.read_schema(file).names
        if field not in columns:
            raise UserError(f"{where}: {file} has no column {field!r} (it has {columns})")
        values = pyarrow.parquet.read_table(file, columns=[field])[field].to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{where}: {file} is not a readable parquet file ({str(error).splitlines()[0]})") from error
    if not all(value is None or isinstance(value, str) for value in values):
        raise UserError(f"{where}: column {field!r} of {file} is not text")
    return [value for value in values if value]


def split_file(directory: Path, split: str, *, where: str) -> Path:
    """The one file of a split in a domain's directory.

    Raises:
        UserError: none, or more than one.
    """
    found = [directory / f"{split}{suffix}" for suffix in SUFFIXES if (directory / f"{split}{suffix}").is_file()]
    if len(found) != 1:
        what = "no" if not found else "more than one"
        raise UserError(f"{where}: {what} {split}.jsonl, {split}.txt or {split}.parquet in {directory}")
    return found[0]


def domain_directories(path: str, names: list[str] | None, *, where: str) -> dict[str, Path]:
    """{domain: directory} below ``path``, in the order of ``names``, or by name.

    Raises:
        UserError: no such directory, or an unknown domain.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UserError(f"{where}.path={path}: no such directory")
    present = {d.name: d for d in sorted(root.iterdir()) if d.is_dir() and any(d.glob("train.*"))}
    if not present:
        raise UserError(f"{where}.path={path}: no <domain>/train.jsonl|txt|parquet below it")
    unknown = sorted(set(names or []) - set(present))
    if unknown:
        raise UserError(f"{where}.domains: {unknown} not among {list(present)}")
    return {name: present[name] for name in (names or present)}
