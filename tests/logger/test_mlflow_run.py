"""What MLflow is given, read back from its database by its own client."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from dive.config import MLflowConfig
from dive.errors import UserError
from dive.logger.log import log_evaluation, log_point
from dive.logger.mlflow_run import build_mlflow, legal
from dive.results import StageResult, flatten, read_as
from tests.report import made
from tests.workplace import Workplace

pytest.importorskip("mlflow")
pytest.importorskip("sqlalchemy")
pytest.importorskip("alembic")


def client_of(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri)


@pytest.fixture(scope="module")
def results(workplace: Workplace) -> dict[str, Any]:
    uri = f"sqlite:///{workplace.root / 'track/runs.db'}"
    (workplace.root / "track").mkdir()
    tracked = ("logger=[csv,mlflow]", f"logger.mlflow.uri={uri}", "logger.mlflow.name=first")
    return workplace.run("tracked", *tracked, "+logger.mlflow.tags.team=one")


@pytest.fixture(scope="module")
def run(results: dict[str, Any], workplace: Workplace) -> Any:
    """The only run there is, as the client finds it."""
    client = client_of(f"sqlite:///{workplace.root / 'track/runs.db'}")
    experiment = client.get_experiment_by_name("dive")
    (found,) = client.search_runs([experiment.experiment_id])
    return found


@pytest.fixture(scope="module")
def client(results: dict[str, Any], workplace: Workplace) -> Any:
    return client_of(f"sqlite:///{workplace.root / 'track/runs.db'}")


def test_one_run_has_the_curves_of_all_stages(run: Any, client: Any, workplace: Workplace) -> None:
    assert run.info.status == "FINISHED"
    for stage in ("router", "retrain"):
        with (workplace.root / f"tracked/csv/{stage}/metrics.csv").open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        for key in (f"{stage}/loss", f"{stage}/expert_load/layer_01/expert_0"):
            points = client.get_metric_history(run.info.run_id, key)
            assert [(p.step, p.value) for p in points] == [
                (float(row[f"{stage}/step"]), pytest.approx(float(row[key]))) for row in rows
            ]


def test_evaluations_stand_at_the_tokens_before_them(run: Any, client: Any, results: dict[str, Any]) -> None:
    perplexity = {stage["name"]: stage["perplexity"] for stage in results["stages"]}
    assert run.data.metrics["dense/eval_perplexity/mean"] == pytest.approx(perplexity["dense"]["mean"])
    assert run.data.metrics["retrain/eval_perplexity/cats/32"] == pytest.approx(perplexity["retrain"]["cats@32"])
    (point,) = client.get_metric_history(run.info.run_id, "retrain/eval_perplexity/mean")
    assert point.step == sum(stage["tokens"] for stage in results["stages"])
    assert run.data.metrics["final/perplexity"] == pytest.approx(perplexity["retrain"]["mean"])


def test_settings_are_its_parameters(run: Any, results: dict[str, Any]) -> None:
    assert run.data.params["moe.experts"] == "2"
    assert run.data.params["retrain.stages.retrain.tokens"] == "3072"
    assert set(run.data.params) == set(flatten(results["run"]["config"]))
    assert (run.info.run_name, run.data.tags["team"]) == ("first", "one")
    assert run.data.tags["export"] == results["export"]
    assert run.data.tags["dense_model"] == results["run"]["fingerprints"]["model"]


def test_tables_figures_and_page_are_its_artifacts(
    run: Any, client: Any, workplace: Workplace, results: dict[str, Any], tmp_path: Path
) -> None:
    where = Path(client.download_artifacts(run.info.run_id, "", str(tmp_path)))
    assert run.info.artifact_uri.startswith((workplace.root / "track/mlflow-artifacts").as_uri())
    for name in ("report.html", "results.json", "config.yaml"):
        assert (where / name).read_bytes() == (workplace.root / "tracked" / name).read_bytes()
    assert (where / "figures/affinity.png").read_bytes().startswith(b"\x89PNG")
    table = json.loads((where / "results/stages.json").read_text())
    assert table["columns"][:2] == ["stage", "perplexity"]
    assert [row[1] for row in table["data"]] == pytest.approx([s["perplexity"]["mean"] for s in results["stages"]])
    assert {file.stem for file in (where / "results").iterdir()} >= {"stages", "perplexity", "parameters", "cost"}


def test_an_interrupted_run_goes_on_without_doubles(workplace: Workplace, tmp_path: Path) -> None:
    config = MLflowConfig(uri=f"sqlite:///{tmp_path / 'runs.db'}")
    client = client_of(str(config.uri))
    settings, store = {"seed": 1, "store": "there"}, tmp_path / "store"
    measured = read_as(StageResult, made.stage("dense", 2.0), "stage")
    first = build_mlflow(config, settings, store)
    log_evaluation(first, measured, tokens=0)
    log_point(first, "retrain", {"step": 2.0, "tokens": 64.0, "loss": 3.0})
    first.finalize("failed")
    assert client.get_run(first.run).info.status == "FAILED"

    second = build_mlflow(config, settings | {"store": "elsewhere"}, store)
    assert second.run == first.run
    assert client.get_run(first.run).info.status == "RUNNING"
    log_evaluation(second, measured, tokens=0)
    log_point(second, "retrain", {"step": 2.0, "tokens": 64.0, "loss": 3.0})
    log_point(second, "retrain", {"step": 4.0, "tokens": 128.0, "loss": 2.5})
    second.finalize("success")
    assert client.get_run(first.run).info.status == "RUNNING"  # more stages may come
    points = client.get_metric_history(first.run, "retrain/loss")
    assert [(point.step, point.value) for point in points] == [(2, 3.0), (4, 2.5)]
    assert len(client.get_metric_history(first.run, "dense/eval_perplexity/mean")) == 1
    second._leave()
    assert client.get_run(first.run).info.status == "KILLED"

    other = build_mlflow(config, {"seed": 2}, store)
    assert other.run != first.run
    client.delete_run(other.run)
    assert build_mlflow(config, {"seed": 2}, store).run != other.run


def test_a_point_of_many_experts_is_logged_whole(tmp_path: Path) -> None:
    logger = build_mlflow(MLflowConfig(uri=f"sqlite:///{tmp_path / 'runs.db'}"), {}, tmp_path / "store")
    values = {f"s/expert_load/layer_{n:02d}/expert_{e}": n + e / 64 for n in range(33) for e in range(64)}
    logger.log_metrics(values, step=1)
    assert logger.experiment.get_run(logger.run).data.metrics == values


def test_names_keep_every_alphabet() -> None:
    assert legal("dense/eval_perplexity/法律/32") == "dense/eval_perplexity/法律/32"
    assert legal("dense/eval_score/gsm8k/exact_match,strict") == "dense/eval_score/gsm8k/exact_match_strict"


def test_a_database_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = MLflowConfig(uri=f"sqlite:///{tmp_path / 'file/runs.db'}")
    with pytest.raises(UserError, match=r"^logger\.mlflow\.uri=sqlite.*file/runs\.db: MLflow refuses"):
        build_mlflow(config, {}, tmp_path / "store")
