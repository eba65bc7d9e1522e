"""Shapes of a dense model without its weights, and without torch: from a directory, the cache, or the preset.

Only the parameters' arithmetic is here; :mod:`dive.model.families` has the modules.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from dive.config import ArchitectureConfig, ModelConfig
from dive.errors import UserError

EMBEDDED = Path(__file__).resolve().parent / "tiny"
"""Directory of the model that comes with the package."""

SUPPORTED = ("llama", "mistral", "qwen3")
"""``model_type`` of the dense models that can be turned into a Mixture-of-Experts."""


def locate_architecture(model: ModelConfig) -> ArchitectureConfig:
    """Figures of the configured model: of its directory's or the cache's config.json, else of ``model.architecture``.

    Never asks the hub.

    Raises:
        UserError: neither is there, config.json cannot be read or lacks a figure, the two differ, or the family is unknown.
    """
    found = _config_file(model)
    if found is None:
        if model.architecture is None:
            raise UserError(
                f"model.path={model.path} is not here, so its figures are unknown: set model.architecture (as conf/model/*.yaml "
                "do), or model.path to a directory"
            )
        check_family(model.architecture.model_type, model.path)
        return model.architecture
    try:
        settings = json.loads(found.read_text(encoding="utf-8"))
        check_family(str(settings.get("model_type")), model.path)
        architecture = read_architecture(settings)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"model.path={model.path}: config.json cannot be read ({error})") from error
    except KeyError as error:
        raise UserError(f"model.path={model.path}: config.json lacks {error}") from error
    check_architecture(model, architecture)
    return architecture


def unsupported(path: str, family: object) -> str:
    """What is said of a model of another ``model_type``."""
    return f"model.path={path}: model_type {family!r} is not supported; choose one of {', '.join(SUPPORTED)}"


def check_family(model_type: str, path: str) -> None:
    """Raise :class:`UserError` if the model at ``path`` has no Mixture-of-Experts twin among the stock classes."""
    if model_type not in SUPPORTED:
        raise UserError(unsupported(path, model_type))


def _config_file(model: ModelConfig) -> Path | None:
    directory = EMBEDDED if model.path == "embedded" else Path(model.path).expanduser()
    if directory.is_dir():
        return directory / "config.json"
    if directory.is_absolute() or model.path.startswith((".", "~")) or model.path.count("/") != 1:
        raise UserError(f"model.path={model.path}: no such directory")
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model.path, "config.json", revision=model.revision)
    return Path(cached) if isinstance(cached, str) else None


def read_architecture(settings: dict[str, Any]) -> ArchitectureConfig:
    """Figures of a config.json; what older ones leave out has the value that transformers gives it.

    Raises:
        KeyError: a figure is missing.
    """
    heads = int(settings["num_attention_heads"])
    hidden = int(settings["hidden_size"])
    defaults = {
        "num_key_value_heads": heads,
        "head_dim": 128 if settings["model_type"] == "qwen3" else hidden // heads,
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


def head_norms(architecture: ArchitectureConfig) -> int:
    """Weights of one layer's norms on query and key heads, which Qwen3 has."""
    return 2 * architecture.head_dim if architecture.model_type == "qwen3" else 0
