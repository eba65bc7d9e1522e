"""Progress of long work: a bar with rate and time left in a terminal, a line now and then elsewhere."""

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Self, TextIO, TypeVar

from dive.units import clock, count

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

T = TypeVar("T")
log = logging.getLogger(__name__)

PLAIN_INTERVAL = 20.0
"""Seconds between lines where there is no terminal."""
WINDOW = 32
"""Latest steps that the rate is the mean of."""


def track(items: Sequence[T], description: str, unit: str = "it") -> Iterator[T]:
    """Iterate over ``items`` and show how far it is, how fast, and how long it will take."""
    with Progress(description, len(items), unit) as progress:
        for done, item in enumerate(items):
            progress.reached(done)
            yield item


def terminal() -> "Console | None":
    """The terminal that bars are drawn in, if there is one."""
    if not sys.stderr.isatty():
        return None
    from rich.console import Console

    console = Console(stderr=True)
    return None if console.is_dumb_terminal else console


class Progress:
    """How far one piece of work is. In a terminal a bar, and log lines above it; elsewhere a log line now and then."""

    def __init__(
        self,
        description: str,
        total: int,
        unit: str = "it",
        *,
        size: int = 1,
        done: int = 0,
        console: "Console | None" = None,
    ) -> None:
        """
        Args:
            total: steps of the whole work.
            unit: of the rate.
            size: units a step.
            done: steps that were taken before, by an interrupted run.
            console: where the bar is drawn; the terminal, if there is one, for none.
        """
        self.description = description
        self.total = total
        self.unit = unit
        self.size = size
        self.done = done
        self.note = ""
        self._console = console or terminal()
        self._bar: Bar | None = None
        self._open = ExitStack()
        self._samples = deque([(time.monotonic(), done)], maxlen=WINDOW)
        self._said = time.monotonic()

    def __enter__(self) -> Self:
        self._samples = deque([(time.monotonic(), self.done)], maxlen=WINDOW)
        self._said = time.monotonic()
        if self._console is not None:
            with ExitStack() as opened:
                opened.enter_context(_logging_above(self._console))
                self._bar = opened.enter_context(_bar(self, self._console))
                self._bar.add_task(self.description, total=self.total, completed=self.done)
                self._open = opened.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def reached(self, done: int, note: str = "") -> None:
        """Say that so many steps are taken by now, and what else there is to see, such as a loss."""
        now = time.monotonic()
        self.note = note
        if done != self.done:
            self.done = done
            self._samples.append((now, done))
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done)
        elif now - self._said >= PLAIN_INTERVAL and self.rate and done < self.total:
            log.info("%s: %d/%d, %s", self.description, done, self.total, self.figures(clock))
            self._said = now

    @property
    def rate(self) -> float:
        """Steps a second; 0 where none was taken yet."""
        (start, first), (end, last) = self._samples[0], self._samples[-1]
        return (last - first) / (end - start) if end > start else 0.0

    def speed(self) -> str:
        """``5.3 k tokens/s``, ``2.5 it/s``, or ``12.0 s/layer`` for what takes longer than a second."""
        rate = self.rate * self.size
        if not rate:
            return ""
        if rate < 1:
            return f"{clock(1 / rate)}/{self.unit}"
        return f"{count(rate) if rate >= 1000 else f'{rate:.1f}'} {self.unit}/s"

    def left(self) -> float | None:
        """Seconds that the rest will take; none before the first step."""
        if not self.rate:
            return None
        since = time.monotonic() - self._samples[-1][0]
        return max(0.0, (self.total - self.done) / self.rate - since)

    def figures(self, shown: Callable[[float], str]) -> str:
        """Rate, note and time left, which ``shown`` makes a text of."""
        left = self.left()
        parts = (self.speed(), self.note, "" if left is None else f"{shown(left)} left")
        return ", ".join(part for part in parts if part)


def ticking(seconds: float) -> str:
    """247 seconds as 4:07, 3847 as 1:04 h: what changes while one looks at it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d} h" if hours else f"{minutes}:{rest:02d}"


def _bar(progress: Progress, console: "Console") -> "Bar":
    from rich.console import RenderableType
    from rich.constrain import Constrain
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn
    from rich.progress import Progress as Bar
    from rich.table import Column
    from rich.text import Text

    class Figures(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(progress.figures(ticking))

    class Narrowed(Bar):
        def get_renderables(self) -> Iterator[RenderableType]:
            # A terminal writes ^C behind the bar; in a full line it would break, and the bar would not be erased.
            for table in super().get_renderables():
                yield Constrain(table, console.width - 4)

    return Narrowed(
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(bar_width=None, table_column=Column(ratio=1, max_width=40)),  # what the words leave
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        Figures(table_column=Column(no_wrap=True)),
        console=console,
        transient=True,
        expand=True,
        redirect_stdout=sys.stdout.isatty(),  # or what is printed would miss the file that it is sent to
    )


class _Above:
    """A terminal while a bar is drawn in it: what is written are whole lines, and they stand above the bar."""

    closed = False

    def __init__(self, console: "Console") -> None:
        self.console = console

    def isatty(self) -> bool:
        """Bars within bars leave the log to the first."""
        return False

    def write(self, text: str) -> None:
        self.console.out(text.removesuffix("\n"), highlight=False)

    def flush(self) -> None:
        """Every line is out already."""


@contextmanager
def _logging_above(console: "Console") -> Iterator[None]:
    """Handlers hold the stream that they began with, which rich's own redirection does not reach.

    Those that look for ``sys.stderr`` anew, as logging's last resort does, it reaches.
    """
    named = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    handlers = {handler for logger in (logging.root, *named) for handler in logger.handlers}
    streams = {
        handler: handler.stream
        for handler in handlers
        if isinstance(handler, logging.StreamHandler) and "stream" in vars(handler) and _is_terminal(handler.stream)
    }
    for handler in streams:
        handler.setStream(_Above(console))
    try:
        yield
    finally:
        for handler, stream in streams.items():
            handler.setStream(stream)


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def show(*items: object) -> None:
    """Print to the terminal; 120 columns where there is none."""
    from rich.console import Console

    width = None if Console().is_terminal else 120
    console = Console(width=width, markup=False, emoji=False)  # names may have brackets
    for item in items:
        console.print(item, soft_wrap=isinstance(item, str))  # a line is the terminal's to wrap: paths stay whole


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
        ".*Experiment logs directory .* exists.*",
        ".*Found .* module\\(s\\) in eval mode.*",
    ):
        warnings.filterwarnings("ignore", message=message)
