"""``verify.json``: what engines answered, as it is kept beside the checkpoint."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from dive.errors import UserError
from dive.results import read_as

FILE = "verify.json"
EQUAL, NEAR, DIFFERS, REFERENCE = "equal", "near", "differs", "reference"
LOADS, ABSENT, REFUSED = "loads whole", "not installed", "refused"
"""Verdicts: beside the plain ones, a quantised export has about the same perplexity; the loader read every tensor and nothing was
computed; no such engine; it raised an error."""


@dataclass(slots=True, kw_only=True)
class EngineResult:
    """What one engine made of the checkpoint."""

    engine: str
    verdict: str
    version: str | None = None
    reason: str | None = None
    """Of a verdict that is not plain."""
    difference: float | None = None
    """Largest difference of a token's log-probability, in nats."""
    perplexity: float | None = None
    equal: int | None = None
    """Continuations that are the same."""
    seconds: float | None = None


@dataclass(slots=True, kw_only=True)
class Verified:
    """``verify.json``: one checkpoint in every engine that was asked for."""

    checkpoint: str
    model: str
    """Its class."""
    texts: str
    """What was compared."""
    predicted: int
    """Tokens whose log-probabilities were compared."""
    continuations: int
    tokens: int
    """Of each continuation."""
    tolerance: float
    """Nats."""
    date: str
    engines: list[EngineResult] = field(default_factory=list)

    def of(self, verdict: str) -> list[EngineResult]:
        """Engines of this verdict."""
        return [found for found in self.engines if found.verdict == verdict]


def read_verified(directory: Path) -> Verified | None:
    """What stands in a run's directory; none where nobody asked, or where the checkpoint was written again since."""
    file = directory / FILE
    try:
        found: Verified = read_as(Verified, json.loads(file.read_text(encoding="utf-8")), FILE)
        written = (directory / Path(found.checkpoint).name / "config.json").stat().st_mtime
        return found if written <= file.stat().st_mtime else None
    except (OSError, ValueError, RecursionError, UserError):
        return None
