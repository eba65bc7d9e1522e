"""Train a small dense Llama from scratch on the embedded texts: ``python -m dive.pretrain [overrides]``.

The model that comes with the package was made with it. It is a model to try every stage on without a network
or a GPU: large enough that domains use different FFN channels, small enough for a CPU.
"""

import json
import logging
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dive.cli import run
from dive.config import require
from dive.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

log = logging.getLogger(__name__)

SEPARATOR = "\n\n"
"""Between documents."""
BEGIN, END = "<s>", "</s>"
SPECIAL_EVERY = 4
"""Every so many boundaries between training documents are ``</s><s>``, which trains these two tokens."""


@dataclass(slots=True, kw_only=True)
class PretrainConfig:
    """A tokenizer, a dense model and its training."""

    output: str = "outputs/pretrain/model"
    """Directory that the finished model is written to."""
    directory: str = "outputs/pretrain/run"
    """Directory of the tokenizer, the last checkpoint and the metrics of a run that is under way."""
    resume: bool = False
    """Go on from the last checkpoint in ``directory``."""
    domains: list[str] | None = None
    """Embedded domains to train on; all if null."""
    seed: int = 42
    vocabulary: int = 4096
    """Tokens of the byte-level BPE tokenizer, the two special ones included."""
    hidden: int = 192
    """Width of the residual stream."""
    channels: int = 768
    """Channels of every FFN."""
    layers: int = 5
    heads: int = 6
    kv_heads: int = 3
    head_dim: int = 32
    positions: int = 1024
    """Longest sequence, in tokens."""
    init: float = 0.06
    """Standard deviation of the initial weights."""
    tokens: int = 8_000_000
    """Training tokens; rounded up to whole steps."""
    batch: int = 8
    """Windows per step."""
    length: int = 256
    """Tokens per window."""
    long_every: int = 8
    """Every so many steps the windows are ``positions`` tokens long, and fewer, to train all positions."""
    learning_rate: float = 4e-3
    """Peak."""
    warmup: float = 0.03
    """Share of the steps over which the learning rate rises."""
    floor: float = 0.1
    """Final learning rate as a share of the peak, which half a cosine leads down to."""
    weight_decay: float = 0.1
    """Of the matrices; vectors have none."""
    gradient_clip: float = 1.0
    """Largest gradient norm."""
    accelerator: str = "cpu"
    precision: str = "32-true"
    """Lightning precision."""
    compile: bool = False
    """Run the training through ``torch.compile``: a third faster on a CPU, needs a C++ compiler."""
    windows: int = 12
    """Test windows per domain, of ``length`` tokens."""
    checkpoint_every: int = 100
    """Optimiser steps between checkpoints."""
    log_every: int = 10
    """Optimiser steps between logged values."""

    def __post_init__(self) -> None:
        positive = (
            "hidden",
            "channels",
            "layers",
            "heads",
            "kv_heads",
            "tokens",
            "batch",
            "long_every",
            "windows",
            "checkpoint_every",
            "log_every",
        )
        for name in positive:
            require(getattr(self, name) >= 1, f"{name} ({getattr(self, name)}) must be at least 1")
        require(self.vocabulary >= 258, f"vocabulary ({self.vocabulary}) must hold 256 bytes and 2 special tokens")
        require(self.length >= 2, f"length ({self.length}) must be at least 2")
        require(
            self.length <= self.positions,
            f"length ({self.length}) must not exceed positions ({self.positions}); raise positions",
        )
        require(
            self.heads % self.kv_heads == 0,
            f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})",
        )
        require(
            self.head_dim >= 2 and self.head_dim % 2 == 0,
            f"head_dim ({self.head_dim}) must be even and positive",
        )
        require(self.init > 0, f"init ({self.init}) must be positive")
        require(self.learning_rate > 0, f"learning_rate ({self.learning_rate}) must be positive")
        require(0 <= self.warmup < 1, f"warmup ({self.warmup}) must lie in [0, 1)")
        require(0 <= self.floor <= 1, f"floor ({self.floor}) must lie in [0, 1]")
        require(self.weight_decay >= 0, f"weight_decay ({self.weight_decay}) must not be negative")
        require(self.gradient_clip > 0, f"gradient_clip ({self.gradient_clip}) must be positive")
        require(
            self.domains is None or len(self.domains) > 0,
            "domains names no domain; null takes all embedded ones",
        )

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return math.ceil(self.tokens / (self.batch * self.length))


def train_tokenizer(texts: Sequence[str], vocabulary: int, positions: int) -> "PreTrainedTokenizerFast":
    """Byte-level BPE with GPT-2's splitting rule, which every runtime knows; no special token is added."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer, length=len(texts))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BEGIN,
        eos_token=END,
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", directory: Path) -> None:
    """Write the tokenizer under the class name that earlier versions of transformers know as well."""
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def encode(tokenizer: "PreTrainedTokenizerFast", documents: Sequence[str]) -> "Tensor":
    """Token ids of all documents with what stands between them, (tokens,)."""
    import torch

    plain: list[int] = tokenizer(SEPARATOR)["input_ids"]
    marked: list[int] = [tokenizer.eos_token_id, tokenizer.bos_token_id]
    ids: list[int] = []
    for number, piece in enumerate(tokenizer(list(documents), verbose=False)["input_ids"]):
        ids += piece
        ids += marked if number % SPECIAL_EVERY == SPECIAL_EVERY - 1 else plain
    return torch.tensor(ids, dtype=torch.long)


def build_model(config: PretrainConfig, tokenizer: "PreTrainedTokenizerFast") -> "LlamaForCausalLM":
    """A dense Llama with random weights and tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.hidden,
            intermediate_size=config.channels,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.positions,
            tie_word_embeddings=True,
            initializer_range=config.init,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def perplexities(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    tests: Mapping[str, Sequence[str]],
    *,
    length: int,
    windows: int,
) -> dict[str, float]:
    """Perplexity of each domain's test text: its first ``windows`` adjoining windows of ``length`` tokens."""
    import torch

    model.eval()
    found: dict[str, float] = {}
    for name, documents in tests.items():
        ids = torch.tensor(tokenizer(SEPARATOR.join(documents), verbose=False)["input_ids"])
        rows = min(windows, len(ids) // length)
        if rows == 0:
            raise UserError(f"length: the test text of {name} has {len(ids)} tokens, fewer than {length}; lower length")
        batch = ids[: rows * length].view(rows, length).to(model.device)
        with torch.no_grad():
            found[name] = math.exp(float(model(input_ids=batch, labels=batch).loss))
    return found


def model_card(recipe: Mapping[str, Any]) -> str:
    """README of the model's directory."""
    config = recipe["configuration"]
    rows = "\n".join(f"| {name} | {value:.2f} |" for name, value in recipe["perplexity"].items())
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# Tiny dense Llama

A dense Llama of {recipe["parameters"]:,} parameters ({config["layers"]} layers, width {config["hidden"]},
{config["channels"]} FFN channels, {config["vocabulary"]} tokens of byte-level BPE), trained from scratch with
`python -m dive.pretrain` on texts that come with Python and this package's dependencies: source code,
documentation, headers, licences and generated exercises. It exists to try every stage of DIVE on a CPU
without a network. It knows little and is of no use for anything else.

Trained on {recipe["tokens"]:,} tokens in {recipe["steps"]:,} steps; the mean loss of the last
{recipe["last_loss_steps"]} steps was {recipe["last_loss"]:.3f} nats. `recipe.json` holds the whole
configuration and the versions.

Perplexity on the test texts ({config["windows"]} windows of {config["length"]} tokens each), measured with
the weights of this directory:

| domain | perplexity |
|---|---:|
{rows}
"""


def pretrain(config: PretrainConfig) -> None:
    """Train tokenizer and model and write them to ``config.output``.

    Raises:
        UserError: a domain is unknown or too short, or there is no checkpoint to resume from.
    """
    from dive.calibration_domains.embedded import DOMAINS, embedded_texts

    directory, output = Path(config.directory), Path(config.output)
    last = directory / "last.ckpt"
    if config.resume and not last.is_file():
        raise UserError(f"resume: {last} does not exist; leave out resume=true or correct directory")
    unknown = sorted(set(config.domains or ()) - set(DOMAINS))
    require(not unknown, f"domains: {unknown} not among {', '.join(DOMAINS)}")
    texts = embedded_texts(config.domains)

    import torch
    from lightning.pytorch import Trainer, seed_everything
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from dive.pretrain_module import Pretraining, Windows

    seed_everything(config.seed, verbose=False)
    if config.resume:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    else:
        tokenizer = train_tokenizer(
            [text for train, _ in texts.values() for text in train], config.vocabulary, config.positions
        )
        if len(tokenizer) != config.vocabulary:
            raise UserError(
                f"vocabulary: the texts give {len(tokenizer)} tokens; set vocabulary={len(tokenizer)} or add domains"
            )
        save_tokenizer(tokenizer, directory)
    streams = {name: encode(tokenizer, train) for name, (train, _) in texts.items()}
    for name, stream in streams.items():
        if len(stream) < config.positions:
            raise UserError(f"domains: the train text of {name} has {len(stream)} tokens; lower positions")
    log.info("%s training tokens in %d domains", f"{sum(map(len, streams.values())):,}", len(streams))

    model = build_model(config, tokenizer)
    if config.compile:
        model.compile(dynamic=False)
    windows = Windows(
        list(streams.values()),
        batch=config.batch,
        length=config.length,
        long=config.positions,
        long_every=config.long_every,
        seed=config.seed,
    )
    module = Pretraining(
        model,
        windows,
        steps=config.steps,
        learning_rate=config.learning_rate,
        warmup=config.warmup,
        floor=config.floor,
        weight_decay=config.weight_decay,
    )
    trainer = Trainer(
        accelerator=config.accelerator,
        devices=1,
        precision=config.precision,  # type: ignore[arg-type]
        max_steps=config.steps,
        gradient_clip_val=config.gradient_clip,
        log_every_n_steps=config.log_every,
        logger=CSVLogger(directory, name="metrics"),
        callbacks=[
            ModelCheckpoint(
                directory,
                filename="last",
                every_n_train_steps=config.checkpoint_every,
                enable_version_counter=False,
            )
        ],
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    log.info("%s parameters, %d steps", f"{model.num_parameters():,}", config.steps)
    trainer.fit(
        module,
        DataLoader(windows, batch_size=None),
        ckpt_path=last if config.resume else None,
        weights_only=True,
    )
    if trainer.global_step < config.steps:
        # Lightning ends quietly on Ctrl-C; half a model must not pass for a finished one.
        log.warning("stopped at step %d; resume=true goes on from %s", trainer.global_step, last)
        raise KeyboardInterrupt

    output.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(output)
    save_tokenizer(tokenizer, output)
    saved = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    measured = perplexities(
        saved,
        tokenizer,
        {name: test for name, (_, test) in texts.items()},
        length=config.length,
        windows=config.windows,
    )
    settings = asdict(config)
    for name in ("output", "directory", "resume"):
        del settings[name]
    recipe = {
        "configuration": settings,
        "texts": {name: {"train_tokens": len(stream)} for name, stream in streams.items()},
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "lightning", "transformers", "tokenizers")},
        },
        "parameters": saved.num_parameters(),
        "steps": config.steps,
        "tokens": config.steps * config.batch * config.length,
        "seconds": round(module.seconds, 1),
        "first_loss": sum(module.first_losses) / len(module.first_losses),
        "last_loss": sum(module.last_losses) / len(module.last_losses),
        "last_loss_steps": len(module.last_losses),
        "perplexity": {name: round(value, 3) for name, value in measured.items()},
    }
    (output / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    (output / "README.md").write_text(model_card(recipe), encoding="utf-8")
    for name, value in measured.items():
        log.info("%-20s perplexity %.2f", name, value)
    log.info("written to %s", output)


if __name__ == "__main__":
    run(pretrain, "pretrain", PretrainConfig)
