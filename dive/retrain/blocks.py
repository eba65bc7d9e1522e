"""The blocks of a corpus by their numbers: tokenised once, in parts that rest in the store, and read from there.

Block number i is the same whoever asks, so that any number of processes share a corpus without gaps or repeats. Asking for it
costs the same wherever it stands, so that a resumed run goes on at once. Each part keeps where its stream stood at its end; a
longer run begins there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import IterableDataset

from dive.errors import UserError
from dive.model.recipe import Dense
from dive.progress import Progress
from dive.retrain.corpus import Corpus
from dive.retrain.parts import parts_of
from dive.retrain.streams import Stream
from dive.store import Artifact, HasStore, Place, write_json
from dive.together import from_first, shared_step

TOKENS, STATE = "tokens.safetensors", "state.json"
NAME = "blocks"

Blocks = Callable[[int], Tensor]
"""Block (length,) int64 of a number."""


@dataclass(slots=True)
class Reader:
    """A corpus being tokenised: its stream, and the part that it stands before."""

    corpus: Corpus
    stream: Stream | None = None
    part: int = 0

    def at(self, part: int, earlier: Artifact | None) -> Stream:
        """The stream at the beginning of a part.

        Args:
            earlier: the part before it; none for the first one.
        """
        if self.stream is None or self.part != part:
            self.stream = self.corpus.stream()
            if earlier is not None:
                self.stream.restore(earlier.read(STATE))
        self.part = part + 1
        return self.stream


@shared_step("tokens", "tokens of the retraining text")
def tokenise(
    place: Place,
    run: HasStore,
    reader: Reader,
    span: range,
    earlier: Artifact | None,
    *,
    model: Dense,
    corpus: Corpus,
    part: int,
) -> None:
    """A part of a corpus, and where its stream stands behind it. The first process tokenises.

    Args:
        span: its blocks.
        model: whose tokenizer it is.
    """
    if not place.writes:
        return
    stream = reader.at(part, earlier)
    rows = torch.empty(len(span), corpus.length, dtype=torch.int32)
    with Progress("tokenising", len(span), "tokens", size=corpus.length) as shown:
        for number in range(len(span)):
            rows[number] = next(stream)
            shown.reached(number + 1)
    save_file({NAME: rows}, place.directory / TOKENS)
    write_json(place.directory / STATE, stream.state())


def prepare_blocks(run: HasStore, corpus: Corpus, *, model: Dense, wanted: range) -> Blocks:
    """These blocks of a corpus, by their numbers; what the store lacks of them is tokenised.

    Raises:
        UserError: the text cannot be read; or, when a block is asked for, its part was damaged since.
    """
    keys: dict[str, Any] = {"model": model, "corpus": corpus}
    parts = parts_of(wanted, corpus.length)
    first = next((number for number, _ in parts if not tokenise.exists(run, **keys, part=number)), None)
    begin = -1
    if first is not None:  # from the last part before it that is there
        begin = next((number for number in range(first, 0, -1) if tokenise.exists(run, **keys, part=number - 1)), 0)
    begin = from_first(begin)  # another run may be writing parts at this very moment
    if begin >= 0:
        reader = Reader(corpus)
        earlier = tokenise.find(run, **keys, part=begin - 1) if begin else None
        for number, span in parts_of(range(wanted.stop), corpus.length)[begin:]:
            earlier = tokenise(run, reader, span, earlier, **keys, part=number)
    return Stored(run, keys, dict(parts), corpus.length)


@dataclass(slots=True)
class Stored:
    """Blocks in the store; a part is checked when it is first read."""

    run: HasStore
    keys: dict[str, Any]
    parts: dict[int, range]
    length: int
    _open: dict[int, Any] = field(default_factory=dict)

    def __call__(self, number: int) -> Tensor:
        """
        Raises:
            UserError: the part is damaged, or gone.
        """
        part, span = next((part, span) for part, span in self.parts.items() if number in span)
        if part not in self._open:
            found = tokenise.find(self.run, **self.keys, part=part)
            if found is None:
                raise UserError(
                    f"store={self.run.store.root}: tokens of the retraining text were damaged or taken away; the same command "
                    "makes them anew and goes on"
                )
            self._open = {part: safe_open(found.path / TOKENS, framework="pt").get_slice(NAME)}  # blocks come in order
        block: Tensor = self._open[part][number - span.start]
        return block.long()


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
        for index in range(self.start + (self.rank - self.start) % self.world, self.stop, self.world):
            yield {"input_ids": self.blocks(index), "index": torch.tensor(index)}
