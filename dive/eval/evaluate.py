"""Measuring one model on all evaluation texts."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dive.calibration_domains.sampling import Tokenize, evaluation_windows
from dive.calibration_domains.texts import DomainTexts, load_eval_set, refuse_overlap, training_documents
from dive.config import EvalConfig
from dive.errors import UserError
from dive.eval.perplexity import geometric_mean, perplexity_of, token_nll
from dive.model.chat import Chat, Conversation
from dive.progress import track
from dive.ranks import ALONE, Ranks
from dive.store import identity

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(slots=True)
class EvaluationTexts:
    """Windows to measure on."""

    domains: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """{length: {domain: (N, length)}}"""
    sets: dict[str, Tensor] = field(default_factory=dict)
    """{"<set>@<length>": (N, length)}"""
    documents: dict[str, dict[str, list[str]]] = field(default_factory=lambda: {"domains": {}, "sets": {}})
    """{"domains" or "sets": {name: what its windows are cut from}}"""

    def all(self) -> dict[str, Tensor]:
        """Every matrix under its key in the results."""
        named = {f"{domain}@{length}": w for length, by in self.domains.items() for domain, w in by.items()}
        return named | self.sets


def evaluation_texts(
    config: EvalConfig,
    domains: Sequence[DomainTexts],
    tokenize: Tokenize,
    *,
    corpus: Sequence[str] = (),
    chat: Chat | None = None,
) -> EvaluationTexts:
    """Cut the test texts into windows.

    Args:
        corpus: retraining documents beside the domains' own.
        chat: what makes documents of lists of messages in ``eval.sets``.

    Raises:
        UserError: a text is too short, unreadable, or stands in the training text.
    """
    texts = EvaluationTexts()
    seen = itertools.chain(corpus, *(domain.train for domain in domains))
    training = training_documents(() if config.allow_overlap else seen)
    for domain in domains:
        refuse_overlap(training, domain.test, name=f"calibration_domains: {domain.name!r}")
        texts.documents["domains"][domain.name] = domain.test
    for length in config.lengths if domains else ():
        texts.domains[length] = {
            d.name: evaluation_windows(d.test, tokenize, length=length, windows=config.windows, name=d.name)
            for d in domains
        }
    for name, entry in config.sets.items():
        documents = load_eval_set(name, entry, chat=chat)
        refuse_overlap(training, documents, name=f"eval.sets.{name}")
        texts.documents["sets"][name] = documents
        if entry.separator is not None and not any(isinstance(document, Conversation) for document in documents):
            documents = [entry.separator.join(documents)]
        for length in entry.lengths:
            texts.sets[f"{name}@{length}"] = evaluation_windows(
                documents, tokenize, length=length, windows=config.windows, name=name
            )
    return texts


def evaluate(
    model: "PreTrainedModel", texts: EvaluationTexts, *, batch: int, description: str, ranks: Ranks = ALONE
) -> dict[str, float]:
    """Perplexity under every key, and ``mean``: the geometric mean over the domains, if any, at the first length.

    Further lengths have means of their own, ``mean@<length>``.

    Args:
        batch: windows per forward pass.
        ranks: the processes that measure together, each its share of the windows.

    Raises:
        UserError: a perplexity is not finite.
    """
    items = list(texts.all().items())
    values: dict[str, float] = {}
    for key, windows in track(items, f"evaluating {description}"):
        own = torch.tensor(token_nll(model, ranks.part(windows), batch=batch), dtype=torch.float64)
        values[key] = perplexity_of(*ranks.sum(own).tolist())
        if not math.isfinite(values[key]):
            raise UserError(
                f"{description}: the perplexity of {key} is {values[key]}: weights that are not finite, or a model beyond the "
                f"range of {str(model.dtype).removeprefix('torch.')}; set model.dtype=float32, or look at the weights"
            )
    return values | means(values, texts)


def means(values: Mapping[str, float], texts: EvaluationTexts) -> dict[str, Any]:
    """Geometric means over the domains, by length; none without domains."""
    if not texts.domains:
        return {}
    found = {
        f"mean@{length}": geometric_mean([values[f"{domain}@{length}"] for domain in by])
        for length, by in texts.domains.items()
    }
    first = next(iter(found.values()))
    return {"mean": first} | (found if len(found) > 1 else {})


@identity.register
def _(value: EvaluationTexts) -> dict[str, Any]:
    """The windows, and over which domains means are taken in which order."""
    windows = {name: identity(matrix) for name, matrix in value.all().items()}
    return {"windows": windows, "means_over": [[length, *by] for length, by in value.domains.items()]}
