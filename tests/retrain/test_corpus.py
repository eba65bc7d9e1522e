"""Which text is retrained on, and in what order."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from dive.cli import composed
from dive.config import CorpusConfig, CorpusSource, HubTextConfig, RetrainConfig, StageText
from dive.errors import UserError
from dive.retrain.corpus import Generated, dealt_domains, local_documents, open_corpora
from dive.retrain.streams import Stream, shuffled_documents


def tokenize(texts: Sequence[str]) -> list[list[int]]:
    return [[ord(character) for character in text] for text in texts]


DOMAINS = {"a": ["a" * 50] * 4, "b": ["b" * 30] * 7, "c": ["c" * 90]}


def taken(stream: Stream, count: int) -> list[list[int]]:
    return [next(stream).tolist() for _ in range(count)]


def dealt(generated: Generated | None = None, seed: int = 3) -> Stream:
    return dealt_domains(DOMAINS, tokenize, length=10, seed=seed, generated=generated)


def test_every_domain_has_the_same_share() -> None:
    found = ["".join(map(chr, block)) for block in taken(dealt(), 30)]
    for start in range(0, 30, 3):
        assert sorted(block[0] for block in found[start : start + 3]) == ["a", "b", "c"]
    assert len({tuple(b[0] for b in found[start : start + 3]) for start in range(0, 30, 3)}) > 1
    assert all(block == block[0] * 10 for block in found)


def test_blocks_follow_the_seed() -> None:
    assert taken(dealt(seed=1), 12) == taken(dealt(seed=1), 12) != taken(dealt(seed=2), 12)


# ---------------------------------------------------------------------------------------------- configured corpora


def configured(corpus: CorpusConfig, domains: dict[str, list[str]], **settings: int) -> tuple[list[list[int]], str]:
    opened = open_corpora(
        RetrainConfig(length=settings.get("length", 10), corpus=corpus),
        domains,
        local_documents(corpus),
        tokenize,
        seed=settings.get("seed", 3),
    )[StageText.corpus]
    return taken(opened.stream(), 12), opened.identity


def test_the_domains_as_a_corpus() -> None:
    found, name = configured(CorpusConfig(), DOMAINS)
    assert found == taken(dealt(), 12)
    names = {
        name,
        configured(CorpusConfig(), DOMAINS, seed=4)[1],
        configured(CorpusConfig(), DOMAINS, length=11)[1],
        configured(CorpusConfig(), DOMAINS | {"c": ["d" * 90]})[1],
        configured(CorpusConfig(), dict(reversed(DOMAINS.items())))[1],
    }
    assert len(names) == 5
    assert configured(CorpusConfig(), DOMAINS)[1] == name


def test_calibration_text_is_the_domains_whatever_the_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("second" * 50)
    files = CorpusConfig(source=CorpusSource.local, path=str(tmp_path / "a.txt"))
    settings = RetrainConfig(length=10, corpus=files)
    opened = open_corpora(settings, DOMAINS, local_documents(files), tokenize, seed=3)
    assert taken(opened[StageText.calibration].stream(), 12) == taken(dealt(), 12)
    assert taken(opened[StageText.corpus].stream(), 12) != taken(dealt(), 12)
    same = open_corpora(RetrainConfig(length=10), DOMAINS, [], tokenize, seed=3)
    assert len({opened[StageText.calibration].identity, *(corpus.identity for corpus in same.values())}) == 1


def test_files_as_a_corpus(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "b.txt").write_text("second" * 5)
    (tmp_path / "below" / "c.jsonl").write_text(json.dumps({"body": "third" * 5}))
    (tmp_path / "notes.md").write_text("not read")
    config = CorpusConfig(source=CorpusSource.local, path=str(tmp_path), text_field="body")
    documents = local_documents(config)
    assert documents == ["second" * 5, "third" * 5]
    one = CorpusConfig(source=CorpusSource.local, path=str(tmp_path / "b.txt"))
    assert local_documents(one) == ["second" * 5]
    found, name = configured(config, {})
    assert found == taken(shuffled_documents(documents, tokenize, length=10, seed=3), 12)
    (tmp_path / "b.txt").write_text("other" * 5)
    assert configured(config, {})[1] != name


@pytest.mark.parametrize("content", [None, "notes.md"])
def test_a_corpus_that_is_not_there(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "corpus"
    if content is not None:
        path.mkdir()
        (path / content).write_text("x")
    with pytest.raises(UserError, match=r"^retrain\.corpus\.path=.*: no \.jsonl, \.txt, \.parquet file there"):
        local_documents(CorpusConfig(source=CorpusSource.local, path=str(path)))


def test_naming_a_corpus_chooses_its_source(tmp_path: Path) -> None:
    assert CorpusConfig().chosen is CorpusSource.domains
    assert composed([f"retrain.corpus.path={tmp_path}"]).retrain.corpus.chosen is CorpusSource.local
    assert CorpusConfig(path=str(tmp_path)).chosen is CorpusSource.local
    assert CorpusConfig(hub=HubTextConfig(path="x/y")).chosen is CorpusSource.hub
    (tmp_path / "a.txt").write_text("named" * 5)
    assert configured(CorpusConfig(path=str(tmp_path)), DOMAINS)[1].startswith("local:")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "x", "hub": HubTextConfig(path="x/y")}, r"name two corpora; .*retrain\.corpus\.source"),
        ({"source": CorpusSource.domains, "path": "x"}, r"path has no say with .*source=domains; set .*source=local"),
        ({"source": CorpusSource.hub, "path": "x", "hub": HubTextConfig(path="x/y")}, r"path has no say .*=hub"),
        ({"text_field": "body"}, r"text_field has no say"),
        ({"hub": HubTextConfig(path="", streaming=True)}, r"hub\.path is needed"),
        ({"shuffle_buffer": 5}, r"shuffle_buffer has no say with .*source=domains"),
    ],
)
def test_a_corpus_that_would_be_ignored_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=rf"^retrain\.corpus\..*{message}"):
        CorpusConfig(**settings).or_else(None)  # type: ignore[arg-type]


def test_what_is_said_of_the_default_corpus() -> None:
    hub = ["budget=toy", "calibration_domains=paper"]
    corpus = composed([*hub, "retrain.corpus.shuffle_buffer=5"]).retrain.corpus
    assert (corpus.chosen, corpus.hub.config, corpus.shuffle_buffer) == (CorpusSource.hub, "sample-10BT", 5)
    assert composed([*hub, "retrain.corpus.source=hub"]).retrain.corpus.hub == corpus.hub
    with pytest.raises(
        UserError, match=r"^retrain\.corpus\.hub\.path is needed.*fineweb-edu.*calibration_domains\.corpus"
    ):
        composed([*hub, "retrain.corpus.hub.config=sample-100BT"])


def test_a_presets_data_set_that_has_no_say_is_named(caplog: pytest.LogCaptureFixture) -> None:
    config = CorpusConfig(source=CorpusSource.domains, hub=HubTextConfig(path="x/y"))
    with caplog.at_level("WARNING", logger="dive"):
        assert configured(config, DOMAINS) == configured(CorpusConfig(), DOMAINS)
    assert "retrain.corpus.hub.path=x/y has no say" in caplog.messages[0]


def test_generated_text_has_its_share_of_each_turn() -> None:
    """Of 10 blocks of two turns 4 are generated, and 2 are each domain's."""
    written = Generated(torch.zeros(3, 8, dtype=torch.int64), share=2)
    found = [block[0] for block in taken(dealt(generated=written), 10)]
    for turn in (found[:5], found[5:]):
        assert sorted(turn) == [0, 0, ord("a"), ord("b"), ord("c")]


def test_generated_text_tells_corpora_apart() -> None:
    def known(generated: Generated | None) -> str:
        corpora = open_corpora(RetrainConfig(length=10), DOMAINS, [], tokenize, seed=3, generated=generated)
        return corpora[StageText.calibration].identity

    rows = torch.zeros(3, 8, dtype=torch.int64)
    made = [None, Generated(rows, share=1), Generated(rows, share=2), Generated(rows + 1, share=1)]
    assert len({known(generated) for generated in made}) == 4
