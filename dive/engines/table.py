"""What engines answered, for people."""

from collections.abc import Iterator

from rich.table import Table

from dive.engines.verified import ABSENT, LOADS, REFUSED, EngineResult, Verified


def figures(verified: Verified, found: EngineResult) -> tuple[str, str, str]:
    """(largest difference of a log-probability, perplexity, continuations that are equal); dashes for what there is not."""
    return (
        "–" if found.difference is None else f"{found.difference:.1e}",
        "–" if found.perplexity is None else f"{found.perplexity:.4f}",
        "–" if found.equal is None else f"{found.equal} of {verified.continuations}",
    )


def table(verified: Verified) -> Table:
    """A row an engine."""
    shown = Table(title=f"{verified.model}, {verified.predicted:,} tokens of {verified.texts}")
    for name, right in (("engine", False), ("version", False), ("max |Δ logprob|", True), ("perplexity", True)):
        shown.add_column(name, justify="right" if right else "left")
    shown.add_column("continuations equal", justify="right")
    shown.add_column("verdict")
    for found in verified.engines:
        verdict = (
            found.verdict
            if found.verdict in (ABSENT, LOADS) or not found.reason
            else f"{found.verdict}: {found.reason}"
        )
        shown.add_row(found.engine, found.version or "–", *figures(verified, found), verdict)
    return shown


def lines(verified: Verified) -> Iterator[str]:
    """What a row has no room for: how to install what was not there, and what a loader alone says."""
    for found in verified.engines:
        if found.reason and found.verdict in (ABSENT, LOADS):
            yield f"{found.engine}: {found.verdict}; {found.reason}"
    if verified.of(REFUSED):
        yield "An engine that refuses the model serves nothing wrong; docs/serving.md says which classes each knows."
