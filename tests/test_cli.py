"""The command line: what it answers at once, and how it says that something is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dive.cli import PACKAGE
from tests.workplace import Workplace, environment


def command(*arguments: str, directory: Path) -> "subprocess.CompletedProcess[str]":
    """Run ``python -m dive.train`` with these arguments."""
    line = [sys.executable, "-m", "dive.train", *arguments]
    return subprocess.run(line, cwd=directory, env=environment(), capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["moe.expert=4"], "moe.expert: Key 'expert' not in 'MoEConfig'"),
        (["moe.experts=four"], "moe.experts: Value 'four' of type 'str' could not be converted to Integer"),
        (["pruning.metric=best"], "pruning.metric: Invalid value 'best', expected one of [wifv, ifv, wifn"),
        (["+extra=1"], "extra: no such option"),
        (["model=local"], "model.path is needed"),
        (["affinity=null"], "a group takes the name of one of its options"),
        (["model=gpt5"], "Could not find 'model/gpt5'"),
        (["moe.top_k=9"], "moe.top_k (9) must not exceed moe.experts (8)"),
        (["pruning.ratio=1.0"], "pruning.ratio (1.0) must lie strictly between 0 and 1"),
        (["trainer.devices=2"], "trainer.devices (2) needs a strategy"),
        (["moe=upcycle", "moe.router_init=distilled"], "moe.router_init=distilled"),
        (["retrain.stages.experts.train.norms=lora"], "train.norms"),
        (["retrain.stages.experts.batch=3", "trainer.accumulation=2"], "retrain.stages.experts.batch (3)"),
        (["model=llama2-7b"], "hf download meta-llama/Llama-2-7b-hf"),
        (["model=local", "model.path=/nowhere"], "model.path=/nowhere: no such directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_users_error_is_one_line_without_a_traceback(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = command(*arguments, directory=tmp_path)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert lines[-1].startswith("error: ")
    assert message in lines[-1]
    assert "Traceback" not in done.stderr


def test_a_store_that_cannot_be_written_is_refused(workplace: Workplace, tmp_path: Path) -> None:
    done = command(*workplace.settings, "store=/proc/nowhere", directory=tmp_path)
    assert done.returncode == 1
    assert "error: store=/proc/nowhere cannot be written" in done.stderr


def test_composing_needs_none_of_the_heavy_packages() -> None:
    code = (
        "import sys; from hydra import compose, initialize_config_dir; from dive.cli import *; from dive.config import Config\n"
        "import dive.evaluate, dive.train\n"
        "register_schema('config', Config)\n"
        "with initialize_config_dir(str(CONF), version_base=None): to_typed(compose('config'), Config)\n"
        "print([n for n in ('torch', 'transformers', 'lightning', 'datasets', 'wandb') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_composed_configuration_is_printed(tmp_path: Path) -> None:
    done = command("model=llama2-7b", "moe.experts=8", "--cfg", "job", directory=tmp_path)
    printed = yaml.safe_load(done.stdout)
    assert printed["model"]["path"] == "meta-llama/Llama-2-7b-hf"
    assert printed["moe"]["experts"] == 8


@pytest.mark.slow
def test_the_configuration_works_from_an_installed_wheel(tmp_path: Path) -> None:
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path)]
    subprocess.run([*wheel, str(PACKAGE.parent)], check=True)
    target = tmp_path / "site"
    (built,) = tmp_path.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(built)]
    subprocess.run(install, check=True)
    done = subprocess.run(
        [sys.executable, "-m", "dive.train", "moe.experts=4", "--cfg", "job"],
        cwd=tmp_path,
        env=environment() | {"PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert yaml.safe_load(done.stdout)["moe"]["experts"] == 4
    assert (target / "dive/conf/config.yaml").is_file()
    assert (target / "dive/model/tiny/model.safetensors").is_file()
    for name in ("report.html", "page.css", "charts.js", "vendor/plot-0.6.17.umd.min.js", "vendor/LICENSE-plot"):
        assert (target / "dive/report/html" / name).is_file()
    assert (target / "dive/eval/paper_tasks/logiqa_parquet.yaml").is_file()


@pytest.mark.slow
def test_a_sweep_calibrates_once_and_mines_once_a_ratio(workplace: Workplace, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "dive.train", "-m", *workplace.settings),
            *(f"store={tmp_path / 'store'}", f"hydra.sweep.dir={tmp_path / 'sweep'}"),
            *("pruning.ratio=0.5,0.75", "moe.experts=2,3"),
        ],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    said = done.stdout + done.stderr
    assert len(list((tmp_path / "sweep").glob("*/results.json"))) == 4
    for kind, times in (("statistics", 1), ("matrix", 2), ("groups", 4 * 3)):  # groups by each of three measures
        computed = [line for line in said.splitlines() if f" {kind} " in line and line.endswith("computing")]
        assert len(computed) == times, kind
