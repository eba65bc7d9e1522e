"""Results of a run that never ran, for figures that are checked by hand."""

from typing import Any

from dive.results import Results, from_json


def stage(name: str, mean: float, **more: Any) -> dict[str, Any]:
    """One stage as ``results.json`` has it."""
    given = {"name": name, "tokens": 0, "seconds": 0.0, "reused": False, "trained": 0}
    return given | {"perplexity": {"mean": mean}} | more


def results(config: dict[str, Any] | None = None, **parts: Any) -> Results:
    """Results with these parts of ``results.json``, and nothing else than has to be there."""
    prints = {"model": "m", "domains": {}, "retraining_corpus": "c"}
    run = {"command": [], "seed": 1, "device": "cpu", "versions": {}, "fingerprints": prints}
    run |= {"samples": {"evaluation": {}, "calibration": {}}, "config": config or {}}
    return from_json({"run": run, "evaluation": {"domains": [], "sets": [], "tasks": {}}} | parts)
