"""``quantised.json``: what became of an export that was quantised, as it is kept beside its weights."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from dive.errors import UserError
from dive.results import read_as

FILE = "quantised.json"
TOOLS = {"llm_compressor": "llm-compressor", "llama_cpp": "llama.cpp of llama-cpp-python"}
"""As people write them."""


@dataclass(slots=True, kw_only=True)
class Quantised:
    """One export in one scheme, and what that costs."""

    checkpoint: str
    """Directory of the export."""
    model: str
    """Its class."""
    scheme: str
    stored: str
    """How numbers are stored."""
    tool: str
    version: str
    group: int | None = None
    """Columns that share a scale, where groups do."""
    bytes_before: int = 0
    bytes_after: int = 0
    """Of weights."""
    texts: str = ""
    """What perplexity was measured on."""
    predicted: int = 0
    """Tokens of it."""
    perplexity_before: float = 0.0
    """In transformers, in float32."""
    perplexity_after: float = 0.0
    """With the quantised weights, read from the disk."""
    measured_in: str = ""
    """What computed the second: ``transformers 5.17.0``."""
    trouble: str | None = None
    """Why transformers does not load it as it is; none where it does, or is not meant to."""
    calibration_tokens: int = 0
    every_expert: bool = False
    """Whether every expert saw every token."""
    reached: dict[str, list[int]] = field(default_factory=dict)
    """{layer: calibration tokens that its router sent to each expert}"""
    date: str = ""

    @property
    def is_gguf(self) -> bool:
        """Whether it is one GGUF file and no directory of safetensors."""
        return self.tool == "llama_cpp"

    @property
    def how(self) -> str:
        """How weights are stored, for people."""
        return self.stored.format(group=self.group)

    @property
    def made_by(self) -> str:
        """Tool and release, for people."""
        return f"{TOOLS[self.tool]} {self.version}"

    @property
    def calibrated(self) -> str:
        """What it was calibrated on, for people; nothing where it was not."""
        if not self.reached:
            return ""
        least = min(min(counts) for counts in self.reached.values())
        each = "every expert saw all of them" if self.every_expert else f"the least used expert saw {least:,}"
        return f"Calibrated on {self.calibration_tokens:,} tokens of training texts; {each}"


def read_quantised(file: Path) -> Quantised:
    """What stands in ``quantised.json``.

    Raises:
        UserError: it cannot be read.
    """
    try:
        found: Quantised = read_as(Quantised, json.loads(file.read_text(encoding="utf-8")), str(file))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read; quantise again") from error
    return found


def read_beside(directory: Path) -> Quantised | None:
    """What stands beside the weights of a directory; none where they are not quantised by :mod:`dive.quantise`.

    Raises:
        UserError: it cannot be read.
    """
    return read_quantised(directory / FILE) if (directory / FILE).is_file() else None


def bytes_of(path: Path) -> int:
    """Of the weights in a directory, or of a file."""
    files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.gguf")]
    return sum(file.stat().st_size for file in files)
