"""The retraining text: which one a run reads, as an endless stream of token blocks in an order that the seed decides."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from dive.calibration_domains.local import SUFFIXES, read_documents, text_files
from dive.calibration_domains.sampling import TokenizeAll
from dive.calibration_domains.texts import fingerprint
from dive.config import CorpusConfig, CorpusSource, RetrainConfig, StageText
from dive.errors import require
from dive.model.chat import Chat
from dive.retrain.streams import Dealt, Stream, rounds, shuffled_documents, shuffled_rows
from dive.store import identity

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Corpus:
    """A retraining corpus."""

    identity: str
    """Of its text and order, and of the length of its blocks; its tokens are a tokenizer's matter."""
    length: int
    """Tokens of a block."""
    stream: Callable[[], Stream]
    """Begins it anew."""


@identity.register
def _(value: Corpus) -> str:
    return value.identity


@dataclass(frozen=True, slots=True)
class Generated:
    """Text that the dense model wrote, to be read beside the domains'."""

    rows: Tensor
    """(N, T) int64"""
    share: int
    """Of the blocks, where a domain has 1."""


def dealt_domains(
    texts: Mapping[str, Sequence[str]],
    tokenize: TokenizeAll,
    *,
    length: int,
    seed: int,
    generated: Generated | None = None,
) -> Stream:
    """Blocks of every domain in turn, in a new random order each turn: each domain has the same share of the tokens."""
    streams: list[Stream] = [
        shuffled_documents(documents, tokenize, length=length, seed=seed + number)
        for number, documents in enumerate(texts.values())
    ]
    shares = [1] * len(streams)
    if generated is not None:
        streams.append(shuffled_rows(generated.rows, length=length, seed=seed + len(streams)))
        shares.append(generated.share)
    return Dealt(streams, shares, seed=seed)


def open_corpora(
    config: RetrainConfig,
    domains: Mapping[str, Sequence[str]],
    local: Sequence[str],
    tokenize: TokenizeAll,
    *,
    seed: int,
    chat: Chat | None = None,
    generated: Generated | None = None,
) -> dict[StageText, Corpus]:
    """What the stages read.

    Args:
        domains: {domain: train documents}.
        local: documents of a local corpus, see :func:`local_documents`.
        generated: what is read with the domains' text.
        chat: what makes documents of the lists of messages of a hub corpus.
    """
    length = config.length
    prints = ",".join(f"{name}={fingerprint(documents)}" for name, documents in domains.items())
    if generated is not None:
        prints += f",{generated.share}*{identity(generated.rows)}"
    evenly = partial(dealt_domains, domains, tokenize, length=length, seed=seed, generated=generated)
    calibration = Corpus(f"domains:{hashlib.sha256(prints.encode()).hexdigest()}:{length}:{seed}", length, evenly)
    other = _other_corpus(config, local, tokenize, seed=seed, chat=chat)
    return {StageText.calibration: calibration, StageText.corpus: other or calibration}


def _other_corpus(
    config: RetrainConfig, local: Sequence[str], tokenize: TokenizeAll, *, seed: int, chat: Chat | None
) -> Corpus | None:
    """The configured corpus; none if that is the text of the calibration domains."""
    corpus, length = config.corpus, config.length
    if corpus.hub.path and corpus.chosen is not CorpusSource.hub:  # a preset's, with the source set to another
        log.warning("retrain.corpus.hub.path=%s has no say: another retrain.corpus.source is set", corpus.hub.path)
    if corpus.chosen is CorpusSource.hub:
        from dive.calibration_domains.hub import hub_texts

        def documents(number: int) -> Iterator[str]:
            return hub_texts(
                corpus.hub,
                "train",
                where="retrain.corpus.hub",
                seed=seed + number,
                shuffle_buffer=corpus.shuffle_buffer,
                chat=chat,
            )

        hub = partial(rounds, documents, tokenize, length=length)
        return Corpus(f"hub:{corpus.hub}:{corpus.shuffle_buffer}:{length}:{seed}", length, hub)
    if corpus.chosen is CorpusSource.local:
        own = partial(shuffled_documents, local, tokenize, length=length, seed=seed)
        return Corpus(f"local:{fingerprint(local)}:{length}:{seed}", length, own)
    return None


def local_documents(config: CorpusConfig, *, chat: Chat | None = None) -> list[str]:
    """Documents of a local corpus: of a file, or of all jsonl, txt and parquet files below a directory; else none.

    Args:
        chat: what makes documents of lists of messages.

    Raises:
        UserError: nothing there, or a file cannot be read.
    """
    if config.chosen is not CorpusSource.local:
        return []
    assert config.path is not None
    where = "retrain.corpus.path"
    files = text_files(config.path, where=where)
    require(bool(files), f"{where}={config.path}: no {', '.join(SUFFIXES)} file there")
    read = partial(read_documents, field=config.text_field, where=where, chat=chat)
    return [document for file in files for document in read(file)]
