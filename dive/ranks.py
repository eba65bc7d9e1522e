"""The processes that compute one thing together, and what each of them holds of it.

Whatever is as long as the tokens and as wide as the model is shared out: each process has a run of the sequences. Whatever is
as long as the tokens alone, such as the expert of each, is known to all, so that all draw the same rows from it.

Shapes: T tokens of all processes, t of this one, D width of a matrix.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, distributed

from dive.errors import UserError, require


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that compute together. Of one alone everything below is nothing to do.

    What is summed may be written over.
    """

    rank: int = 0
    count: int = 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of all processes' tensors, in each of them."""
        return self._collective(tensor, distributed.all_reduce)

    def sum_at(self, owner: int, tensor: Tensor) -> Tensor:
        """The sum of all processes' tensors, in the owner; what the others get means nothing."""
        return self._collective(tensor, lambda there: distributed.reduce(there, dst=owner))

    def from_owner(self, owner: int, tensor: Tensor) -> Tensor:
        """The owner's tensor, in each of them; the others give one of its shape and type."""
        return self._collective(tensor, lambda there: distributed.broadcast(there, src=owner))

    def joined(self, tensor: Tensor, lengths: Sequence[int]) -> Tensor:
        """All processes' tensors (n, ...), one after another, in each of them.

        Args:
            lengths: n of each process.
        """
        if self.count == 1:
            return tensor
        here = torch.empty(max(lengths), *tensor.shape[1:], dtype=tensor.dtype, device=meeting_place(tensor.device))
        here[: len(tensor)] = tensor  # what stands behind it is cut off again
        found = [torch.empty_like(here) for _ in lengths]
        with others_alive():
            distributed.all_gather(found, here)
        return torch.cat([part[:length] for part, length in zip(found, lengths, strict=True)]).to(tensor.device)

    def owner(self, number: int) -> int:
        """The process to which it falls to make the thing of this number."""
        return number % self.count

    def owns(self, number: int) -> bool:
        """Whether that is this one."""
        return self.owner(number) == self.rank

    def from_owners(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """:meth:`from_owner` of the thing of each number."""
        return [self.from_owner(self.owner(number), tensor) for number, tensor in enumerate(tensors)]

    def part(self, rows: Tensor) -> Tensor:
        """This process's run of rows that all have; it may be empty."""
        first, last = (len(rows) * place // self.count for place in (self.rank, self.rank + 1))
        return rows[first:last]

    def each(self, number: int, make: Callable[[int], Tensor], like: Tensor) -> list[Tensor]:
        """``make`` of every number below ``number``, each by its owner; the results in all processes.

        Args:
            like: of the shape, type and device of every result.
        """
        return self.from_owners([make(i) if self.owns(i) else torch.empty_like(like) for i in range(number)])

    def _collective(self, tensor: Tensor, run: Callable[[Tensor], object]) -> Tensor:
        if self.count == 1:
            return tensor
        there = tensor.contiguous().to(meeting_place(tensor.device))
        with others_alive():
            run(there)
        return there.to(tensor.device)


ALONE = Ranks()


def meeting_place(device: torch.device) -> torch.device:
    """Where a tensor of this device is for a collective call: NCCL knows those on a GPU alone."""
    if distributed.get_backend() == "nccl" and device.type == "cpu":
        return torch.device("cuda", torch.cuda.current_device())
    return device


@contextmanager
def others_alive(where: str = "") -> Iterator[None]:
    """Collective calls, or word that another process is gone.

    Args:
        where: what the word begins with.

    Raises:
        UserError: it is.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, distributed.DistError) or "by peer" in str(error):
            raise UserError(f"{where}another process of this run has ended; what it said tells why") from error
        raise


# -------------------------------------------------------------------------------------------------------------- sharing


def sequences_of(ranks: Ranks, counts: Sequence[int], *, rank: int | None = None) -> list[slice]:
    """Which sequences of each set fall to a process: a run of all sets one after another.

    Args:
        counts: sequences of each set.
        rank: of the process; this one if none.

    Raises:
        UserError: there are fewer sequences than processes.
    """
    total, place = sum(counts), ranks.rank if rank is None else rank
    require(
        ranks.count == 1 or total >= ranks.count,
        f"{total} calibration sequences cannot be shared out over {ranks.count} processes; raise "
        "calibration_domains.samples, or lower trainer.devices",
    )
    first, last = place * total // ranks.count, (place + 1) * total // ranks.count
    starts = [0, *accumulate(counts)]
    return [
        slice(min(max(first - start, 0), stop - start), min(max(last - start, 0), stop - start))
        for start, stop in pairwise(starts)
    ]


def shared_tokens(ranks: Ranks, sets: Sequence[Tensor]) -> list[Tensor]:
    """This process's sequences of each set (N, L), some of which may be empty; (n, L) each."""
    slices = sequences_of(ranks, [len(tokens) for tokens in sets])
    return [tokens[here] for tokens, here in zip(sets, slices, strict=True)]


def batches(rows: Tensor, size: int) -> tuple[Tensor, ...]:
    """Rows in parts of so many; none of a share that is empty, of which ``split`` makes one."""
    return rows.split(size) if len(rows) else ()


@dataclass(frozen=True, slots=True)
class Share:
    """Which of T rows rest in this process: each has a run of them, in the order of the processes."""

    lengths: tuple[int, ...]
    """Rows of each process."""
    ranks: Ranks = ALONE

    @classmethod
    def all_of(cls, rows: Tensor) -> "Share":
        """Of a matrix that rests in one process."""
        return cls((len(rows),))

    @classmethod
    def of_sequences(cls, ranks: Ranks, sets: Sequence[Tensor]) -> "Share":
        """Of the tokens of sets of sequences (N, L) as :func:`sequences_of` shares them out."""
        counts = [len(tokens) for tokens in sets]
        return cls(
            tuple(
                sum(
                    (here.stop - here.start) * tokens.shape[1]
                    for here, tokens in zip(sequences_of(ranks, counts, rank=rank), sets, strict=True)
                )
                for rank in range(ranks.count)
            ),
            ranks,
        )

    @property
    def count(self) -> int:
        """T"""
        return sum(self.lengths)

    @property
    def here(self) -> slice:
        """The rows of this process."""
        start = sum(self.lengths[: self.ranks.rank])
        return slice(start, start + self.lengths[self.ranks.rank])

    def own(self, rows: Tensor) -> Tensor:
        """Those of some rows that rest here, numbered from the first one here; in the order given."""
        if self.ranks.count == 1:
            return rows
        here = self.here
        own: Tensor = rows[(rows >= here.start) & (rows < here.stop)] - here.start
        return own

    def take(self, matrix: Tensor, rows: Tensor, *, ordered: bool = True) -> Tensor:
        """Some rows (n,) of a matrix of which this process has (t, D); (n, D) in every process.

        Args:
            ordered: in the order given; otherwise, of several processes, in one that is the same for any matrix.
        """
        if self.ranks.count == 1:
            return matrix.index_select(0, rows)
        bounds = torch.tensor(list(accumulate(self.lengths)))
        owner = torch.bucketize(rows, bounds, right=True)
        lengths = torch.bincount(owner, minlength=self.ranks.count).tolist()
        found = self.ranks.joined(matrix.index_select(0, self.own(rows)), lengths)
        if not ordered:
            return found
        return torch.empty_like(found).index_copy_(0, torch.argsort(owner, stable=True).to(found.device), found)

    def whole(self, vector: Tensor) -> Tensor:
        """(T, ...) in every process, of which each has (t, ...)."""
        return self.ranks.joined(vector, self.lengths)

    def mean(self, values: Tensor) -> Tensor:
        """Mean of the numbers of all rows, of which this process has (t, ...)."""
        if self.ranks.count == 1:
            return values.mean()
        return self.ranks.sum(values.sum()) / (self.count * values.shape[1:].numel())


# ----------------------------------------------------------------------------------------------------------- gradients


class _Joined(torch.autograd.Function):
    """Numbers of pairs, each computed by its expert's owner, in every process; a gradient goes back to what was computed here."""

    @staticmethod
    def forward(context: Any, own: Tensor, places: Tensor, count: int, ranks: Ranks) -> Tensor:
        context.save_for_backward(places)
        return ranks.sum(own.new_zeros(count).index_copy_(0, places, own))

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        [places] = context.saved_tensors
        return gradients[0].index_select(0, places), None, None, None


def joined_pairs(own: Tensor, places: Tensor, count: int, ranks: Ranks) -> Tensor:
    """(count,) numbers in every process, of which each computed those at its ``places``; differentiable by its own."""
    joined: Tensor = _Joined.apply(own, places, count, ranks)
    return joined


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, part: Tensor, ranks: Ranks) -> Tensor:
        return ranks.sum(part.clone())

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def summed(part: Tensor, ranks: Ranks) -> Tensor:
    """The sum of all processes' parts, in every process; a gradient goes back to this one's part."""
    if ranks.count == 1:
        return part
    whole: Tensor = _Summed.apply(part, ranks)
    return whole
