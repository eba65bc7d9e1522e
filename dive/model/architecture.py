"""Shapes of a dense model without its weights, and without torch: from a directory, the cache, or the preset."""

import json
import os
import reprlib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from dive.config import ArchitectureConfig, ModelConfig
from dive.errors import UserError, one_line
from dive.model.families import check_family, twin_of
from dive.model.gguf import read_gguf
from dive.model.headers import DEQUANTISE

EMBEDDED = Path(__file__).resolve().parent / "tiny"
"""Directory of the model that comes with the package."""
GGUF = ".gguf"
"""How files of llama.cpp's format are named."""

FIGURES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
"""Figures of a config.json that are whole numbers and never null."""
MOST = 10_000
"""Layers, or labels; more are a slip, and transformers would count them out for hours."""
DTYPES = ("float32", "bfloat16", "float16", "float64")
"""Element types that a config.json may name."""


def locate_architecture(model: ModelConfig) -> ArchitectureConfig:
    """Figures of the configured model: of its directory or GGUF file, of ``model.architecture``, or of the cache's config.json.

    Never asks the hub.

    Raises:
        UserError: neither is there, config.json cannot be read or lacks a figure, the two differ, or the family is unknown.
    """
    found = _local_or_cached(model)
    if found is None:
        if model.architecture is None:
            raise UserError(
                f"model.path={model.path} is not here, so its figures are unknown: `hf download {model.path} config.json` "
                "fetches them; or set model.architecture (as conf/model/*.yaml do), or model.path to a directory"
            )
        check_family(model.architecture.model_type, model.path)
        return model.architecture
    named = f"model.path={model.path}"
    settings = read_settings(found, named)
    check_family(str(settings.get("model_type")), model.path)
    check_figures(settings, named)
    try:
        architecture = read_architecture(settings)
    except KeyError as error:
        raise UserError(f"{named}: config.json lacks {error}") from error
    check_architecture(model, architecture)
    return architecture


def local_model(path: str, where: str = "model.path") -> Path | None:
    """The directory or GGUF file that names a model, or none where it is a hub id.

    Imports nothing heavy: a command calls it first, so that a slip of the pen is said at once.

    Args:
        path: ``embedded``, a directory, a GGUF file, or a hub id.
        where: override to name in errors.

    Raises:
        UserError: it is meant as a directory or file, and there is none, or it cannot be read, or holds no config.json.
    """
    if path == "embedded":
        return EMBEDDED
    try:
        directory = Path(path).expanduser()
        if directory.is_dir():
            os.listdir(directory)  # raises where it cannot be read
            if not (directory / "config.json").is_file():
                raise UserError(f"{where}={path}: no config.json in this directory{name_a_gguf(directory, where)}")
            return directory
        if directory.is_file() and directory.suffix == GGUF:
            return directory
    except OSError as error:
        raise UserError(
            f"{where}={path} cannot be read ({error.strerror}); make it readable, or choose another directory by {where}=DIR"
        ) from error
    except RuntimeError as error:  # ~nobody
        raise UserError(f"{where}={path}: no such directory ({error})") from error
    if directory.suffix == GGUF:
        raise UserError(f"{where}={path}: no such file")
    if directory.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
        raise UserError(f"{where}={path}: no such directory")
    return None


def name_a_gguf(directory: Path, where: str) -> str:
    """What is added to the error of a directory that is no model, but holds GGUF files."""
    files = sorted(directory.glob(f"*{GGUF}"))
    return f"; one of the GGUF files there is chosen by {where}={files[0]}" if files else ""


def read_settings(place: Path, named: str) -> dict[str, Any]:
    """What a directory's config.json holds, or would hold of a GGUF file.

    Args:
        named: what to begin errors with: ``model.path=DIR``.

    Raises:
        UserError: it cannot be read, is no JSON object, or is of quantised weights.
    """
    if place.is_file():
        return dict(read_gguf(place, named).settings)
    try:
        found = json.loads((place / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{named}: config.json cannot be read ({one_line(error)})") from error
    if not isinstance(found, dict):
        raise UserError(f"{named}: config.json cannot be read (it is no JSON object but a {type(found).__name__})")
    refuse_quantised(found.get("quantization_config"), named)
    return found


def refuse_quantised(settings: object, named: str) -> None:
    """Raise :class:`UserError` if a model has a ``quantization_config``."""
    if settings is not None:
        raise UserError(
            f"{named}: quantised weights (quantization_config in config.json) are not read; {DEQUANTISE}, and leave "
            "quantization_config out"
        )


def check_figures(settings: Mapping[str, Any], named: str) -> None:
    """Refuse a config.json whose figures no model can have; figures that it lacks are let pass.

    Of the supported families and their twins, which name them alike.

    Args:
        settings: of config.json, of whatever types.
        named: what to begin errors with: ``model.path=DIR``.

    Raises:
        UserError: a figure is of another type, out of range, or contradicts another.
    """

    def refuse(name: str, wanted: str) -> NoReturn:
        raise UserError(f"{named}: {name} in config.json is {reprlib.repr(settings[name])}, not {wanted}")

    optional = ("num_key_value_heads", "head_dim", "sliding_window")
    for name in (*FIGURES, *optional):
        value = settings.get(name, 1)
        if (
            name == "sliding_window" and value == 0
        ):  # what transformers writes of a class that may have one and has none
            continue
        if not (isinstance(value, int) and not isinstance(value, bool) and value >= 1) and (
            name not in optional or value is not None
        ):
            refuse(name, "a whole number of at least 1")
    for name in ("num_hidden_layers", "num_labels"):
        if isinstance(value := settings.get(name), int) and value > MOST:
            refuse(name, f"at most {MOST}")
    if settings.get("per_layer_config") is not None:
        refuse("per_layer_config", "null: layers of several shapes are not supported")
    for name in ("rms_norm_eps", "attention_dropout"):
        value = settings.get(name, 0)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
            refuse(name, "a number in [0, 1)")
    for name in ("dtype", "torch_dtype"):
        if settings.get(name) is not None and str(settings[name]).removeprefix("torch.") not in DTYPES:
            refuse(name, f"one of {', '.join(DTYPES)}")
    if not isinstance(settings.get("tie_word_embeddings", False), bool | None):
        refuse("tie_word_embeddings", "true or false")
    heads, hidden = settings.get("num_attention_heads"), settings.get("hidden_size")
    if heads is None or hidden is None:
        return
    if heads % (settings.get("num_key_value_heads") or heads):
        refuse("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    if hidden % heads:  # transformers demands it even where head_dim is given
        refuse("hidden_size", f"a multiple of num_attention_heads ({heads})")
    if (settings.get("head_dim") or hidden // heads) % 2:
        refuse("head_dim" if settings.get("head_dim") else "hidden_size", "of an even number of channels for each head")


def _local_or_cached(model: ModelConfig) -> Path | None:
    place = local_model(model.path)
    if place is not None or model.architecture is not None:
        return place  # model.architecture is checked against the model's own once that is loaded
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model.path, "config.json", revision=model.revision)
    return Path(cached).parent if isinstance(cached, str) else None


def read_architecture(settings: dict[str, Any]) -> ArchitectureConfig:
    """Figures of a config.json; what older ones leave out has the value that transformers gives it.

    Raises:
        KeyError: a figure is missing.
    """
    heads = int(settings["num_attention_heads"])
    hidden = int(settings["hidden_size"])
    defaults = {
        "num_key_value_heads": heads,
        "head_dim": twin_of(settings["model_type"]).head_dim or hidden // heads,
        "tie_word_embeddings": False,
        "dtype": settings.get("torch_dtype") or "float32",
    }
    values: dict[str, Any] = {}
    for field in fields(ArchitectureConfig):
        value = settings.get(field.name)
        values[field.name] = value if value is not None else defaults.get(field.name)
        if values[field.name] is None:
            raise KeyError(field.name)
    values["dtype"] = str(values["dtype"]).removeprefix("torch.")
    return ArchitectureConfig(**values)


def check_architecture(model: ModelConfig, found: ArchitectureConfig) -> None:
    """Refuse a ``model.architecture`` that is another model's.

    Raises:
        UserError: a figure differs from the model's own.
    """
    if model.architecture is None:
        return
    for field in fields(ArchitectureConfig):
        stated, real = getattr(model.architecture, field.name), getattr(found, field.name)
        if field.name != "dtype" and stated != real:  # checkpoints are converted, their shapes are not
            raise UserError(
                f"model.architecture.{field.name} ({stated}) differs from {real} in config.json of {model.path}; set "
                f"model.architecture.{field.name}={real}, or model.architecture=null"
            )
