"""Text from a model, token by token: ``python -m dive.generate checkpoint=DIR prompt="Monday, 3"``."""

import sys
from dataclasses import dataclass

from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import MISSING

from dive.cli import run
from dive.config import Dtype, require


@dataclass(slots=True, kw_only=True)
class GenerateConfig:
    """What continues which text, and how."""

    checkpoint: str = MISSING
    """Directory of an export or of a dense model, a hub id, or ``embedded``."""
    prompt: str = MISSING
    compare: str | None = None
    """A second model that continues the same text: the dense one, named in the same ways."""
    max_new_tokens: int = 100
    temperature: float = 0.7
    """0 takes the likeliest token each time."""
    top_p: float = 0.95
    """Sample among the likeliest tokens that together have this probability."""
    seed: int = 42
    device: str = "auto"
    """``cpu``, ``cuda``, ``cuda:1``, or ``auto``."""
    dtype: Dtype = Dtype.float32
    """Element type of the weights; ``auto`` takes the checkpoint's own."""

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, f"max_new_tokens ({self.max_new_tokens}) must be at least 1")
        require(self.temperature >= 0.0, f"temperature ({self.temperature}) must not be negative")
        require(0.0 < self.top_p <= 1.0, f"top_p ({self.top_p}) must lie in (0, 1]")
        require(self.seed >= 0, f"seed ({self.seed}) must not be negative")


def generate(config: GenerateConfig) -> None:
    """Print the prompt and what each model makes of it, as the tokens come.

    Raises:
        UserError: a model cannot be loaded, or the text would be longer than its positions.
    """
    from dive.eval.generation import continue_text
    from dive.export import open_checkpoint
    from dive.model.load import load_tokenizer, resolve_device
    from dive.progress import quiet_libraries

    quiet_libraries()
    models = {"checkpoint": config.checkpoint} | ({"compare": config.compare} if config.compare else {})
    for option, path in models.items():
        source, load = open_checkpoint(
            path, dtype=config.dtype.value, device=resolve_device(config.device), where=option
        )
        tokenizer = load_tokenizer(source)
        if len(models) > 1:
            print(f"--- {path}")
        continue_text(
            load(),
            tokenizer,
            config.prompt,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=config.seed,
        )


def quoted(argument: str) -> str:
    """``prompt=a, b`` as ``prompt="a, b"``: to Hydra a bare comma is a sweep, and ``${...}`` a reference."""
    name, equals, text = argument.partition("=")
    if name != "prompt" or not equals:
        return argument
    return f"prompt={QuotedString(text.replace('${', chr(92) + '${'), Quote.double).with_quotes()}"


if __name__ == "__main__":
    sys.argv[1:] = [quoted(argument) for argument in sys.argv[1:]]
    run(generate, "generate", GenerateConfig)
