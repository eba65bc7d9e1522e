"""The way from a command line to a typed configuration, and from an error to one clear line.

Hydra composes; :func:`run` hands the task a plain dataclass and turns what a user can mend into a single line.
"""

import importlib.util
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from traceback import walk_tb
from typing import Any, TypeVar

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from dive import preemption
from dive.config import Config, EvalConfig, LoggerConfig
from dive.errors import UserError, disk_trouble
from dive.help import help_text
from dive.model.architecture import locate_architecture
from dive.renamed import refuse_old_names

C = TypeVar("C")

PACKAGE = Path(__file__).resolve().parent
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"
"""Directory of the YAML files: inside the package in a wheel, beside it in the repository."""

# ${ratio_of_active:0.25,${moe.top_k}} in YAML: the pruning.ratio at which top_k experts have a quarter of the channels together.
OmegaConf.register_new_resolver("ratio_of_active", lambda share, top_k: 1.0 - share / top_k, replace=True)
OmegaConf.register_new_resolver("times", lambda one, other: one * other, replace=True)


def by_size(entries: Mapping[str, Any], *, _root_: DictConfig) -> Any:
    """``${by_size:{0:full,5e9:lora}}`` in YAML: the entry of the largest size that the configured dense model has.

    Args:
        entries: {parameters: value}.

    Raises:
        UserError: the model's figures are not to be had.
    """
    if OmegaConf.is_missing(_root_.model, "path"):
        raise UserError("model.path is needed: set model.path=DIR")
    model: Any = OmegaConf.to_object(_root_.model)
    size = locate_architecture(model).weights
    return entries[max((start for start in entries if float(start) <= size), key=float)]


def expert_tokens(*, _root_: DictConfig) -> int:
    """``${expert_tokens:}`` in YAML: what the budget leaves after the stage that trains routers alone.

    Raises:
        UserError: nothing.
    """
    tokens, routers = _root_.budget.tokens, _root_.budget.router_tokens
    if tokens <= routers:
        raise UserError(
            f"budget.tokens ({tokens}) must be more than budget.router_tokens ({routers}), which it includes; set both"
        )
    return int(tokens - routers)


OmegaConf.register_new_resolver("by_size", by_size, replace=True)
OmegaConf.register_new_resolver("expert_tokens", expert_tokens, replace=True)


def register_schema(name: str, schema: type[Any]) -> None:
    """Let ``<name>.yaml`` start its defaults list with ``<name>_schema``, which types everything after it."""
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)


def to_typed(config: DictConfig, schema: type[C]) -> C:
    """Turn a composed configuration into its dataclass; bounds and contradictions are checked here.

    Raises:
        UserError: an option is unknown, a value is missing, or two values contradict each other.
    """
    for key in _unknown(config):
        raise UserError(f"{key}: no such option; --cfg job prints all there are")
    try:
        typed = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(describe(error)) from error
    if not isinstance(typed, schema):
        raise UserError(f"the configuration is not a {schema.__name__}: its defaults list lacks the schema")
    return typed


def _unknown(config: DictConfig, where: str = "") -> Iterator[str]:
    """Paths of what +key=value added to a dataclass that has no such field."""
    kind = OmegaConf.get_type(config)
    known = {entry.name for entry in fields(kind)} if kind is not None and is_dataclass(kind) else None
    for name in config:
        path = f"{where}.{name!s}".lstrip(".")
        if known is not None and name not in known:
            yield path
        elif OmegaConf.is_missing(config, name) or OmegaConf.is_interpolation(config, str(name)):
            continue
        elif isinstance(inner := config[name], DictConfig):
            yield from _unknown(inner, path)


def composed(overrides: Sequence[str]) -> Config:
    """The typed configuration of a command line of ``dive.train``.

    Raises:
        UserError: an override is unknown or contradicts another.
    """
    register_schema("config", Config)
    running = GlobalHydra.instance().hydra  # a Hydra application may call this: it composes once at a time
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONF), version_base=None):
            refuse_old_names(overrides)
            refuse_lists(overrides)
            config = hydra.compose("config", list(overrides))
    except Exception as error:
        if not from_composing(error):
            raise
        raise UserError(describe(error)) from error
    finally:
        GlobalHydra.instance().hydra = running
    return to_typed(config, Config)


def refuse_lists(overrides: Iterable[str]) -> None:
    """Hydra takes a list of options for any group and merges them; only loggers are meant to stand beside each other.

    Raises:
        UserError: names the group and the first of its options.
    """
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        group, chosen = override.key_or_group, override.value()
        if not isinstance(chosen, list) or not (CONF / group).is_dir():
            continue
        if group != "logger":
            one = f"set {group}={chosen[0]}" if chosen else "--help lists them"
            raise UserError(f"{override.input_line}: the group {group} takes one of its options; {one}")
        if not all(isinstance(option, str) for option in chosen):
            raise UserError(f"{override.input_line}: a list of the group's options, such as logger=[csv,wandb]")


def from_composing(error: BaseException) -> bool:
    """Whether an error comes from what Hydra makes of the command line, whatever its class."""
    return isinstance(error, HydraException | OmegaConfBaseException) or any(
        frame.f_code.co_name in ("load_configuration", "parse_overrides") for frame, _ in walk_tb(error.__traceback__)
    )


LONGEST = 400
"""Characters of a line that may repeat a long value of the user's."""


def describe(error: BaseException) -> str:
    """One line that says what is wrong and which override to change."""
    chain: list[BaseException] = [error]
    while (below := chain[-1].__cause__ or chain[-1].__context__) is not None and below not in chain:
        chain.append(below)
    for cause in chain:
        if isinstance(cause, UserError):
            return str(cause)
    line = " ".join(_describe(chain).split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} … {line[-LONGEST // 2 :]}"


def _describe(chain: Sequence[BaseException]) -> str:
    override, key, composing = _override_in(chain)
    stumbled = any(isinstance(cause, AssertionError) or "'NoneType' object has" in str(cause) for cause in chain)
    if composing is not None and stumbled:
        parts = key.split(".")
        prefixes = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        absent = next((at for at in prefixes if OmegaConf.select(composing, at) is None), key)
        group = absent.partition(".")[0]
        return f"{override}: {absent} is null and has nothing to set; choose an option of {group} that gives it, see --help"
    for cause in chain:
        if isinstance(cause, OmegaConfBaseException) and "$VALUE" not in str(cause):
            lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
            named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:"))
            path = _whole_key(str(cause.full_key or next(named, "")), key)
            if isinstance(cause, MissingMandatoryValue):
                return f"{path} is needed: set {path}=VALUE"
            if " is not a ListConfig" in lines[0]:
                return f"{path} must be a list"
            if lines[0].startswith("Invalid type assigned: dict is not a subclass of"):
                where, _, name = path.rpartition(".")
                return (
                    f"{override}: {name} is no entry of {where} yet; add it whole, as in '+{where}={{{name}:{{...}}}}'"
                )
            return f"{path}: {lines[0]}" if path else lines[0]
    if any(str(cause).startswith("Config group override") for cause in chain):
        return f"{override}: a group takes the name of one of its options, neither null nor a number; --help lists them"
    text = str(chain[0]) or str(chain[-1]) or type(chain[0]).__name__
    return text if override in text else f"{override}: {text}"


def _override_in(chain: Sequence[BaseException]) -> tuple[str, str, DictConfig | None]:
    """The override at which Hydra stopped, its key, and what was composed so far; Hydra's errors rarely tell."""
    for cause in chain:
        for frame, _ in walk_tb(cause.__traceback__):
            found = frame.f_locals.get("override") if frame.f_globals.get("__name__", "").startswith("hydra.") else None
            if isinstance(found, Override):
                config = frame.f_locals.get("cfg")
                return found.input_line or "", found.key_or_group, config if isinstance(config, DictConfig) else None
            if isinstance(found, str):
                return found, found.partition("=")[0].lstrip("+~"), None
    return "", "", None


def _whole_key(key: str, override: str) -> str:
    """OmegaConf names an entry of what an override assigns by its last part alone."""
    if not override or key.startswith(override):
        return key
    if key.isdigit():
        return f"{override}[{key}]"
    parts = override.split(".")
    if key in parts:
        return ".".join(parts[: parts.index(key) + 1])
    return f"{override}.{key}" if key else override


PLUGINS = {"joblib": "sweep", "optuna": "sweep", "submitit_local": "slurm", "submitit_slurm": "slurm"}
"""{launcher or sweeper: the extra that it comes with}"""


def missing_plugin(error: BaseException) -> str | None:
    """What to install, where an error is of a launcher or a sweeper that an extra has."""
    found = re.search(r"Could not find 'hydra/(launcher|sweeper)/(\w+)'", str(error))
    if found is None or found[2] not in PLUGINS:
        return None
    return f"hydra/{found[1]}={found[2]} is not installed: pip install 'dive-moe[{PLUGINS[found[2]]}]'"


def require_extra(module: str, extra: str, named: str, otherwise: str = "") -> None:
    """Look for a package of an extra without importing it: what is missing is said before the heavy imports.

    Args:
        module: that is needed.
        extra: that has it.
        named: what needs it.
        otherwise: what else to do.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{named}: pip install 'dive-moe[{extra}]'{otherwise}")


def require_tasks(config: EvalConfig) -> None:
    """lm-evaluation-harness, where there are tasks.

    Raises:
        UserError: it is not installed.
    """
    if config.tasks:
        require_extra("lm_eval", "tasks", "eval.tasks needs lm-evaluation-harness", ", or set eval.tasks=[]")


def require_loggers(config: LoggerConfig) -> None:
    """The packages of the loggers that are chosen.

    Raises:
        UserError: one is not installed.
    """
    otherwise = ", or leave it out of logger=[...]"
    if config.tensorboard is not None:
        require_extra("tensorboard", "tensorboard", "logger=tensorboard needs TensorBoard", otherwise)
    if config.mlflow is not None:
        for module in ("mlflow", "sqlalchemy", "alembic"):  # the latter two for a database
            require_extra(module, "mlflow", f"logger=mlflow needs {module}", otherwise)


def refusal(error: PermissionError) -> str:
    """One line for what the system does not let a run do with a path: read it, reach it, or write it."""
    path = Path(os.path.abspath(os.fsdecode(error.filename or ".")))
    there = path
    while not os.path.lexists(there):
        there = there.parent
    said = f"({error.strerror})"
    if there == path and not os.access(path, os.R_OK):
        return f"{path} cannot be read {said}; make it readable, or choose another"
    if there != path and not os.access(there, os.X_OK):
        return f"{path} cannot be reached {said}; make {there} searchable, or choose another"
    return f"{path} cannot be written {said}; set hydra.run.dir=DIR"


SILENT = ("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none")
"""Overrides of a command that leaves no directory behind."""


def run(task: Callable[[C], object], config_name: str, schema: type[C], *, writes: bool = True) -> None:
    """Compose ``conf/<config_name>.yaml`` with the command line's overrides and call ``task`` with the result.

    What the task returns is the objective that an optimising sweeper gets.

    Args:
        writes: give the run a directory of its own under ``outputs/``.

    ``--help`` prints the command's own options instead, see :mod:`dive.help`.

    Exits with 1 and one line on stderr for a user's error, with 130 for Ctrl-C, with 75 for SIGTERM and SIGUSR1; anything
    else keeps its traceback.
    """
    register_schema(config_name, schema)
    refused: list[UserError] = []
    arguments = get_args_parser().parse_intermixed_args()  # moe=plain --help moe
    began = False

    @hydra.main(version_base=None, config_path=str(CONF), config_name=config_name)
    def main(config: DictConfig) -> object:
        nonlocal began
        began = True
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
        if arguments.help:
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends in silence
            described = sys.modules[task.__module__].__doc__ or ""
            print(help_text(described, config_name, schema, CONF, arguments.overrides, config_dir=arguments.config_dir))
            return
        refuse_old_names(arguments.overrides)
        refuse_lists(arguments.overrides)
        main()
    except (UserError, HydraException, OmegaConfBaseException) as error:
        if wants_traceback:
            raise
        sys.exit(f"error: {missing_plugin(error) or describe(error)}")
    except PermissionError as error:
        if wants_traceback:
            raise
        sys.exit(f"error: {refusal(error)}")
    except preemption.Preempted:
        if not preemption.started_by_lightning():
            print(f"\n{preemption.message()}", file=sys.stderr)
        sys.exit(preemption.exit_code())
    except Exception as error:
        if not wants_traceback and from_composing(error):
            sys.exit(f"error: {describe(error)}")
        trouble = disk_trouble(error)
        if wants_traceback:
            raise
        if trouble is None and not began and isinstance(error, OSError) and error.filename:
            option = "hydra.sweep.dir" if arguments.multirun else "hydra.run.dir"
            sys.exit(f"error: {option}: {error.filename} cannot be a directory ({error.strerror}); set {option}=DIR")
        if trouble is None:
            raise
        sys.exit(f"error: {trouble}; make room, or set hydra.run.dir=DIR and store=DIR elsewhere, and run it again")
    except KeyboardInterrupt:
        print("\nstopped. The same command goes on from the last finished stage, layer or checkpoint.", file=sys.stderr)
        sys.exit(130)
    if refused:
        sys.exit(f"error: {refused[0]}")
