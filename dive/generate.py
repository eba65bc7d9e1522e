"""Continue a text with any model, token by token: ``python -m dive.generate checkpoint=DIR prompt="Monday, 3"``."""

import sys
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import MISSING

from dive.bounds import bounded, check_bounds
from dive.cli import run
from dive.config import MAX_SEED, Dtype
from dive.errors import require
from dive.model.architecture import local_model


@dataclass(slots=True, kw_only=True)
class GenerateConfig:
    """What continues which text, and how."""

    checkpoint: str = MISSING
    """Directory of an export or of a dense model, a GGUF file, a hub id, or ``embedded``."""
    prompt: str = MISSING
    """Message to a chat model, or the text to continue."""
    chat: bool | None = None
    """Put the prompt to the model as a user's message, by its chat template; null does where the model has one."""
    compare: str | None = None
    """A second model for the same prompt: the dense one, named in the same ways."""
    max_new_tokens: int = bounded(100, at_least=1, at_most=10**6)
    """Longest answer or continuation."""
    temperature: float = bounded(0.7, at_least=0, at_most=1000)
    """0 takes the likeliest token each time."""
    top_p: float = bounded(0.95, above=0, at_most=1)
    """Sample among the likeliest tokens that together have this probability."""
    seed: int = bounded(42, at_least=0, at_most=MAX_SEED)
    """Seed of what is sampled."""
    device: str = "auto"
    """``cpu``, ``cuda``, ``cuda:1``, or ``auto``."""
    dtype: Dtype = Dtype.float32
    """Element type of the weights; ``auto`` takes the checkpoint's own."""
    store: str = "outputs/store"
    """Directory that a GGUF file is de-quantised into."""

    def __post_init__(self) -> None:
        check_bounds(self)
        require(
            self.temperature == 0 or self.temperature >= 0.01,
            f"temperature ({self.temperature}) must be 0, or at least 0.01",
        )


def generate(config: GenerateConfig) -> None:
    """Print the prompt and what each model makes of it, as the tokens come.

    Raises:
        UserError: a model cannot be loaded, or has no chat template that is asked for; or the text would be longer than its
            positions.
    """
    local_model(config.checkpoint, "checkpoint")  # before the heavy imports
    local_model(config.compare or "embedded", "compare")
    named = config.checkpoint + (f" and {config.compare}" if config.compare else "")
    print(f"loading {named}", file=sys.stderr, flush=True)  # beside the text, which may go elsewhere
    from dive.eval.generation import continue_text
    from dive.export import open_checkpoint
    from dive.model.chat import conversation
    from dive.model.load import load_tokenizer, resolve_device
    from dive.progress import quiet_libraries
    from dive.store import Store, WithStore

    quiet_libraries()
    models = {"checkpoint": config.checkpoint} | ({"compare": config.compare} if config.compare else {})
    for option, path in models.items():
        device = resolve_device(config.device, "device")
        model = open_checkpoint(path, dtype=config.dtype.value, device=device, where=option)
        if model.source.gguf is not None:
            model = model.in_safetensors(WithStore(Store(Path(config.store))))
        tokenizer = load_tokenizer(model.source)
        chats, prompt = bool(tokenizer.chat_template), config.prompt
        require(chats or not config.chat, f"chat=true: {option}={path} has no chat template; set chat=false")
        if chats and config.chat is not False:
            prompt = conversation(tokenizer, [{"role": "user", "content": prompt}], "prompt", where=option, prompt=True)
            how = "is a user's message, by the chat template; chat=false goes on from it as text"
        else:
            how = "is text to go on from" + (
                "; chat=true makes it a user's message" if chats else ", without a chat template"
            )
        print(f"{path}: the prompt {how}", file=sys.stderr, flush=True)
        if len(models) > 1:
            print(f"--- {path}")
        continue_text(
            model.load(),
            tokenizer,
            prompt,
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


def command() -> None:
    """Compose the command line and do it."""
    sys.argv[1:] = [quoted(argument) for argument in sys.argv[1:]]
    run(generate, "generate", GenerateConfig)


if __name__ == "__main__":
    command()
