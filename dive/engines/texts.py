"""What every engine is asked: texts to give probabilities of, and beginnings to go on from.

Shapes: N texts, T tokens of a text.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from dive.calibration_domains.embedded import embedded_texts
from dive.calibration_domains.sampling import evaluation_windows
from dive.calibration_domains.texts import load_domains
from dive.config import CalibrationDomainsConfig
from dive.errors import UserError
from dive.model.chat import conversation
from dive.model.load import document_tokens
from dive.results import FILE, Results, read_results

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dive.calibration_domains.texts import DomainTexts

EMBEDDED = ("python_code", "language_reference", "c_headers", "arithmetic")
"""Embedded domains whose test texts are taken where there is no run beside the checkpoint."""
LENGTH = 256
"""Tokens of each of their windows, at most."""
BEGINNING = 32
"""Tokens of a beginning, at most; and at most half of its text."""


@dataclass(slots=True, kw_only=True)
class Question:
    """Token ids, the same for every engine."""

    source: str
    """Where the texts come from, for people."""
    texts: list[list[int]]
    """(N, T), of several lengths where prompts were given."""
    prompts: list[list[int]]
    """Beginnings to be continued."""
    tokens: int
    """Tokens of each continuation."""
    measured: float | None = None
    """Perplexity that the run beside the checkpoint measured of its last model on just these texts, where it did."""

    @property
    def predicted(self) -> int:
        """Tokens whose probabilities are compared."""
        return sum(len(text) - 1 for text in self.texts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is asked."""

    budget: int
    """Most tokens of all texts."""
    continuations: int
    """Texts that are gone on from, at most."""
    tokens: int
    """Of each continuation."""
    positions: int
    """Of the model."""


def question(checkpoint: Path, prompts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", sizes: Sizes) -> Question:
    """The prompts where there are any, else texts of the run beside the checkpoint, else embedded ones.

    Raises:
        UserError: a prompt is too short or too long, or the run's texts cannot be had any more.
    """
    if prompts:
        return given(prompts, tokenizer, sizes)
    results = run_beside(checkpoint)
    if results is not None and results.evaluation.domains:
        return of_run(results, tokenizer, sizes)
    return of_embedded(tokenizer, sizes)


def run_beside(checkpoint: Path) -> Results | None:
    """Results of the run that wrote this checkpoint; none where no such run is beside it.

    Raises:
        UserError: ``results.json`` is there and cannot be read.
    """
    directory = checkpoint.resolve().parent
    if not (directory / FILE).is_file():
        return None
    results = read_results(directory)
    return results if Path(results.export or "").name == checkpoint.resolve().name else None


def given(prompts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", sizes: Sizes) -> Question:
    """Prompts of the user's, whose probabilities are compared and which are gone on from.

    Raises:
        UserError: one has no two tokens, or too many for the model.
    """
    ids = [document_tokens(tokenizer, prompt) for prompt in prompts]
    for prompt, row in zip(prompts, ids, strict=True):
        if len(row) < 2:
            raise UserError(f"prompts: {prompt!r} has fewer than two tokens, and nothing to compare; lengthen it")
        if len(row) + sizes.tokens > sizes.positions:
            raise UserError(
                f"prompts: the {len(row)} tokens of one and max_new_tokens ({sizes.tokens}) exceed the model's "
                f"{sizes.positions} positions; "
                "shorten it or lower max_new_tokens"
            )
    return Question(source=f"{len(ids)} prompts", texts=ids, prompts=ids, tokens=sizes.tokens)


def of_run(results: Results, tokenizer: "PreTrainedTokenizerBase", sizes: Sizes) -> Question:
    """Test texts of the run: whole domains as it measured them, as many as fit, or the beginning of the first.

    Raises:
        UserError: the run's texts cannot be had any more.
    """
    from omegaconf.errors import OmegaConfBaseException

    settings, names = results.run.config, results.evaluation.domains
    length, count = int(settings["eval"]["lengths"][0]), settings["eval"]["windows"]
    fitting = max(1, sizes.budget // length)
    domains = names[: max(1, fitting // count)] if count else names[:1]
    try:
        tokenize = partial(document_tokens, tokenizer)
        windows = {
            each.name: evaluation_windows(each.test, tokenize, length=length, windows=count or fitting, name=each.name)
            for each in domains_of(results, domains, tokenizer)
        }
    except (UserError, OmegaConfBaseException) as error:
        raise UserError(
            f"the texts of the run beside the checkpoint cannot be read ({error}); set prompts=[TEXT,...] to compare on others"
        ) from error
    asked = _question("the run's test texts", windows, fitting, sizes)
    figures = results.stages[-1].perplexity if results.stages else {}
    counts = {f"{name}@{length}": len(rows) for name, rows in windows.items()}
    total = sum(counts.values())
    if count and length < sizes.positions and total <= fitting and counts.keys() <= figures.keys():
        asked.measured = math.exp(sum(n * math.log(figures[key]) for key, n in counts.items()) / total)
    return asked


def domains_of(results: Results, names: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> "list[DomainTexts]":
    """Texts of domains of a run.

    Raises:
        UserError: they cannot be had any more.
        OmegaConfBaseException: the run's configuration is another release's.
    """
    from omegaconf import OmegaConf

    settings = results.run.config
    schema = OmegaConf.structured(CalibrationDomainsConfig)
    typed = OmegaConf.to_object(OmegaConf.merge(schema, settings["calibration_domains"], {"domains": list(names)}))
    assert isinstance(typed, CalibrationDomainsConfig)
    return load_domains(typed, seed=int(settings["seed"]), chat=partial(conversation, tokenizer, where="checkpoint"))


def calibration(checkpoint: Path, tokenizer: "PreTrainedTokenizerBase", *, tokens: int, length: int) -> list[list[int]]:
    """Sequences of ``length`` from training texts of all domains of the run beside the checkpoint, or of embedded ones.

    Each domain gives as many, up to ``tokens`` in all, as far as its text goes.

    Raises:
        UserError: the run's texts cannot be had any more, or do not fill one sequence.
    """
    from omegaconf.errors import OmegaConfBaseException

    results = run_beside(checkpoint)
    if results is not None and results.evaluation.domains:
        try:
            found = domains_of(results, results.evaluation.domains, tokenizer)
        except (UserError, OmegaConfBaseException) as error:
            raise UserError(
                f"the texts of the run beside the checkpoint, which are calibrated on, cannot be read ({error}); "
                "put them back, or move the checkpoint away from its run to take embedded ones"
            ) from error
        texts = {each.name: each.train for each in found}
    else:
        texts = {name: train for name, (train, _) in embedded_texts(EMBEDDED).items()}
    windows = -(-max(1, tokens // length) // len(texts))
    rows: list[list[int]] = []
    for name, train in texts.items():
        tokenize = partial(document_tokens, tokenizer)
        rows += evaluation_windows(train, tokenize, length=length, windows=windows, name=name).tolist()
    return rows


def of_embedded(tokenizer: "PreTrainedTokenizerBase", sizes: Sizes) -> Question:
    """Test texts of four embedded domains, for a checkpoint without its run.

    Raises:
        UserError: the tokens do not fill one window.
    """
    length = min(LENGTH, sizes.positions - 1, sizes.budget)
    fitting = max(1, sizes.budget // length)
    tokenize = partial(document_tokens, tokenizer)
    windows = {
        name: evaluation_windows(test, tokenize, length=length, windows=-(-fitting // len(EMBEDDED)), name=name)
        for name, (_, test) in embedded_texts(EMBEDDED).items()
    }
    return _question("embedded test texts", windows, fitting, sizes)


def _question(source: str, windows: Mapping[str, Tensor], fitting: int, sizes: Sizes) -> Question:
    """The first ``fitting`` windows; engines that go on by a token at least take one less than all positions."""
    rows: list[list[int]] = [row for each in windows.values() for row in each[:, : sizes.positions - 1].tolist()]
    rows = rows[:fitting]
    beginning = max(1, min(BEGINNING, len(rows[0]) // 2))
    spread = rows[:: max(1, len(rows) // sizes.continuations)][: sizes.continuations]
    return Question(
        source=f"{source} ({', '.join(windows)})",
        texts=rows,
        prompts=[row[:beginning] for row in spread],
        tokens=max(1, min(sizes.tokens, sizes.positions - beginning)),
    )
