"""The pages of many runs: which are best by hand, a failing job, and real sweeps with every launcher and sweeper."""

import csv
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from omegaconf import OmegaConf

from dive.cli import CONF, PACKAGE, register_schema, to_typed
from dive.config import Config
from dive.errors import UserError
from dive.report.callback import SweepReport
from dive.report.sweep import comparable, differing, find_jobs, pareto, read_job, write_sweep
from dive.results import write_results
from tests.browser import browse, shapes
from tests.report.made import results as made
from tests.report.made import stage
from tests.workplace import Workplace, environment

DOMAIN = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def sweep(workplace: Workplace) -> Path:
    """Three finished runs, one that failed and one that was stopped."""
    root = workplace.root / "swept"
    for number, overrides in enumerate((["pruning.ratio=0.25"], ["pruning.ratio=0.5"], ["moe.experts=3"])):
        workplace.run(f"swept/{number}", "retrain.stages.retrain.tokens=512", *overrides)
    for number, config in ((3, {"moe": {"experts": 9}}), (10, {"moe": {"experts": 3}})):
        (root / f"{number}/.hydra").mkdir(parents=True)
        (root / f"{number}/.hydra/overrides.yaml").write_text("[]\n")
        (root / f"{number}/.hydra/config.yaml").write_text(yaml.safe_dump(config))
    (root / "3/failure.json").write_text(json.dumps({"reason": f"moe.experts (9) {DOMAIN}", "error": "UserError"}))
    return root


def table(root: Path) -> list[dict[str, str]]:
    with (root / "sweep.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_table_has_every_job(sweep: Path) -> None:
    page = write_sweep(find_jobs(sweep), sweep)
    rows = table(sweep)
    assert [row["run"] for row in rows] == ["0", "1", "2", "3", "10"]
    assert [row["status"] for row in rows] == ["finished"] * 3 + ["failed", "not finished"]
    assert rows[3]["reason"] == f"moe.experts (9) {DOMAIN}"
    assert [row["pruning.ratio"] for row in rows[:3]] == ["0.25", "0.5", "0.5"]
    for number, row in enumerate(rows[:3]):
        results = json.loads((sweep / str(number) / "results.json").read_text())
        assert float(row["perplexity"]) == results["stages"][-1]["perplexity"]["mean"]
        assert int(row["active"]) == results["parameters"]["active"]
        assert int(row["tokens"]) == 1024
    assert rows[3]["perplexity"] == rows[4]["perplexity"] == ""
    best = min(rows[:3], key=lambda row: float(row["perplexity"]))
    text = page.read_text(encoding="utf-8")
    assert f'href="{best["run"]}/report.html"' in text
    assert DOMAIN not in text


def test_chromium_draws_the_sweep(sweep: Path, tmp_path: Path) -> None:
    seen = browse(write_sweep(find_jobs(sweep), sweep), tmp_path)
    assert seen.console == []
    assert set(seen.figures) == {"scatter", "experts", "grid"}
    assert all(shapes(html) >= 4 for html in seen.figures.values())
    assert "<script>alert" not in seen.dom


def test_the_command_rebuilds_and_compares(sweep: Path, tmp_path: Path) -> None:
    def command(*arguments: object, directory: Path = tmp_path) -> "subprocess.CompletedProcess[str]":
        line = [sys.executable, "-m", "dive.report", *map(str, arguments)]
        return subprocess.run(line, cwd=directory, env=environment(), capture_output=True, text=True, timeout=120)

    (sweep / "sweep.html").unlink(missing_ok=True)
    (sweep / "0/report.html").unlink()
    done = command(sweep)
    assert done.returncode == 0, done.stderr
    assert (sweep / "sweep.html").is_file()
    assert (sweep / "0/report.html").is_file()
    assert command(sweep / "0", sweep / "2").returncode == 0
    assert [Path(tmp_path, row["run"]).resolve() for row in table(tmp_path)] == [sweep / "0", sweep / "2"]
    assert command(sweep / "0", "--output", tmp_path / "x").stdout.startswith("report")
    (tmp_path / "empty").mkdir()
    for wrong in ("nowhere", "empty"):
        done = command(wrong)
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: {wrong}: ")
        assert len(done.stderr.splitlines()) == 1


def test_composing_the_callback_needs_none_of_the_heavy_packages() -> None:
    code = "import sys, dive.report.callback; print([n for n in ('torch', 'scipy', 'jinja2') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------------------ by hand


def row(active: int, perplexity: float | None, texts: str = "A") -> dict[str, Any]:
    return {"active": active, "perplexity": perplexity, "texts": texts}


def test_the_front_is_what_none_beats() -> None:
    rows = [
        row(10, 5.0),
        row(5, 9.0),
        row(7, 9.0),
        row(10, 4.0),
        row(20, 4.0),
        row(30, 3.0),
        row(1, None),
        row(2, 1.0, "B"),
    ]
    assert comparable(rows) == [0, 1, 2, 3, 4, 5]
    assert pareto(rows, comparable(rows)) == [1, 3, 5]
    assert comparable([row(1, None)]) == []


def test_columns_are_the_stages_that_the_runs_had(tmp_path: Path) -> None:
    config = {"eval": {"lengths": [32]}, "moe": {"experts": 2}}
    sizes = {"dense": 9, "active": 5, "total": 20}
    for number, names in enumerate((["dense", "merged"], ["dense", "pruned", "merged", "healed"])):
        stages = [stage(name, 2.0 + i) for i, name in enumerate(names)] + [stage("retrain", 1.5, tokens=512)]
        (tmp_path / str(number)).mkdir()
        write_results(made(config, stages=stages, parameters=sizes, export="checkpoint"), tmp_path / str(number))
    text = write_sweep(find_jobs(tmp_path), tmp_path).read_text(encoding="utf-8")
    assert "<th>healed</th><th>pruned, one expert</th><th>merged</th><th>dense model</th>" in text
    first, second = table(tmp_path)
    assert [(first[name], second[name]) for name in ("dense", "merged", "pruned", "healed")] == [
        *(("2.0", "2.0"), ("3.0", "4.0"), ("", "3.0"), ("", "5.0"))
    ]
    assert "retrain" not in first  # the last one's perplexity has a column of its own


def test_a_finished_run_that_measured_nothing_is_a_row(tmp_path: Path) -> None:
    write_results(made({"eval": {"lengths": [32]}}, export="checkpoint"), tmp_path)
    write_sweep([tmp_path], tmp_path)
    assert [(r["status"], r["perplexity"]) for r in table(tmp_path)] == [("finished", "")]


def test_only_settings_of_the_method_tell_runs_apart(tmp_path: Path) -> None:
    for number, config in enumerate(
        ({"moe": {"top_k": 1}, "seed": 1, "store": "a"}, {"moe": {"top_k": 2}, "seed": 1, "store": "b"})
    ):
        (tmp_path / f"{number}/.hydra").mkdir(parents=True)
        (tmp_path / f"{number}/.hydra/overrides.yaml").touch()
        (tmp_path / f"{number}/.hydra/config.yaml").write_text(yaml.safe_dump(config))
    assert differing([read_job(path) for path in find_jobs(tmp_path)]) == ["moe.top_k"]


def test_results_on_other_texts_do_not_compete(sweep: Path, tmp_path: Path) -> None:
    results = json.loads((sweep / "0/results.json").read_text())
    results["run"]["fingerprints"]["domains"]["cats"]["test"] = "other"
    results["stages"][-1]["perplexity"]["mean"] = 1.0
    (tmp_path / "results.json").write_text(json.dumps(results))
    page = write_sweep([sweep / "0", sweep / "1", tmp_path], tmp_path).read_text()
    assert [r["texts"] for r in table(tmp_path)] == ["A", "A", "B"]
    assert "1 of them was measured with another model or on other texts" in page
    assert "Lowest perplexity: <b>1.000</b>" not in page


def test_a_job_that_fails_leaves_its_reason(tmp_path: Path) -> None:
    hydra = {"mode": RunMode.MULTIRUN, "job": {"num": 0}, "sweep": {"dir": "sweep"}}
    config = OmegaConf.create(
        {"hydra": hydra | {"runtime": {"cwd": str(tmp_path), "output_dir": str(tmp_path / "sweep/0")}}}
    )
    (tmp_path / "sweep/0").mkdir(parents=True)
    for error, reason in ((UserError("set moe.experts=2"), "set moe.experts=2"), (KeyError("x"), "KeyError: 'x'")):
        SweepReport().on_job_end(config, JobReturn(status=JobStatus.FAILED, _return_value=error))
        assert [(r["status"], r["reason"]) for r in table(tmp_path / "sweep")] == [("failed", reason)]
    config.hydra.mode = RunMode.RUN
    (tmp_path / "sweep/sweep.csv").unlink()
    SweepReport().on_job_end(config, JobReturn(status=JobStatus.COMPLETED))
    assert not (tmp_path / "sweep/sweep.csv").exists()


# ---------------------------------------------------------------------------------------------------------- real sweeps


def multirun(workplace: Workplace, directory: Path, *overrides: str) -> "subprocess.CompletedProcess[str]":
    """A sweep whose pages are in ``<directory>/sweep``; what it sweeps over is fixed nowhere else."""
    short = (
        "retrain.stages.retrain.tokens=512",
        f"store={directory / 'store'}",
        f"hydra.sweep.dir={directory / 'sweep'}",
    )
    swept = {override.split("=")[0] for override in overrides}
    settings = [setting for setting in workplace.settings if setting.split("=")[0] not in swept]
    line = [sys.executable, "-m", "dive.train", "-m", *settings, *short, *overrides]
    return subprocess.run(line, cwd=directory, env=environment(), capture_output=True, text=True, timeout=400)


@pytest.mark.slow
def test_a_failing_job_does_not_lose_the_others(workplace: Workplace, tmp_path: Path) -> None:
    done = multirun(workplace, tmp_path, "moe.experts=2,5,3")
    assert done.returncode == 1
    assert "error: moe.experts (5) exceeds the number of calibration domains (4)" in done.stderr
    assert "Traceback" not in done.stderr
    rows = table(tmp_path / "sweep")
    assert [(r["moe.experts"], r["status"]) for r in rows] == [("2", "finished"), ("5", "failed"), ("3", "finished")]
    assert rows[1]["reason"].startswith("moe.experts (5) exceeds")
    assert (tmp_path / "sweep/sweep.html").is_file()


@pytest.mark.slow
def test_a_sweep_by_joblib(workplace: Workplace, tmp_path: Path) -> None:
    if importlib.util.find_spec("hydra_plugins.hydra_joblib_launcher") is None:
        pytest.skip("needs the extra: pip install 'dive-moe[sweep]'")
    done = multirun(workplace, tmp_path, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "moe.experts=2,5,3")
    assert done.returncode == 1
    assert "error: moe.experts (5) exceeds the number of calibration domains (4)" in done.stderr
    rows = table(tmp_path / "sweep")
    assert [r["status"] for r in rows] == ["finished", "failed", "finished"]


@pytest.mark.slow
def test_a_search_by_optuna(workplace: Workplace, tmp_path: Path) -> None:
    if importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper") is None:
        pytest.skip("needs the extra: pip install 'dive-moe[sweep]'")
    search = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.sampler.seed=1")
    done = multirun(workplace, tmp_path, *search, "pruning.ratio=interval(0.3,0.7)", "moe.experts=choice(2,3)")
    assert done.returncode == 0, done.stderr
    rows = table(tmp_path / "sweep")
    assert [r["status"] for r in rows] == ["finished"] * 3
    found = yaml.safe_load((tmp_path / "sweep/optimization_results.yaml").read_text())
    best = min(rows, key=lambda r: float(r["perplexity"]))
    assert found["best_value"] == pytest.approx(float(best["perplexity"]))
    assert found["best_params"]["pruning.ratio"] == pytest.approx(float(best["pruning.ratio"]))
    assert "sweep.html" in done.stdout


def documented() -> list[str]:
    """Sweeps in the documentation's shell blocks, continued lines joined, comments left out."""
    text = (PACKAGE.parent / "docs/report.md").read_text(encoding="utf-8")
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].partition("dive.train -m ")[2] for line in lines if "dive.train -m " in line]


@pytest.mark.parametrize("overrides", documented())
def test_a_documented_sweep_composes(overrides: str) -> None:
    parsed = OverridesParser.create().parse_overrides(shlex.split(overrides))
    first = []
    for override in parsed:
        if override.key_or_group.startswith("hydra"):
            continue  # the plugins' own, of packages that need not be here
        value = override.value()
        if override.is_interval_sweep():
            value = value.start
        elif override.is_sweep_override():
            value = next(iter(override.sweep_iterator()))
        first.append(f"{override.key_or_group}={value}")
    register_schema("config", Config)
    with initialize_config_dir(str(CONF), version_base=None):
        to_typed(compose("config", first), Config)


def test_the_documentation_has_sweeps() -> None:
    assert len(documented()) == 4
