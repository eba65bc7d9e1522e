"""A dense model whose weights stay on disk: a decoder layer is read when it is asked for, and let go for the next one.

The rest of the code does not know: :func:`dive.model.families.decoder_layers` gives out the layers, filled, one at a time.
"""

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from dive.errors import UserError, one_line
from dive.model.families import decoder_layers, twin_of
from dive.model.headers import check_tensors, read_headers, weight_files
from dive.model.load import DenseSource, different_head, weights_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Tensors of a directory, in one safetensors file or several.

    A file is mapped only while something is read from it, so that its pages do not stay in this process.
    """

    files: Mapping[str, Path]
    """{name of a tensor: file that holds it}"""

    def same(self, first: str, second: str) -> bool:
        """Whether two tensors are equal."""
        with safe_open(self.files[first], framework="pt") as one, safe_open(self.files[second], framework="pt") as two:
            return torch.equal(one.get_tensor(first), two.get_tensor(second))

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

    def __init__(
        self, name: str, layers: nn.ModuleList, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(layers)
        self._name, self._checkpoint, self._dtype, self._device = name, checkpoint, dtype, device
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
            prefix = f"{self._name}.{number}."
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


def load_streamed(source: DenseSource, *, dtype: torch.dtype | str, device: torch.device) -> "PreTrainedModel":
    """The dense model in evaluation mode, its weights on disk until a layer is asked for.

    Its forward pass is the model's own and reads every layer; running one layer over all tokens before the next
    (:class:`dive.model.layers.Track`) reads each once. ``model.checkpoint`` is the :class:`Checkpoint`.

    Raises:
        UserError: weights missing, truncated, of other shapes than the configuration says, of an element type that is not
            read, or without a place in the model.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    named = f"{source.where}={source.path}"
    stored = read_headers(weight_files(weights_directory(source), named), named)
    checkpoint = Checkpoint({name: tensor.file for name, tensor in stored.items()})
    log.info("streaming %s", source.path)
    with torch.device("meta"):  # of a copy: the source keeps the checkpoint's dtype
        model = AutoModelForCausalLM.from_config(copy.deepcopy(source.config))
    twin, tied = twin_of(source.config.model_type), source.config.tie_word_embeddings
    embeddings, norm, own_head = (f"{place}.weight" for place in (twin.embeddings, twin.norm, twin.head))
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}  # tied heads stand once
    check_tensors(stored, wanted, spare=twin.spare(tied=tied), named=named)
    head = embeddings if tied else own_head
    if tied and own_head in stored and not checkpoint.same(embeddings, own_head):
        raise UserError(different_head(named))
    if isinstance(dtype, str):
        dtype = source.config.dtype or checkpoint.dtype(embeddings)
    layers = StreamedLayers(twin.layers, decoder_layers(model), checkpoint, dtype=dtype, device=device)
    model.set_submodule(twin.layers, layers)
    model.set_submodule(twin.embeddings, StreamedEmbedding(embeddings, checkpoint, dtype=dtype, device=device))
    model.set_submodule(twin.head, StreamedHead(head, checkpoint))
    read = checkpoint.read([norm], dtype=dtype, device=device)
    model.get_submodule(twin.norm).weight = nn.Parameter(read[norm])
    model.set_submodule(twin.rotary, type(model.get_submodule(twin.rotary))(config=model.config).to(device))
    model.config.dtype = dtype
    model.checkpoint = checkpoint
    try:
        model.generation_config = GenerationConfig.from_pretrained(
            source.path, revision=source.revision, local_files_only=source.offline
        )
    except OSError:
        log.debug("%s has no generation_config.json", source.path)
    except Exception as error:
        raise UserError(f"{named}: generation_config.json cannot be read ({one_line(error)})") from error
    return model.eval().requires_grad_(False)
