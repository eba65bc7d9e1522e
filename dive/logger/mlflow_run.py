"""An MLflow run: one for all stages, which the same command goes on in after an interruption."""

import atexit
import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger

from dive.config import MLflowConfig
from dive.errors import UserError
from dive.logger import keys
from dive.logger.tables import tables
from dive.logger.unfinished import note_of, read_id, write_id
from dive.results import FILE, Results, flatten

NAME = "mlflow"
SQLITE = "sqlite:///"
BATCH = 1000
"""Values that MLflow takes at once; a point of 64 layers of 64 experts has more."""


class MLflowRun(MLFlowLogger):
    """Lightning's logger, of a run that outlives its trainers and may have begun before this process."""

    had: Mapping[str, float]
    """{key: latest value} of before an interruption."""

    def __init__(self, *, experiment: str, tracking_uri: str, run: str, had: Mapping[str, float]) -> None:
        """
        Args:
            experiment: that the run is of.
            run: its id.
            had: what it holds already.
        """
        super().__init__(experiment_name=experiment, tracking_uri=tracking_uri, run_id=run)
        self.had = had
        self._ended = False
        atexit.register(self._leave)

    @property
    def run(self) -> str:
        """The run's id."""
        assert self.run_id is not None, "it was given"
        return self.run_id

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log values, however many, under names that MLflow takes."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = [Metric(legal(key), float(value), now, step or 0) for key, value in metrics.items()]
        for start in range(0, len(values), BATCH):
            self.experiment.log_batch(self.run, metrics=values[start : start + BATCH])

    def finalize(self, status: str = "success") -> None:
        """A trainer that fails ends the run; one that succeeds does not: more stages may come."""
        if status == "failed":
            self.end("FAILED")

    def end(self, status: str) -> None:
        """End the run."""
        self._ended = True
        self.experiment.set_terminated(self.run, status)

    def _leave(self) -> None:
        if not self._ended:
            with contextlib.suppress(Exception):  # the process ends, whatever a server says
                self.end("KILLED")


def legal(key: str) -> str:
    """A key with what MLflow takes in names: letters and digits of any alphabet, and ``_-./: ``."""
    return re.sub(r"[^/\w.\- :]", "_", key)


def build_mlflow(config: MLflowConfig, settings: dict[str, Any], store: Path) -> MLflowRun:
    """One run for all stages; the same command after an interruption goes on in it.

    Args:
        settings: the composed configuration, recorded as the run's parameters.
        store: of the artifacts, where the ids of unfinished runs stand; ``mlflow.db`` is beside it where no server is named.

    Raises:
        UserError: the server or the database cannot be reached.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = tracking_uri(config, store)
    try:
        client = MlflowClient(uri)
        experiment = _experiment(client, config.experiment or "dive", uri)
        note = note_of(NAME, settings, store)
        run, had = _go_on(client, read_id(note), experiment)
        made = MLflowRun(
            experiment=experiment, tracking_uri=uri, run=run or _begin(client, config, experiment), had=had
        )
        if run is None:
            made.log_hyperparams({legal(name): str(value) for name, value in flatten(settings).items()})
    except (MlflowException, OSError) as error:
        raise UserError(f"logger.mlflow.uri={uri}: MLflow refuses ({' '.join(str(error).split())})") from error
    write_id(note, made.run)
    return made


def tracking_uri(config: MLflowConfig, store: Path) -> str:
    """Of the server or database: the one chosen, that of ``MLFLOW_TRACKING_URI``, or a file beside the store."""
    chosen = config.uri or os.environ.get("MLFLOW_TRACKING_URI")
    return chosen or f"{SQLITE}{store.absolute().parent / 'mlflow.db'}"


def _experiment(client: Any, name: str, uri: str) -> str:
    """Name of the experiment, made where it is not there; jobs of a sweep may want it at the same time."""
    from mlflow.exceptions import MlflowException

    where = None
    if uri.startswith(SQLITE):
        where = (Path(uri.removeprefix(SQLITE)).absolute().parent / "mlflow-artifacts").as_uri()
    if client.get_experiment_by_name(name) is None:
        try:
            client.create_experiment(name, artifact_location=where)
        except MlflowException:
            if client.get_experiment_by_name(name) is None:
                raise
    return name


def _go_on(client: Any, run: str | None, experiment: str) -> tuple[str | None, dict[str, float]]:
    """The interrupted run and what it holds; none where this server or this experiment has it no more."""
    from mlflow.exceptions import MlflowException

    if run is None:
        return None, {}
    try:
        found = client.get_run(run)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None, {}
        raise
    there = client.get_experiment(found.info.experiment_id).name == experiment
    if found.info.lifecycle_stage != "active" or not there:
        return None, {}
    client.update_run(run, status="RUNNING")
    return run, dict(found.data.metrics)


def _begin(client: Any, config: MLflowConfig, experiment: str) -> str:
    from mlflow.tracking.context.registry import resolve_tags

    number = client.get_experiment_by_name(experiment).experiment_id
    return str(client.create_run(number, run_name=config.name, tags=resolve_tags(dict(config.tags))).info.run_id)


def finish(run: MLflowRun, results: Results, directory: Path, settings: Mapping[str, Any], store: Path) -> str:
    """Summary, tables and files of a finished run, which ends; the next one of this configuration is another.

    Weights are not uploaded: a tag says where they are.

    Args:
        directory: of the run's outputs, with ``plots/``.

    Returns:
        Where it is to be seen.
    """
    client = run.experiment
    run.log_metrics(keys.summary(results), step=results.tokens)
    for name, (columns, rows) in tables(results).items():
        columnwise = zip(columns, zip(*rows, strict=True), strict=True)
        client.log_table(run.run, {column: list(values) for column, values in columnwise}, f"{name}.json")
    upload: Callable[..., None] = client.log_artifact
    for file in sorted((directory / "plots").glob("*.png")):
        upload(run.run, str(file), "figures")
    for name in ("config.yaml", FILE, *(["report.html"] if results.stages else [])):
        upload(run.run, str(directory / name))
    prints = results.run.fingerprints
    tags = {"export": results.export, "dense_model": prints.model, "retraining_corpus": prints.retraining_corpus}
    if results.stages:
        tags["final/stage"] = results.stages[-1].name
    for tag, value in tags.items():
        client.set_tag(run.run, tag, value)
    run.end("FINISHED")
    note_of(NAME, settings, store).unlink(missing_ok=True)
    return f"{run._tracking_uri}, run {run.run}"
