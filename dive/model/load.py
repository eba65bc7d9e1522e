"""Loading dense models from the package, a directory or the hub."""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dive.connection import hub_answers
from dive.errors import UserError
from dive.model.architecture import EMBEDDED, SUPPORTED, unsupported
from dive.model.families import check_supported

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DenseSource:
    """A dense model that was found, its configuration read, its weights not yet loaded."""

    path: str
    """Directory or hub id."""
    revision: str | None
    config: "PretrainedConfig"
    fingerprint: str
    """SHA-256 of the configuration, tokenizer and weight files, or the hub's commit hash."""
    dtype: str
    """Element type the weights will be loaded in, or ``auto``."""
    offline: bool
    """Whether the hub is left alone: a directory, or no network."""
    where: str = "model.path"
    """Override that named it, for messages."""

    @property
    def channels(self) -> int:
        """F, channels of each FFN."""
        return int(self.config.intermediate_size)


def locate_dense(
    path: str,
    revision: str | None = None,
    *,
    dtype: str = "auto",
    where: str = "model.path",
    any_family: bool = False,
) -> DenseSource:
    """Find a dense model and read its configuration, without its weights.

    Args:
        path: ``embedded``, a directory, or a hub id.
        revision: commit, branch or tag on the hub.
        dtype: recorded for the weights' loading.
        where: override to name in errors.
        any_family: accept models that cannot become a Mixture-of-Experts, or are one, as well.

    Raises:
        UserError: nothing there, an unreadable configuration, an unsupported family, pickled weights only.
    """
    from transformers import AutoConfig

    location = str(EMBEDDED) if path == "embedded" else path
    directory = Path(location).expanduser()
    is_local = directory.is_dir()
    if not is_local and (directory.is_absolute() or location.startswith((".", "~")) or location.count("/") != 1):
        raise UserError(f"{where}={path}: no such directory")
    if is_local:
        _check_directory(directory, f"{where}={path}")
        location = str(directory)
    offline = not is_local and not hub_answers()
    try:
        config = AutoConfig.from_pretrained(
            location, revision=revision, local_files_only=offline, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        if is_local:
            family = _model_type(directory)
            if family not in (None, *SUPPORTED) and not any_family:
                raise UserError(unsupported(path, family)) from error
            raise UserError(f"{where}={path}: config.json cannot be read ({_first_line(error)})") from error
        if offline:
            raise UserError(_not_cached(path, revision, where)) from error
        raise UserError(
            f"{where}={path}: the hub does not give it out ({_first_line(error)}); check it and its revision, and "
            "accept its licence there if it has one (then `hf auth login`)"
        ) from error
    if not any_family:
        check_supported(config, path)
    if is_local:
        try:
            fingerprint = fingerprint_directory(directory)
        except OSError as error:
            raise UserError(f"{where}={path}: {error.filename} cannot be read ({error.strerror})") from error
    else:
        fingerprint = f"{path}@{getattr(config, '_commit_hash', None) or revision}"
    return DenseSource(location, revision, config, fingerprint, dtype, is_local or offline, where)


def _model_type(directory: Path) -> str | None:
    try:
        settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(settings["model_type"]) if isinstance(settings, dict) and "model_type" in settings else None


def _check_directory(directory: Path, named: str) -> None:
    if not (directory / "config.json").is_file():
        raise UserError(f"{named}: no config.json in this directory")
    shards = sorted(directory.glob("*.safetensors"))
    if not shards:
        if any(directory.glob("*.bin")):
            raise UserError(
                f"{named}: only pickled weights (.bin), which are not read; convert them into a directory NEW by: python -c "
                f"\"from transformers import *; m = AutoModelForCausalLM.from_pretrained('{directory}', dtype='auto'); "
                f"m.save_pretrained('NEW'); AutoTokenizer.from_pretrained('{directory}').save_pretrained('NEW')\""
            )
        raise UserError(f"{named}: no weights: a *.safetensors file is missing")
    _check_shards(directory, shards, named)


def _check_shards(directory: Path, shards: Sequence[Path], named: str) -> None:
    """Read the header of every shard: it says how long the file must be."""
    from safetensors import SafetensorError, safe_open

    for file in shards:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{named}: {file.name} cannot be read or is truncated ({_first_line(error)}); copy or fetch it again"
            ) from error
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{named}: {index.name} cannot be read ({_first_line(error)})") from error
        missing = sorted(listed - {file.name for file in shards})
        if missing:
            raise UserError(f"{named}: {len(missing)} shards that {index.name} lists are missing (first: {missing[0]})")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _not_cached(path: str, revision: str | None, where: str) -> str:
    at = f" --revision {revision}" if revision else ""
    instead = "choose model=local model.path=DIR" if where == "model.path" else f"set {where}=DIR"
    return (
        f"{where}={path} is not in the Hugging Face cache and the hub does not answer; where there is network, fetch it "
        f"with `hf download {path}{at}`, or {instead}"
    )


def fingerprint_directory(directory: Path) -> str:
    """SHA-256 over names and bytes of the files that define a model."""
    digest = hashlib.sha256()
    for file in sorted(directory.iterdir()):
        if file.suffix in (".safetensors", ".json", ".model") and file.name != "recipe.json":
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def load_tokenizer(source: DenseSource) -> "PreTrainedTokenizerBase":
    """The tokenizer beside the weights.

    Raises:
        UserError: no tokenizer, or one with more tokens than the model has embeddings.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.path, revision=source.revision, local_files_only=source.offline, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{source.where}={source.path}: no tokenizer there ({_first_line(error)})") from error
    highest = max(len(tokenizer) - 1, *tokenizer.get_vocab().values())  # ids may have gaps
    if highest >= source.config.vocab_size:
        raise UserError(
            f"{source.where}={source.path}: its tokenizer has token ids up to {highest}, its config.json vocab_size="
            f"{source.config.vocab_size}; the two are not of one model: put the model's own tokenizer there"
        )
    return tokenizer


def load_weights(source: DenseSource, *, dtype: torch.dtype | str, device: torch.device) -> "PreTrainedModel":
    """The dense model in evaluation mode, its weights frozen.

    Raises:
        UserError: weights missing, truncated, or of other shapes than the configuration says.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    log.info("loading %s", source.path)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source.path,
            revision=source.revision,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below
            output_loading_info=True,
            local_files_only=source.offline,
            trust_remote_code=False,
        )
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{source.where}={source.path}: the weights cannot be read ({_first_line(error)})") from error
    missing = sorted(report["missing_keys"])
    if missing or report["mismatched_keys"]:
        raise UserError(
            f"{source.where}={source.path}: {len(missing)} tensors missing, {len(report['mismatched_keys'])} of another shape "
            f"(first: {(missing + sorted(map(str, report['mismatched_keys'])))[0]})"
        )
    return model.to(device).eval().requires_grad_(False)


def resolve_device(name: str) -> torch.device:
    """``auto`` is this process's CUDA device (by its local rank) if there is one.

    Raises:
        UserError: the device does not exist.
    """
    if name == "auto":
        local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
        return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"model.device={name} is not to be had here ({_first_line(error)})") from error


def load_dense(
    path: str = "embedded",
    *,
    revision: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    device: str = "auto",
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load a dense model and its tokenizer.

    Args:
        path: a directory, a hub id, or ``embedded`` for the model that comes with the package.
        revision: commit, branch or tag on the hub.
        dtype: of the weights, or ``auto`` for the checkpoint's own.
        device: ``auto``, ``cpu``, ``cuda``, ...

    Raises:
        UserError: it cannot be found, read or turned into a Mixture-of-Experts.
    """
    source = locate_dense(path, revision)
    tokenizer = load_tokenizer(source)
    return load_weights(source, dtype=dtype, device=resolve_device(device)), tokenizer


def document_tokens(tokenizer: Any, document: str) -> list[int]:
    """Tokens of one document as language models are trained on it: a boundary token, then the text.

    The boundary is the tokenizer's BOS token, or its EOS token where there is no BOS (Qwen), or nothing.
    """
    boundary = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids: list[int] = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    return ids if boundary is None else [boundary, *ids]
