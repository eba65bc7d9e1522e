"""Writing a Mixture-of-Experts that stock transformers, vLLM, SGLang and llama.cpp load as it is.

The directory is written beside its place, read back and compared, and only then moved there.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import nn

from dive.config import SHARD_BYTES, Dtype, Load, ModelConfig
from dive.errors import UserError, disk_trouble, one_line
from dive.model.architecture import check_figures, local_model, read_settings
from dive.model.families import (
    TWINS,
    is_inherited,
    is_zero_at_first,
    moe_block,
    moe_blocks,
    moe_class,
    moe_config,
    sparse_layers,
    stock_layer_tensors,
    twin_of,
)
from dive.model.families.twin import Form
from dive.model.headers import WEIGHTS
from dive.model.load import DenseSource, check_files, fingerprint_directory, load_weights, locate_dense
from dive.model.recipe import Dense
from dive.model.shards import ShardWriter
from dive.moe.build import read_experts
from dive.moe.implementation import use_stock_experts
from dive.moe.layer import ExpertLayer
from dive.moe.mixture import Mixture
from dive.moe.plug import plug_routers, unplug
from dive.retrain.retrained import Retrained
from dive.store import write_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

BIASED_MODEL_TYPE = "dive_moe_with_expert_bias"
"""``model_type`` of the custom format: unknown to every engine, so that none loads it and drops the biases silently."""


def has_expert_bias(model: "PreTrainedModel") -> bool:
    """Whether the experts have FLAP's bias, which no stock class has a place for."""
    return hasattr(moe_blocks(model)[0].experts, "down_bias")


def save(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    directory: str | Path,
    *,
    card: str | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the model as its stock class, and prove it by reading it back.

    Adapters are merged and the training routers taken out of ``model``, in place.

    Args:
        directory: to create; an existing one is replaced once the new one is proven.
        card: text of the model card.
        dtype: element type to write; the model is converted, in place. Its own if none.

    Returns:
        The directory.

    Raises:
        UserError: the experts have biases (see :func:`save_with_expert_bias`), the directory cannot be written, or what
            was read back differs.
    """
    if has_expert_bias(model):
        raise UserError(
            "pruning.compensation=bias: a stock Mixture-of-Experts has no place for expert biases and every engine would "
            "drop them silently; use compensation=least_squares or none, or save_with_expert_bias() for a custom directory"
        )
    unplug(model)
    if dtype is not None and dtype != model.dtype:
        for parameter in model.parameters():  # model.to(dtype) would round the rotary frequencies too
            parameter.data = parameter.data.to(dtype)
        use_stock_experts(model)
    target = Path(directory)
    with _replacing(target) as working:
        model.save_pretrained(working, state_dict=_with_head(model))
        tokenizer.save_pretrained(working)
        copy_sentencepiece(tokenizer, working)
        add_earlier_names(working)
        if card is not None:
            (working / "README.md").write_text(card, encoding="utf-8")
        verify(model, working)
    return target


def _with_head(model: "PreTrainedModel") -> dict[str, torch.Tensor]:
    """The model's tensors, and of a tied head a copy that is written as well.

    SGLang never ties the head of these classes: without the tensor it serves one that nobody initialised, in silence. Others
    tie it whether it is there or not.
    """
    tensors: dict[str, torch.Tensor] = model.state_dict()
    if model.config.tie_word_embeddings:
        head = f"{twin_of(model.config.model_type).head}.weight"
        tensors[head] = tensors[head].clone()
    return tensors


def copy_sentencepiece(tokenizer: "PreTrainedTokenizerBase", directory: Path) -> None:
    """Put ``tokenizer.model`` beside ``tokenizer.json`` where the tokenizer came with one; transformers 5 leaves it out.

    Only that file has the scores of a SentencePiece vocabulary. llama.cpp's converter makes all of them equal without it, and
    the GGUF file then cuts text into other tokens.
    """
    source = Path(getattr(tokenizer, "vocab_file", None) or "")
    if source.name == "tokenizer.model" and source.is_file():
        shutil.copyfile(source, directory / source.name)


def add_earlier_names(directory: Path) -> None:
    """Write what transformers 5 renamed under its former name as well, so that releases before it read the same model.

    Without ``rope_theta`` they fall back to another base in silence, and they know no class ``TokenizersBackend``; engines
    and llama.cpp's converter pin such releases. A twin knows what else they need. How the tokenizer was loaded here is left
    out: it says nothing about it.
    """
    file = directory / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" in rope:
        config["rope_theta"] = rope.pop("rope_theta")
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = rope
    config |= twin_of(config["model_type"]).earlier_names(config)
    write_json(file, config)
    file = directory / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    for name in ("is_local", "local_files_only"):
        settings.pop(name, None)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(file, settings)


@torch.no_grad()
def save_streamed(
    dense: "PreTrainedModel",
    layers: Iterable[ExpertLayer],
    tokenizer: "PreTrainedTokenizerBase",
    directory: str | Path,
    *,
    top_k: int,
    form: Form | None = None,
    card: str | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write the stock Mixture-of-Experts of a streamed model and these experts, without ever having it whole in memory.

    The files are those of :func:`save` on the assembled model, in more and smaller shards. Each shard is read back and
    compared; names and sizes are compared with the stock class's.

    Args:
        dense: of :func:`dive.model.streamed.load_streamed`.
        layers: experts of each layer in turn.
        directory: to create; an existing one is replaced once the new one is whole.
        top_k: experts a token.
        form: what is chosen of the Mixture-of-Experts beside.
        card: text of the model card.
        dtype: element type to write; that of ``dense`` if none.
        shard_bytes: size of a shard, and so of what is held in memory; a larger tensor has one for itself.

    Returns:
        The directory.

    Raises:
        UserError: the experts have biases, the directory cannot be written, or what was read back differs.
    """
    target, kind = Path(directory), dense.dtype if dtype is None else dtype
    places = twin_of(dense.config.model_type)
    twin: PreTrainedModel | None = None
    with _replacing(target) as working:
        writer = ShardWriter(working, dtype=kind, shard_bytes=shard_bytes)
        written = 0
        numbers: Iterator[int] = iter(())
        for layer in layers:
            if layer.bias is not None:
                raise UserError("pruning.compensation=bias: a stock Mixture-of-Experts has no place for expert biases")
            if twin is None:
                experts, _, width = layer.down.shape
                config = moe_config(
                    dense.config,
                    width=width,
                    experts=experts,
                    top_k=min(top_k, experts),
                    shared=layer.shared_width,
                    form=form,
                )
                with torch.device("meta"):
                    twin = moe_class(config)(config)
                _copy_shared(dense, twin, writer, f"{places.embeddings}.")
                numbers = iter(sparse_layers(config))
            number = next(numbers)
            for other in range(written, number + 1):
                _copy_shared(dense, twin, writer, f"{places.layers}.{other}.")
            written = number + 1
            parts = stock_layer_tensors(
                config, number, gate_up=layer.gate_up, down=layer.down, router=layer.router, shared=layer.shared
            )
            for name, tensor in parts:
                writer.add(name, tensor)
        if twin is None:
            raise ValueError("no layers")
        for other in range(written, config.num_hidden_layers):
            _copy_shared(dense, twin, writer, f"{places.layers}.{other}.")
        _copy_shared(dense, twin, writer, f"{places.norm}.", f"{places.head}.")
        total = twin.num_parameters()
        if config.tie_word_embeddings:  # see _with_head
            embedding = f"{places.embeddings}.weight"
            copy = dense.checkpoint.read([embedding], dtype=writer.dtype, device=torch.device("cpu"))[embedding]
            writer.add(f"{places.head}.weight", copy)
            total += copy.numel()
        writer.close()
        if writer.parameters != total:
            raise UserError(f"{target}: {writer.parameters} parameters were written, {type(twin).__name__} has {total}")
        tokenizer.save_pretrained(working)
        copy_sentencepiece(tokenizer, working)
        if card is not None:
            (working / "README.md").write_text(card, encoding="utf-8")
        twin.config.dtype = str(kind).removeprefix("torch.")
        twin.config.architectures = [type(twin).__name__]
        dense.generation_config.save_pretrained(working)
        twin.config.save_pretrained(working)  # last: without it nothing loads the directory
        add_earlier_names(working)
    return target


def _copy_shared(dense: "PreTrainedModel", twin: "PreTrainedModel", writer: ShardWriter, *prefixes: str) -> None:
    """Copy what the dense model and its twin share, of the names that begin so, from disk to disk."""
    host = torch.device("cpu")
    for name, parameter in twin.named_parameters():  # a tied head stands there once, as the embedding
        if not (name.startswith(prefixes) and is_inherited(twin, name)):
            continue
        if name not in dense.checkpoint.files and is_zero_at_first(twin, name):
            writer.add(name, torch.zeros(parameter.shape, dtype=writer.dtype))
        else:
            writer.add(name, dense.checkpoint.read([name], dtype=writer.dtype, device=host)[name])


@torch.no_grad()
def verify(model: "PreTrainedModel", directory: Path) -> None:
    """Read a directory back as any user would, and compare every tensor and the logits of a few tokens.

    It is read to the host. Once its tensors are known to be equal, what was read computes its logits with the model's own,
    so that no device holds a second copy.

    Raises:
        UserError: a tensor is missing, unexpected or different, or the logits are.
    """
    from transformers import AutoModelForCausalLM

    again, report = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=model.dtype,
        output_loading_info=True,
        experts_implementation=model.config._experts_implementation,
    )
    if type(again) is not type(model):
        raise UserError(f"{directory} loads as {type(again).__name__}, not as {type(model).__name__}")
    wrong = {
        name: sorted(map(str, report[name]))
        for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        if report.get(name)
    }
    if wrong:
        raise UserError(f"{directory} does not load whole: {wrong}")
    loaded = dict(again.named_parameters())
    for name, parameter in model.named_parameters():
        if not torch.equal(parameter.cpu(), loaded[name]):
            raise UserError(f"{directory}: {name} differs after reading it back")
        loaded[name].data = parameter.data
    length = min(64, model.config.max_position_embeddings)
    ids = torch.arange(2 * length).reshape(2, length) * 7919 % model.config.vocab_size
    ours = model.eval()(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()
    theirs = again.to(model.device).eval()(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()
    difference = float((ours - theirs).abs().max())
    if not difference <= 1e-5 * float(ours.abs().max()):
        raise UserError(f"{directory}: logits differ by {difference:.2e} after reading it back")
    log.info("export read back: every tensor equal, logits differ by %.1e", difference)


def save_with_expert_bias(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    directory: str | Path,
    *,
    card: str | None = None,
) -> Path:
    """Write a model whose experts have biases, in a format of its own that :func:`load_with_expert_bias` reads.

    Returns:
        The directory.

    Raises:
        UserError: the directory's name does not say ``expert_bias``, or it cannot be written.
    """
    from safetensors.torch import save_model

    target = Path(directory)
    if "expert_bias" not in target.name:
        raise UserError(f"{target}: a directory that no engine can serve must say so; put expert_bias in its name")
    unplug(model)
    settings = model.config.to_dict() | {
        "stock_model_type": model.config.model_type,
        "model_type": BIASED_MODEL_TYPE,
    }
    settings.pop("architectures", None)
    note = (
        "> **Not a stock model.** Its experts have biases (FLAP's compensation), which Mixtral has no place for. Only "
        "`dive.load_with_expert_bias(directory)` loads it. For a model that serves anywhere choose "
        "`pruning.compensation=least_squares`.\n\n"
    )
    with _replacing(target) as working:
        save_model(model, str(working / "model.safetensors"), metadata={"format": "pt"})
        (working / "config.json").write_text(json.dumps(settings, indent=2, default=str))
        tokenizer.save_pretrained(working)
        (working / "README.md").write_text(note + (card or ""), encoding="utf-8")
    return target


def expert_bias_config(directory: Path, named: str | None = None) -> "PretrainedConfig":
    """The stock configuration of a directory of :func:`save_with_expert_bias`.

    Args:
        named: what to begin errors with: ``checkpoint=DIR``; the directory if none.

    Raises:
        UserError: the directory holds something else, or its config.json cannot be read.
    """
    from transformers import AutoConfig

    named = named or str(directory)
    settings = read_settings(directory, named)
    if settings.get("model_type") != BIASED_MODEL_TYPE:
        raise UserError(f"{named} is not a directory of save_with_expert_bias; load it with transformers")
    known = [twin.name for twin in TWINS]
    if settings.get("stock_model_type") not in known:
        raise UserError(f"{named}: stock_model_type in config.json is not one of {', '.join(known)}")
    check_figures(settings, named)
    settings["model_type"] = settings.pop("stock_model_type")
    try:
        config: PretrainedConfig = AutoConfig.for_model(**settings)
    except Exception as error:  # transformers and its validation raise types of many kinds
        raise UserError(f"{named}: config.json cannot be read ({one_line(error)})") from error
    return config


def load_with_expert_bias(directory: str | Path) -> "PreTrainedModel":
    """Load an export whose experts have biases, ``checkpoint_with_expert_bias``, which no engine reads.

    Args:
        directory: of the export.

    Raises:
        UserError: the directory holds something else, or its weights are not those of its configuration.
    """
    return _load_biased(Path(directory), str(directory))


def _load_biased(path: Path, named: str) -> "PreTrainedModel":
    from safetensors.torch import load_file, load_model

    from dive.model.families import empty_moe

    config = expert_bias_config(path, named)
    try:
        model = empty_moe(config, getattr(torch, str(config.dtype).removeprefix("torch.")))
        stored, places = load_file(path / WEIGHTS), twin_of(config.model_type)
        for number in sparse_layers(config):
            bias = stored.get(f"{places.layers}.{number}.{places.block}.experts.down_bias")
            if bias is None:
                raise UserError(f"{named}: {WEIGHTS} lacks the experts' biases")
            moe_block(model, number).experts.down_bias = nn.Parameter(bias, requires_grad=False)
        load_model(model, str(path / WEIGHTS))
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{named}: the weights are not those of its config.json ({one_line(error)})") from error
    plug_routers(model)
    assert isinstance(model, moe_class(config))
    return model.requires_grad_(False).eval()


def open_checkpoint(
    path: str, *, revision: str | None = None, dtype: str, device: torch.device, where: str = "checkpoint"
) -> Dense:
    """The recipe of a finished model: a stock directory or hub id, or one with expert biases.

    Args:
        path: a directory, a GGUF file, a hub id, or ``embedded``.
        revision: commit, branch or tag on the hub.
        dtype: of the weights, or ``auto`` for the checkpoint's own.
        where: override to name in errors.

    Raises:
        UserError: nothing there, or not readable.
    """
    named = f"{where}={path}"
    directory = local_model(path, where)
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    stock = directory is None or directory.is_file()  # a GGUF file has no expert biases
    if directory is None or stock or read_settings(directory, named).get("model_type") != BIASED_MODEL_TYPE:
        source = locate_dense(path, revision, dtype=dtype, where=where, any_family=True)
        return Dense(source, device, partial(load_weights, dtype=wanted, device=device))
    config = expert_bias_config(directory, named)
    check_files(directory, named)
    source = DenseSource(
        str(directory), None, config, fingerprint_directory(directory), dtype, offline=True, where=where
    )

    def load(source: DenseSource) -> "PreTrainedModel":
        model = _load_biased(directory, named)
        return model.to(device=device, dtype=model.dtype if wanted == "auto" else wanted)

    return Dense(source, device, load)


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A fresh directory that takes the place of ``target`` if all goes well, and vanishes otherwise.

    Raises:
        UserError: ``target`` is there and holds anything but a model, or cannot be written.
    """
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file()):
        raise UserError(f"{target} is there and holds something else than a model; choose another directory")
    working = target.with_name(f".{target.name}-{os.getpid()}")
    replaced = working.with_name(f"{working.name}-replaced")
    for left in target.parent.glob(f".{target.name}-*"):  # by runs that were killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        working.mkdir(parents=True)
        yield working
        for file in working.iterdir():
            file.chmod(0o644)  # safetensors writes for its owner alone; a server may be another user
        if target.exists():  # moved, not removed: half a directory would have neither the old model nor the new one
            os.replace(target, replaced)
        os.replace(working, target)
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror or error})") from error
    except Exception as error:
        trouble = disk_trouble(error)
        if trouble is None:
            raise
        raise UserError(f"{target} cannot be written ({trouble})") from error
    finally:
        shutil.rmtree(working, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def export(
    config: ModelConfig, model: Mixture | Retrained, tokenizer: "PreTrainedTokenizerBase", directory: Path, *, card: str
) -> Path:
    """Write a run's model: a stock directory, or with expert biases a custom one under a name that says so.

    Args:
        directory: of the run's outputs.
        card: text of the model card.

    Returns:
        The directory that was written.
    """
    dense, dtype = model.dense, export_dtype(config, model.dense.source)
    if config.load is Load.streamed:
        mixture = model.mixture
        return save_streamed(
            dense.load(),
            read_experts(mixture.experts),
            tokenizer,
            directory / "checkpoint",
            top_k=mixture.top_k,
            form=mixture.form,
            card=card,
            dtype=dtype,
        )
    whole = model.take(master_weights=False)
    if not has_expert_bias(whole):
        return save(whole, tokenizer, directory / "checkpoint", card=card, dtype=dtype)
    log.warning(
        "pruning.compensation=bias: experts have biases, which no stock class has a place for; the export is a custom "
        "directory that only dive.load_with_expert_bias reads"
    )
    return save_with_expert_bias(whole, tokenizer, directory / "checkpoint_with_expert_bias", card=card)


def export_dtype(config: ModelConfig, source: DenseSource) -> torch.dtype | None:
    """Element type of the export; none for that of the weights in memory."""
    wanted = config.export_dtype
    if wanted is None:
        return None
    found: torch.dtype = source.config.dtype if wanted is Dtype.auto else getattr(torch, wanted.value)
    return found
