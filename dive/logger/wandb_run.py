"""What a Weights & Biases run holds beside the curves: axes, tables, images, the final summary, artifacts and lineage."""

import json
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dive.results import Results, to_json
from dive.store import key_of, write_json

if TYPE_CHECKING:
    from wandb import Run


def run_id_file(settings: Mapping[str, Any], store: Path) -> Path:
    """Where the id of an unfinished run of this configuration stands; loggers and places make it no other run."""
    defining = {name: value for name, value in settings.items() if name not in ("logger", "store", "plan")}
    return store / "wandb" / f"{key_of('wandb', defining)}.json"


def run_id(settings: Mapping[str, Any], store: Path) -> str:
    """The id to go on under: that of the interrupted run of this configuration, or a new one, which is noted down."""
    file = run_id_file(settings, store)
    try:
        found = json.loads(file.read_text())["id"]
        if isinstance(found, str) and found.isalnum():
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    file.parent.mkdir(parents=True, exist_ok=True)
    new = secrets.token_hex(4)
    write_json(file, {"id": new})
    return new


def define_axes(run: "Run", stages: Iterable[str]) -> None:
    """Draw every value of a stage over the tokens that it had trained on."""
    for stage in stages:
        run.define_metric(f"{stage}/tokens", hidden=True)
        run.define_metric(f"{stage}/*", step_metric=f"{stage}/tokens")


def log_results(run: "Run", results: Results, directory: Path) -> None:
    """Tables, images, summary and artifacts of a finished run.

    Args:
        directory: of the run's outputs, with ``plots/``.
    """
    import wandb

    media: dict[str, Any] = {}
    for name, (columns, rows) in tables(results).items():
        media[name] = wandb.Table(columns=columns, data=rows)
    for file in sorted((directory / "plots").glob("*.png")):
        media[f"figures/{file.stem}"] = wandb.Image(str(file))
    run.log(media)
    run.summary.update(final_summary(results))
    log_artifacts(run, results)


def tables(results: Results) -> dict[str, tuple[list[str | int], list[list[Any]]]]:
    """{section/name: (columns, rows)} of what a run found."""
    made: dict[str, tuple[list[str | int], list[list[Any]]]] = {}
    columns: list[str | int] = ["stage", "perplexity", "trained parameters", "tokens", "calibration", "seconds"]
    rows = [[s.name, s.mean, s.trained, s.tokens, s.calibration, s.seconds] for s in results.stages]
    made["results/stages"] = (columns, rows)
    if results.stages:
        keys = [key for key in results.stages[0].perplexity if not key.startswith("mean")]
        values = [[key, *(stage.perplexity[key] for stage in results.stages)] for key in keys]
        made["results/perplexity"] = (["text", *(stage.name for stage in results.stages)], values)
    if results.groups:
        members = [[number, ", ".join(group)] for number, group in enumerate(results.groups)]
        made["affinity/groups"] = (["expert", "domains"], members)
    mined = results.affinity
    if mined is not None:
        if mined.groups is not None and mined.groups != results.groups:
            made["affinity/mapped"] = (
                ["group", "domains"],
                [[n, ", ".join(group)] for n, group in enumerate(mined.groups)],
            )
        for measure, matrix in (("perplexity", mined.perplexity), ("similarity", mined.similarity)):
            if matrix is not None:
                rows = [[domain, *row] for domain, row in zip(mined.domains, matrix, strict=True)]
                made[f"affinity/{measure}"] = (["pruned on", *mined.domains], rows)
    routing = results.routing
    by_layer = (routing.share_by_layer if routing is not None else None) or {}
    numbers = routing.layers if routing is not None else None
    shares = [
        [domain, layer, expert, share]
        for domain, layers in by_layer.items()
        for layer, experts in zip(numbers or range(len(layers)), layers, strict=True)
        for expert, share in enumerate(experts)
    ]
    if shares:
        made["routing/share"] = (["domain", "layer", "expert", "share of tokens"], shares)
    return made


def final_summary(results: Results) -> dict[str, Any]:
    """The columns by which runs are compared in W&B's table of runs."""
    summary: dict[str, Any] = {f"parameters/{name}": value for name, value in to_json(results.parameters).items()}
    summary |= {f"seconds/{name}": value for name, value in results.timings.items()}
    if results.stages:
        last = results.stages[-1]
        summary |= {"final/stage": last.name, "final/perplexity": last.mean, "final/tokens": results.tokens}
        summary["final/calibration_tokens"] = results.calibration_tokens
        if results.dense is not None:
            summary["final/perplexity_over_dense"] = last.mean / results.dense.mean
        if last.tasks_mean is not None:
            summary["final/tasks_mean"] = last.tasks_mean
    return summary


def log_artifacts(run: "Run", results: Results) -> None:
    """Groups and export as outputs of the run; dense model and texts as its inputs.

    Weights are not uploaded: the artifacts refer to them and hold their fingerprints. W&B records inputs online alone, so
    the outputs name what they came from in their metadata too.
    """
    import wandb

    prints, config = results.run.fingerprints, results.run.config
    origin = {"dense_model": prints.model, "retraining_corpus": prints.retraining_corpus}
    if not run.offline:
        dense = wandb.Artifact(f"dense-{config['model']['name']}", type="model", metadata={"sha256": prints.model})
        texts = wandb.Artifact("texts", type="dataset", metadata={"retraining_corpus": prints.retraining_corpus})
        with texts.new_file("fingerprints.json") as stream:
            json.dump(to_json(prints.domains), stream, indent=2)
        with dense.new_file("source.json") as stream:
            json.dump(config["model"], stream, indent=2)
        run.use_artifact(dense)
        run.use_artifact(texts)
    groups = wandb.Artifact("groups", type="groups", metadata=origin)
    with groups.new_file("groups.json") as stream:
        json.dump({"groups": results.groups, "affinity": to_json(results.affinity) or {}}, stream, indent=2)
    run.log_artifact(groups)
    export = wandb.Artifact(
        f"moe-{config['model']['name']}",
        type="model",
        metadata=origin | {"groups": groups.digest, "parameters": to_json(results.parameters)},
    )
    assert results.export is not None, "the run is finished"
    export.add_reference(Path(results.export).resolve().as_uri())
    run.log_artifact(export)


def close(run: "Run", settings: Mapping[str, Any], store: Path) -> None:
    """Finish the run; the next one of this configuration is another."""
    run.finish()
    run_id_file(settings, store).unlink(missing_ok=True)
