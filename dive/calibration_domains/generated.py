"""Text that the dense model writes itself: as broad as what it was trained on, where nobody has that text any more.

Experts that are calibrated on a few domains lose the rest. A model's own samples stand for that rest (LLM-QAT, arXiv
2305.17888, section 3.1; as calibration text of pruning, arXiv 2410.17170).

Shapes: N sequences, T tokens of each, V vocabulary.
"""

from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dive.model.load import boundary_token
from dive.model.recipe import Dense
from dive.progress import track
from dive.store import Artifact, HasStore, Place, step

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS = 64
"""Sequences that are written at a time; what is drawn depends on it."""
FILE = "generated.safetensors"


def beginnings(tokenizer: "PreTrainedTokenizerBase", *, count: int, generator: torch.Generator) -> Tensor:
    """What each text begins with, (N, 1 or 2) int64: the boundary token, if there is one, and then any token.

    From the boundary alone a model writes what most of its documents begin with. A token drawn evenly from the vocabulary leads
    it to source code, lists and other languages as well.
    """
    others = torch.arange(len(tokenizer))
    others = others[~torch.isin(others, torch.tensor(tokenizer.all_special_ids, dtype=torch.int64))]
    drawn = others[torch.randint(len(others), (count, 1), generator=generator)]
    boundary = boundary_token(tokenizer)
    return drawn if boundary is None else torch.cat([torch.full_like(drawn, boundary), drawn], dim=1)


@torch.no_grad()
def sample(model: "PreTrainedModel", beginnings: Tensor, *, length: int, seed: int) -> Tensor:
    """Continue beginnings (N, B) int64 by tokens drawn from the model's own distribution, to (N, ``length``) int64.

    At temperature 1 over the whole vocabulary, so that the text's cross-entropy is the model's own entropy. A text that ends
    goes on with the next one.
    """
    ids = beginnings.to(model.device)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        # As arguments: in a configuration, what is None is taken from the model's own file, its end-of-text token among it.
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=length - ids.shape[1],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            eos_token_id=None,
            pad_token_id=0,
        )
    result: Tensor = found.cpu()
    return result


@step("generated", "calibration text that the dense model writes")
def write_text(
    place: Place,
    run: HasStore,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    model: Dense,
    samples: int,
    length: int,
    seed: int,
) -> None:
    """Sequences that the dense model writes.

    Args:
        tokenizer: the model's own.
        samples: N.
        length: T, tokens of each.
        seed: of what is drawn.
    """
    loaded = model.load()
    starts = beginnings(tokenizer, count=samples, generator=torch.Generator().manual_seed(seed)).split(ROWS)
    rows = [
        sample(loaded, some, length=length, seed=seed + number)
        for number, some in enumerate(track(starts, "writing text", unit="batch"))
    ]
    save_file({"tokens": torch.cat(rows)}, place.directory / FILE)


def read_text(artifact: Artifact) -> Tensor:
    """(N, T) int64, of :func:`write_text`."""
    return load_file(artifact.path / FILE)["tokens"]
