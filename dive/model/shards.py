"""Writing a checkpoint as sharded safetensors, tensor after tensor."""

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dive.errors import UserError
from dive.model.headers import INDEX


class ShardWriter:
    """Collects tensors to shards, writes each when it is full, and the index when all are there.

    Names and layout are those of transformers' ``save_pretrained``.
    """

    def __init__(self, directory: Path, *, dtype: torch.dtype, shard_bytes: int) -> None:
        """
        Args:
            directory: to write to.
            dtype: element type of every tensor.
            shard_bytes: what a shard holds at most; a larger tensor has one for itself.
        """
        self.directory, self.dtype, self.shard_bytes = directory, dtype, shard_bytes
        self.parameters = 0
        """Numbers written so far."""
        self._waiting: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._size = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor, which is copied where its type, device or layout differs."""
        size = tensor.numel() * self.dtype.itemsize
        if self._waiting and self._size + size > self.shard_bytes:
            self._write()
        # A clone of a slice: safetensors refuses tensors that share memory.
        found = tensor.to("cpu", self.dtype)
        shares = found.untyped_storage().nbytes() != size
        self._waiting[name] = found.clone(memory_format=torch.contiguous_format) if shares else found.contiguous()
        self._size += size
        self.parameters += tensor.numel()

    def close(self) -> None:
        """Write what waits, give the shards their names, and write the index."""
        self._write()
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"
            os.replace(self._file(number), self.directory / file)
            weight_map |= dict.fromkeys(names, file)
        metadata = {"total_parameters": self.parameters, "total_size": self.parameters * self.dtype.itemsize}
        index = {"metadata": metadata, "weight_map": weight_map}
        (self.directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _file(self, number: int) -> Path:
        return self.directory / f"unfinished-{number + 1:05d}.safetensors"

    def _write(self) -> None:
        if not self._waiting:
            return
        file = self._file(len(self._shards))
        save_file(self._waiting, file, metadata={"format": "pt"})
        for name, tensor in self._waiting.items():
            with safe_open(file, framework="pt") as stored:  # anew for each, or all of the file would stay mapped
                if not torch.equal(stored.get_tensor(name), tensor):
                    raise UserError(f"{file}: {name} differs after reading it back")
        self._shards.append(list(self._waiting))
        self._waiting, self._size = {}, 0
