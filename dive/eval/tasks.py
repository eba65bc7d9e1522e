"""Accuracy on tasks, by lm-evaluation-harness (``lm_eval``) on a model that is in memory already.

Prompts, metrics, seeds and the treatment of BOS are the harness's defaults, so that ``lm_eval --model hf --model_args
pretrained=DIR`` gives the same figures on what a run has exported.
"""

import contextlib
import copy
import difflib
import hashlib
import inspect
import io
import itertools
import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dive.config import EvalConfig, TaskConfig
from dive.connection import hub_answers
from dive.errors import UserError
from dive.model.recipe import Model
from dive.store import HasStore, Place, identity, step, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

OWN_TASKS = Path(__file__).resolve().parent / "paper_tasks"
"""Tasks of the paper whose data the harness cannot load any more."""

UNSAFE = "runs code that the model writes, or has pictures or sound, which is not done here; leave it out"

Metrics = dict[str, float]
"""{metric: value}; of a metric behind a filter ``<metric>,<filter>``, of a standard error ``<metric>_stderr``."""


@dataclass(slots=True)
class Task:
    """One of ``eval.tasks`` with its data: a task of the harness, or a group or tag of several."""

    name: str
    loaded: Any
    """``lm_eval.tasks.manager.TaskDict``"""
    shots: int | None
    limit: int | None
    metric: str | None
    add_bos_token: bool | None
    """Whether prompts begin with the BOS token; as the tokenizer does by itself if null."""
    asked: str
    """SHA-256 of everything that decides what is asked and how the answers are counted."""

    @property
    def members(self) -> dict[str, Any]:
        """{name: task of the harness}; a single task is its own member."""
        members: dict[str, Any] = self.loaded["tasks"]
        return members

    def documents(self) -> Iterator[list[str]]:
        """The passages of every question: all texts of its row."""
        for member in self.members.values():
            for row in itertools.islice(member.eval_docs, self.limit):
                yield list(_texts(row))


@dataclass(slots=True)
class TaskSuite:
    """The tasks of a run, and how they are put to its models."""

    tasks: list[Task] = field(default_factory=list)
    tokenizer: "PreTrainedTokenizerBase | None" = None
    batch: int = 16

    def measure(self, run: HasStore, model: Model) -> dict[str, Metrics]:
        """{task: metrics} of one model, task by task from the store where they rest there.

        Tags, and groups that have no metrics of their own, are replaced by their members.
        """
        found: dict[str, Metrics] = {}
        for task in self.tasks:
            artifact = put_task(run, self.tokenizer, self.batch, model=model, task=task)
            metrics: dict[str, Metrics] = artifact.read("task.json")
            own = {task.name: metrics[task.name]} if metrics.get(task.name) else {}
            found |= own or {name: values for name, values in metrics.items() if name in task.members}
        return found

    def describe(self) -> dict[str, dict[str, Any]]:
        """{task: how it was put, and on how many questions}, for the record."""
        return {
            task.name: {
                "shots": task.shots,
                "limit": task.limit,
                "metric": task.metric,
                "questions": sum(min(len(m.eval_docs), task.limit or sys.maxsize) for m in task.members.values()),
                "members": [name for name in task.members if name != task.name],
            }
            for task in self.tasks
        }


@identity.register
def _(value: Task) -> dict[str, Any]:
    return {"asked": value.asked, "add_bos_token": value.add_bos_token}


@identity.register
def _(value: TaskSuite) -> list[Any]:
    return [identity(task) for task in value.tasks]


@step("task", "answers to the questions of a task")
def put_task(
    place: Place, run: HasStore, tokenizer: "PreTrainedTokenizerBase | None", batch: int, *, model: Model, task: Task
) -> None:
    """``task.json``: metrics of one model on one task.

    Args:
        tokenizer: of the model.
        batch: sequences per forward pass.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    own = copy.deepcopy(tokenizer)  # the harness gives it a padding token, which the export must not have
    if task.add_bos_token is not None:
        own.add_bos_token = task.add_bos_token  # type: ignore[union-attr]
    with _quiet(), _seeded():
        lm = HFLM(pretrained=model.load(), tokenizer=own, batch_size=batch, add_bos_token=task.add_bos_token)
        _prepare(task)
        results = evaluate(lm=lm, task_dict=task.loaded, limit=task.limit, log_samples=False)["results"]
    for member in task.members.values():
        member._instances = None  # prompts and answers: much memory, and never read again
    write_json(place.directory / "task.json", {name: _metrics(row) for name, row in results.items()})


def headline(metrics: Metrics, chosen: str | None) -> tuple[str, float]:
    """The metric that stands for a task in tables, and its value: the chosen one, or the first."""
    return (chosen, metrics[chosen]) if chosen in metrics else next(iter(metrics.items()))


# ------------------------------------------------------------------------------------------------------------- loading


def load_tasks(config: EvalConfig, tokenizer: "PreTrainedTokenizerBase") -> TaskSuite:
    """Find the tasks, read their data and try each on its first question.

    Raises:
        UserError: the harness is not installed; a task is unknown, cannot be loaded, has no data or too few examples.
    """
    suite = TaskSuite(tokenizer=tokenizer, batch=config.batch)
    if not config.tasks:
        return suite
    if find_spec("lm_eval") is None:
        raise UserError("eval.tasks needs lm-evaluation-harness: pip install 'dive-moe[tasks]', or set eval.tasks=[]")
    own = _own_directory(config.task_path)
    with _quiet():
        manager = _manager(config, own)
    for name in config.tasks:
        settings = config.task_settings.get(name, TaskConfig())
        if (manager.task_index[name].cfg or {}).get("unsafe_code"):  # loading it may fetch code already
            raise UserError(f"eval.tasks: {name!r} {UNSAFE}")
        with _quiet(), _seeded(), _hub_left_alone():
            try:
                loaded = manager.load([name])
            except Exception as error:  # the harness and `datasets` raise whatever they meet
                raise UserError(_cannot_load(name, manager, error)) from error
        suite.tasks.append(_checked(name, loaded, settings, config, own))
    if config.add_bos_token is None and tokenizer.bos_token_id is not None:
        begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        if not begins:
            log.info("tasks: this tokenizer begins no text with its BOS token; eval.add_bos_token=true makes it")
    return suite


def _own_directory(task_path: str | None) -> Path | None:
    if task_path is None:
        return None
    directory = Path(task_path).expanduser()
    if not directory.is_dir():
        raise UserError(f"eval.task_path={task_path}: no such directory")
    if next(directory.rglob("*.yaml"), None) is None:
        raise UserError(f"eval.task_path={task_path}: no task there (*.yaml)")
    return directory


def _manager(config: EvalConfig, own: Path | None) -> Any:
    """The harness's index of tasks.

    Raises:
        UserError: one of the tasks, or of those that settings are for, is in no index.
    """
    from lm_eval.tasks import TaskManager

    paths = [OWN_TASKS, *([own] if own else [])]
    wanted = {"tasks": config.tasks, "task_settings": list(config.task_settings)}
    manager = TaskManager(include_path=paths, include_defaults=False)
    index = manager.task_index
    if all(name in index and index[name].kind.name != "GROUP" for name in itertools.chain(*wanted.values())):
        return manager  # reading the harness's own 14 000 YAMLs takes many seconds
    log.info("reading the index of lm-evaluation-harness")
    manager = TaskManager(include_path=paths)
    for key, names in wanted.items():
        unknown = [name for name in names if name not in manager.task_index]
        if unknown:
            near = difflib.get_close_matches(unknown[0], manager.all_tasks)
            raise UserError(
                f"eval.{key}: no task {', '.join(map(repr, unknown))}"
                + (f" (near: {', '.join(near)})" if near else "")
                + "; `lm_eval ls tasks` lists the harness's, eval.task_path=DIR adds YAMLs of your own"
            )
    return manager


def _cannot_load(name: str, manager: Any, error: Exception) -> str:
    """One line on why a task did not load, and what to do."""
    import datasets

    text = " ".join(str(error).split()) or type(error).__name__
    where = f"eval.tasks: {name!r}"
    if isinstance(error, ConnectionError):
        return (
            f"{where}: its data is not in the cache {datasets.config.HF_DATASETS_CACHE}, and the hub does not answer "
            f"({text}); run the same command once where there is network and copy its HF_HOME here, or take tasks from "
            "files by eval.task_path=DIR"
        )
    if "scripts are no longer supported" in text:
        return (
            f"{where}: its data needs a loading script, which datasets no longer runs ({text}); write a task YAML that "
            "takes the data from elsewhere, and name its directory by eval.task_path=DIR"
        )
    if isinstance(error, IndexError):
        return f"{where} has no questions: its split is empty; choose another task"
    return f"{where} cannot be loaded from {manager.task_index[name].yaml_path}: {type(error).__name__}: {text}"


def _checked(name: str, loaded: Any, settings: TaskConfig, config: EvalConfig, own: Path | None) -> Task:
    """The task, its examples counted and its first question put into words.

    Raises:
        UserError: it runs code that models write, wants pictures, has no such metric, or too few examples.
    """
    where = f"eval.task_settings.{name}"
    metrics: set[str] = set()
    for member_name, member in loaded["tasks"].items():
        if getattr(member, "UNSAFE_CODE", False) or getattr(member, "MULTIMODAL", False):
            raise UserError(f"eval.tasks: {member_name!r} {UNSAFE}")
        filters = ["" if ensemble.name == "none" else f",{ensemble.name}" for ensemble in member._filters]
        metrics |= {f"{metric}{behind}" for metric in member.higher_is_better() for behind in filters}
        fixed = member.config.num_fewshot
        if settings.shots and fixed == 0:
            raise UserError(f"{where}.shots ({settings.shots}): the task {member_name!r} allows none; set 0 or null")
    if settings.metric is not None and settings.metric not in metrics:
        raise UserError(f"{where}.metric: {settings.metric!r} is none of {', '.join(sorted(metrics))}")
    limit = settings.limit or config.task_limit
    task = Task(name, loaded, settings.shots, limit, settings.metric, config.add_bos_token, asked="")
    _prepare(task)
    shots = {member.config.num_fewshot for member in task.members.values()}
    task.shots = shots.pop() if len(shots) == 1 else settings.shots
    with _quiet(), _seeded():
        for member_name, member in task.members.items():
            try:
                first = next(iter(member.eval_docs))
                member.fewshot_context(first, num_fewshot=member.config.num_fewshot)
                member.doc_to_target(first)
            except Exception as error:  # whatever a template or the harness's samplers raise
                text = " ".join(str(error).split()) or type(error).__name__
                raise UserError(
                    f"eval.tasks: {member_name!r} with {member.config.num_fewshot} examples fails on its first question "
                    f"({text}); lower {where}.shots, or mend the task"
                ) from error
    _prepare(task)  # the trial drew from the examples
    task.asked = _asked(task, own)
    return task


def _prepare(task: Task) -> None:
    """Set the number of examples and the seed they are drawn by, as ``lm_eval`` does for each of its runs."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    for member in task.members.values():
        if task.shots is not None and member.config.num_fewshot != 0:
            member.set_config(key="num_fewshot", value=task.shots)
        elif member.config.num_fewshot is None:
            member.set_config(key="num_fewshot", value=0)
        member.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


# ------------------------------------------------------------------------------------------------------------ identity


def _asked(task: Task, own: Path | None) -> str:
    """SHA-256 of the settings, the questions, the examples and the code of a task; not of where they are kept."""
    digest = hashlib.sha256(f"lm_eval {version('lm_eval')} {task.name} {task.limit}".encode())

    def add(value: Any) -> None:
        digest.update(json.dumps(value, sort_keys=True, default=_source).encode("utf-8", "surrogatepass"))

    for name, group in task.loaded["groups"].items():
        add([name, [asdict(aggregated) for aggregated in group.aggregate_metric_list or []]])
    for name, member in task.members.items():
        settings = member.config.to_dict()
        for place in ("metadata", "dataset_path", "dataset_name", "dataset_kwargs"):
            settings.pop(place, None)
        add([name, str(member.VERSION), settings])
        for row in itertools.islice(member.eval_docs, task.limit):
            add(row)
        for row in (member.fewshot_docs() or ()) if member.config.num_fewshot else ():
            add(row)
    for file in sorted(own.rglob("*.py")) if own else ():
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _source(value: Any) -> str:
    """What JSON has no form for: a function's source, never its address."""
    try:
        return inspect.getsource(value)
    except (TypeError, OSError):
        return getattr(value, "__qualname__", type(value).__qualname__) if callable(value) else str(value)


# --------------------------------------------------------------------------------------------------------------- parts


def _texts(value: Any) -> Iterator[str]:
    """All strings in a row, those inside lists and structures included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _texts(item)


def _metrics(row: Mapping[str, Any]) -> Metrics:
    """{metric: value} from a row of the harness's results, whose keys are ``<metric>,<filter>``."""
    found: Metrics = {}
    for key, value in row.items():
        metric, comma, behind = key.partition(",")
        if comma and isinstance(value, int | float) and math.isfinite(value):
            found[metric if behind == "none" else key] = float(value)
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's messages away, and its progress bars where there is no terminal."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    bars = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    with bars:
        yield


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """The harness's seeds inside, and the run's random state afterwards as it was before."""
    import random

    import numpy as np
    import torch
    from lightning.pytorch.utilities.seed import isolate_rng
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    with isolate_rng():
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        yield


@contextlib.contextmanager
def _hub_left_alone() -> Iterator[None]:
    """Where the hub does not answer, let ``datasets`` look into its cache at once instead of asking again and again."""
    if hub_answers():
        yield
        return
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
