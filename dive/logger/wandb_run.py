"""A Weights & Biases run: its axes, and what it holds beside the curves: tables, images, the summary, artifacts and lineage."""

import json
import netrc
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import WandbLogger

from dive.config import WandbConfig
from dive.logger import keys
from dive.logger.tables import tables
from dive.logger.unfinished import note_of, read_id, write_id
from dive.results import Results, to_json

if TYPE_CHECKING:
    from wandb import Run

NAME = "wandb"


def wandb_logged_in() -> bool:
    """Whether Weights & Biases has a key for this user: in the environment or in netrc; asks no server."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def build_wandb(config: WandbConfig, directory: Path, settings: dict[str, Any], store: Path) -> WandbLogger:
    """One run for all stages, offline where nobody is logged in or WANDB_MODE says so.

    The same command after an interruption goes on in the same run.

    Args:
        settings: the composed configuration, recorded with the run.
        store: of the artifacts, where the ids of unfinished runs stand.
    """
    import wandb

    mode = os.environ.get("WANDB_MODE")
    run = wandb.init(
        project=config.project,
        entity=config.entity,
        group=config.group,
        name=config.name,
        tags=config.tags,
        dir=directory,
        id=run_id(settings, store),
        resume="allow",
        reinit="finish_previous",  # the job of a sweep that failed in this process leaves its run open
        mode="offline" if mode is None and not wandb_logged_in() else None,
        config=settings,
        settings=wandb.Settings(quiet=True),  # no curves in block letters between our own tables
    )
    define_axes(run, settings["retrain"]["stages"])
    return WandbLogger(project=config.project, save_dir=directory, experiment=run)


def run_id(settings: Mapping[str, Any], store: Path) -> str:
    """The id to go on under: that of the interrupted run of this configuration, or a new one, which is noted down."""
    note = note_of(NAME, settings, store)
    found = read_id(note)
    if found is not None:
        return found
    new = secrets.token_hex(4)
    write_id(note, new)
    return new


def define_axes(run: "Run", stages: Iterable[str]) -> None:
    """Draw every value of a stage over the tokens that it had trained on."""
    for stage in stages:
        tokens = keys.of(stage, keys.TOKENS)
        run.define_metric(tokens, hidden=True)
        run.define_metric(keys.of(stage, "*"), step_metric=tokens)


def log_results(run: "Run", results: Results, directory: Path) -> None:
    """Tables, images, summary, page and artifacts of a finished run.

    Args:
        directory: of the run's outputs, with ``plots/``.
    """
    import wandb

    found: dict[str, Any] = dict(keys.summary(results))
    for name, (columns, rows) in tables(results).items():
        found[name] = wandb.Table(columns=[*columns], data=rows)
    for file in sorted((directory / "plots").glob("*.png")):
        found[f"figures/{file.stem}"] = wandb.Image(str(file))
    run.log(found)
    if results.stages:
        run.summary["final/stage"] = results.stages[-1].name
    if results.stages and (directory / "report.html").is_file():
        run.save(str(directory / "report.html"), base_path=str(directory), policy="now")
    log_artifacts(run, results)


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


def finish(run: "Run", results: Results, directory: Path, settings: Mapping[str, Any], store: Path) -> str:
    """Log the results and end the run; the next one of this configuration is another.

    Returns:
        Where it is to be seen.
    """
    log_results(run, results, directory)
    where = run.url or f"wandb sync {Path(run.dir).parent}"  # no address offline
    run.finish()
    note_of(NAME, settings, store).unlink(missing_ok=True)
    return where
