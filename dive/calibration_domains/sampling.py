"""From documents to token matrices: random crops for calibration, windows for evaluation, blocks for retraining.

Every document begins with the tokenizer's boundary token, see :func:`dive.model.load.document_tokens`.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from dive.errors import UserError

Tokenize = Callable[[str], list[int]]

PIECE = 8000
"""Characters; a longer document counts as several, so that a book is not tokenised for one crop of it."""


def pieces(documents: Sequence[str]) -> list[str]:
    """Documents of at most :data:`PIECE` characters."""
    return [
        d[start : start + PIECE]
        for d in documents
        for start in range(0, len(d), PIECE)
        if d[start : start + PIECE].strip()
    ]


class _Crops:
    """Random crops from shuffled documents, each document used once a round."""

    def __init__(self, documents: Sequence[str], tokenize: Tokenize, rng: np.random.Generator) -> None:
        self.documents = documents
        self.tokenize = tokenize
        self.rng = rng
        self.order: list[int] = []
        self.tokens_in_round = 0

    def _next(self) -> list[int] | None:
        if not self.order:
            return None
        tokens = self.tokenize(self.documents[self.order.pop()])
        self.tokens_in_round += len(tokens)
        return tokens

    def start_round(self) -> None:
        self.order = self.rng.permutation(len(self.documents)).tolist()
        self.tokens_in_round = 0

    def take(self, length: int) -> list[int] | None:
        """Documents joined until longer than ``length`` tokens, cropped at random; none when the round has run out."""
        joined: list[int] = []
        while len(joined) <= length:
            tokens = self._next()
            if tokens is None:
                return None
            joined += tokens
        start = int(self.rng.integers(len(joined) - length))
        return joined[start : start + length]


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

    As the paper's: documents in random order are joined until longer than ``length`` tokens, then cropped at random. The
    two matrices come from different pieces of documents. Where one round through them is too short for all samples, further
    rounds crop elsewhere, as long as the text has as many tokens as are asked for; with ``repeat`` however short
    it is.

    Raises:
        UserError: the domain's text is too short; says by how much.
    """
    rng = np.random.default_rng([seed, *domain.encode()])
    parts = pieces(documents)
    crops = _Crops(parts, tokenize, rng)
    crops.start_round()
    held_out = [crops.take(length) for _ in range(measured)]
    crops.documents = [parts[i] for i in crops.order]
    crops.start_round()
    taken: list[list[int]] = []
    before = 0  # crops taken when the round began
    while len(taken) < samples and None not in held_out:
        crop = crops.take(length)
        if crop is not None:
            taken.append(crop)
        elif (crops.tokens_in_round < samples * length and not repeat) or len(taken) == before:
            break
        else:
            before = len(taken)
            crops.start_round()
    if len(taken) < samples:
        total = sum(len(tokenize(part)) for part in parts)
        needed = (samples + measured) * length
        lacks = max(needed - total, length)
        raise UserError(
            f"calibration_domains.samples: domain {domain!r} has {total} tokens of training text, "
            f"({samples} + {measured} for affinity) × {length} = {needed} are asked for, and it lacks at least {lacks}; "
            "lower calibration_domains.samples, add text, or set calibration_domains.repeat=true"
        )
    return torch.tensor(taken), torch.tensor([crop for crop in held_out if crop], dtype=torch.int64).reshape(
        measured, length
    )


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
        tokens += tokenize(document)
        if windows is not None and len(tokens) >= windows * length:
            del tokens[windows * length :]
            break
    count = len(tokens) // length
    if count == 0:
        raise UserError(
            f"eval.lengths: the test text of {name!r} has {len(tokens)} tokens, a window {length}; shorten the window or add text"
        )
    return torch.tensor(tokens[: count * length]).reshape(count, length)


def token_blocks(documents: Sequence[str], tokenize: Tokenize, *, length: int, seed: int) -> Iterator[Tensor]:
    """Endless blocks (length,) int64 of the documents joined in random order, reshuffled every round."""
    rng = np.random.default_rng(seed)
    parts = pieces(documents)
    pending: list[int] = []
    while True:
        for index in rng.permutation(len(parts)):
            pending += tokenize(parts[index])
            while len(pending) >= length:
                yield torch.tensor(pending[:length])
                del pending[:length]
