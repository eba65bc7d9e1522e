"""The command line: what it answers at once, and how it says that something is wrong."""

import importlib
import inspect
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import dive.train
from dive.__main__ import commands
from dive.cli import CONF, PACKAGE, composed
from dive.config import Config, EvaluateConfig, RefinedConfig
from dive.dashboard import DashboardConfig
from dive.generate import GenerateConfig
from dive.help import walk
from dive.push import PushConfig
from dive.quantise import QuantiseConfig
from dive.verify import VerifyConfig
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
        (["pruning.ratio=1.0"], "pruning.ratio (1.0) must be at least 0 and below 1"),
        (["trainer.devices=2"], "trainer.devices (2) needs a strategy"),
        (
            ["experiment=dive", "budget.tokens=2000"],
            "budget.tokens (2000) must be more than budget.router_tokens (16384), which it includes; set both",
        ),
        (["model=local", "model.path=org/name"], "`hf download org/name config.json` fetches them"),
        (
            ["moe=upcycle", "moe.upcycle.router_init=distilled"],
            "moe.upcycle.router_init: Key 'router_init' not in 'UpcycleConfig'",
        ),
        (["moe=plain", "moe.refined.rounds=2"], "moe.refined is null and has nothing to set"),
        (["moe.refinement.rounds=2"], "moe.refinement.rounds is no more: write moe.refined.rounds"),
        (["retrain.stages.retrain.train.norms=lora"], "train.norms"),
        (["retrain.stages.retrain.batch=3", "trainer.accumulation=2"], "retrain.stages.retrain.batch (3)"),
        (["model=llama2-7b", "trainer=cpu"], "hf download meta-llama/Llama-2-7b-hf"),
        (["model=local", "model.path=/nowhere"], "model.path=/nowhere: no such directory"),
        (["hydra.run.dir=/etc/passwd"], "hydra.run.dir: /etc/passwd cannot be a directory (File exists)"),
        (["hydra.run.dir=/etc/passwd/x"], "hydra.run.dir: /etc/passwd/x cannot be a directory (Not a directory)"),
        (["-m", "seed=1,2", "hydra.sweep.dir=/etc/passwd"], "hydra.sweep.dir: /etc/passwd cannot be a directory"),
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


def test_a_large_model_without_a_gpu_is_one_line_after_what_it_would_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = command("model=llama2-7b", "moe.experts=8", directory=tmp_path)
    assert done.returncode == 1
    assert re.search(
        r"^budget   hours; budget=minutes trains on [\d.]+ k tokens and takes about [\d.]+ min; budget=paper trains on 5\.5 B ",
        done.stdout,
        flags=re.MULTILINE,
    )
    assert "error: trainer.accelerator=gpu: torch finds no GPU on this machine; trainer=cpu runs it" in done.stderr


def test_a_store_that_cannot_be_written_is_refused(workplace: Workplace, tmp_path: Path) -> None:
    done = command(*workplace.settings, "store=/proc/nowhere", directory=tmp_path)
    assert done.returncode == 1
    assert "error: store=/proc/nowhere cannot be written" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["logger=csv", "logger.wandb.name=x"],
            "error: logger.wandb.name=x: logger.wandb is null and has nothing to set",
        ),
        (
            ["moe=[default,plain]"],
            "error: moe=[default,plain]: the group moe takes one of its options; set moe=default",
        ),
        (["seed=" + "9" * 5000], "error: seed=9999"),
        (["affinity.groups=[sst2,rte]"], "error: affinity.groups[0] must be a list"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_stops_hydra_itself_is_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = command(*arguments, directory=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(message)


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


# ----------------------------------------------------------------------------------------------------------- extras

HEAVY = ("torch", "transformers", "lightning", "datasets", "wandb")


def without(package: str, module: str, *arguments: str, directory: Path) -> "subprocess.CompletedProcess[str]":
    """Run ``python -m MODULE`` where a package is not installed; its last line on stdout is what heavy was imported."""
    code = (
        "import runpy, sys\n"
        f"sys.modules[{package!r}] = None\n"
        f"sys.argv = {[module, *arguments]!r}\n"
        f"try: runpy.run_module({module!r}, run_name='__main__', alter_sys=True)\n"
        f"finally: print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=directory, env=environment(), capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("package", "module", "arguments", "message"),
    [
        (
            "lm_eval",
            "dive.train",
            ["model=smollm2-135m"],
            "eval.tasks needs lm-evaluation-harness: pip install 'dive-moe[tasks]', or set eval.tasks=[]",
        ),
        ("lm_eval", "dive.evaluate", ["checkpoint=embedded", "eval.tasks=[piqa]"], "pip install 'dive-moe[tasks]'"),
        ("tensorboard", "dive.train", ["logger=[csv,tensorboard]"], "pip install 'dive-moe[tensorboard]'"),
        ("mlflow", "dive.train", ["logger=[csv,mlflow]"], "logger=mlflow needs mlflow: pip install 'dive-moe[mlflow]'"),
        ("wandb_workspaces", "dive.dashboard", ["entity=me"], "pip install 'dive-moe[dashboard]'"),
    ],
)
def test_a_missing_extra_is_said_before_the_heavy_imports(
    package: str, module: str, arguments: list[str], message: str, tmp_path: Path
) -> None:
    done = without(package, module, *arguments, directory=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.skipif(find_spec("hydra_plugins.hydra_submitit_launcher") is not None, reason="the launcher is installed")
def test_a_missing_launcher_is_one_line_with_what_to_install(tmp_path: Path) -> None:
    done = command("-m", "hydra/launcher=submitit_slurm", "seed=1,2", directory=tmp_path)
    assert done.returncode == 1
    said = "error: hydra/launcher=submitit_slurm is not installed: pip install 'dive-moe[slurm]'"
    assert done.stderr.splitlines() == [said]


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (
            "dive.train",
            ["calibration_domains.domains=[readmes]"],
            "begins: model tiny (embedded), text from embedded domains (readmes)",
        ),
        ("dive.evaluate", ["checkpoint=embedded"], "begins: checkpoint embedded, measured on embedded domains, piqa"),
    ],
)
def test_what_a_run_reads_is_said_before_the_heavy_imports(
    module: str, arguments: list[str], message: str, tmp_path: Path
) -> None:
    where = f"hydra.run.dir={tmp_path / 'here'}"
    done = without("lm_eval", module, "eval.tasks=[piqa]", where, *arguments, directory=tmp_path)
    first, heavy = done.stdout.splitlines()
    assert first.split(" ", 1)[1] == f"{message}, into {tmp_path / 'here'}"
    assert heavy == "[]"


# ------------------------------------------------------------------------------------------------------------- help


def helped(module: str, *arguments: str, directory: Path) -> str:
    """What ``--help`` prints, which needs nothing heavy."""
    done = without("nothing", module, *arguments[:1], "--help", *arguments[1:], directory=directory)
    assert done.returncode == 0, done.stderr
    *lines, heavy = done.stdout.splitlines()
    assert heavy == "[]"
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("module", "options"),
    [
        ("dive.generate", [field.name for field in fields(GenerateConfig)]),
        ("dive.push", [field.name for field in fields(PushConfig)]),
        ("dive.verify", [option.name for option in walk(VerifyConfig, None)]),
        ("dive.quantise", [field.name for field in fields(QuantiseConfig)]),
        ("dive.dashboard", [field.name for field in fields(DashboardConfig)]),
        ("dive.evaluate", ["checkpoint", "revision", "dtype", "device", "seed", "store"]),
    ],
)
def test_help_lists_a_commands_own_options(module: str, options: list[str], tmp_path: Path) -> None:
    printed = helped(module, directory=tmp_path)
    section = printed.split("Options:\n")[1].split("\n\n")[0]
    assert re.findall(r"^  ([\w.]+)=", section, flags=re.MULTILINE) == options
    assert "affinity" not in printed


def test_help_has_the_meaning_the_default_and_the_choices(tmp_path: Path) -> None:
    printed = " ".join(helped("dive.generate", directory=tmp_path).split())
    assert 'python -m dive.generate checkpoint=DIR prompt="Monday, 3"' in printed
    assert (
        "checkpoint=(needed) Directory of an export or of a dense model, a GGUF file, a hub id, or embedded." in printed
    )
    assert (
        "dtype=float32 Element type of the weights; auto takes the checkpoint's own. One of auto, float32," in printed
    )


def test_help_of_a_run_has_every_group_and_of_a_group_every_option(tmp_path: Path) -> None:
    printed = helped("dive.train", directory=tmp_path)
    groups = printed.split("Groups, ")[1].split("\n\n")[0]
    named = dict(re.findall(r"^  (\w+)=(\S+) +[A-Z]", groups, flags=re.MULTILINE))
    assert set(named) == {folder.name for folder in CONF.iterdir() if folder.is_dir()}
    assert (named["moe"], named["logger"], named["experiment"]) == ("default", "csv,wandb", "null")
    assert "pruning.ratio=0.75" in printed
    assert "How the Mixture-of-Experts is built. [coactivation, plain, random_split, upcycle]" in " ".join(
        printed.split()
    )

    said = " ".join(helped("dive.train", "moe.refined.steps=7", "moe", "retrain.stages", directory=tmp_path).split())
    assert "plain One expert a group of domains, pruned and refitted on its group's statistics alone" in said
    assert all(f" {option.name}=" in said for option in walk(RefinedConfig, None, "moe.refined."))
    assert "moe.refined.steps=7 Gradient steps per layer on experts and router together" in said
    assert "retrain.stages.retrain.train.router=full" in said
    assert "trainer.devices" not in said


@pytest.mark.parametrize("schema", [Config, EvaluateConfig, GenerateConfig, PushConfig, VerifyConfig, DashboardConfig])
def test_every_option_has_a_meaning(schema: type) -> None:
    silent = [option.name for option in walk(schema, None) if not option.meaning]
    assert silent == []


def test_help_about_what_there_is_not_is_an_error(tmp_path: Path) -> None:
    done = command("--help", "moo", directory=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["error: --help moo: no group or option has this name; --help lists them"]


def test_presets_of_ones_own_are_in_the_help(tmp_path: Path) -> None:
    (tmp_path / "mine/model").mkdir(parents=True)
    (tmp_path / "mine/model/ours.yaml").write_text("# A model of ours: small.\nname: ours\npath: /ours\n")
    printed = helped("dive.train", "--config-dir=mine", "model=ours", "model", directory=tmp_path)
    assert re.search(r"^  ours +A model of ours: small$", printed, flags=re.MULTILINE)
    assert "model.path=/ours" in printed


def test_the_package_lists_its_commands() -> None:
    done = subprocess.run([sys.executable, "-m", "dive"], env=environment(), capture_output=True, text=True, check=True)
    listed = dict(re.findall(r"^  python -m (dive\.\w+) +(.+)$", done.stdout, flags=re.MULTILINE))
    assert listed.keys() >= {
        f"dive.{name}" for name in ("train", "evaluate", "generate", "plan", "report", "push", "quantise", "verify")
    }
    assert listed["dive.train"] == "Turn a dense model into a Mixture-of-Experts"
    assert all(find_spec(module) for module in listed)


def test_every_command_has_a_script_of_its_own() -> None:
    scripts = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert {name.replace("-", ".") for name in scripts} == {"dive", *(module for module, _ in commands())}
    for entry in scripts.values():
        module, _, function = entry.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("moe=", ["moe=coactivation", "moe=default", "moe=plain"]), ("pruning.rat", ["pruning.ratio="])],
)
def test_the_shell_completes_groups_and_options(typed: str, offered: list[str]) -> None:
    line = [sys.executable, "-m", "dive.train", "--shell-completion", "query=bash"]
    asked = environment() | {"COMP_LINE": f"dive-train {typed}"}
    done = subprocess.run(line, env=asked, capture_output=True, text=True, check=True)
    assert set(offered) <= set(done.stdout.split())


def test_the_examples_in_the_help_of_a_run_compose() -> None:
    said = inspect.cleandoc(dive.train.__doc__ or "")
    (example,) = re.findall(
        r"^  python -m dive\.train (.*?)\n\n", said.replace("\\\n", " "), flags=re.MULTILINE | re.DOTALL
    )
    column = [line[2:42].strip() for line in said.partition("Most used::\n\n")[2].partition("\n\n")[0].splitlines()]
    for words in (shlex.split(example), ["model=smollm2-135m", *" ".join(column).split()[1:]]):
        here = ["model.path=embedded" if word == "model.path=DIR" else word for word in words]
        assert composed([word for word in here if not word.startswith("hydra.") and "=" in word]).moe.experts == 8


# ------------------------------------------------------------------------------------------------------- permissions


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        ("open('{0}/secret')", "{0}/secret cannot be read (Permission denied); make it readable"),
        ("open('{0}/shut/file')", "{0}/shut/file cannot be reached (Permission denied); make {0}/shut searchable"),
        ("open('{0}/given', 'w')", "{0}/given cannot be written (Permission denied); set hydra.run.dir=DIR"),
        ("os.mkdir('{0}/new')", "{0}/new cannot be written (Permission denied); set hydra.run.dir=DIR"),
    ],
)
def test_what_cannot_be_read_is_told_from_what_cannot_be_written(attempt: str, message: str) -> None:
    with tempfile.TemporaryDirectory() as name:  # not below pytest's own, which other users cannot enter
        for file, mode in (("secret", 0o200), ("given", 0o444)):
            (Path(name) / file).touch()
            (Path(name) / file).chmod(mode)
        (Path(name) / "shut").mkdir()
        (Path(name) / "shut").chmod(0o600)
        Path(name).chmod(0o555)
        code = (
            "import os; from dive.cli import refusal\n"
            "if os.geteuid() == 0: os.setuid(65534)\n"  # root may do everything
            f"try: {attempt.format(name)}\n"
            "except PermissionError as error: print(refusal(error))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
        )
        Path(name).chmod(0o700)
    assert done.stdout.startswith(message.format(name))


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
    for kind, times in (
        ("statistics", 1),
        ("matrix", 2),
        ("groups", 4 + 4 + 2),
    ):  # importance is the same at every ratio
        computed = [line for line in said.splitlines() if f" {kind} " in line and ": computing " in line]
        assert len(computed) == times, kind
