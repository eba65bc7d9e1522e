"""Streams of blocks: every text once a round, in an order that follows the seed, and the same after a pause as without one."""

import json
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from dive.retrain.streams import Dealt, Stream, rounds, shuffled_documents, shuffled_rows

DOCUMENTS = ["aa", "bbb", "cccc"]  # 9 tokens a round


def tokenize(texts: Sequence[str]) -> list[list[int]]:
    return [[ord(character) for character in text] for text in texts]


def shuffled(seed: int = 0) -> Stream:
    return shuffled_documents(DOCUMENTS, tokenize, length=3, seed=seed)


def dealt() -> Dealt:
    other = shuffled_rows(torch.arange(30).view(5, 6), length=3, seed=5)
    return Dealt([shuffled(1), other], [1, 2], seed=4)


def read(number: int) -> Iterator[str]:
    """A round of a text that nobody can enter in the middle."""
    yield from (f"{number}{letter}" * 2 for letter in "abcde")


def in_rounds() -> Stream:
    return rounds(read, tokenize, length=3)


def taken(stream: Stream, count: int) -> list[list[int]]:
    return [next(stream).tolist() for _ in range(count)]


def test_documents_come_in_random_order_again_and_again() -> None:
    text = "".join(chr(c) for block in taken(shuffled(), 60) for c in block)
    seen = [text[start : start + 9] for start in range(0, 180, 9)]
    assert all(sorted(r) == sorted("".join(DOCUMENTS)) for r in seen)
    assert len(set(seen)) > 2
    assert taken(shuffled(), 60) == taken(shuffled(), 60) != taken(shuffled(1), 60)


def test_sequences_are_all_in_each_round() -> None:
    """5 sequences of 6 tokens are 3 blocks of 10 a round, and nothing is lost between two."""
    stream = shuffled_rows(torch.arange(30).view(5, 6), length=10, seed=3)
    found = torch.tensor(taken(stream, 6)).view(2, 5, 6)
    for turn in found:
        assert sorted(turn[:, 0].tolist()) == [0, 6, 12, 18, 24]
        assert (turn - turn[:, :1] == torch.arange(6)).all()
    assert not torch.equal(*found)


def test_each_turn_deals_every_stream_its_share() -> None:
    kinds = ["letters" if block[0] >= 97 else "numbers" for block in taken(dealt(), 30)]
    for start in range(0, 30, 3):
        assert sorted(kinds[start : start + 3]) == ["letters", "numbers", "numbers"]
    assert len({tuple(kinds[start : start + 3]) for start in range(0, 30, 3)}) > 1


def test_rounds_follow_one_another() -> None:
    text = "".join(chr(c) for block in taken(in_rounds(), 14) for c in block)
    assert text[:40] == "".join([*read(0), *read(1)])


@pytest.mark.parametrize("make", [shuffled, dealt, in_rounds])
@pytest.mark.parametrize("place", [0, 1, 2, 3, 7, 20])
def test_a_stream_that_was_put_down_goes_on_with_the_next_block(make: Callable[[], Stream], place: int) -> None:
    whole = taken(make(), place + 40)
    first = make()
    taken(first, place)
    kept = json.dumps(first.state())
    again = make()
    again.restore(json.loads(kept))
    assert taken(again, 40) == whole[place:]
    assert taken(first, 40) == whole[place:]  # asking where it stands does not move it
    assert len(kept) < 1000


def test_texts_are_tokenised_together_but_few_that_are_not_read() -> None:
    asked: list[list[str]] = []

    def counted(texts: Sequence[str]) -> list[list[int]]:
        asked.append([*texts])
        return tokenize(texts)

    stream = rounds(read, counted, length=4)
    taken(stream, 3)
    assert asked == [["0a0a"], ["0b0b", "0c0c"]]
    again = rounds(read, counted, length=4)
    again.restore(stream.state())
    next(again)
    assert asked[2:] == [["0d0d"]]  # those before it were not tokenised again
