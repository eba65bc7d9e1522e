"""Train the embedded model anew by its recipe: ``python dive/model/tiny/pretrain.py --output DIR``.

A tokenizer and a small dense Llama, from scratch, on the embedded texts. ``recipe.json`` beside this file holds every default;
an hour on two cores, less with ``--compile``.
"""

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dive.calibration_domains.embedded import embedded_texts
from dive.config import Schedule
from dive.errors import UserError
from dive.eval.perplexity import perplexity
from dive.progress import track
from dive.retrain.schedule import learning_rate_share

RECIPE = json.loads((Path(__file__).parent / "recipe.json").read_text(encoding="utf-8"))["configuration"]
SETTINGS = [name for name, value in RECIPE.items() if type(value) in (int, float)]
SEPARATOR = "\n\n"
"""Between documents."""
SPECIAL_EVERY = 4
"""Every so many boundaries between training documents are ``</s><s>``, which trains these two tokens."""


def train_tokenizer(texts: Sequence[str], vocabulary: int, positions: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with GPT-2's splitting rule, which every runtime knows; no special token is added."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer, length=len(texts))
    special = {"bos_token": "<s>", "eos_token": "</s>", "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=positions, **special)


def encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]) -> Tensor:
    """Token ids of all documents with what stands between them, (tokens,)."""
    plain, marked = tokenizer(SEPARATOR)["input_ids"], [tokenizer.eos_token_id, tokenizer.bos_token_id]
    ids: list[int] = []
    for number, piece in enumerate(tokenizer(list(documents), verbose=False)["input_ids"]):
        ids += piece
        ids += marked if number % SPECIAL_EVERY == SPECIAL_EVERY - 1 else plain
    return torch.tensor(ids, dtype=torch.long)


def batches(streams: Sequence[Tensor], s: argparse.Namespace, steps: int) -> Iterator[Tensor]:
    """Token ids (batch, length) of every step; now and then fewer and longer windows, which train all positions."""
    # Drawn by the root of a domain's size: even draws would repeat a small one too often.
    odds = np.sqrt([len(stream) for stream in streams])
    for step in range(steps):
        draw = np.random.default_rng((s.seed, step))
        length = s.positions if step % s.long_every == s.long_every - 1 else s.length
        windows = []
        for domain in draw.choice(len(streams), size=max(1, s.batch * s.length // length), p=odds / odds.sum()):
            offset = int(draw.integers(len(streams[domain]) - length + 1))
            windows.append(streams[domain][offset : offset + length])
        yield torch.stack(windows)


def train(model: LlamaForCausalLM, streams: Sequence[Tensor], s: argparse.Namespace) -> list[float]:
    """Next-token training; the loss of every step in nats."""
    steps = math.ceil(s.tokens / (s.batch * s.length))
    parameters = list(model.parameters())
    matrices, vectors = ([p for p in parameters if (p.ndim >= 2) is wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": s.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    # A longer second memory than 0.95: the steps are small.
    optimizer = torch.optim.AdamW(groups, lr=s.learning_rate, betas=(0.9, 0.99), fused=True)
    share = partial(learning_rate_share, steps=steps, schedule=Schedule.cosine, warmup=s.warmup, floor=s.floor)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    losses, drawn = [], batches(streams, s, steps)
    model.train()
    for _ in track(range(steps), "training", unit="steps"):
        ids = next(drawn)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, s.gradient_clip)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write the tokenizer under the class name that earlier versions of transformers know as well."""
    tokenizer.save_pretrained(directory)
    file = directory / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def measure(output: Path, tokenizer: PreTrainedTokenizerFast, s: argparse.Namespace) -> dict[str, float]:
    """{domain: perplexity} of the saved model, on the first adjoining windows of the domain's test text."""
    saved, found = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval(), {}
    for name, (_, test) in embedded_texts(s.domains).items():
        ids = torch.tensor(tokenizer(SEPARATOR.join(test), verbose=False)["input_ids"])
        rows = min(s.windows, len(ids) // s.length)
        if rows == 0:
            raise UserError(f"the test text of {name} has {len(ids)} tokens; lower --length")
        found[name] = perplexity(saved, ids[: rows * s.length].view(rows, s.length))
    return found


def pretrain(s: argparse.Namespace) -> dict[str, Any]:
    """Train tokenizer and model and write them to ``s.output`` with their recipe, which is returned.

    Raises:
        UserError: a domain is unknown or too short.
    """
    texts, start = embedded_texts(s.domains), time.monotonic()
    tokenizer = train_tokenizer([text for train, _ in texts.values() for text in train], s.vocabulary, s.positions)
    if len(tokenizer) != s.vocabulary:
        raise UserError(f"the texts give {len(tokenizer)} tokens; set --vocabulary {len(tokenizer)} or add domains")
    streams = {name: encode(tokenizer, documents) for name, (documents, _) in texts.items()}
    for name, stream in streams.items():
        if len(stream) < s.positions:
            raise UserError(f"the train text of {name} has {len(stream)} tokens; lower --positions")
    torch.manual_seed(s.seed)
    shape = {"hidden_size": s.hidden, "intermediate_size": s.channels, "num_hidden_layers": s.layers}
    shape |= {"num_attention_heads": s.heads, "num_key_value_heads": s.kv_heads, "head_dim": s.head_dim}
    shape |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    shape |= {"max_position_embeddings": s.positions, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=s.vocabulary, initializer_range=s.init, **shape))
    if s.compile:
        model.compile(dynamic=False)
    losses = train(model, list(streams.values()), s)
    model.half().save_pretrained(s.output)
    save_tokenizer(tokenizer, s.output)
    recipe: dict[str, Any] = {
        "configuration": {"domains": s.domains, **{name: getattr(s, name) for name in SETTINGS}, "compile": s.compile},
        "texts": {name: {"train_tokens": len(stream)} for name, stream in streams.items()},
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers")},
        "parameters": model.num_parameters(),
        "steps": len(losses),
        "tokens": len(losses) * s.batch * s.length,
        "seconds": round(time.monotonic() - start, 1),
        "first_loss": fmean(losses[:10]),
        "last_loss": fmean(losses[-50:]),
        "last_loss_steps": len(losses[-50:]),
        "perplexity": {name: round(value, 3) for name, value in measure(s.output, tokenizer, s).items()},
    }
    (s.output / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    return recipe


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; defaults are the recipe's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the finished model goes")
    parser.add_argument("--domains", nargs="+", help="embedded domains to train on; all by default")
    for name in SETTINGS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(RECIPE[name]), default=RECIPE[name], metavar="N")
    parser.add_argument("--compile", action="store_true", help="a third faster on a CPU; needs a C++ compiler")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        print(json.dumps(pretrain(parse())["perplexity"], indent=2))
    except UserError as error:
        sys.exit(f"error: {error}")
