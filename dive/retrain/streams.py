"""Endless streams of token blocks, each a pure function of its texts and a seed, that can be put down and taken up again.

``state()`` of a stream is JSON, and as small wherever in the text it stands; a stream of the same texts that is given it by
``restore()`` goes on with the very next block.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from dive.calibration_domains.sampling import TokenizeAll, pieces

AHEAD = 64
"""Texts that are tokenised together, at most: tokenizers share them out over the cores. The first one comes alone, then two,
and so on, so that a short run tokenises little that it does not read."""
State = Mapping[str, Any]
"""JSON values."""
T = TypeVar("T")


class Stream(Protocol):
    """Blocks (length,) int64 without end."""

    def __next__(self) -> Tensor: ...

    def state(self) -> State:
        """Where it stands."""

    def restore(self, state: State) -> None:
        """Go on from where another stream of the same texts and seed stood."""


class Joined(Generic[T]):
    """Texts one after another, cut into blocks; they are tokenised shortly before their turn."""

    def __init__(
        self,
        texts: Callable[[State | None], Iterator[tuple[T, State]]],
        tokens: Callable[[list[T]], list[list[int]]],
        *,
        length: int,
    ) -> None:
        """
        Args:
            texts: endless, from a place or from the beginning; with each text the place behind it.
            tokens: of some texts.
            length: tokens of a block.
        """
        self.texts, self.tokens, self.length = texts, tokens, length
        self._begin(None, [])

    def _begin(self, place: State | None, pending: list[int]) -> None:
        self._place, self._pending = place, pending
        self._coming = self.texts(place)
        self._ready: deque[tuple[list[int], State]] = deque()
        self._ahead = 1

    def __next__(self) -> Tensor:
        while len(self._pending) < self.length:
            if not self._ready:
                coming = list(islice(self._coming, self._ahead))
                found = self.tokens([text for text, _ in coming])
                self._ready.extend(zip(found, (place for _, place in coming), strict=True))
                self._ahead = min(2 * self._ahead, AHEAD)
            tokens, self._place = self._ready.popleft()
            self._pending += tokens
        block = torch.tensor(self._pending[: self.length])
        del self._pending[: self.length]
        return block

    def state(self) -> State:
        return {"place": self._place, "pending": list(self._pending)}

    def restore(self, state: State) -> None:
        self._begin(state["place"], list(state["pending"]))


class _Turns:
    """The numbers below ``count`` in random order, in a new one every round."""

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self._random = np.random.default_rng(seed)
        self._begin(0)

    def _begin(self, taken: int) -> None:
        self._before = self._random.bit_generator.state
        self._order = self._random.permutation(self.count)
        self._taken = taken

    def __next__(self) -> int:
        if self._taken == self.count:
            self._begin(0)
        self._taken += 1
        return int(self._order[self._taken - 1])

    def state(self) -> State:
        return {"random": self._before, "taken": self._taken}

    def restore(self, state: State) -> None:
        self._random.bit_generator.state = state["random"]
        self._begin(int(state["taken"]))


class Dealt:
    """Blocks of several streams in turn, in a new random order each turn."""

    def __init__(self, streams: Sequence[Stream], shares: Sequence[int], *, seed: int) -> None:
        """
        Args:
            shares: blocks of each stream in a turn.
        """
        self.streams = streams
        self._places = [number for number, share in enumerate(shares) for _ in range(share)]
        self._turns = _Turns(len(self._places), seed)

    def __next__(self) -> Tensor:
        return next(self.streams[self._places[next(self._turns)]])

    def state(self) -> State:
        return {"turns": self._turns.state(), "streams": [stream.state() for stream in self.streams]}

    def restore(self, state: State) -> None:
        self._turns.restore(state["turns"])
        for stream, stood in zip(self.streams, state["streams"], strict=True):
            stream.restore(stood)


def shuffled_documents(documents: Sequence[str], tokenize: TokenizeAll, *, length: int, seed: int) -> Joined[int]:
    """The documents in random order, a long one as several, reshuffled every round."""
    parts = pieces(documents)
    return Joined(_shuffled(len(parts), seed), lambda some: tokenize([parts[number] for number in some]), length=length)


def shuffled_rows(rows: Tensor, *, length: int, seed: int) -> Joined[int]:
    """The same of sequences (N, T) int64."""
    return Joined(_shuffled(len(rows), seed), lambda some: rows[some].tolist(), length=length)


def _shuffled(count: int, seed: int) -> Callable[[State | None], Iterator[tuple[int, State]]]:
    def numbers(place: State | None) -> Iterator[tuple[int, State]]:
        turns = _Turns(count, seed)
        if place is not None:
            turns.restore(place)
        while True:
            yield next(turns), turns.state()

    return numbers


def rounds(documents: Callable[[int], Iterator[str]], tokenize: TokenizeAll, *, length: int) -> Joined[str]:
    """Documents that can only be read from the beginning, round after round, such as a hub stream's.

    Going on reads those before the place again, without tokenising them: what a buffer has shuffled depends on all of them.

    Args:
        documents: of a round, numbered from 0.
    """

    def texts(place: State | None) -> Iterator[tuple[str, State]]:
        number, read = (0, 0) if place is None else (int(place["round"]), int(place["read"]))
        while True:
            for document in islice(documents(number), read, None):
                read += 1
                yield document, {"round": number, "read": read}
            number, read = number + 1, 0

    return Joined(texts, tokenize, length=length)
