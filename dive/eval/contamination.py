"""Evaluation text that also stands in the training text, found by n-grams of words.

Words are lower-cased and free of punctuation. A word's hash is 64 bits of BLAKE2b; an n-gram's is the polynomial of its
words' hashes modulo 2^64, so that NumPy makes those of a million words at once. Two different n-grams share one with a
probability of about 2^-63. N-grams do not cross from one passage into the next.
"""

import hashlib
import itertools
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dive.artifacts import Store, write_json
from dive.calibration_domains.texts import DomainTexts, fingerprint
from dive.config import EvalConfig
from dive.eval.evaluate import EvaluationTexts
from dive.eval.tasks import TaskSuite

log = logging.getLogger(__name__)

Hashes: TypeAlias = NDArray[np.uint64]
Document: TypeAlias = Sequence[str]
"""The passages of one document; a plain text is one passage."""

WORD = re.compile(r"[^\W_]+")
CHUNK = 1 << 20
"""Words that are hashed at once."""
BASE = np.uint64(0x9E3779B97F4A7C15)
"""Of the polynomial: odd, so that no word's bits are lost."""
VOCABULARY = 2_000_000
"""Distinct words whose hashes are kept."""
DOCUMENTS = 20_000
"""Documents of each evaluation set that are looked at, from its first."""
CORPUS = "retrain.corpus"
"""Name of the retraining corpus among the training sources."""


class _WordHashes(dict[str, int]):
    """BLAKE2b of words, computed once each."""

    def __missing__(self, word: str) -> int:
        if len(self) >= VOCABULARY:
            self.clear()
        digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self[word] = value = int.from_bytes(digest, "little")
        return value


def ngrams(documents: Iterable[Document], n: int) -> Iterator[tuple[Hashes, NDArray[np.int64]]]:
    """(hashes of the n-grams, number of the document each stands in), chunk by chunk."""
    known = _WordHashes()
    words: list[int] = []
    passages: list[int] = []  # words of each passage
    owners: list[int] = []  # document of each passage
    for number, document in enumerate(documents):
        for passage in document:
            found = WORD.findall(passage.lower())
            if len(found) < n:
                continue
            words += map(known.__getitem__, found)
            passages.append(len(found))
            owners.append(number)
        if len(words) >= CHUNK:
            yield _roll(words, passages, owners, n)
            words, passages, owners = [], [], []
    if words:
        yield _roll(words, passages, owners, n)


def _roll(words: list[int], passages: list[int], owners: list[int], n: int) -> tuple[Hashes, NDArray[np.int64]]:
    values = np.array(words, dtype=np.uint64)
    starts = len(values) - n + 1
    hashes = np.zeros(starts, dtype=np.uint64)
    for offset in range(n):
        hashes = hashes * BASE + values[offset : offset + starts]
    passage = np.repeat(np.arange(len(passages)), passages)
    within = passage[:starts] == passage[n - 1 :]
    return hashes[within], np.array(owners)[passage[:starts][within]]


@dataclass(slots=True)
class Overlap:
    """How much of one evaluation set stands in the training text."""

    documents: int
    long_enough: int
    """Documents with at least one n-gram; shorter ones cannot be told."""
    found: int
    """Documents of which at least one n-gram stands in the training text."""
    ngrams: int
    ngrams_found: int
    sources: dict[str, int] = field(default_factory=dict)
    """{training source: documents found in it}, those with any."""

    def summary(self) -> dict[str, Any]:
        """JSON values: the counts, and what share of documents and n-grams was found."""
        return {
            "documents": self.documents,
            "long_enough": self.long_enough,
            "found": self.found,
            "share": self.found / max(self.documents, 1),
            "ngrams": self.ngrams,
            "ngrams_found": self.ngrams_found,
            "ngram_share": self.ngrams_found / max(self.ngrams, 1),
            "sources": self.sources,
        }


def find_overlap(
    training: Mapping[str, Iterable[Document]], evaluation: Mapping[str, Sequence[Document]], *, n: int
) -> dict[str, Overlap]:
    """Look for every n-gram of the evaluation sets in the training sources.

    Only the evaluation sets' hashes are held in memory; training text is read once and may be a stream.

    Args:
        n: words of an n-gram; 13 is the usual choice since GPT-3 (Brown et al. 2020, appendix C).
    """
    sets: dict[str, tuple[Hashes, NDArray[np.int64]]] = {}
    for name, documents in evaluation.items():
        chunks = [*ngrams(documents, n)] or [(np.zeros(0, np.uint64), np.zeros(0, np.int64))]
        sets[name] = np.concatenate([c[0] for c in chunks]), np.concatenate([c[1] for c in chunks])
    wanted = np.unique(np.concatenate([hashes for hashes, _ in sets.values()])) if sets else np.zeros(0, np.uint64)
    seen: dict[str, NDArray[np.bool_]] = {}
    for source, texts in training.items():
        seen[source] = np.zeros(len(wanted), dtype=bool)
        for hashes, _ in ngrams(texts, n) if len(wanted) else ():
            place = np.searchsorted(wanted, hashes).clip(max=len(wanted) - 1)
            seen[source][place[wanted[place] == hashes]] = True
    anywhere = np.logical_or.reduce([*seen.values(), np.zeros(len(wanted), dtype=bool)])
    overlaps = {}
    for name, (hashes, owners) in sets.items():
        place = np.searchsorted(wanted, hashes)
        found = anywhere[place]
        by_source = {source: int(np.unique(owners[mask[place]]).size) for source, mask in seen.items()}
        overlaps[name] = Overlap(
            documents=len(evaluation[name]),
            long_enough=int(np.unique(owners).size),
            found=int(np.unique(owners[found]).size),
            ngrams=len(hashes),
            ngrams_found=int(found.sum()),
            sources={source: count for source, count in by_source.items() if count},
        )
    return overlaps


def contamination(
    store: Store,
    config: EvalConfig,
    domains: Sequence[DomainTexts],
    texts: EvaluationTexts,
    tasks: TaskSuite,
    *,
    corpus: Sequence[str] = (),
) -> dict[str, Any]:
    """How much of every evaluation set stands in the training text, for the record.

    Args:
        corpus: retraining documents beside the domains' own. Those streamed from the hub are not looked at.

    Returns:
        {"ngram": words, "domains" | "sets" | "tasks": {name: :meth:`Overlap.summary`}}; empty where
        ``eval.ngram`` is 0 or there is no training text.
    """
    training = {domain.name: domain.train for domain in domains} | ({CORPUS: corpus} if corpus else {})
    if config.ngram == 0 or not training:
        return {}
    plain = {(kind, name): found for kind, sets in texts.documents.items() for name, found in sets.items()}
    asked = {("tasks", task.name): task for task in tasks.tasks}

    def compute(directory: Path) -> None:
        evaluation: dict[tuple[str, str], Sequence[Document]] = {
            key: [[document] for document in documents[:DOCUMENTS]] for key, documents in plain.items()
        }
        evaluation |= {key: [*itertools.islice(task.documents(), DOCUMENTS)] for key, task in asked.items()}
        sources = {name: ([document] for document in documents) for name, documents in training.items()}
        overlaps = find_overlap(sources, {"/".join(key): rows for key, rows in evaluation.items()}, n=config.ngram)
        found: dict[str, Any] = {"ngram": config.ngram, "domains": {}, "sets": {}, "tasks": {}}
        for kind, name in evaluation:
            found[kind][name] = overlaps[f"{kind}/{name}"].summary()
        write_json(directory / "contamination.json", found)

    depends = {
        "ngram": config.ngram,
        "training": {name: fingerprint(documents) for name, documents in training.items()},
        "texts": {"/".join(key): fingerprint(documents) for key, documents in plain.items()},
        "tasks": {name: task.identity for (_, name), task in asked.items()},
    }
    artifact = store.get("contamination", depends, compute)
    found: dict[str, Any] = json.loads((artifact.path / "contamination.json").read_text())
    for kind in ("domains", "sets", "tasks"):
        hit = {name: row for name, row in found[kind].items() if row["found"]}
        if hit:
            most = max(hit, key=lambda name: hit[name]["share"])
            log.info(
                "%d of %d %s share %d words in a row with the training text, most of all %s: %d of %d documents",
                *(len(hit), len(found[kind]), kind, config.ngram, most, hit[most]["found"], hit[most]["documents"]),
            )
    return found
