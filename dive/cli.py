"""The way from a command line to a typed configuration, and from an error to one clear line.

Hydra composes; :func:`run` hands the task a plain dataclass and turns what a user can mend into a single line.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from dive import preemption
from dive.config import Config
from dive.errors import UserError, disk_trouble

C = TypeVar("C")

PACKAGE = Path(__file__).resolve().parent
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"
"""Directory of the YAML files: inside the package in a wheel, beside it in the repository."""

# ${ratio_of_active:0.25,${moe.top_k}} in YAML: the pruning.ratio at which top_k experts have a quarter of the channels together.
OmegaConf.register_new_resolver("ratio_of_active", lambda share, top_k: 1.0 - share / top_k, replace=True)


def register_schema(name: str, schema: type[Any]) -> None:
    """Let ``<name>.yaml`` start its defaults list with ``<name>_schema``, which types everything after it."""
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)


def to_typed(config: DictConfig, schema: type[C]) -> C:
    """Turn a composed configuration into its dataclass; cross-field checks run here.

    Raises:
        UserError: a value is missing, or two values contradict each other.
    """
    try:
        typed = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(describe(error)) from error
    except AttributeError as error:  # a key added by +key=value
        key = str(error).rpartition("attribute ")[2].strip("'")
        raise UserError(f"{key}: no such option; --cfg job prints all there are") from error
    if not isinstance(typed, schema):
        raise UserError(f"the configuration is not a {schema.__name__}: its defaults list lacks the schema")
    return typed


def composed(overrides: Sequence[str]) -> Config:
    """The typed configuration of a command line of ``dive.train``.

    Raises:
        UserError: an override is unknown or contradicts another.
    """
    register_schema("config", Config)
    try:
        with hydra.initialize_config_dir(str(CONF), version_base=None):
            return to_typed(hydra.compose("config", list(overrides)), Config)
    except HydraException as error:
        raise UserError(describe(error)) from error


def describe(error: BaseException) -> str:
    """One line that says what is wrong and which override to change."""
    chain: list[BaseException] = [error]
    while (below := chain[-1].__cause__ or chain[-1].__context__) is not None and below not in chain:
        chain.append(below)
    for cause in chain:
        if isinstance(cause, UserError):
            return str(cause)
    for cause in chain:
        if isinstance(cause, OmegaConfBaseException) and "$VALUE" not in str(cause):
            lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
            named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:"))
            key = cause.full_key or next(named, "")
            if isinstance(cause, MissingMandatoryValue):
                return f"{key} is needed: set {key}=VALUE"
            return f"{key}: {lines[0]}" if key else lines[0]
    text = " ".join(str(error).split())
    return text or type(error).__name__


SILENT = ("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none")
"""Overrides of a command that leaves no directory behind."""


def run(task: Callable[[C], object], config_name: str, schema: type[C], *, writes: bool = True) -> None:
    """Compose ``conf/<config_name>.yaml`` with the command line's overrides and call ``task`` with the result.

    What the task returns is the objective that an optimising sweeper gets.

    Args:
        writes: give the run a directory of its own under ``outputs/``.

    Exits with 1 and one line on stderr for a user's error, with 130 for Ctrl-C, with 75 for SIGTERM and SIGUSR1; anything
    else keeps its traceback.
    """
    register_schema(config_name, schema)
    refused: list[UserError] = []

    @hydra.main(version_base=None, config_path=str(CONF), config_name=config_name)
    def main(config: DictConfig) -> object:
        preemption.listen()  # once more: a sweep's launcher may run this in another process
        try:
            return task(to_typed(config, schema))
        except Exception as error:
            preemption.let_the_first_speak()
            if wants_traceback or HydraConfig.get().mode is RunMode.MULTIRUN or not isinstance(error, UserError):
                raise  # a sweep must learn which of its jobs failed
            refused.append(error)  # Hydra would put a line of its own before ours
            return None

    ours = os.environ.setdefault("DIVE_ONE_LINE_ERRORS", "0" if os.environ.get("HYDRA_FULL_ERROR") == "1" else "1")
    wants_traceback = ours == "0"
    if not writes:
        sys.argv += SILENT
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing, and the line below is one line
    preemption.listen()
    try:
        main()
    except (UserError, HydraException, OmegaConfBaseException) as error:
        if wants_traceback:
            raise
        sys.exit(f"error: {describe(error)}")
    except PermissionError as error:
        if wants_traceback:
            raise
        sys.exit(f"error: {error.filename} cannot be written ({error.strerror}); set hydra.run.dir=DIR")
    except preemption.Preempted:
        if not preemption.started_by_lightning():
            print(f"\n{preemption.message()}", file=sys.stderr)
        sys.exit(preemption.exit_code())
    except Exception as error:
        if not wants_traceback and str(error).startswith(
            "Config group override"
        ):  # Hydra's own, of GROUP=null or GROUP=3
            sys.exit(
                "error: a group takes the name of one of its options, neither null nor a number; --help lists them"
            )
        trouble = disk_trouble(error)
        if wants_traceback or trouble is None:
            raise
        sys.exit(f"error: {trouble}; make room, or set hydra.run.dir=DIR and store=DIR elsewhere, and run it again")
    except KeyboardInterrupt:
        print("\nstopped. The same command goes on from the last finished stage, layer or checkpoint.", file=sys.stderr)
        sys.exit(130)
    if refused:
        sys.exit(f"error: {refused[0]}")
