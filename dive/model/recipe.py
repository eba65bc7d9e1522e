"""A model as a recipe: what tells it apart, and how to get it. Nothing is loaded before a step needs its weights."""

import contextlib
import ctypes
import gc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from dive.config import Load, ModelConfig
from dive.model.load import DenseSource, in_safetensors, load_weights, locate_dense, resolve_device
from dive.model.streamed import load_streamed
from dive.store import Artifact, HasStore, identity, key_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Make = Callable[[], "PreTrainedModel"]
LoadDense = Callable[[DenseSource], "PreTrainedModel"]


class Model(Protocol):
    """Dense, or assembled from what steps have made."""

    @property
    def key(self) -> str:
        """Differs wherever the weights do; part of the key of every step that takes the model."""

    @property
    def routed(self) -> bool:
        """Whether it has routers."""

    @property
    def artifact(self) -> Artifact | None:
        """What its own weights rest in, where a step made them."""

    @property
    def seconds(self) -> float:
        """What making these took, whenever that was."""

    @property
    def tokens(self) -> int:
        """Retraining tokens of its last stage."""

    @property
    def trained(self) -> int:
        """Parameters that its last stage trained."""

    def load(self) -> "PreTrainedModel":
        """The model in evaluation mode, frozen, for reading only: whoever asks next gets the same one."""


class Slot:
    """Holds the assembled model that was asked for last. There is never more than one beside the dense model."""

    def __init__(self) -> None:
        self._key: str | None = None
        self._model: PreTrainedModel | None = None

    def get(self, key: str, make: Make) -> "PreTrainedModel":
        """The model of this key, made if it is not here; the one before it is let go first."""
        if self._model is None or self._key != key:
            self.clear()
            self._key, self._model = key, make()
        return self._model

    def take(self, key: str, make: Make) -> "PreTrainedModel":
        """The same for one who changes it: the slot forgets it."""
        model = self.get(key, make)
        self.clear()
        return model

    def clear(self) -> None:
        """Let go of the model."""
        self._key = self._model = None
        give_back()


def give_back() -> None:
    """Give the system the memory of what nobody uses any more."""
    gc.collect()  # Lightning's objects hold each other in circles: a trained model and Adam's states would stay
    with contextlib.suppress(OSError, AttributeError):  # glibc alone keeps gigabytes between what is still in use
        ctypes.CDLL(None).malloc_trim(0)


@dataclass(slots=True)
class Dense:
    """A model as its checkpoint holds it: the dense one that a run starts from, or any other to be measured."""

    source: DenseSource
    device: torch.device
    make: LoadDense
    """Loads the weights."""
    slot: Slot = field(default_factory=Slot)
    """For the models assembled from it."""
    _model: "PreTrainedModel | None" = None

    @classmethod
    def locate(cls, config: ModelConfig) -> "Dense":
        """Find the configured model and read its configuration; its weights wait.

        Raises:
            UserError: it is not there, not readable, or of no supported family; or the device does not exist.
        """
        assert config.dtype is not None, "settled by the device"
        source = locate_dense(config.path, config.revision, dtype=config.dtype.value)
        device = resolve_device(config.device)
        dtype = source.dtype if source.dtype == "auto" else getattr(torch, source.dtype)
        load = load_streamed if config.load is Load.streamed else load_weights
        return cls(source, device, partial(load, dtype=dtype, device=device))

    def in_safetensors(self, run: HasStore) -> "Dense":
        """The same, with weights and tokenizer where steps can read them: see :func:`dive.model.load.in_safetensors`."""
        return replace(self, source=in_safetensors(self.source, run))

    @property
    def key(self) -> str:
        return key_of("dense", {"model": self.source.fingerprint, "dtype": self.source.dtype})

    @property
    def routed(self) -> bool:
        return False

    @property
    def artifact(self) -> Artifact | None:
        return None

    @property
    def seconds(self) -> float:
        return 0.0

    @property
    def tokens(self) -> int:
        return 0

    @property
    def trained(self) -> int:
        return 0

    @property
    def channels(self) -> int:
        """F, channels of each FFN."""
        return self.source.channels

    def load(self) -> "PreTrainedModel":
        if self._model is None:
            self._model = self.make(self.source)
        return self._model


@identity.register
def _(value: Dense) -> str:
    return value.key
