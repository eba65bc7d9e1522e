"""Evaluation of a finished model, whoever made it: what ``python -m dive.evaluate`` runs."""

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dive.artifacts import Store, plain, write_json
from dive.calibration_domains.texts import domain_names, fingerprint, load_domains
from dive.config import EvaluateConfig
from dive.eval.contamination import contamination
from dive.eval.evaluate import evaluation_texts
from dive.eval.tasks import load_tasks
from dive.export import open_checkpoint
from dive.model.architecture import SUPPORTED
from dive.model.families import TWINS, count_parameters
from dive.model.load import DenseSource, document_tokens, load_tokenizer, resolve_device
from dive.pipeline import check_lengths, check_names, measure, package_versions, task_results
from dive.progress import quiet_libraries

STAGE = "checkpoint"
"""Name of the one stage in the results."""


def evaluate_checkpoint(config: EvaluateConfig, directory: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Perplexity and tasks of one model, from the store where they rest there.

    Args:
        directory: of this run's outputs.
        overrides: of the command line, for the record.

    Returns:
        What ``results.json`` holds: the same as a run's, with one stage.

    Raises:
        UserError: something that the user can mend.
    """
    start = time.monotonic()
    quiet_libraries()
    source, model = open_checkpoint(
        config.checkpoint, revision=config.revision, dtype=config.dtype.value, device=resolve_device(config.device)
    )
    wants_domains = config.calibration_domains is not None
    check_lengths({"eval.lengths": config.eval.lengths if wants_domains else []}, config.eval, source)
    check_names(config.eval, domain_names(config.calibration_domains) if config.calibration_domains else [])
    tokenizer = load_tokenizer(source)
    tasks = load_tasks(config.eval, tokenizer)
    domains = load_domains(config.calibration_domains, seed=config.seed) if config.calibration_domains else []
    texts = evaluation_texts(config.eval, domains, partial(document_tokens, tokenizer))
    store = Store(Path(config.store))
    results: dict[str, Any] = {
        "run": {
            "command": ["python", "-m", "dive.evaluate", *overrides],
            "seed": config.seed,
            "device": str(resolve_device(config.device)),
            "versions": package_versions(tasks),
            "fingerprints": {
                "model": source.fingerprint,
                "domains": {d.name: {"train": fingerprint(d.train), "test": fingerprint(d.test)} for d in domains},
            },
            "samples": {"evaluation": {name: list(matrix.shape) for name, matrix in texts.all().items()}},
            "config": plain(config),
        },
        "evaluation": {
            "domains": [domain.name for domain in domains],
            "sets": list(texts.sets),
            "tasks": tasks.describe(),
        },
        "contamination": contamination(store, config.eval, domains, texts, tasks),
        "parameters": _parameters(source),
    }
    key = {"model": source.fingerprint, "dtype": source.dtype}
    found = measure(store, STAGE, key, texts, model, batch=config.eval.batch, routing=False, tasks=tasks)
    values = json.loads((found.path / "evaluation.json").read_text())
    stage = {"name": STAGE, "tokens": 0, "seconds": found.seconds, "reused": found.reused, "trained": 0}
    stage["perplexity"] = values["perplexity"]
    if "tasks" in values:
        stage |= task_results(values["tasks"], results["evaluation"]["tasks"])
    results |= {"stages": [stage], "timings": {STAGE: found.seconds, "total": time.monotonic() - start}}
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "results.json", results)
    return results


def _parameters(source: DenseSource) -> dict[str, int]:
    """Total and active parameters, of the families whose experts we know."""
    if source.config.model_type not in (*SUPPORTED, *TWINS):
        return {}
    total, active = count_parameters(source.config)
    return {"total": total, "active": active}
