"""Evaluation text that also stands in the training text, found by n-grams of words.

Words are lower-cased and free of punctuation. A word's hash is 64 bits of BLAKE2b; an n-gram's is the polynomial of its
words' hashes modulo 2^64, so that NumPy makes those of a million words at once. Two different n-grams share one with a
probability of about 2^-63. N-grams do not cross from one passage into the next.
"""

import hashlib
import itertools
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dive.calibration_domains.texts import Documents, DomainTexts
from dive.config import EvalConfig
from dive.eval.evaluate import EvaluationTexts
from dive.eval.tasks import Task, TaskSuite
from dive.model.chat import passages
from dive.store import HasStore, Place, step, write_json

log = logging.getLogger(__name__)

Hashes: TypeAlias = NDArray[np.uint64]
Document: TypeAlias = Sequence[str]
"""The passages of one document; a plain text is one passage, a conversation has one a message."""

WORD = re.compile(r"[^\W_]+")
GAP = re.compile(r"[\W_]")
CHUNK = 1 << 20
"""Words that are hashed at once."""
BASE = np.uint64(0x9E3779B97F4A7C15)
"""Of the polynomial: odd, so that no word's bits are lost."""
VOCABULARY = 2_000_000
"""Distinct words whose hashes are kept."""
DOCUMENTS = 20_000
"""Documents of each evaluation set that are looked at, from its first."""
CHARACTERS = 4_000_000
"""Characters of an evaluation document that are looked at, from its start: about six books."""
SLICE = 1 << 20
"""Characters of a passage whose words are found at once."""
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
    """(hashes of the n-grams, number of the document each stands in), chunk by chunk, however long a passage is."""
    known = _WordHashes()
    words: list[int] = []
    passages: list[int] = []  # words of each passage, or of its part in this chunk
    owners: list[int] = []  # document of each passage
    for number, document in enumerate(documents):
        for passage in document:
            begin = len(words)
            for part in _slices(passage):
                words += map(known.__getitem__, WORD.findall(part.lower()))
                if len(words) - begin >= max(CHUNK, n):
                    yield _roll(words, [*passages, len(words) - begin], [*owners, number], n)
                    words, passages, owners = words[1 - n :] if n > 1 else [], [], []
                    begin = 0
            if len(words) - begin < n:
                del words[begin:]
                continue
            passages.append(len(words) - begin)
            owners.append(number)
        if len(words) >= CHUNK:
            yield _roll(words, passages, owners, n)
            words, passages, owners = [], [], []
    if words:
        yield _roll(words, passages, owners, n)


def _slices(passage: str) -> Iterator[str]:
    """A passage in parts of about :data:`SLICE` characters, cut where no word is."""
    start = 0
    while start < len(passage):
        cut = GAP.search(passage, start + SLICE)
        stop = len(passage) if cut is None else cut.end()
        yield passage[start:stop]
        start = stop


def _beginning(document: Document) -> Document:
    """The passages of a document up to its first :data:`CHARACTERS`; itself if it is no longer."""
    if sum(map(len, document)) <= CHARACTERS:
        return document
    kept, room = [], CHARACTERS
    for passage in document:
        kept.append(passage[:room])
        room -= len(kept[-1])
    return kept


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
    cut: int = 0
    """Documents of which only the first :data:`CHARACTERS` were looked at."""

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
            "cut": self.cut,
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
    everything = np.concatenate([np.zeros(0, np.uint64), *(hashes for hashes, _ in sets.values())])
    # The inverse also keeps NumPy from finding them by a hash table, which takes ten times as long.
    wanted, place = np.unique(everything, return_inverse=True)
    seen: dict[str, NDArray[np.bool_]] = {}
    for source, texts in training.items():
        seen[source] = np.zeros(len(wanted), dtype=bool)
        for hashes, _ in ngrams(texts, n) if len(wanted) else ():
            hashes.sort()  # neighbours in ``wanted`` one after another
            near = np.searchsorted(wanted, hashes).clip(max=len(wanted) - 1)
            seen[source][near[wanted[near] == hashes]] = True
    anywhere = np.logical_or.reduce([*seen.values(), np.zeros(len(wanted), dtype=bool)])
    overlaps = {}
    begin = 0
    for name, (hashes, owners) in sets.items():
        here = place[begin : begin + len(hashes)]
        begin += len(hashes)
        found = anywhere[here]
        by_source = {source: _distinct(owners[mask[here]]) for source, mask in seen.items()}
        overlaps[name] = Overlap(
            documents=len(evaluation[name]),
            long_enough=_distinct(owners),
            found=_distinct(owners[found]),
            ngrams=len(hashes),
            ngrams_found=int(found.sum()),
            sources={source: count for source, count in by_source.items() if count},
        )
    return overlaps


def _distinct(owners: NDArray[np.int64]) -> int:
    """Different values of a sorted array."""
    return int(np.count_nonzero(owners[1:] != owners[:-1])) + int(owners.size > 0)


@step("contamination", "which test texts share words with the training text")
def look_for_overlap(
    place: Place,
    run: HasStore,
    *,
    ngram: int,
    training: Mapping[str, Documents],
    texts: Mapping[str, Documents],
    tasks: Mapping[str, Task],
) -> None:
    """``contamination.json``: {"ngram": words, "domains" | "sets" | "tasks": {name: :meth:`Overlap.summary`}}

    Args:
        ngram: words that must follow each other alike.
        training: {source: documents}
        texts: {"domains/<name>" or "sets/<name>": documents that are measured on}
        tasks: {"tasks/<name>": questions}
    """
    evaluation: dict[str, Sequence[Document]] = {
        name: [passages(document) for document in documents.items[:DOCUMENTS]] for name, documents in texts.items()
    }
    evaluation |= {name: [*itertools.islice(task.documents(), DOCUMENTS)] for name, task in tasks.items()}
    cut = {name: sum(sum(map(len, row)) > CHARACTERS for row in rows) for name, rows in evaluation.items()}
    evaluation = {name: [*map(_beginning, rows)] for name, rows in evaluation.items()}
    sources = {name: (passages(document) for document in documents.items) for name, documents in training.items()}
    found: dict[str, Any] = {"ngram": ngram, "domains": {}, "sets": {}, "tasks": {}}
    for key, overlap in find_overlap(sources, evaluation, n=ngram).items():
        overlap.cut = cut[key]
        kind, _, name = key.partition("/")
        found[kind][name] = overlap.summary()
    write_json(place.directory / "contamination.json", found)


def contamination(
    run: HasStore,
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
        What :func:`look_for_overlap` writes; empty where ``eval.ngram`` is 0 or there is no training text.
    """
    training = {domain.name: domain.train for domain in domains} | ({CORPUS: corpus} if corpus else {})
    if config.ngram == 0 or not training:
        return {}
    measured = {
        f"{kind}/{name}": Documents(found) for kind, sets in texts.documents.items() for name, found in sets.items()
    }
    artifact = look_for_overlap(
        run,
        ngram=config.ngram,
        training={name: Documents(documents) for name, documents in training.items()},
        texts=measured,
        tasks={f"tasks/{task.name}": task for task in tasks.tasks},
    )
    found: dict[str, Any] = artifact.read("contamination.json")
    _say(found)
    return found


def _say(found: Mapping[str, Any]) -> None:
    """Log what of :func:`contamination` a reader must know."""
    rows = {name: row for kind in ("domains", "sets", "tasks") for name, row in found[kind].items()}
    if long := {name: row["cut"] for name, row in rows.items() if row.get("cut")}:
        log.info(
            "%d evaluation documents (of %s) are longer than %d characters: "
            "only their beginnings are compared with the training text",
            *(sum(long.values()), ", ".join(long), CHARACTERS),
        )
    for kind in ("domains", "sets", "tasks"):
        hit = {name: row for name, row in found[kind].items() if row["found"]}
        if hit:
            most = max(hit, key=lambda name: hit[name]["share"])
            log.info(
                "%d of %d %s share %d words in a row with the training text, most of all %s: %d of %d documents",
                *(len(hit), len(found[kind]), kind, found["ngram"], most, hit[most]["found"], hit[most]["documents"]),
            )
