"""N-grams of evaluation sets in training text, counted by hand."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from dive.calibration_domains.texts import DomainTexts
from dive.config import EvalConfig
from dive.eval import contamination as module
from dive.eval.contamination import contamination, find_overlap, ngrams
from dive.eval.evaluate import EvaluationTexts
from dive.eval.tasks import TaskSuite
from dive.model.chat import Conversation
from tests.workplace import Bench


def test_by_hand() -> None:
    # Trigrams of "a b c d": abc bcd; of "b c d e": bcd cde. One of two stands in the training text, in one of two documents.
    training = {"first": [["b c d e"]], "second": [["x y z"]]}
    evaluation = {"set": [["a b c d"], ["one two three"], ["too short"]], "empty": []}
    found = find_overlap(training, evaluation, n=3)
    assert found["set"].summary() == {
        "documents": 3,
        "long_enough": 2,
        "found": 1,
        "share": pytest.approx(1 / 3),
        "ngrams": 3,
        "ngrams_found": 1,
        "ngram_share": pytest.approx(1 / 3),
        "sources": {"first": 1},
        "cut": 0,
    }
    assert found["empty"].summary()["share"] == 0.0


@pytest.mark.parametrize(
    "text", ["THE cat, sat: on the... mat!", "the\ncat\tsat — on the mat", "«the cat» sat_on the mat"]
)
def test_case_space_and_punctuation_make_no_difference(text: str) -> None:
    assert find_overlap({"t": [[text]]}, {"e": [["The cat sat on the mat."]]}, n=6)["e"].found == 1


@pytest.mark.parametrize(
    "text", ["the cat on sat the mat", "mat the on sat cat the", "the cat sat on a mat", "the cat sat on"]
)
def test_order_and_every_word_count(text: str) -> None:
    assert find_overlap({"t": [[text]]}, {"e": [["the cat sat on the mat"]]}, n=6)["e"].found == 0


def test_ngrams_do_not_cross_passages_or_documents() -> None:
    training = {"t": [["a b c", "d e f"], ["g h i"]]}
    evaluation = {"e": [["b c d"], ["f g h"], ["a b c"], ["e f"]]}
    assert find_overlap(training, evaluation, n=3)["e"].found == 1
    assert find_overlap(training, evaluation, n=2)["e"].found == 4  # bc, gh, ab, ef


def test_what_a_chat_template_adds_is_no_overlap(tmp_path: Path) -> None:
    system = "system: you are a helpful assistant who answers in one word. user: "
    talks = [["a b c", "d e"], ["a b c d", "x"], ["f g h"]]
    train, *test = (Conversation(system + " ".join(spoken), spoken) for spoken in talks)
    texts = EvaluationTexts(documents={"domains": {"talk": list(test)}, "sets": {}})
    domains = [DomainTexts("talk", train=[train], test=list(test))]
    found = contamination(Bench(tmp_path), EvalConfig(ngram=3), domains, texts, TaskSuite())["domains"]["talk"]
    assert (found["ngrams"], found["ngrams_found"], found["found"]) == (3, 1, 1)  # abc of abc bcd fgh


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("size", [1, 9, 1 << 20])
def test_it_is_the_comparison_of_sets_of_tuples(chunk: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    monkeypatch.setattr(module, "SLICE", size)
    draw = random.Random(0)
    texts = [[" ".join(draw.choices("abcd", k=draw.randrange(12))) for _ in range(3)] for _ in range(60)]
    training, evaluation = texts[:30], texts[30:]

    def tuples(document: list[str]) -> set[tuple[str, ...]]:
        return {tuple(words[i : i + 5]) for p in document if (words := p.split()) for i in range(len(words) - 4)}

    known = set().union(*map(tuples, training))
    found = find_overlap({"t": training}, {"e": evaluation}, n=5)["e"]
    assert found.found == sum(bool(tuples(document) & known) for document in evaluation)
    assert 0 < found.found < found.long_enough == sum(bool(tuples(document)) for document in evaluation)


def test_hashes_of_a_vocabulary_that_overflows_stay_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [[" ".join(f"w{i % 9}" for i in range(40))]]
    expected = np.concatenate([hashes for hashes, _ in ngrams(documents, 4)])
    monkeypatch.setattr(module, "VOCABULARY", 3)
    assert np.array_equal(np.concatenate([hashes for hashes, _ in ngrams(documents, 4)]), expected)
    assert len(np.unique(expected)) == 9


def test_the_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    domain = DomainTexts(
        "law", train=["the court of appeal found for the claimant"], test=["and so the court of appeal"]
    )
    texts = EvaluationTexts()
    texts.documents["domains"]["law"] = domain.test
    texts.documents["sets"]["news"] = ["rain fell in the town"]
    run, corpus = Bench(tmp_path), ["today rain fell in the town again"]
    with caplog.at_level("INFO", logger="dive"):
        found = contamination(run, EvalConfig(ngram=4), [domain], texts, TaskSuite(), corpus=corpus)
    assert found["ngram"] == 4
    assert found["domains"]["law"]["sources"] == {"law": 1}
    assert found["domains"]["law"]["ngrams_found"] == 1  # the court of appeal
    assert found["sets"]["news"]["sources"] == {"retrain.corpus": 1}
    assert json.loads(json.dumps(found)) == found
    assert (
        "1 of 1 sets share 4 words in a row with the training text, most of all news: 1 of 1 documents" in caplog.text
    )
    assert contamination(run, EvalConfig(ngram=0), [domain], texts, TaskSuite()) == {}
    assert contamination(run, EvalConfig(), [], texts, TaskSuite()) == {}


def test_the_parts_of_a_long_passage_are_the_passage(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [["lead"], [" ".join(f"w{i}" for i in range(100)), "a b"], [" ".join(f"v{i}" for i in range(9))]]
    whole = [*ngrams(documents, 4)]
    for chunk, size in ((10, 1), (10, 25), (33, 40), (97, 7)):
        monkeypatch.setattr(module, "CHUNK", chunk)
        monkeypatch.setattr(module, "SLICE", size)
        parts = [*ngrams(documents, 4)]
        assert max(len(hashes) for hashes, _ in parts) <= chunk + size + 3
        for position in range(2):
            expected, found = (np.concatenate([chunk[position] for chunk in chunks]) for chunks in (whole, parts))
            assert np.array_equal(expected, found)


def test_a_line_of_32_megabytes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    draw = np.random.default_rng(0)
    letters = draw.integers(ord("a"), ord("z") + 1, 16_000_000, dtype=np.uint8)
    text = np.stack([letters, np.full_like(letters, ord(" "))], axis=1).tobytes().decode()
    texts = EvaluationTexts()
    texts.documents["domains"]["law"] = [text, "a short one"]
    domain = DomainTexts("law", train=["z " * 20 + text[:1000]], test=texts.documents["domains"]["law"])
    with caplog.at_level("INFO", logger="dive"):
        found = contamination(Bench(tmp_path), EvalConfig(), [domain], texts, TaskSuite())
    row = found["domains"]["law"]
    assert (row["cut"], row["documents"], row["found"]) == (1, 2, 1)
    assert row["ngrams"] == module.CHARACTERS // 2 - 12
    assert [m for m in caplog.messages if "1 evaluation documents (of law) are longer than 4000000 characters" in m]
