"""Loading dense models from the package, a directory, a GGUF file or the hub."""

import copy
import hashlib
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dive.connection import hub_answers
from dive.errors import UserError, one_line
from dive.model.architecture import (
    check_figures,
    local_model,
    name_a_gguf,
    read_settings,
    refuse_quantised,
)
from dive.model.chat import Conversation
from dive.model.families import KNOWN, SUPPORTED, check_supported, twin_of, unsupported
from dive.model.gguf import Gguf, dequantise, read_gguf
from dive.model.headers import (
    INDEX,
    WEIGHTS,
    Stored,
    check_layers,
    check_tensors,
    check_types,
    indexed_files,
    read_headers,
    refuse_unexpected,
    weight_files,
)
from dive.store import HasStore, Store, WithStore

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DenseSource:
    """A dense model that was found, its configuration read, its weights not yet loaded."""

    path: str
    """Directory, hub id, or GGUF file."""
    revision: str | None
    config: "PretrainedConfig"
    fingerprint: str
    """SHA-256 of the configuration, tokenizer and weight files or of the GGUF file, or the hub's commit hash."""
    dtype: str
    """Element type the weights will be loaded in, or ``auto``."""
    offline: bool
    """Whether the hub is left alone: a directory, or no network."""
    where: str = "model.path"
    """Override that named it, for messages."""
    gguf: Gguf | None = None
    """The file, where it is one."""

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
        path: ``embedded``, a directory, a GGUF file, or a hub id.
        revision: commit, branch or tag on the hub.
        dtype: recorded for the weights' loading.
        where: override to name in errors.
        any_family: accept models that cannot become a Mixture-of-Experts, or are one, as well.

    Raises:
        UserError: nothing there, an unreadable configuration, an unsupported family, pickled weights only.
    """
    from transformers import AutoConfig

    named = f"{where}={path}"
    directory = local_model(path, where)
    location = path if directory is None else str(directory)
    offline = directory is None and not hub_answers()
    stored: dict[str, Stored] = {}
    gguf = read_gguf(directory, named) if directory is not None and directory.is_file() else None
    if directory is not None:
        settings = read_settings(directory, named) if gguf is None else dict(gguf.settings)
        family = settings.get("model_type")
        if family not in SUPPORTED and not any_family:
            raise UserError(unsupported(path, family))
        if family in KNOWN:
            check_figures(settings, named)
        stored = check_files(directory, named) if gguf is None else {}
    try:
        if gguf is not None:
            config = gguf.config(named)
        else:
            config = AutoConfig.from_pretrained(
                location, revision=revision, local_files_only=offline, trust_remote_code=False
            )
        if not any_family:
            check_supported(config, path)
    except UserError:
        raise
    except Exception as error:  # transformers and its validation raise types of many kinds, of hub files OSError
        if directory is not None or not isinstance(error, OSError):
            raise UserError(f"{named}: config.json cannot be read ({one_line(error)})") from error
        if offline:
            raise UserError(_not_cached(path, revision, where)) from error
        raise UserError(
            f"{named}: the hub does not give it out ({one_line(error)}); check it and its revision, and "
            "accept its licence there if it has one (then `hf auth login`)"
        ) from error
    refuse_quantised(getattr(config, "quantization_config", None), named)
    if config.model_type in KNOWN:
        check_figures(config.to_dict(), named)
        _check_model(config, stored, named)
    if gguf is not None:
        gguf.check(config, named)
        log.info("%s: %s; what its weights had beyond is lost", path, gguf.precision)
    if directory is None:
        fingerprint = f"{path}@{getattr(config, '_commit_hash', None) or revision}"
    else:
        try:
            fingerprint = fingerprint_directory(directory) if gguf is None else gguf.fingerprint()
        except OSError as error:
            raise UserError(f"{named}: {error.filename} cannot be read ({error.strerror})") from error
    return DenseSource(location, revision, config, fingerprint, dtype, directory is not None or offline, where, gguf)


def locate_quantised(directory: Path) -> DenseSource:
    """What :mod:`dive.quantise` wrote, its configuration read; engines load its weights, and nothing here does.

    Raises:
        UserError: an unreadable configuration.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and its validation raise types of many kinds
        raise UserError(f"checkpoint={directory}: config.json cannot be read ({one_line(error)})") from error
    return DenseSource(str(directory), None, config, "", "float32", True, "checkpoint")


def in_safetensors(source: DenseSource, run: HasStore) -> DenseSource:
    """The model as a directory or on the hub: a GGUF file is de-quantised into the store, once for each element type.

    Raises:
        UserError: the store takes it not, or the tokenizer in the file cannot be read.
    """
    if source.gguf is None:
        return source
    dtype = str(source.config.dtype).removeprefix("torch.") if source.dtype == "auto" else source.dtype
    made = dequantise(run, source.gguf, source.config, file=source.fingerprint, dtype=dtype)
    return replace(source, path=str(made.path))


def _check_model(config: "PretrainedConfig", stored: Mapping[str, Stored], named: str) -> None:
    """Build the model without memory, and compare it with the headers of its weights where they are at hand.

    Raises:
        UserError: there is no such model, or the weights are another's.
    """
    from transformers import AutoModelForCausalLM

    twin = twin_of(config.model_type)
    if stored:
        check_layers(stored, config.num_hidden_layers, named, place=twin.layers)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    except Exception as error:
        raise UserError(f"{named}: config.json describes no model that can be built ({one_line(error)})") from error
    # A twin's experts have other names on disk. Files of a bare decoder lack the prefix, which loading adds.
    if config.model_type in SUPPORTED and any(name.startswith(twin.layers) for name in stored):
        wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}  # tied heads stand once
        check_tensors(stored, wanted, spare=twin.spare(tied=config.tie_word_embeddings), named=named)
    try:
        if not 0 < (config.rope_parameters or {}).get("partial_rotary_factor", 1) <= 1:
            raise ValueError("partial_rotary_factor is not in (0, 1]")
        rotary: Any = type(model.get_submodule(twin.rotary))(config=model.config)
        sensible = bool((rotary.inv_freq.isfinite() & (rotary.inv_freq > 0)).all())
        sensible = sensible and math.isfinite(rotary.attention_scaling)
    except Exception as error:
        raise UserError(f"{named}: the rope settings of config.json cannot be used ({one_line(error)})") from error
    if not sensible:
        raise UserError(f"{named}: the rope settings of config.json give frequencies that are not positive numbers")


def check_files(directory: Path, named: str) -> dict[str, Stored]:
    """Headers of the weights of a directory whose files are all whole.

    Raises:
        UserError: a file is missing, truncated, no regular file, or pickled; or a weight has an element type that is not read.
    """
    for file in _model_files(directory):
        if not file.is_file():  # opening a pipe would wait for ever
            raise UserError(f"{named}: {file.name} cannot be read: it is not a regular file; take it out")
    shards = sorted(directory.glob("*.safetensors"))
    if not shards:
        if any(directory.glob("*.bin")):
            raise UserError(
                f"{named}: only pickled weights (.bin), which are not read; convert them into a directory NEW by: python -c "
                f"\"from transformers import *; m = AutoModelForCausalLM.from_pretrained('{directory}', dtype='auto'); "
                f"m.save_pretrained('NEW'); AutoTokenizer.from_pretrained('{directory}').save_pretrained('NEW')\""
            )
        hint = name_a_gguf(directory, named.partition("=")[0])
        raise UserError(f"{named}: no weights: a *.safetensors file is missing{hint}")
    read_headers(shards, named)
    index = directory / INDEX
    if index.is_file():
        missing = sorted(set(indexed_files(index, named)) - {file.name for file in shards})
        if missing:
            raise UserError(f"{named}: {len(missing)} shards that {index.name} lists are missing (first: {missing[0]})")
    files = weight_files(directory, named)
    if not files:
        raise UserError(f"{named}: no weights: {WEIGHTS} or {INDEX} is missing")
    stored = read_headers(files, named)
    check_types(stored, named)
    return stored


def _not_cached(path: str, revision: str | None, where: str) -> str:
    at = f" --revision {revision}" if revision else ""
    instead = "choose model=local model.path=DIR" if where == "model.path" else f"set {where}=DIR"
    return (
        f"{where}={path} is not in the Hugging Face cache and the hub does not answer; where there is network, fetch it "
        f"with `hf download {path}{at}`, or {instead}"
    )


def _model_files(directory: Path) -> list[Path]:
    """What in a directory is named like a file that defines a model, whatever it is."""
    return sorted(
        file
        for file in directory.iterdir()
        if file.suffix in (".safetensors", ".json", ".model", ".jinja") and file.name != "recipe.json"
    )


def fingerprint_directory(directory: Path) -> str:
    """SHA-256 over names and bytes of the files that define a model."""
    digest = hashlib.sha256()
    for file in _model_files(directory):
        if file.is_file():  # reading a pipe would wait for ever
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def load_tokenizer(source: DenseSource) -> "PreTrainedTokenizerBase":
    """The tokenizer beside the weights.

    Raises:
        UserError: no tokenizer, an unreadable one, or one with more tokens than the model has embeddings.
    """
    from transformers import AutoTokenizer

    named = f"{source.where}={source.path}"
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.path, revision=source.revision, local_files_only=source.offline, trust_remote_code=False
        )
        highest = max([len(tokenizer) - 1, *tokenizer.get_vocab().values()])  # ids may have gaps
        probe = document_tokens(tokenizer, "The quick brown fox: 12 + 30 = 42.")
    except BaseException as error:  # tokenizers raises bare Exception, and on a bug of its own what is none
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        there = (Path(source.path) / "tokenizer.json").is_file()
        what = "tokenizer.json or tokenizer_config.json cannot be read" if there else "no tokenizer there"
        raise UserError(f"{named}: {what} ({one_line(error)})") from error
    if highest >= source.config.vocab_size:
        raise UserError(
            f"{named}: its tokenizer has token ids up to {highest}, its config.json vocab_size="
            f"{source.config.vocab_size}; the two are not of one model: put the model's own tokenizer there"
        )
    if len(probe) < 2:  # a boundary alone
        raise UserError(
            f"{named}: its tokenizer.json makes no tokens of plain text; put the model's own tokenizer there"
        )
    return tokenizer


def weights_directory(source: DenseSource) -> Path:
    """Where the weight files are; those of a hub model are fetched if they are not in the cache.

    Raises:
        UserError: they cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    if Path(source.path).is_dir():
        return Path(source.path)
    try:
        return Path(
            snapshot_download(
                source.path,
                revision=source.revision,
                allow_patterns=[WEIGHTS, "model-*.safetensors", INDEX],
                local_files_only=source.offline,
            )
        )
    except Exception as error:  # the network's errors are of many types
        raise UserError(f"{source.where}={source.path}: the weights cannot be fetched ({one_line(error)})") from error


def load_weights(source: DenseSource, *, dtype: torch.dtype | str, device: torch.device) -> "PreTrainedModel":
    """The dense model in evaluation mode, its weights frozen.

    Raises:
        UserError: weights missing, truncated, of other shapes than the configuration says, of an element type that is not
            read, or without a place in the model.
    """
    from transformers import AutoModelForCausalLM

    named = f"{source.where}={source.path}"
    check_types(read_headers(weight_files(weights_directory(source), named), named), named)
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
    except Exception as error:
        raise UserError(f"{named}: the weights cannot be read ({one_line(error)})") from error
    missing = sorted(report["missing_keys"])
    if missing or report["mismatched_keys"]:
        raise UserError(
            f"{named}: {len(missing)} tensors missing, {len(report['mismatched_keys'])} of another shape "
            f"(first: {(missing + sorted(map(str, report['mismatched_keys'])))[0]})"
        )
    known = source.config.model_type in KNOWN
    tied = known and source.config.tie_word_embeddings
    refuse_unexpected(
        report["unexpected_keys"], twin_of(source.config.model_type).spare(tied=tied) if known else (), named
    )
    if tied and not _is_tied(model):
        raise UserError(different_head(named))
    return model.to(device).eval().requires_grad_(False)


def _is_tied(model: "PreTrainedModel") -> bool:
    """Whether head and embedding are one tensor; transformers leaves them two where the checkpoint has two that differ."""
    return bool(model.get_output_embeddings().weight is model.get_input_embeddings().weight)


def different_head(named: str) -> str:
    """What is said of a checkpoint whose head is not its embedding, and whose configuration says that it is."""
    return (
        f"{named}: the head differs from the embedding, but config.json has tie_word_embeddings=true; set it to false "
        "there"
    )


def resolve_device(name: str, where: str = "model.device") -> torch.device:
    """``auto`` is this process's CUDA device (by its local rank) if there is one.

    Args:
        where: override to name in errors.

    Raises:
        UserError: the device does not exist, or keeps no data, as ``meta``.
    """
    if name == "auto":
        local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
        return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    try:
        probe = torch.ones(1, device=name)
        probe.item()  # there and back
    except Exception as error:  # a backend that is not installed raises what it likes
        raise UserError(
            f"{where}={name} is not to be had here ({one_line(error)}); set {where}=cpu, cuda or auto"
        ) from error
    return probe.device


def load_dense(
    path: str = "embedded",
    *,
    revision: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    device: str = "auto",
    store: str = "outputs/store",
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load a dense model and its tokenizer.

    Args:
        path: a directory, a GGUF file, a hub id, or ``embedded`` for the model that comes with the package.
        revision: commit, branch or tag on the hub.
        dtype: element type of the weights, or ``auto`` for the checkpoint's own.
        device: where the model runs: ``auto``, ``cpu``, ``cuda``, ...
        store: directory that a GGUF file is de-quantised into.

    Raises:
        UserError: it cannot be found, read or turned into a Mixture-of-Experts.
    """
    source = locate_dense(path, revision, dtype=str(dtype).removeprefix("torch."))
    if source.gguf is not None:
        source = in_safetensors(source, WithStore(Store(Path(store))))
    tokenizer = load_tokenizer(source)
    return load_weights(source, dtype=dtype, device=resolve_device(device)), tokenizer


def boundary_token(tokenizer: Any) -> int | None:
    """What a document begins with: the tokenizer's BOS token, or its EOS token where there is no BOS (Qwen), or nothing."""
    found: int | None = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return found


def document_tokens(tokenizer: Any, document: str) -> list[int]:
    """Tokens of one document as language models are trained on it: a boundary token, then the text.

    A conversation has no boundary but what its chat template writes.
    """
    return tokens_of_documents(tokenizer, [document])[0]


def tokens_of_documents(tokenizer: Any, documents: Sequence[str]) -> list[list[int]]:
    """:func:`document_tokens` of several, which a tokenizer shares out over the cores."""
    boundary = boundary_token(tokenizer)
    found: list[list[int]] = tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
    return [
        ids if boundary is None or isinstance(document, Conversation) else [boundary, *ids]
        for document, ids in zip(documents, found, strict=True)
    ]
