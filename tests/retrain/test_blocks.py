"""Blocks by their numbers: the same whoever asks and however far others read, shared without gaps or repeats."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dive.errors import UserError
from dive.retrain import blocks, parts, streams
from dive.retrain.blocks import BlockRange, prepare_blocks
from dive.retrain.corpus import Corpus
from dive.retrain.parts import spans
from dive.retrain.streams import Stream, rounds, shuffled_documents
from dive.store import Store, WithStore, identity


@dataclass(frozen=True)
class Tokenizer:
    """What stands in a key for the model."""

    name: str


@identity.register
def _(value: Tokenizer) -> str:
    return value.name


MODEL: Any = Tokenizer("a")
LENGTH = 4


def numbered(number: int) -> Tensor:
    return torch.full((LENGTH,), number)


def indices(**settings: int) -> list[int]:
    return [int(item["index"]) for item in BlockRange(numbered, **settings)]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize(("start", "stop"), [(0, 12), (5, 17), (7, 8), (4, 4)])
def test_ranks_share_the_blocks_without_gaps_or_repeats(start: int, stop: int, world: int) -> None:
    shares = [indices(start=start, stop=stop, rank=rank, world=world) for rank in range(world)]
    assert sorted(index for share in shares for index in share) == list(range(start, stop))
    assert all(index % world == rank for rank, share in enumerate(shares) for index in share)
    assert all(share == sorted(share) for share in shares)


def test_each_item_is_its_own_block() -> None:
    for item in BlockRange(numbered, start=3, stop=9, rank=1, world=2):
        assert item["input_ids"].tolist() == [int(item["index"])] * LENGTH
    assert indices(start=3, stop=9, rank=1, world=2) == [3, 5, 7]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_step_sees_the_same_blocks_however_many_processes(world: int) -> None:
    def step(rank: int, number: int) -> set[int]:
        loader = DataLoader(BlockRange(numbered, start=0, stop=32, rank=rank, world=world), batch_size=8 // world)
        return set(next(islice(loader, number, None))["index"].tolist())

    for number in range(4):
        seen = set.union(*(step(rank, number) for rank in range(world)))
        assert seen == set(range(8 * number, 8 * number + 8))


# ------------------------------------------------------------------------------------------------------------- parts


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 2, 4, 8, 8, ... blocks, of texts that are tokenised one by one."""
    monkeypatch.setattr(streams, "AHEAD", 1)
    monkeypatch.setattr(parts, "FIRST", 2 * LENGTH)
    monkeypatch.setattr(parts, "LARGEST", 8 * LENGTH)


@dataclass
class Text:
    """A corpus that counts how often a text is tokenised."""

    kind: str = "shuffled"
    tokenised: int = 0

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        self.tokenised += len(texts)
        return [[ord(character) for character in text] for text in texts]

    def documents(self, number: int) -> Iterator[str]:
        yield from (hashlib.sha256(f"{number}/{n}".encode()).hexdigest()[: 3 + n % 5] for n in range(40))

    def stream(self) -> Stream:
        if self.kind == "rounds":
            return rounds(self.documents, self.tokenize, length=LENGTH)
        return shuffled_documents([*self.documents(0)], self.tokenize, length=LENGTH, seed=3)

    @property
    def corpus(self) -> Corpus:
        return Corpus(self.kind, LENGTH, self.stream)


def whole(kind: str, count: int) -> list[list[int]]:
    stream = Text(kind).stream()
    return [next(stream).tolist() for _ in range(count)]


@pytest.fixture
def run(tmp_path: Path) -> WithStore:
    return WithStore(Store(tmp_path))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", ["shuffled", "rounds"])
def test_blocks_are_those_of_the_stream(run: WithStore, kind: str) -> None:
    found = prepare_blocks(run, Text(kind).corpus, model=MODEL, wanted=range(17))
    assert [found(number).tolist() for number in range(17)] == whole(kind, 17)
    assert found(3).dtype == torch.int64
    assert found(12).tolist() == whole(kind, 13)[-1]  # in any order
    assert found(1).tolist() == whole(kind, 2)[-1]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", ["shuffled", "rounds"])
def test_a_longer_run_goes_on_from_what_a_shorter_one_tokenised(run: WithStore, kind: str) -> None:
    prepare_blocks(run, Text(kind).corpus, model=MODEL, wanted=range(5))
    again, anew = Text(kind), Text(kind)
    found = prepare_blocks(run, again.corpus, model=MODEL, wanted=range(40))
    assert [found(number).tolist() for number in range(40)] == whole(kind, 40)
    last = next(span.stop for span in spans(LENGTH) if span.stop >= 40)
    stream = anew.stream()
    for _ in range(last):
        next(stream)
    assert again.tokenised < anew.tokenised
    once_more = Text(kind)
    prepare_blocks(run, once_more.corpus, model=MODEL, wanted=range(40))
    assert once_more.tokenised == 0


@pytest.mark.usefixtures("small")
def test_the_middle_of_a_corpus_takes_no_more_than_its_own_parts(run: WithStore, tmp_path: Path) -> None:
    prepare_blocks(run, Text().corpus, model=MODEL, wanted=range(40))
    manifests = [*tmp_path.glob("tokens/*/manifest.json")]
    assert len(manifests) == 7  # 2 + 4 + 5 · 8 = 46 blocks
    text = Text()
    found = prepare_blocks(run, text.corpus, model=MODEL, wanted=range(20, 24))
    assert [found(number).tolist() for number in range(20, 24)] == whole("shuffled", 24)[20:]
    assert text.tokenised == 0


@pytest.mark.usefixtures("small")
def test_a_part_that_is_gone_is_made_from_the_one_before_it(run: WithStore) -> None:
    prepare_blocks(run, Text().corpus, model=MODEL, wanted=range(30))
    keys = {"model": MODEL, "corpus": Text().corpus}
    gone = blocks.tokenise.find(run, **keys, part=3)
    assert gone is not None
    (gone.path / "manifest.json").unlink()
    text = Text()
    found = prepare_blocks(run, text.corpus, model=MODEL, wanted=range(30))
    assert [found(number).tolist() for number in range(30)] == whole("shuffled", 30)
    assert 0 < text.tokenised < 30


@pytest.mark.usefixtures("small")
def test_a_part_that_is_damaged_while_it_is_read_ends_the_run(run: WithStore) -> None:
    found = prepare_blocks(run, Text().corpus, model=MODEL, wanted=range(10))
    part = blocks.tokenise.find(run, model=MODEL, corpus=Text().corpus, part=1)
    assert part is not None
    (part.path / blocks.TOKENS).write_bytes(b"")
    assert found(0).tolist() == whole("shuffled", 1)[0]
    with pytest.raises(UserError, match=r"tokens of the retraining text were damaged .* the same command"):
        found(2)
    mended = prepare_blocks(run, Text().corpus, model=MODEL, wanted=range(10))
    assert mended(2).tolist() == whole("shuffled", 3)[2]


@pytest.mark.usefixtures("small")
def test_another_tokenizer_has_tokens_of_its_own(run: WithStore) -> None:
    prepare_blocks(run, Text().corpus, model=MODEL, wanted=range(2))
    other: Any = Tokenizer("b")
    text = Text()
    prepare_blocks(run, text.corpus, model=other, wanted=range(2))
    assert text.tokenised > 0
