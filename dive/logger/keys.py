"""The key of every value that a run logs: ``stage/metric``, or ``stage/metric/of what``.

A stage is one of the run's, retraining or not. What is of the whole run stands under :data:`WHOLE_RUN` in its place. Every
logger gets the same keys.
"""

from collections.abc import Mapping

from dive.results import Planned, Results, Spent, StageResult, to_json

PARAMETERS, FINAL, COST = "parameters", "final", "cost"
WHOLE_RUN = (PARAMETERS, FINAL, COST)
"""First parts of keys that are no stage's."""
STEP, TOKENS = "step", "tokens"
"""Of a curve: optimiser steps so far, and the tokens that its other values are drawn over."""
LOSS, TEXT_PERPLEXITY, LEARNING_RATE, SPEED = "loss", "perplexity", "learning_rate", "tokens_per_second"
ENTROPY, LOAD = "router_entropy", "expert_load"
EVALUATED, SCORE, SECONDS = "eval_perplexity", "eval_score", "seconds"


def of(stage: str, metric: str, *of_what: str) -> str:
    """The key of a metric of a stage, or of one of :data:`WHOLE_RUN`."""
    return "/".join((stage, metric, *of_what))


def curve(stage: str, values: Mapping[str, float]) -> dict[str, float]:
    """One point of a retraining stage's curve, as :class:`dive.retrain.curve.Curve` has it."""
    return {of(stage, name): value for name, value in values.items()}


def evaluation(stage: StageResult) -> dict[str, float]:
    """What a stage's model was measured at: perplexity of each text, ``cats@32`` as ``cats/32``, and every task's metrics."""
    values = {of(stage.name, EVALUATED, *text.split("@")): value for text, value in stage.perplexity.items()}
    for task, metrics in (stage.tasks or {}).items():
        values |= {of(stage.name, SCORE, task, metric): value for metric, value in metrics.items()}
    if stage.tasks_mean is not None:
        values[of(stage.name, SCORE, "mean")] = stage.tasks_mean
    return values


def summary(results: Results) -> dict[str, float]:
    """By which runs are compared: what each stage took, and parameters, cost and the last model of the whole run."""
    found: dict[str, float] = {
        of(FINAL if name == "total" else name, SECONDS): value for name, value in results.timings.items()
    }
    found |= {of(PARAMETERS, part): count for part, count in to_json(results.parameters).items()}
    if results.plan is not None:
        for when, cost in (("planned", results.plan.planned), ("actual", results.plan.actual)):
            found |= {of(COST, f"{when}_{what}"): value for what, value in costs(cost).items()}
    if results.stages:
        last = results.stages[-1]
        found[of(FINAL, "perplexity")] = last.mean
        found[of(FINAL, "tokens")] = results.tokens
        found[of(FINAL, "calibration_tokens")] = results.calibration_tokens
        if results.dense is not None:
            found[of(FINAL, "perplexity_over_dense")] = last.mean / results.dense.mean
        if last.tasks_mean is not None:
            found[of(FINAL, SCORE)] = last.tasks_mean
    return found


def costs(cost: Planned | Spent) -> dict[str, float]:
    """Seconds and peak bytes of a whole run; the disk's are those of the store and the export."""
    disk = cost.disk_bytes.store + cost.disk_bytes.export if isinstance(cost, Planned) else cost.disk_bytes
    return {
        "seconds": cost.seconds,
        "host_bytes": cost.host_bytes,
        "device_bytes": cost.device_bytes,
        "disk_bytes": disk,
    }
