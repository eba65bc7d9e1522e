"""Texts of data sets on the hub, read through ``datasets`` and put into words by a template.

Without network a data set is taken from the cache: from the files that ``hf download`` left there, else from
what an earlier run of ``datasets`` prepared.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from string import Formatter
from typing import Any, Literal

from dive.config import HubTextConfig
from dive.connection import hub_answers
from dive.errors import UserError
from dive.model.chat import Chat

# --------------------------------------------------------------------------------------------------- template


@dataclass(frozen=True, slots=True)
class Field:
    """One field in braces: ``{columns[key][key]:separator}``."""

    written: str
    """The field as the template has it, for messages."""
    columns: tuple[str, ...]
    keys: tuple[str, ...]
    separator: str | None


FIELD = re.compile(r"(?P<columns>[^\[\]{}]+)(?P<keys>(?:\[[^\[\]{}]+\])*)")
COUNTED = re.compile(r"(?P<column>.+)-(?P<first>\d+)")


def render(
    template: str, row: Mapping[str, object], *, where: str = "template", chat: Chat | None = None
) -> str | None:
    """Put a row into words; :attr:`HubTextConfig.template` documents the syntax.

    Args:
        chat: what makes a document of a list of messages that is all there is in the template.

    Returns:
        None if the row lacks one of the values: null, an empty list, a position past it, a hidden answer.

    Raises:
        UserError: the template is malformed, or does not fit the row; ``where`` names its override. Or ``chat`` fails.
    """
    parts: list[str] = []
    pieces = _parse(template, where)
    for literal, entry in pieces:
        parts.append(literal)
        if entry is None:
            continue
        value = _look_up(entry, row, where)
        if chat is not None and isinstance(value, list) and value and isinstance(value[0], Mapping):
            if (literal, len(pieces)) != ("", 1):
                raise UserError(
                    f"{where}: {entry.written} is a conversation, and has to be all there is in the template"
                )
            return chat(value, f"{where}: {entry.written}")
        text = _words(value, entry, where)
        if text is None:
            return None
        parts.append(text)
    return "".join(parts)


@lru_cache(maxsize=256)
def _parse(template: str, where: str) -> tuple[tuple[str, Field | None], ...]:
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"{where}: {template!r} is malformed: {error}") from error
    pieces: list[tuple[str, Field | None]] = []
    for literal, name, spec, conversion in parsed:
        if name is None:
            pieces.append((literal, None))
            continue
        match = FIELD.fullmatch(name)
        columns = tuple(match["columns"].split("|")) if match else ()
        keys = tuple(re.findall(r"\[([^\[\]]+)\]", match["keys"])) if match else ()
        if conversion is not None or not all(columns) or not columns or (len(columns) > 1 and not keys):
            raise UserError(f"{where}: the field {{{name}}} is none of {{column}}, {{column[key]}} and {{a|b[key]}}")
        pieces.append((literal, Field(f"{{{name}}}", columns, keys, spec or None)))
    return tuple(pieces)


def _column(name: str, row: Mapping[str, object], entry: Field, where: str) -> object:
    if name not in row:
        raise UserError(f"{where}: {entry.written} needs a column {name!r}; the columns are {', '.join(row)}")
    return row[name]


def _look_up(entry: Field, row: Mapping[str, object], where: str) -> object:
    """The value a field stands for; None if the row lacks it."""
    columns = [_column(name, row, entry, where) for name in entry.columns]
    value: object = columns if len(columns) > 1 else columns[0]
    for key in entry.keys:
        if value is None:
            return None
        if isinstance(value, Mapping):
            if key not in value:
                raise UserError(f"{where}: {entry.written} needs a key {key!r}; the keys are {', '.join(value)}")
            value = value[key]
        elif isinstance(value, list | tuple):
            position = _position(key, row, entry, where)
            # A negative one is how data sets hide an answer; Python would count it from the end.
            value = value[position] if position is not None and 0 <= position < len(value) else None
        else:
            raise UserError(f"{where}: {entry.written} reaches inside a {type(value).__name__}")
    return value


def _position(key: str, row: Mapping[str, object], entry: Field, where: str) -> int | None:
    """Position in a list, counted from 0, that a key in brackets stands for; None if the row hides it."""
    if key.isdecimal():
        return int(key)
    first = 0
    match = COUNTED.fullmatch(key)
    if match and key not in row:
        key, first = match["column"], int(match["first"])
    held = _column(key, row, entry, where)
    if held is None or held == "":
        return None
    if isinstance(held, int):
        return held - first
    text = str(held).strip()
    if re.fullmatch(r"-?\d+", text):
        return int(text) - first
    if re.fullmatch(r"[A-Za-z]", text):
        return ord(text.upper()) - ord("A")
    raise UserError(f"{where}: {entry.written} needs a position, but {key} holds {held!r}")


def _words(value: object, entry: Field, where: str) -> str | None:
    """A field's value as text; None if there is none."""
    if isinstance(value, list | tuple):
        return _joined(value, " " if entry.separator is None else entry.separator, entry, where) or None
    if isinstance(value, Mapping):
        raise UserError(f"{where}: {entry.written} is a structure; choose a key of {', '.join(value)}")
    if entry.separator is not None:
        raise UserError(f"{where}: {entry.written} is not a list, so it takes no separator after a colon")
    return None if value is None else str(value)


def _joined(value: object, separator: str, entry: Field, where: str) -> str:
    """The texts of a list, and of the lists in it, joined."""
    if isinstance(value, list | tuple):
        return separator.join(text for item in value if (text := _joined(item, separator, entry, where)))
    if isinstance(value, Mapping):
        raise UserError(f"{where}: {entry.written} is a list of structures, which has no text")
    return "" if value is None else str(value)


# ---------------------------------------------------------------------------------------------------- reading


def hub_texts(
    source: HubTextConfig,
    split: Literal["train", "test"],
    *,
    where: str,
    seed: int | None = None,
    shuffle_buffer: int = 10_000,
    keep_empty: bool = False,
    chat: Chat | None = None,
) -> Iterator[str]:
    """Texts of one data set, one a row; it is opened at once, and its rows are read as they are asked for.

    Args:
        source: the data set.
        split: which of the source's two splits, not its name.
        where: the override that set ``source``, for messages: ``calibration_domains.hub.gsm8k``.
        seed: of a random order; the data set's own order if None. Neighbouring rows often share a passage.
        shuffle_buffer: rows held to shuffle a stream.
        keep_empty: whether empty texts count, as in WikiText's blank lines; otherwise they are left out.
        chat: of :func:`render`.

    Raises:
        UserError: the data set cannot be found or read, or its rows do not fit the template.
    """
    rows = _open(source, split, where)
    if seed is not None:
        # In memory: otherwise the order is written beside the data set, and a shared cache may be read-only.
        rows = (
            rows.shuffle(seed=seed, buffer_size=shuffle_buffer)
            if source.streaming
            else rows.shuffle(seed=seed, keep_in_memory=True)
        )
    return _texts(rows, source, split, where, keep_empty, chat)


def _texts(
    rows: Any, source: HubTextConfig, split: str, where: str, keep_empty: bool, chat: Chat | None
) -> Iterator[str]:
    count = 0
    for row in rows:
        text = render(source.template, row, where=f"{where}.template", chat=chat)
        if text is not None and (keep_empty or text.strip()):
            count += 1
            yield text
    if count == 0:
        raise UserError(
            f"{where}: no row of {source.path!r}, split {getattr(source, split)!r}, has all that "
            f"{where}.template asks for; change the template, or choose another split with {where}.{split}"
        )


def _open(source: HubTextConfig, split: Literal["train", "test"], where: str) -> Any:
    """The rows of a split: a ``Dataset``, or an ``IterableDataset`` if streaming."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    name = source.train if split == "train" else source.test
    if name is None:
        raise UserError(f"{where}.test is null: no test text; set it to one of the splits of {source.path!r}")
    files = source.data_files if split == "train" else source.test_data_files

    def load(path: str, revision: str | None) -> Any:
        return load_dataset(
            path,
            name=source.config,
            revision=revision,
            # A slice such as train[:100] is not part of the split's name.
            data_files={re.split(r"[\[+]", name)[0]: files} if files else None,
            split=name,
            streaming=source.streaming,
            # With some of the files only, the sizes on record do not match.
            verification_mode="no_checks" if files else None,
        )

    try:
        if Path(source.path).expanduser().is_dir():
            return load(str(Path(source.path).expanduser()), None)
        if hub_answers():
            return load(source.path, source.revision)
        return _cached(source, files, load, where)
    except DatasetNotFoundError as error:
        raise UserError(f"{where}: {_line(error)} Check {where}.path and {where}.revision.") from error
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise UserError(
            f"{where}: {source.path!r} needs a loading script, which datasets no longer runs; "
            f"try {where}.revision=refs/convert/parquet"
        ) from error
    except ValueError as error:  # mostly an unknown configuration or split
        text = _line(error).lower()
        key = f".{split}" if "split" in text else ".config" if "config" in text else ""
        raise UserError(f"{where}{key}: {source.path!r} cannot be opened: {_line(error)}") from error
    except (OSError, DatasetsError, _http_error(HfHubHTTPError)) as error:
        raise UserError(f"{where}: {source.path!r} cannot be read: {_line(error)}") from error


def _cached(source: HubTextConfig, files: str | None, load: Callable[[str, str | None], Any], where: str) -> Any:
    """The data set without network."""
    import datasets
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError

    # load_dataset does not look at what `hf download` fetched unless it is given as a directory.
    try:
        snapshot = snapshot_download(
            source.path,
            repo_type="dataset",
            revision=source.revision,
            local_files_only=True,
            allow_patterns=files,
        )
        return load(snapshot, None)
    except (FileNotFoundError, HFValidationError):
        pass
    offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True  # or load_dataset asks the hub again and again
    try:
        return load(source.path, source.revision)
    except (ConnectionError, FileNotFoundError) as error:
        command = ["hf download --repo-type dataset", source.path, *([files] if files else [])]
        command += ["--revision", source.revision] if source.revision else []
        raise UserError(
            f"{where}: data set {source.path!r} is neither a directory nor in the cache "
            f"{constants.HF_HUB_CACHE}, and {constants.ENDPOINT} cannot be reached; where there is network, "
            f"run `{' '.join(command)}`, then copy its cache here and set HF_HOME to it"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _http_error(error: type[Exception]) -> type[Exception]:
    """The base class of the errors of whichever HTTP library ``huggingface_hub`` is built on."""
    return next(base for base in error.__mro__ if base.__name__ == "HTTPError")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
