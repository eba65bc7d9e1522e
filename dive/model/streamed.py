"""A dense model whose weights stay on disk: a decoder layer is read when it is asked for, and let go for the next one.

The rest of the code does not know: :func:`dive.model.families.decoder_layers` gives out the layers, filled, one at a time.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional

from dive.errors import UserError
from dive.model.families import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dive.model.load import DenseSource

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Tensors of a directory, in one safetensors file or several.

    A file is mapped only while something is read from it, so that its pages do not stay in this process.
    """

    files: Mapping[str, Path]
    """{name of a tensor: file that holds it}"""

    @classmethod
    def open(cls, directory: Path) -> "Checkpoint":
        """
        Raises:
            UserError: neither the one file nor an index is there, or a file cannot be read.
        """
        index, single = directory / INDEX, directory / WEIGHTS
        try:
            if index.is_file():
                listed: dict[str, str] = json.loads(index.read_text())["weight_map"]
                return cls({name: directory / file for name, file in listed.items()})
            with safe_open(single, framework="pt") as stored:
                return cls(dict.fromkeys(stored.keys(), single))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            what = INDEX if index.is_file() else WEIGHTS
            raise UserError(f"{directory}: {what} cannot be read ({error})") from error

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor; reads the headers alone.

        Raises:
            UserError: a file is missing or truncated, or lacks a tensor that the index places there.
        """
        found = {}
        for file, names in self._by_file(self.files):
            try:
                with safe_open(file, framework="pt") as stored:
                    for name in names:
                        found[name] = tuple(stored.get_slice(name).get_shape())
            except (OSError, SafetensorError) as error:
                raise UserError(f"{file}: the weights cannot be read ({error})") from error
        return found

    def read(self, names: Iterable[str], *, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Copies of some tensors."""
        found = {}
        for file, wanted in self._by_file(names):
            with safe_open(file, framework="pt") as stored:
                for name in wanted:
                    # A copy in any case: what safetensors gives out lives in the mapped file.
                    found[name] = stored.get_tensor(name).to(device, dtype, copy=True)
        return found

    def rows(self, name: str, numbers: Tensor, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Some rows of a matrix: ``numbers`` (...) int64 to (..., columns). Nothing else of it is read."""
        with safe_open(self.files[name], framework="pt") as stored:
            return functional.embedding(numbers.cpu(), stored.get_tensor(name)).to(device, dtype)

    def dtype(self, name: str) -> torch.dtype:
        """Element type that a tensor is stored in."""
        with safe_open(self.files[name], framework="pt") as stored:
            kind: torch.dtype = stored.get_tensor(name).dtype
        return kind

    def _by_file(self, names: Iterable[str]) -> Iterator[tuple[Path, list[str]]]:
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name], []).append(name)
        yield from by_file.items()


class StreamedLayers(nn.ModuleList):
    """Decoder layers of which one is filled: the one that was asked for last.

    The others have no parameters at all, so that a model's ``device``, ``dtype`` and ``parameters`` speak of what is there.
    """

    def __init__(self, layers: nn.ModuleList, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device):
        super().__init__(layers)
        self._checkpoint, self._dtype, self._device = checkpoint, dtype, device
        self._names = [[name for name, _ in layer.named_parameters()] for layer in layers]
        self._filled: int | None = None
        for number in range(len(self)):
            self._empty(number)

    def __getitem__(self, index: Any) -> Any:
        """The layer, filled; of a slice an iterator that fills one after another."""
        if isinstance(index, slice):
            return (self[number] for number in range(*index.indices(len(self))))
        number = range(len(self))[index]
        layer = self._modules[str(number)]
        if number != self._filled:
            if self._filled is not None:
                self._empty(self._filled)
            prefix = f"model.layers.{number}."
            names = [prefix + name for name in self._names[number]]
            read = self._checkpoint.read(names, dtype=self._dtype, device=self._device)
            for name, tensor in read.items():
                self._put(number, name.removeprefix(prefix), nn.Parameter(tensor, requires_grad=False))
            self._filled = number
        return layer

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self[:])

    def _empty(self, number: int) -> None:
        for name in self._names[number]:
            self._put(number, name, None)
        self._filled = None

    def _put(self, number: int, name: str, parameter: nn.Parameter | None) -> None:
        owner, _, leaf = name.rpartition(".")
        layer = self._modules[str(number)]
        assert layer is not None
        setattr(layer.get_submodule(owner), leaf, parameter)


class StreamedEmbedding(nn.Module):
    """An embedding that reads the rows of the tokens it is given."""

    def __init__(self, name: str, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._name, self._checkpoint, self._dtype, self._device = name, checkpoint, dtype, device

    def forward(self, ids: Tensor) -> Tensor:
        """(n, T) int64 to (n, T, D)."""
        return self._checkpoint.rows(self._name, ids, dtype=self._dtype, device=self._device)


class StreamedHead(nn.Module):
    """A language-model head that is read when it is used."""

    def __init__(self, name: str, checkpoint: Checkpoint) -> None:
        super().__init__()
        self._name, self._checkpoint = name, checkpoint

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) to (..., vocabulary)."""
        read = self._checkpoint.read([self._name], dtype=hidden.dtype, device=hidden.device)
        return functional.linear(hidden, read[self._name])


def load_streamed(source: "DenseSource", *, dtype: torch.dtype | str, device: torch.device) -> "PreTrainedModel":
    """The dense model in evaluation mode, its weights on disk until a layer is asked for.

    Its forward pass is the model's own and reads every layer; running one layer over all tokens before the next
    (:func:`dive.model.layers.walk_layers`) reads each once. ``model.checkpoint`` is the :class:`Checkpoint`.

    Raises:
        UserError: weights missing, truncated, or of other shapes than the configuration says.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    checkpoint = Checkpoint.open(_directory(source))
    log.info("streaming %s", source.path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source.config)
    _check(model, checkpoint, f"{source.where}={source.path}")
    embeddings = "model.embed_tokens.weight"
    head = embeddings if source.config.tie_word_embeddings else "lm_head.weight"
    if isinstance(dtype, str):
        dtype = source.config.dtype or checkpoint.dtype(embeddings)
    body = model.model
    body.layers = StreamedLayers(decoder_layers(model), checkpoint, dtype=dtype, device=device)
    body.embed_tokens = StreamedEmbedding(embeddings, checkpoint, dtype=dtype, device=device)
    model.lm_head = StreamedHead(head, checkpoint)
    norm = checkpoint.read(["model.norm.weight"], dtype=dtype, device=device)
    body.norm.weight = nn.Parameter(norm["model.norm.weight"])
    body.rotary_emb = type(body.rotary_emb)(config=model.config).to(device)
    model.config.dtype = dtype
    model.checkpoint = checkpoint
    try:
        model.generation_config = GenerationConfig.from_pretrained(
            source.path, revision=source.revision, local_files_only=source.offline
        )
    except OSError:
        log.debug("%s has no generation_config.json", source.path)
    return model.eval().requires_grad_(False)


def _directory(source: "DenseSource") -> Path:
    from huggingface_hub import snapshot_download

    if Path(source.path).is_dir():
        return Path(source.path)
    try:
        return Path(
            snapshot_download(
                source.path,
                revision=source.revision,
                allow_patterns=["model*.safetensors", INDEX],
                local_files_only=source.offline,
            )
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{source.where}={source.path}: the weights cannot be fetched ({error})") from error


def _check(model: "PreTrainedModel", checkpoint: Checkpoint, named: str) -> None:
    stored = checkpoint.shapes()
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}  # tied heads stand once
    missing = sorted(set(wanted) - set(stored))
    other = sorted(name for name, shape in wanted.items() if name in stored and stored[name] != shape)
    if missing or other:
        raise UserError(
            f"{named}: {len(missing)} tensors missing, {len(other)} of another shape (first: {(missing + other)[0]})"
        )
