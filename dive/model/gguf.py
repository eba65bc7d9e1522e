"""Dense models in GGUF files, llama.cpp's format: read without their weights, and de-quantised into safetensors."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dive.config import SHARD_BYTES
from dive.errors import UserError, one_line, require
from dive.model.families import IN_GGUF
from dive.model.headers import Stored, check_tensors
from dive.store import HasStore, Place, step

if TYPE_CHECKING:  # the plan imports this without torch
    from torch import Tensor
    from transformers import PretrainedConfig

ROPE_FREQUENCIES = "rope_freqs.weight"
"""(head_dim / 2,), what llama.cpp divides RoPE's frequencies by."""
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What every Llama since 3.1 has beside its factor; a file holds frequencies alone."""


@dataclass(frozen=True, slots=True)
class Gguf:
    """A file whose metadata was read."""

    path: Path
    settings: Mapping[str, Any]
    """What its config.json would hold. Its ``dtype`` is that of the matrices, float32 where they are quantised."""
    precision: str
    """What quantisation left: ``Q4_1 and Q8_0, 5.74 bits a weight``."""
    tensors: Mapping[str, Any]
    """{llama.cpp's name: tensor of the reader}, mapped and not read."""

    def fingerprint(self) -> str:
        """SHA-256 of the file."""
        with self.path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def config(self, named: str) -> "PretrainedConfig":
        """As transformers has it.

        Args:
            named: what to begin errors with: ``model.path=FILE``.

        Raises:
            UserError: the frequencies of RoPE are of no kind that transformers knows.
        """
        import torch
        from transformers import AutoConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        settings = dict(self.settings)
        divisors = self.tensors.get(ROPE_FREQUENCIES)
        if divisors is None:
            return AutoConfig.for_model(**settings)
        divided = torch.tensor(divisors.data)
        plain = settings["rope_parameters"]["rope_theta"] ** -(torch.arange(len(divided)) / len(divided))
        scaling = LLAMA3_ROPE | {"factor": float(divided.max())}
        settings["rope_parameters"] = settings["rope_parameters"] | scaling
        config = AutoConfig.for_model(**settings)
        found, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        require(
            found.shape == plain.shape and torch.allclose(found, plain / divided, rtol=1e-4),
            f"{named}: {ROPE_FREQUENCIES} is not the RoPE scaling of Llama 3; use the model's own safetensors",
        )
        return config

    def check(self, config: "PretrainedConfig", named: str) -> None:
        """Compare the tensors with the model's, without reading them.

        Raises:
            UserError: one is missing, of another shape, or has no place in the model.
        """
        wanted = parameter_shapes(config)
        names = self._names(wanted)
        unknown = sorted(self.tensors.keys() - names.keys() - {ROPE_FREQUENCIES})
        require(
            not unknown,
            f"{named}: {len(unknown)} tensors have no place in a {self.settings['model_type']} model "
            f"(first: {(unknown or [''])[0]}); use another file",
        )
        stored = {names[name]: Stored(self.path, shape(t), "F32") for name, t in self.tensors.items() if name in names}
        check_tensors(stored, wanted, spare=(), named=named)

    def weights(self, config: "PretrainedConfig") -> Iterator[tuple[str, "Tensor"]]:
        """(transformers' name, float32 tensor), de-quantised one after another."""
        import torch
        from gguf.quants import dequantize

        names = self._names(parameter_shapes(config))
        for name, stored in self.tensors.items():
            if name == ROPE_FREQUENCIES:
                continue
            values = torch.tensor(dequantize(stored.data, stored.tensor_type))
            if IN_GGUF[self.settings["model_type"]] and name.endswith(("attn_q.weight", "attn_k.weight")):
                values = split_halves(values, head_dim=int(config.head_dim))
            yield names[name], values

    def _names(self, parameters: Mapping[str, Any]) -> dict[str, str]:
        """{llama.cpp's name: transformers'}"""
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
        places = get_tensor_name_map(numbers[self.settings["model_type"]], int(self.settings["num_hidden_layers"]))
        return {str(places.get_name(name, try_suffixes=(".weight",))): name for name in parameters}


def shape(tensor: Any) -> tuple[int, ...]:
    """Of a tensor of the reader, as torch has it: llama.cpp counts from the innermost dimension."""
    return tuple(int(size) for size in reversed(tensor.shape))


def split_halves(weight: "Tensor", *, head_dim: int) -> "Tensor":
    """Rows of a query or key projection (heads · head_dim, D) from llama.cpp's order to transformers'.

    RoPE turns pairs of channels: neighbours in llama.cpp's Llama, one of each half of a head in transformers.
    """
    return weight.reshape(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def parameter_shapes(config: "PretrainedConfig") -> dict[str, tuple[int, ...]]:
    """{name: shape} of a model's parameters; tied ones stand once."""
    import copy

    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def read_gguf(path: Path, named: str) -> Gguf:
    """What a file says of its model, without reading its weights; once, however often it is asked while the file stays as it is.

    Args:
        named: what to begin errors with: ``model.path=FILE``.

    Raises:
        UserError: the package gguf is missing; the file is none, truncated, a part of one, or of a model that is not read.
    """
    state = path.stat()
    return _read(path, named, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=4)  # a vocabulary takes seconds, and each size in the configuration asks
def _read(path: Path, named: str, _changed: int, _size: int) -> Gguf:
    try:
        from gguf import GGUFReader, Keys
        from gguf.quants import dequantize
    except ImportError as error:
        raise UserError(
            f"{named}: GGUF files are read by the package gguf: pip install 'dive-moe[gguf]' (or gguf)"
        ) from error
    try:
        reader = GGUFReader(path)
        values = {name: field.contents() for name, field in reader.fields.items() if field.types[0].name != "ARRAY"}
    except Exception as error:  # of many types, by what the bytes happen to say
        raise UserError(
            f"{named}: no GGUF file, or a truncated one ({one_line(error)}); copy or fetch it again"
        ) from error
    parts = values.get(Keys.Split.LLM_KV_SPLIT_COUNT, 1)
    require(parts < 2, f"{named}: one of {parts} parts of a model; join them by `gguf-split --merge FIRST_PART FILE`")
    architecture = values.get(Keys.General.ARCHITECTURE)
    require(
        architecture in IN_GGUF,
        f"{named}: architecture {architecture!r} is not read from GGUF files; choose one of {', '.join(IN_GGUF)}",
    )

    def value(key: str) -> Any:
        return values.get(key.format(arch=architecture))

    for key in (Keys.LLM.EXPERT_COUNT, Keys.Attention.SLIDING_WINDOW):
        require(
            not value(key), f"{named}: {key.format(arch=architecture)} ({value(key)}) is not read; use another file"
        )
    scaling = value(Keys.Rope.SCALING_TYPE)
    require(
        scaling in (None, "none"), f"{named}: RoPE scaling {scaling!r} is not read; use the model's own safetensors"
    )
    rotated, head_dim = value(Keys.Rope.DIMENSION_COUNT), value(Keys.Attention.KEY_LENGTH)
    require(
        rotated == head_dim or None in (rotated, head_dim),
        f"{named}: RoPE on {rotated} of {head_dim} channels of a head is not read; use another file",
    )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    require("token_embd.weight" in tensors, f"{named}: token_embd.weight is missing; use another file")
    matrices = [tensor for tensor in reader.tensors if len(tensor.shape) == 2]
    types = {tensor.tensor_type.name: tensor for tensor in matrices}
    for name, tensor in types.items():
        try:
            dequantize(tensor.data[:1], tensor.tensor_type)
        except Exception as error:
            raise UserError(f"{named}: weights of type {name} cannot be de-quantised ({one_line(error)})") from error
    settings = {
        "model_type": architecture,
        "vocab_size": shape(tensors["token_embd.weight"])[0],
        "hidden_size": value(Keys.LLM.EMBEDDING_LENGTH),
        "intermediate_size": value(Keys.LLM.FEED_FORWARD_LENGTH),
        "num_hidden_layers": value(Keys.LLM.BLOCK_COUNT),
        "num_attention_heads": value(Keys.Attention.HEAD_COUNT),
        "max_position_embeddings": value(Keys.LLM.CONTEXT_LENGTH),
        "rms_norm_eps": value(Keys.Attention.LAYERNORM_RMS_EPS),
    }
    missing = [name for name, found in settings.items() if found is None]
    require(not missing, f"{named}: its metadata says nothing of {', '.join(missing)}; use another file")
    optional = {
        "num_key_value_heads": value(Keys.Attention.HEAD_COUNT_KV),
        "head_dim": head_dim or rotated,
        "bos_token_id": value(Keys.Tokenizer.BOS_ID),
        "eos_token_id": value(Keys.Tokenizer.EOS_ID),
        "pad_token_id": value(Keys.Tokenizer.PAD_ID),
    }
    own = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(next(iter(types))) if len(types) == 1 else None
    settings |= {name: found for name, found in optional.items() if found is not None}
    settings |= {
        "rms_norm_eps": float(f"{settings['rms_norm_eps']:.6g}"),  # 1e-5, which float32 made 9.99999975e-06
        "rope_parameters": {"rope_type": "default", "rope_theta": value(Keys.Rope.FREQ_BASE) or 10000.0},
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": own or "float32",
    }
    bits = 8 * sum(int(tensor.n_bytes) for tensor in matrices) / sum(int(tensor.n_elements) for tensor in matrices)
    return Gguf(path, settings, f"{' and '.join(sorted(types))}, {bits:.2f} bits a weight", tensors)


@step("dequantised", "the weights of a GGUF file")
def dequantise(place: Place, run: HasStore, gguf: Gguf, config: "PretrainedConfig", *, file: str, dtype: str) -> None:
    """A directory that holds the file's model as ``save_pretrained`` would write it; a shard is in memory at a time.

    Args:
        gguf: the file.
        config: of it.
        file: its fingerprint.
        dtype: element type to write.

    Raises:
        UserError: the tokenizer in the file cannot be read.
    """
    import copy

    import torch
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from dive.model.shards import ShardWriter

    try:
        read = AutoTokenizer.from_pretrained(gguf.path.parent, gguf_file=gguf.path.name, local_files_only=True)
        # Of no family's class: those make a pre-tokenizer of their own when they are read back, and not the file's.
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=read.backend_tokenizer, chat_template=read.chat_template, **read.special_tokens_map
        )
    except Exception as error:
        raise UserError(f"{gguf.path}: its tokenizer cannot be read ({one_line(error)})") from error
    tokenizer.save_pretrained(place.directory)
    config = copy.deepcopy(config)
    config.dtype = getattr(torch, dtype)
    config.save_pretrained(place.directory)
    writer = ShardWriter(place.directory, dtype=config.dtype, shard_bytes=SHARD_BYTES)
    for name, weight in gguf.weights(config):
        writer.add(name, weight)
    writer.close()
