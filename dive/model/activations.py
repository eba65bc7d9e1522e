"""Where the hidden states of all tokens rest between layers."""

import logging
import shutil
import tempfile
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dive.errors import UserError

log = logging.getLogger(__name__)

SHARE = 0.5
"""Of the memory that is free, what hidden states may take."""


class Place(Enum):
    """Of hidden states between layers."""

    device = "device"
    host = "host"
    disk = "disk"


class HiddenStates:
    """Hidden states of all tokens, batch by batch, in one place; the place changes no number."""

    def __init__(self, device: torch.device, size: int, *, place: Place | None = None) -> None:
        """
        Args:
            device: where they are computed.
            size: bytes that they will take.
            place: by default the first of device, host and disk that has room.

        Raises:
            UserError: none has.
        """
        self.device = device
        self.place = choose_place(device, size) if place is None else place
        self._folder = tempfile.TemporaryDirectory(prefix="dive-") if self.place is Place.disk else None
        self._states: list[Tensor | Path] = []

    def append(self, states: Tensor) -> None:
        """Add a batch, (n, T, D)."""
        self._states.append(torch.empty(0))
        self[len(self._states) - 1] = states

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, index: int) -> Tensor:
        """A batch, on the device, or on the host if it rests elsewhere."""
        found = self._states[index]
        # A copy: what safetensors gives out lives in the mapped file, which is going to be written over.
        return load_file(found)["states"].clone() if isinstance(found, Path) else found

    def __setitem__(self, index: int, states: Tensor) -> None:
        if self._folder is not None:
            file = Path(self._folder.name) / f"{index:06d}.safetensors"
            save_file({"states": states.cpu().contiguous()}, file)
            self._states[index] = file
        else:
            self._states[index] = states.to(self.device if self.place is Place.device else "cpu")

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))


def choose_place(device: torch.device, size: int) -> Place:
    """The first of device, host and disk where ``size`` bytes have room.

    Raises:
        UserError: none.
    """
    if device.type == "cuda" and size <= SHARE * torch.cuda.mem_get_info(device)[0]:
        return Place.device
    if size <= SHARE * free_host_memory():
        return Place.host
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"hidden states of the calibration tokens take {size / 1e9:.1f} GB, host memory and {folder} have no room for them; "
            "lower calibration_domains.samples, or set TMPDIR to a larger disk"
        )
    log.info("hidden states (%.1f GB) rest in %s", size / 1e9, folder)
    return Place.disk


def free_host_memory() -> float:
    """Bytes that this process may still take: what the machine has available, or what its control group allows."""
    free = float("inf")
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024.0 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        log.debug("this system does not tell its free memory")
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no control group, or no limit ("max")
        pass
    return free
