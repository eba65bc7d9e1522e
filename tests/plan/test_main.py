"""``python -m dive.plan`` from the command line, and the figures of docs/cost.md."""

import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dive.cli import PACKAGE
from dive.config import Strategy
from dive.model.architecture import locate_architecture
from dive.plan.stages import plan
from dive.plan.table import construction_rows
from dive.units import duration, size
from tests.model.test_architecture import PUBLISHED, typed
from tests.workplace import environment

DOCS = (PACKAGE.parent / "docs" / "cost.md").read_text(encoding="utf-8")


def command(*words: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment(), capture_output=True, text=True, check=False
    )


def test_the_plan_of_a_hub_model_needs_no_network_and_leaves_nothing_behind(tmp_path: Path) -> None:
    done = command("-m", "dive.plan", "model=tinyllama", "experiment=paper_1_8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for figure in ("1.1 B dense", "3.385 B with", "719.8 M active", "21.36 M trained", "21,358,592", "720,896"):
        assert figure in done.stdout
    assert not list(tmp_path.iterdir())


def test_the_budget_is_named_and_the_next_one_planned_with_the_same_overrides(tmp_path: Path) -> None:
    overrides = ("model=smollm2-135m", "budget=minutes", "trainer=cpu", "moe.experts=4", "plan.cores=2")
    first, *_ = command("-m", "dive.plan", *overrides, cwd=tmp_path).stdout.splitlines()
    config = typed(*(o.replace("minutes", "hours") for o in overrides))
    next_one = duration(plan(config, locate_architecture(config.model)).seconds)
    assert first == f"budget   minutes; budget=hours trains on 40 M tokens and takes about {next_one}"
    first, *_ = command("-m", "dive.plan", cwd=tmp_path).stdout.splitlines()
    assert first == "budget   toy"


def test_planning_imports_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys, runpy; sys.argv = ['plan', 'model=llama2-7b', 'moe.experts=8']; "
        "runpy.run_module('dive.plan', run_name='__main__'); "
        "print('LOADED', sorted({'torch', 'transformers', 'lightning', 'numpy'} & set(sys.modules)))"
    )
    done = command("-c", script, cwd=tmp_path)
    assert "LOADED []" in done.stdout, done.stderr


def test_errors_are_one_line(tmp_path: Path) -> None:
    for overrides, message in (
        (["plan.device=abacus"], "plan.device (abacus) is none of auto, h100, a100-80, rtx4090, cpu"),
        (["pruning.width_multiple=1024"], "pruning.width_multiple"),
    ):
        done = command("-m", "dive.plan", *overrides, cwd=tmp_path)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_run_that_does_not_fit_is_refused_before_texts_are_read(tmp_path: Path) -> None:
    done = command("-m", "dive.train", "eval.batch=65536", "eval.windows=65536", "logger=csv", cwd=tmp_path)
    assert done.returncode == 1
    assert re.match(
        r"error: evaluation needs [0-9.]+ [GT]B of host memory \(logits: .*\), there is .*lower eval.batch", done.stderr
    )
    assert not list((tmp_path / "outputs" / "store").iterdir())


def tables() -> list[tuple[str, list[list[str]]]]:
    """(command, rows) of every table of the document."""
    found = []
    for block in re.finditer(r"```bash\n([^`]*)```\n+\|.*\n\|[ :|-]*\n((?:\|.*\n)+)", DOCS):
        rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in block[2].splitlines()]
        found.append((block[1].replace("\\\n", " ").strip(), rows))
    return found


@pytest.mark.parametrize(("line", "rows"), tables(), ids=[line.split()[3] for line, _ in tables()])
def test_the_documents_tables_are_what_its_commands_print(line: str, rows: list[list[str]]) -> None:
    overrides = shlex.split(line.partition("dive.plan")[2])
    assert "plan.table=construction" in overrides
    config = typed(*overrides)
    _, printed = construction_rows(plan(config, locate_architecture(config.model)))
    assert [list(row) for row in printed] == rows


def test_there_are_tables() -> None:
    assert len(tables()) == 2


ONE, EIGHT = {}, {"accelerator": "gpu", "devices": 8, "strategy": Strategy.ddp, "precision": "bf16-mixed"}
CPU = {"accelerator": "cpu", "precision": "32-true", "gradient_checkpointing": False}
COLUMNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "`minutes`, a CPU core": ("minutes", "cpu", CPU),
    "`minutes`, H100": ("minutes", "h100", ONE),
    "`hours`, H100": ("hours", "h100", ONE),
    "`hours`, 8 × H100": ("hours", "h100", EIGHT),
    "`paper`, H100": ("paper", "h100", ONE),
    "`paper`, 8 × H100": ("paper", "h100", EIGHT),
}
"""{heading: (budget, device, what the trainer is changed to)}"""


def models_and_budgets() -> list[str]:
    """Lines of the table, as the plan has them."""
    rows = [f"| model | {' | '.join(COLUMNS)} |", "| --- |" + " ---: |" * len(COLUMNS)]
    for name in sorted(PUBLISHED, key=lambda name: PUBLISHED[name]):
        composed = {budget: typed(f"model={name}", f"budget={budget}") for budget in ("minutes", "hours", "paper")}
        cells = []
        for budget, device, changes in COLUMNS.values():
            config = composed[budget]
            one_core = replace(config.plan, cores=1)
            config = replace(config, trainer=replace(config.trainer, **changes), plan=one_core)
            found = plan(config, locate_architecture(config.model), device=device)
            cells.append(f"{duration(found.seconds)}, {size(found.device or found.host)}")
        rows.append(f"| `{name}` | {' | '.join(cells)} |")
    return rows


def test_the_table_of_models_and_budgets_is_the_plans() -> None:
    assert "\n".join(models_and_budgets()) in DOCS
