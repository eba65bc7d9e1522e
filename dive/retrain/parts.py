"""Into which parts a tokenised corpus is cut.

Parts hold twice as many tokens each as the one before, from :data:`FIRST` to :data:`LARGEST`: a short run tokenises little more
than it reads, and a long one has few files.
"""

from collections.abc import Iterator
from itertools import count, takewhile

FIRST, LARGEST = 1 << 17, 1 << 24
"""Tokens of the first part, and of the largest ones."""
BYTES = 4
"""Of a token in the store."""


def spans(length: int) -> Iterator[range]:
    """Numbers of the blocks of each part, for blocks of so many tokens."""
    start = 0
    for number in count():
        size = max(min(FIRST << number, LARGEST) // length, 1)
        yield range(start, start + size)
        start += size


def parts_of(blocks: range, length: int) -> list[tuple[int, range]]:
    """Numbers and blocks of the parts that these blocks lie in."""
    reached = takewhile(lambda part: part[1].start < blocks.stop, enumerate(spans(length)))
    return [(number, span) for number, span in reached if span.stop > blocks.start and blocks]
