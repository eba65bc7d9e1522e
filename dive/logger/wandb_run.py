"""What a Weights & Biases run holds beside the curves: axes, tables, images, the final summary, artifacts and lineage."""

import json
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dive.artifacts import key_of, write_json

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


def log_results(run: "Run", results: Mapping[str, Any], directory: Path) -> None:
    """Tables, images, summary and artifacts of a finished run.

    Args:
        results: what ``results.json`` holds.
        directory: of the run's outputs, with ``plots/``.
    """
    import wandb

    media: dict[str, Any] = {}
    for name, (columns, rows) in tables(results).items():
        media[name] = wandb.Table(columns=columns, data=rows)
    for name in ("affinity", "routing", "loss"):
        file = directory / "plots" / f"{name}.png"
        if file.is_file():
            media[f"figures/{name}"] = wandb.Image(str(file))
    run.log(media)
    run.summary.update(final_summary(results))
    log_artifacts(run, results)


def tables(results: Mapping[str, Any]) -> dict[str, tuple[list[str | int], list[list[Any]]]]:
    """{section/name: (columns, rows)} of what a run found."""
    found: dict[str, tuple[list[str | int], list[list[Any]]]] = {}
    columns: list[str | int] = ["stage", "perplexity", "trained parameters", "tokens", "seconds"]
    rows = [[s["name"], s["perplexity"]["mean"], s["trained"], s["tokens"], s["seconds"]] for s in results["stages"]]
    found["results/stages"] = (columns, rows)
    if results["stages"]:
        stages = [stage["name"] for stage in results["stages"]]
        keys = [key for key in results["stages"][0]["perplexity"] if not key.startswith("mean")]
        values = [[key, *(stage["perplexity"][key] for stage in results["stages"])] for key in keys]
        found["results/perplexity"] = (["text", *stages], values)
    if results["groups"]:
        members = [[number, ", ".join(group)] for number, group in enumerate(results["groups"])]
        found["affinity/groups"] = (["expert", "domains"], members)
    affinity = results.get("affinity") or {}
    for measure in ("perplexity", "similarity"):
        if measure in affinity:
            matrix = [[domain, *row] for domain, row in zip(affinity["domains"], affinity[measure], strict=True)]
            found[f"affinity/{measure}"] = (["pruned on", *affinity["domains"]], matrix)
    by_layer = results["routing"].get("share_by_layer", {}) if results["routing"] else {}
    shares = [
        [domain, layer, expert, share]
        for domain, layers in by_layer.items()
        for layer, experts in enumerate(layers)
        for expert, share in enumerate(experts)
    ]
    if shares:
        found["routing/share"] = (["domain", "layer", "expert", "share of tokens"], shares)
    return found


def final_summary(results: Mapping[str, Any]) -> dict[str, Any]:
    """The columns by which runs are compared in W&B's table of runs."""
    found = {f"parameters/{name}": value for name, value in results["parameters"].items()}
    found |= {f"seconds/{name}": value for name, value in results["timings"].items()}
    if results["stages"]:
        last = results["stages"][-1]
        found |= {"final/stage": last["name"], "final/perplexity": last["perplexity"]["mean"]}
        found["final/tokens"] = sum(stage["tokens"] for stage in results["stages"])
        found["final/perplexity_over_dense"] = last["perplexity"]["mean"] / results["stages"][0]["perplexity"]["mean"]
        if "tasks_mean" in last:
            found["final/tasks_mean"] = last["tasks_mean"]
    return found


def log_artifacts(run: "Run", results: Mapping[str, Any]) -> None:
    """Groups and export as outputs of the run; dense model and texts as its inputs.

    Weights are not uploaded: the artifacts refer to them and hold their fingerprints. W&B records inputs online alone, so
    the outputs name what they came from in their metadata too.
    """
    import wandb

    prints = results["run"]["fingerprints"]
    config = results["run"]["config"]
    origin = {"dense_model": prints["model"], "retraining_corpus": prints["retraining_corpus"]}
    if not run.offline:
        dense = wandb.Artifact(f"dense-{config['model']['name']}", type="model", metadata={"sha256": prints["model"]})
        texts = wandb.Artifact("texts", type="dataset", metadata={"retraining_corpus": prints["retraining_corpus"]})
        with texts.new_file("fingerprints.json") as stream:
            json.dump(prints["domains"], stream, indent=2)
        with dense.new_file("source.json") as stream:
            json.dump(config["model"], stream, indent=2)
        run.use_artifact(dense)
        run.use_artifact(texts)
    groups = wandb.Artifact("groups", type="groups", metadata=origin)
    with groups.new_file("groups.json") as stream:
        json.dump({"groups": results["groups"], "affinity": results.get("affinity", {})}, stream, indent=2)
    run.log_artifact(groups)
    export = wandb.Artifact(
        f"moe-{config['model']['name']}",
        type="model",
        metadata=origin | {"groups": groups.digest, "parameters": results["parameters"]},
    )
    export.add_reference(Path(results["export"]).resolve().as_uri())
    run.log_artifact(export)


def close(run: "Run", settings: Mapping[str, Any], store: Path) -> None:
    """Finish the run; the next one of this configuration is another."""
    run.finish()
    run_id_file(settings, store).unlink(missing_ok=True)
