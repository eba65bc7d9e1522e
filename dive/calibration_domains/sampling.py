"""From documents to token matrices: random crops for calibration, windows for evaluation.

Every document begins with the tokenizer's boundary token, see :func:`dive.model.load.document_tokens`.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from dive.errors import UserError
from dive.model.chat import Conversation
from dive.store import identity


@identity.register
def _(value: Tensor) -> str:
    """SHA-256 over element type, shape and values."""
    digest = hashlib.sha256(f"{value.dtype}{tuple(value.shape)}".encode())
    digest.update(value.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


Tokenize = Callable[[str], list[int]]
TokenizeAll = Callable[[Sequence[str]], list[list[int]]]

PIECE = 8000
"""Characters; a longer document counts as several, so that a book is not tokenised for one crop of it. A conversation is one:
a cut could fall into a special token."""


def pieces(documents: Sequence[str]) -> list[str]:
    """Documents of at most :data:`PIECE` characters, and whole conversations."""
    parts = (
        [d] if isinstance(d, Conversation) else [d[start : start + PIECE] for start in range(0, len(d), PIECE)]
        for d in documents
    )
    return [part for some in parts for part in some if part.strip()]


RESERVE = 5
"""One piece in so many, from the end of the random order, is set apart for measuring whether or not anything is measured."""


def _reaching(order: Sequence[int], tokens: Callable[[int], list[int]], wanted: int) -> int | None:
    """Fewest pieces from the front that have ``wanted`` tokens together; none if all of them have fewer."""
    held = 0
    for count, index in enumerate(order, start=1):
        held += len(tokens(index))
        if held >= wanted:
            return count
    return None


def _crops(
    pool: Sequence[int], tokens: Callable[[int], list[int]], *, count: int, length: int, rng: np.random.Generator
) -> tuple[list[list[int]], int]:
    """Random crops of the pieces of a pool, and how many of its pieces they are from, the first ones.

    Each piece is used once a round; the first round has the order of the pool. The pool must have more than ``length`` tokens,
    or this does not end.
    """
    taken: list[list[int]] = []
    read = 0
    order = list(pool)
    while len(taken) < count:
        joined: list[int] = []
        for index in order:
            joined += tokens(index)
            read += 1
            if len(joined) > length:
                start = int(rng.integers(len(joined) - length))
                taken.append(joined[start : start + length])
                joined = []
                if len(taken) == count:
                    break
        order = rng.permutation(pool).tolist()
    return taken, min(read, len(pool))


def calibration_tokens(
    documents: Sequence[str],
    tokenize: Tokenize,
    *,
    samples: int,
    measured: int,
    length: int,
    seed: int,
    domain: str,
    repeat: bool = False,
) -> tuple[Tensor, Tensor]:
    """Calibration sequences (samples, length) and sequences to measure affinity on (measured, length), int64.

    As the paper's: documents in random order are joined until longer than ``length`` tokens, then cropped at random.
    Calibration takes them from the front of the order, measuring from its end, and they never share a piece of a document.
    Neither depends on how much the other takes: each has random numbers and a pool of pieces of its own. The pools are four
    fifths of the text and one fifth (:data:`RESERVE`); one whose share is too short for what is asked of it takes as many
    pieces more as it needs. Where one round through its pool is too short for all crops, further rounds crop elsewhere; with
    ``repeat`` however short the pool is.

    Raises:
        UserError: the domain's text is too short; says by how much.
    """
    parts = pieces(documents)
    streams = np.random.SeedSequence([seed, *domain.encode()]).spawn(3)
    shuffle, crop, measure = (np.random.default_rng(stream) for stream in streams)
    front: list[int] = shuffle.permutation(len(parts)).tolist()
    back = front[::-1]

    @cache
    def tokens(index: int) -> list[int]:
        return tokenize(parts[index])

    reserved = max(len(parts) // RESERVE, _reaching(back, tokens, length + 1) or 0)

    def draw(order: list[int], count: int, share: int, rng: np.random.Generator) -> tuple[list[list[int]], int] | None:
        """Crops, and the number of pieces from the front of the order that they are from; none if the text is too short."""
        needed = _reaching(order, tokens, length + 1 if repeat else max(count * length, length + 1))
        if needed is None:
            return None
        return _crops(order[: max(needed, share)], tokens, count=count, length=length, rng=rng)

    calibration = draw(front, samples, len(parts) - reserved, crop)
    held_out = draw(back, measured, reserved, measure) if measured else ([], 0)
    if calibration is None or held_out is None or calibration[1] + held_out[1] > len(parts):
        total = sum(len(tokens(index)) for index in front)
        raise UserError(_too_short(domain, total, samples=samples, measured=measured, length=length, repeat=repeat))
    return (
        torch.tensor(calibration[0]),
        torch.tensor(held_out[0], dtype=torch.int64).reshape(measured, length),
    )


def _too_short(domain: str, total: int, *, samples: int, measured: int, length: int, repeat: bool) -> str:
    needed = (samples + measured) * length
    asked = f"({samples} + {measured} for affinity) × {length}" if measured else f"{samples} × {length}"
    mend = "calibration_domains.samples" + (" or affinity.samples" if measured else "")
    remedies = f"lower {mend}, add text" + ("" if repeat else ", or set calibration_domains.repeat=true")
    has = f"calibration_domains.samples: domain {domain!r} has {total} tokens of training text, {asked} = {needed} are asked for"
    if total > needed and measured:
        return f"{has}, but its documents are too few to keep those for affinity apart; {remedies}"
    if repeat:
        least = f"not even one sequence {'of each ' if measured else ''}can be cropped"
        return f"{has}, and {least}; lower calibration_domains.length, or add text"
    return f"{has}, and it lacks at least {max(needed - total, length)}; {remedies}"


def evaluation_windows(
    documents: Sequence[str], tokenize: Tokenize, *, length: int, windows: int | None, name: str
) -> Tensor:
    """Non-overlapping windows of the documents one after another, (N, length) int64; an incomplete last one is dropped.

    Args:
        windows: at most so many, from the start; all if none.

    Raises:
        UserError: the text does not fill one window.
    """
    tokens: list[int] = []
    for document in documents:
        if windows is None:
            tokens += tokenize(document)
            continue
        tokens += _beginning(document, tokenize, windows * length - len(tokens))
        if len(tokens) >= windows * length:
            del tokens[windows * length :]
            break
    count = len(tokens) // length
    if count == 0:
        raise UserError(
            f"eval.lengths: the test text of {name!r} has {len(tokens)} tokens, a window {length}; shorten the window or add text"
        )
    return torch.tensor(tokens[: count * length]).reshape(count, length)


def _beginning(document: str, tokenize: Tokenize, wanted: int) -> list[int]:
    """Tokens of a document from its start, at least ``wanted`` if it has so many; a very long one is not tokenised whole."""
    if isinstance(document, Conversation):
        return tokenize(document)
    characters = 64 * wanted
    while True:
        tokens = tokenize(document[:characters])
        # The cut may change the tokens next to it, which stand far beyond those that are wanted.
        if characters >= len(document) or len(tokens) >= 2 * wanted:
            return tokens
        characters *= 4
