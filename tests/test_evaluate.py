"""``dive.evaluate`` on whatever a run has written, against the run's own figures and against ``lm_eval`` itself."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from dive.cli import CONF, register_schema, to_typed
from dive.config import EvaluateConfig
from dive.errors import UserError
from dive.pipeline import evaluate as evaluate_checkpoint
from dive.report.run import write_report
from dive.results import to_json
from tests.workplace import WORDS, Workplace, environment, write_task

TEXT = ["eval.lengths=[32]", "eval.windows=3"]


def evaluate(workplace: Workplace, checkpoint: Path | str, directory: Path, *overrides: str) -> dict[str, Any]:
    register_schema("evaluate", EvaluateConfig)
    settings = [f"checkpoint={checkpoint}", f"store={directory / 'store'}", *overrides]
    with initialize_config_dir(str(CONF), version_base=None):
        config = to_typed(compose("evaluate", settings), EvaluateConfig)
    found: dict[str, Any] = to_json(evaluate_checkpoint(config, directory, settings))
    return found


def domains(workplace: Workplace) -> list[str]:
    return ["calibration_domains=local", f"calibration_domains.path={workplace.root / 'domains'}", *TEXT]


@pytest.fixture(scope="module")
def tasks(workplace: Workplace) -> list[str]:
    """Overrides that choose the task ``cats``."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an optional extra")
    return ["eval.tasks=[cats]", f"eval.task_path={write_task(workplace.root / 'tasks', 'cats')}"]


@pytest.fixture(scope="module")
def finished(workplace: Workplace, tasks: list[str]) -> dict[str, Any]:
    """Results of a run with a task."""
    return workplace.run("with tasks", *tasks)


def test_a_run_records_its_tasks(finished: dict[str, Any]) -> None:
    assert finished["evaluation"]["tasks"]["cats"]["questions"] == 24
    for stage in finished["stages"]:
        assert stage["tasks_mean"] == stage["tasks"]["cats"]["acc"]
        assert (stage["tasks"]["cats"]["acc"] * 24) == pytest.approx(round(stage["tasks"]["cats"]["acc"] * 24))
    assert finished["contamination"]["tasks"]["cats"]["documents"] == 24
    assert set(finished["contamination"]["domains"]) == set(WORDS)
    assert "lm-eval" in finished["run"]["versions"]


def test_another_task_leaves_the_first_one_measured(
    finished: dict[str, Any], tasks: list[str], workplace: Workplace, caplog: pytest.LogCaptureFixture
) -> None:
    write_task(workplace.root / "tasks", "more", seed=1)
    with caplog.at_level("INFO", logger="dive"):
        again = workplace.run("more tasks", *tasks[1:], "eval.tasks=[cats,more]")
    said = [r.getMessage() for r in caplog.records]
    assert sum(bool(re.fullmatch(r"evaluation: task \w+: reused", line)) for line in said) == 5
    assert sum(bool(re.fullmatch(r"evaluation: task \w+: computing .*", line)) for line in said) == 5
    assert [s["tasks"]["cats"] for s in again["stages"]] == [s["tasks"]["cats"] for s in finished["stages"]]


def test_an_export_has_the_figures_of_its_runs_last_stage(
    finished: dict[str, Any], tasks: list[str], workplace: Workplace, tmp_path: Path
) -> None:
    results = evaluate(workplace, workplace.root / "with tasks/checkpoint", tmp_path, *domains(workplace), *tasks)
    (stage,) = results["stages"]
    last = finished["stages"][-1]
    assert stage["tasks"] == last["tasks"]
    assert stage["perplexity"] == {key: pytest.approx(value, rel=1e-4) for key, value in last["perplexity"].items()}
    assert results["parameters"] == {key: finished["parameters"][key] for key in ("total", "active")}
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_the_dense_model_and_one_with_expert_biases(workplace: Workplace, tmp_path: Path) -> None:
    run = workplace.run("biased", "moe=plain", "moe.experts=2", "pruning.metric=wifv", "pruning.compensation=bias")
    directory = workplace.root / "biased/checkpoint_with_expert_bias"
    for checkpoint, stage in ((workplace.root / "dense", "dense"), (directory, "retrain")):
        results = evaluate(workplace, checkpoint, tmp_path / stage, *domains(workplace))
        (expected,) = (s for s in run["stages"] if s["name"] == stage)
        assert results["stages"][0]["perplexity"]["mean"] == pytest.approx(expected["perplexity"]["mean"], rel=1e-4)
        assert "tasks" not in results["stages"][0]


def test_sets_without_domains(workplace: Workplace, tmp_path: Path) -> None:
    text = workplace.root / "domains/cats/test.jsonl"
    sets = f"+eval.sets={{mine:{{path:{text},lengths:[16],separator:null}}}}"
    results = evaluate(workplace, workplace.root / "dense", tmp_path, "~calibration_domains", sets, "eval.windows=2")
    assert list(results["stages"][0]["perplexity"]) == ["mine@16"]
    assert set(results) == {"run", "evaluation", "contamination", "parameters", "stages", "timings"}
    assert set(results["run"]["fingerprints"]) == {"model", "domains"}
    assert set(results["run"]["samples"]) == {"evaluation"}
    with pytest.raises(UserError, match="a finished model was measured here"):
        write_report(tmp_path)
    assert results["contamination"] == {}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["checkpoint=/nowhere"], r"^checkpoint=/nowhere: no such directory"),
        (["checkpoint=some/model"], r"^checkpoint=some/model is not in the .* cache .* set checkpoint=DIR"),
        (["~calibration_domains"], r"^nothing to measure: set eval\.tasks"),
        (["eval.lengths=[65]"], r"^eval\.lengths \(65\) exceeds the 64 positions"),
    ],
)
def test_what_is_refused(overrides: list[str], message: str, workplace: Workplace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(workplace, workplace.root / "dense", tmp_path, *overrides)


def test_code_that_comes_with_a_checkpoint_is_not_run(workplace: Workplace, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for file in (workplace.root / "dense").iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "model/config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    (tmp_path / "model/mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        evaluate(workplace, tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("bos", [None, True])
@pytest.mark.parametrize("shots", [0, 2])
def test_lm_eval_on_the_exported_directory_says_the_same(
    shots: int, bos: bool | None, finished: dict[str, Any], tasks: list[str], workplace: Workplace, tmp_path: Path
) -> None:
    checkpoint = workplace.root / "with tasks/checkpoint"
    command = [sys.executable, "-m", "dive.evaluate", f"checkpoint={checkpoint}", "~calibration_domains", *tasks]
    command += [f"+eval.task_settings={{cats:{{shots:{shots}}}}}", f"eval.add_bos_token={str(bos or 'null').lower()}"]
    command += [f"store={tmp_path / 'store'}", f"hydra.run.dir={tmp_path / 'ours'}"]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"cats +│ +{shots} +│ +24 │ acc ", done.stdout)
    ours = json.loads((tmp_path / "ours/results.json").read_text())["stages"][0]["tasks"]["cats"]

    arguments = f"pretrained={checkpoint}" + (",add_bos_token=True" if bos else "")
    harness = ["--model", "hf", "--model_args", arguments, "--tasks", "cats", "--num_fewshot", str(shots)]
    harness += [
        "--include_path",
        str(workplace.root / "tasks"),
        "--device",
        "cpu",
        "--output_path",
        str(tmp_path / "theirs"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *harness],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "theirs").rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"]["cats"]
    for metric in ("acc", "acc_norm"):
        assert ours[metric] == theirs[f"{metric},none"]
        assert ours[f"{metric}_stderr"] == pytest.approx(theirs[f"{metric}_stderr,none"])
