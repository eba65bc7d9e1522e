"""The retraining text as one endless sequence of token blocks, a pure function of seed and position.

Block number i is the same whoever asks, so that any number of processes share a corpus without gaps or repeats, and a
resumed run goes on exactly where it stopped.
"""

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from dive.calibration_domains.local import SUFFIXES, read_documents, text_files
from dive.calibration_domains.sampling import Tokenize, row_blocks, token_blocks
from dive.calibration_domains.texts import fingerprint
from dive.config import CorpusConfig, CorpusSource, HubTextConfig, RetrainConfig, StageText
from dive.errors import require
from dive.model.chat import Chat
from dive.store import identity

log = logging.getLogger(__name__)

Blocks = Callable[[], Iterator[Tensor]]
"""Starts the sequence of blocks (length,) int64 anew."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """A retraining corpus."""

    identity: str
    """Of its text, order and tokens."""
    blocks: Blocks


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


def domain_blocks(
    texts: Mapping[str, Sequence[str]],
    tokenize: Tokenize,
    *,
    length: int,
    seed: int,
    generated: Generated | None = None,
) -> Iterator[Tensor]:
    """Blocks of every domain in turn, in a new random order each turn: each domain has the same share of the tokens."""
    streams = [
        token_blocks(documents, tokenize, length=length, seed=seed + number)
        for number, documents in enumerate(texts.values())
    ]
    turn = list(range(len(streams)))
    if generated is not None:
        turn += [len(streams)] * generated.share
        streams.append(row_blocks(generated.rows, length=length, seed=seed + len(streams)))
    rng = np.random.default_rng(seed)
    while True:
        for place in rng.permutation(len(turn)):
            yield next(streams[turn[place]])


def hub_blocks(
    source: HubTextConfig,
    tokenize: Tokenize,
    *,
    length: int,
    seed: int,
    buffer: int,
    where: str,
    chat: Chat | None = None,
) -> Iterator[Tensor]:
    """Blocks of a streamed hub corpus, its documents shuffled within a buffer; starts over at the end.

    Args:
        chat: what makes documents of lists of messages.

    Raises:
        UserError: the corpus cannot be reached.
    """
    from dive.calibration_domains.hub import hub_texts

    pending: list[int] = []
    for round_ in itertools.count():
        for document in hub_texts(source, "train", where=where, seed=seed + round_, shuffle_buffer=buffer, chat=chat):
            pending += tokenize(document)
            while len(pending) >= length:
                yield torch.tensor(pending[:length])
                del pending[:length]


@dataclass(slots=True)
class BlockRange(IterableDataset[dict[str, Tensor]]):
    """The blocks ``start`` to ``stop`` that fall to one of ``world`` processes.

    Block i goes to process i mod world, so that every optimiser step sees the same blocks whatever the number of
    processes. Each item has ``input_ids`` (length,) and ``index``, its number, which also seeds dropout and noise.
    """

    blocks: Blocks
    start: int
    stop: int
    rank: int = 0
    world: int = 1

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for index, block in enumerate(itertools.islice(self.blocks(), self.stop)):
            if index >= self.start and index % self.world == self.rank:
                yield {"input_ids": block, "index": torch.tensor(index)}


def open_corpora(
    config: RetrainConfig,
    domains: Mapping[str, Sequence[str]],
    local: Sequence[str],
    tokenize: Tokenize,
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
    evenly = partial(domain_blocks, domains, tokenize, length=length, seed=seed, generated=generated)
    calibration = Corpus(f"domains:{hashlib.sha256(prints.encode()).hexdigest()}:{length}:{seed}", evenly)
    other = _other_corpus(config, local, tokenize, seed=seed, chat=chat)
    return {StageText.calibration: calibration, StageText.corpus: other or calibration}


def _other_corpus(
    config: RetrainConfig, local: Sequence[str], tokenize: Tokenize, *, seed: int, chat: Chat | None
) -> Corpus | None:
    """The configured corpus; none if that is the text of the calibration domains."""
    corpus, length = config.corpus, config.length
    if corpus.hub.path and corpus.chosen is not CorpusSource.hub:  # a preset's, with the source set to another
        log.warning("retrain.corpus.hub.path=%s has no say: another retrain.corpus.source is set", corpus.hub.path)
    if corpus.chosen is CorpusSource.hub:
        hub = partial(
            hub_blocks,
            corpus.hub,
            tokenize,
            length=length,
            seed=seed,
            buffer=corpus.shuffle_buffer,
            where="retrain.corpus.hub",
            chat=chat,
        )
        return Corpus(f"hub:{corpus.hub}:{corpus.shuffle_buffer}:{length}:{seed}", hub)
    if corpus.chosen is CorpusSource.local:
        own = partial(token_blocks, local, tokenize, length=length, seed=seed)
        return Corpus(f"local:{fingerprint(local)}:{length}:{seed}", own)
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
