"""The package as a stranger installs it: sdist, wheel from it, a fresh environment, an empty folder."""

import os
import subprocess
import sys
import tarfile
import venv
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from dive.__main__ import commands
from dive.cli import PACKAGE

pytestmark = pytest.mark.slow
TINY = (
    *("calibration_domains.samples=2", "calibration_domains.domains=[arithmetic,licences]", "moe.experts=2"),
    *("moe.refined.steps=2", "retrain=none", "eval.windows=1", "eval.generations=0", "affinity.mapped=64"),
    *("logger=csv", "hydra.run.dir=here"),
)
"""Overrides of a run of seconds."""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the commands in an environment that has the wheel, and all else from this one."""
    if find_spec("pyproject_hooks") is None:  # of build; a directory called build would be found as well
        pytest.skip("pip install build")
    root = tmp_path_factory.mktemp("package")
    asked = [sys.executable, "-m", "build", "--outdir", str(root / "dist"), str(PACKAGE.parent)]
    subprocess.run(asked, cwd=root, check=True, capture_output=True)
    venv.create(root / "fresh", with_pip=True)
    (wheel,) = (root / "dist").glob("*.whl")
    bin_ = root / "fresh/bin"
    install = [str(bin_ / "python"), "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", str(wheel)]
    subprocess.run(install, check=True)
    site = root / f"fresh/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    # Only now, or pip would find the editable install. Its own .pth file is not read from here.
    shared = [entry for entry in sys.path if entry.endswith("site-packages")]
    (site / "shared.pth").write_text("".join(f"{entry}\n" for entry in shared))
    return bin_


def ran(program: Path, *arguments: str, directory: Path) -> str:
    """What a command prints on stdout in a folder."""
    alone = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    settings = alone | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    line = [str(program), *arguments]
    done = subprocess.run(line, cwd=directory, env=settings, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_the_sdist_holds_what_the_site_and_the_tests_need(scripts: Path) -> None:
    (archive,) = (scripts.parents[1] / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {
        "mkdocs.yml",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "docs/options.py",
        "examples/dive.ipynb",
        "tests/conftest.py",
        "Makefile",
    } <= names
    assert not {name for name in names if name.startswith((".venv", "build", "outputs"))}


def test_files_beside_the_code_are_in_the_wheel(scripts: Path, tmp_path: Path) -> None:
    where = Path(ran(scripts / "python", "-c", "import dive; print(dive.__file__)", directory=tmp_path).strip()).parent
    assert scripts.parent in where.parents
    assert (where / "conf/config.yaml").is_file()
    assert (where / "model/tiny/model.safetensors").is_file()
    for name in ("report.html", "page.css", "charts.js", "vendor/plot-0.6.17.umd.min.js", "vendor/LICENSE-plot"):
        assert (where / "report/html" / name).is_file()
    assert (where / "eval/paper_tasks/logiqa_parquet.yaml").is_file()


def test_every_command_answers_in_an_empty_folder(scripts: Path, tmp_path: Path) -> None:
    listed = ran(scripts / "dive", directory=tmp_path)
    for module, meaning in commands():
        assert meaning in listed
        by_script = ran(scripts / module.replace(".", "-"), "--help", directory=tmp_path)
        assert by_script == ran(scripts / "python", "-m", module, "--help", directory=tmp_path)
    composed = yaml.safe_load(ran(scripts / "dive-train", "moe.experts=4", "--cfg", "job", directory=tmp_path))
    assert composed["moe"]["experts"] == 4
    assert "11.07 B total" in ran(scripts / "dive-plan", "model=llama2-7b", directory=tmp_path)
    assert "-F hydra_bash_completion dive-train" in ran(
        scripts / "dive-train", "--shell-completion", "install=bash", directory=tmp_path
    )


def test_a_model_is_built_measured_and_tried_in_an_empty_folder(scripts: Path, tmp_path: Path) -> None:
    ran(scripts / "dive-train", *TINY, directory=tmp_path)
    assert (tmp_path / "here/report.html").is_file()
    made = "checkpoint=here/checkpoint"
    again = ("calibration_domains.domains=[arithmetic]", "eval.windows=1", "dtype=float32", "hydra.run.dir=measured")
    assert "arithmetic@256" in ran(scripts / "dive-evaluate", made, *again, directory=tmp_path)
    said = ran(scripts / "dive-generate", made, "prompt=Monday, 3", "max_new_tokens=3", directory=tmp_path)
    assert "\nMonday, 3" in said
    pushed = ran(scripts / "dive-push", made, "repo=me/mine", "dry_run=true", directory=tmp_path)
    assert "Upload MixtralForCausalLM" in pushed
    assert "report.html" in ran(scripts / "dive-report", "here", directory=tmp_path)
    assert "experts" in ran(scripts / "dive-store", directory=tmp_path)
