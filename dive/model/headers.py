"""What the weight files of a model hold, from their headers alone: the name, shape and element type of every tensor.

No weight is read, and torch is not imported.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dive.errors import UserError, one_line

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

FLOATING = ("F64", "F32", "F16", "BF16")
"""Element types that are read, as safetensors names them."""
DEQUANTISE = "de-quantise them first: save the model in bfloat16 with the library that quantised it"
"""What to do about quantised weights."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor on disk."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it: ``F32``, ``BF16``, ``I8``, ..."""


def weight_files(directory: Path, named: str) -> list[Path]:
    """The files that transformers reads weights from: the single one, or those of the index; none where neither is there.

    Args:
        named: what to begin errors with: ``model.path=DIR``.

    Raises:
        UserError: the index cannot be read.
    """
    single, index = directory / WEIGHTS, directory / INDEX
    if single.is_file():
        return [single]
    return [directory / name for name in indexed_files(index, named)] if index.is_file() else []


def indexed_files(index: Path, named: str) -> list[str]:
    """Names of the files that an index lists.

    Raises:
        UserError: it cannot be read.
    """
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if not all(isinstance(name, str) for name in names):
            raise TypeError("weight_map does not name files")
        return sorted(names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{named}: {index.name} cannot be read ({one_line(error)})") from error


def read_headers(files: Iterable[Path], named: str) -> dict[str, Stored]:
    """{name: tensor} of all files.

    Raises:
        UserError: a file is missing, truncated or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    found = {}
    for file in files:
        try:
            with safe_open(file, framework="np") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - no mapping
                    part = tensors.get_slice(name)
                    found[name] = Stored(file, tuple(part.get_shape()), part.get_dtype())
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{named}: {file.name} cannot be read or is truncated ({one_line(error)}); copy or fetch it again"
            ) from error
    return found


def check_types(stored: Mapping[str, Stored], named: str) -> None:
    """Refuse weights of integers or of eight bits: read as they are they would be numbers of another scale.

    Raises:
        UserError: a weight has such an element type.
    """
    other = sorted(name for name, t in stored.items() if name.endswith(".weight") and t.dtype not in FLOATING)
    if other:
        raise UserError(
            f"{named}: {len(other)} tensors have an element type that is not read (first: {other[0]}, {stored[other[0]].dtype}); "
            f"{DEQUANTISE}"
        )


def check_layers(stored: Mapping[str, Stored], layers: int, named: str, *, place: str) -> None:
    """Refuse weights of more or fewer decoder layers than the configuration says.

    Args:
        place: of the layers in the model.

    Raises:
        UserError: the two differ.
    """
    numbers = [re.match(rf"{re.escape(place)}\.([0-9]{{1,9}})\.", name) for name in stored]
    found = max((int(number[1]) + 1 for number in numbers if number), default=layers)
    if found != layers:
        raise UserError(
            f"{named}: config.json has num_hidden_layers={layers}, the weights have {found} layers; put the config.json of "
            "these weights there"
        )


def check_tensors(
    stored: Mapping[str, Stored], wanted: Mapping[str, tuple[int, ...]], *, spare: tuple[str, ...], named: str
) -> None:
    """Refuse weights that are not all of a model's, and nothing but a model's.

    Args:
        wanted: {name: shape} of the model's parameters.
        spare: see :meth:`dive.model.families.twin.Twin.spare`.

    Raises:
        UserError: a tensor is missing, of another shape or element type, or has no place in the model.
    """
    missing = sorted(wanted.keys() - stored.keys())
    other = sorted(name for name, shape in wanted.items() if name in stored and stored[name].shape != shape)
    if missing or other:
        raise UserError(
            f"{named}: {len(missing)} tensors missing, {len(other)} of another shape (first: {(missing + other)[0]})"
        )
    check_types(stored, named)
    refuse_unexpected(stored.keys() - wanted.keys(), spare, named)


def refuse_unexpected(names: Iterable[str], spare: tuple[str, ...], named: str) -> None:
    """Refuse tensors that the model has no place for, but those whose names end as ``spare`` says.

    Raises:
        UserError: there are any.
    """
    unexpected = sorted(name for name in names if not name.endswith(spare))
    if unexpected:
        raise UserError(
            f"{named}: the weights hold {len(unexpected)} tensors that the model of config.json has no place for (first: "
            f"{unexpected[0]}); put the config.json of these weights there, or take these tensors out"
        )
