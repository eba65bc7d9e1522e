"""Progress of long work: a bar with rate and time left in a terminal, a line now and then elsewhere."""

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)

PLAIN_INTERVAL = 20.0
"""Seconds between lines where there is no terminal."""


def track(items: Sequence[T], description: str, unit: str = "it") -> Iterator[T]:
    """Iterate over ``items`` and show how far it is, how fast, and how long it will take."""
    if sys.stderr.isatty():
        yield from _bar(items, description, unit)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - last >= PLAIN_INTERVAL and done:
            rate = done / (now - start)
            left = (len(items) - done) / rate
            log.info("%s: %d/%d, %.1f %s/s, %.0f s left", description, done, len(items), rate, unit, left)
            last = now
        yield item


def _bar(items: Sequence[T], description: str, unit: str) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.1f} {unit}/s" if task.speed else "")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield from progress.track(items, description=description)


def quiet_libraries() -> None:
    """Keep what libraries say about themselves out of the way of what the run says."""
    import warnings

    from transformers.utils import logging as transformers_logging

    for name in ("lightning.pytorch", "lightning.fabric", "lightning", "wandb"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for message in (
        ".*isinstance\\(treespec.*",
        ".*does not have many workers.*",
        ".*IterableDataset.*has `__len__`.*",
        ".*Checkpoint directory .* exists.*",
        ".*Found .* module\\(s\\) in eval mode.*",
    ):
        warnings.filterwarnings("ignore", message=message)
