"""A run: its plan, its store, and everything it leaves behind: results, logs, figures, report, W&B."""

import logging
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dive.affinity.grouping import adjusted_rand_index, favourite_groups, routing_overlap
from dive.affinity.groups import Groups
from dive.config import Config, EvaluateConfig, Load, StageText
from dive.eval.generation import Beginnings
from dive.eval.measure import measure, write_on
from dive.eval.tasks import Metrics, headline
from dive.export import export
from dive.hub import card_data
from dive.inputs import Inputs, TrainingInputs
from dive.logger.build import build_boards, build_trackers
from dive.logger.log import finish, log_evaluation
from dive.model.architecture import check_architecture, read_architecture
from dive.model.families import KNOWN, chosen_twin, count_parameters, moe_config
from dive.model.recipe import Dense, Model, give_back
from dive.moe.build import expert_overlap
from dive.moe.mixture import Mixture
from dive.plan.actual import Meter
from dive.plan.capacity import here, refuse
from dive.plan.stages import plan
from dive.plan.table import headline as plan_headline
from dive.progress import quiet_libraries, show
from dive.report.card import model_card
from dive.report.plots import draw
from dive.report.run import write_report
from dive.report.text import results_table, task_tables
from dive.results import (
    AffinityResult,
    AskedTask,
    Contamination,
    Continuation,
    Fingerprints,
    Measured,
    Origin,
    ParameterCounts,
    Planned,
    PlanResult,
    Results,
    RoutingAgreement,
    RoutingResult,
    Samples,
    Split,
    StageResult,
    read_as,
    write_results,
)
from dive.retrain.retrained import Retrained
from dive.store import Artifact, Store, plain
from dive.trainer.build import process_rank

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class Run:
    """What the steps of a run share, and what they leave behind."""

    def __init__(self, config: Config | EvaluateConfig, command: Sequence[str], directory: Path) -> None:
        """
        Args:
            command: for the record.
            directory: of the run's outputs.

        Raises:
            UserError: the store cannot be written.
        """
        quiet_libraries()
        self.started = time.monotonic()
        self.config, self.command, self.directory = config, list(command), directory
        self.main = process_rank() == 0
        """Whether this process records, writes and exports; the others compute with it."""
        if not self.main:
            logging.getLogger("dive").setLevel(logging.WARNING)
        self.store = Store(Path(config.store))
        self.store.finished = self._made
        self.evaluates = not isinstance(config, Config) or config.model.load is not Load.streamed
        """Whether models are measured: they are not where none is whole in memory."""
        self.meter: Meter | None = None
        self.trackers: list[Logger] = []
        """Loggers that hold the whole run: its curves, what its stages were measured at, and its results."""
        self._boards: list[Logger] = []  # which have a file for each curve, and one for all the rest
        self._results: Results | None = None
        self._artifacts: dict[str, None] = {}  # in order, each once

    # ------------------------------------------------------------------------------------------------------- beginning

    def plan(self, config: Config, dense: Dense) -> None:
        """Say what the run will cost on this machine.

        Raises:
            UserError: ``model.architecture`` is another model's, or there is no room.
        """
        architecture = read_architecture(dense.source.config.to_dict())
        check_architecture(config.model, architecture)
        planned = plan(config, architecture, device="cpu" if dense.device.type == "cpu" else None)
        on_gpu = dense.device.type == "cuda"
        memory = torch.cuda.get_device_properties(dense.device).total_memory if on_gpu else None
        refuse(planned, here(self.store.root, self.directory, device=memory))
        self.meter = Meter(planned)
        if self.main:
            show(*plan_headline(planned))

    def open(self, data: Inputs, model: Dense) -> None:
        """Begin the record and the loggers, now that the inputs are known."""
        self._results = Results(run=self._origin(data, model), evaluation=_measured(data))
        if isinstance(data, TrainingInputs):  # keys that stand in a run's file from the beginning
            self._results.groups, self._results.routing = [], RoutingResult()
        self._results.contamination = read_as(Contamination, data.contamination, "contamination")
        if not self.main:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        if isinstance(self.config, Config):
            write_config(self.config, self.directory)
            logger, settings = self.config.logger, plain(self.config)
            self.trackers = build_trackers(logger, self.directory, settings, self.store.root)
            self._boards = build_boards(logger, self.directory, "results")
        if not self.evaluates:
            self._results.evaluation.skipped = "model.load=streamed: no model is whole in memory"
            log.info("model.load=streamed: nothing is evaluated; measure the export by `python -m dive.evaluate`")

    def _origin(self, data: Inputs, model: Dense) -> Origin:
        trained = data if isinstance(data, TrainingInputs) else None
        return Origin(
            command=self.command,
            seed=self.config.seed,
            device=str(model.device),
            versions={"python": platform.python_version(), **self.store.versions},
            fingerprints=Fingerprints(
                model=model.source.fingerprint,
                domains={name: Split(**prints) for name, prints in data.fingerprints.items()},
                retraining_corpus=None if trained is None else trained.corpora[StageText.corpus].identity,
            ),
            samples=Samples(
                calibration=None if trained is None else _shapes(trained.calibration()),
                evaluation=_shapes(data.texts.all()),
            ),
            config=plain(self.config),
            precision=model.source.gguf.precision if model.source.gguf is not None else None,
        )

    # ---------------------------------------------------------------------------------------------------------- stages

    @property
    def results(self) -> Results:
        """What was found so far."""
        assert self._results is not None, "open comes first"
        return self._results

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Everything inside belongs to the stage of this name, in the log and in the account of what the run took."""
        before, self.store.stage = self.store.stage, name
        try:
            yield
        finally:
            self.store.stage = before

    def _made(self, kind: str, artifact: Artifact) -> None:
        """Take note of an artifact that a step gave."""
        self._artifacts[f"{kind}/{artifact.key}"] = None
        if not artifact.reused:
            give_back()
        if self.meter is not None and self.store.stage:
            self.meter.record(self.store.stage, artifact)

    def grouped(self, groups: Groups, config: Config) -> None:
        """Record the groups of domains that experts begin with."""
        self.results.groups = groups.members if config.grouping is not None or config.moe.experts == 1 else []
        if groups.clustering is not None:
            self.results.affinity = AffinityResult(**groups.clustering)

    def measure(self, name: str, model: Model, data: Inputs) -> None:
        """Measure a stage's model, in all processes, and record it in the first; nothing where no model is whole in memory."""
        if not self.evaluates:
            return
        with self.stage("evaluation"):
            found = measure(self, name, self.config.eval.batch, model=model, texts=data.texts, tasks=data.tasks)
        if not self.main:
            return
        values = found.read("evaluation.json")
        made = model.artifact or found
        stage = StageResult(
            name=name,
            tokens=model.tokens,
            calibration=self._reads_calibration(name),
            seconds=model.seconds if model.artifact is not None else found.seconds,
            reused=made.reused,
            trained=model.trained,
            perplexity=values["perplexity"],
        )
        if made.reused and made.versions != self.store.versions:
            stage.versions = dict(made.versions)
        if "mean" in stage.perplexity:
            log.info("%s: perplexity %.2f", name, stage.mean)
        if "tasks" in values:
            stage.tasks, stage.tasks_mean = values["tasks"], self._tasks_mean(values["tasks"])
        self.results.stages.append(stage)
        if "routing" in values:
            self.results.routing = read_as(RoutingResult, values["routing"], "routing")
        for logger in (*self.trackers, *self._boards):
            log_evaluation(logger, stage, tokens=self.results.tokens)
        self._write()

    def _reads_calibration(self, name: str) -> bool:
        if not isinstance(self.config, Config):
            return False
        stage = self.config.retrain.stages.get(name)
        return stage is not None and stage.text is StageText.calibration

    def _tasks_mean(self, tasks: dict[str, Metrics]) -> float:
        """Mean of one metric a task, the chosen or first one."""
        asked = self.results.evaluation.tasks
        values = {
            task: headline(metrics, asked[task].metric if task in asked else None)
            for task, metrics in tasks.items()
            if metrics
        }
        for task, (metric, value) in values.items():
            log.info("%s: %s %.4f", task, metric, value)
        return sum(value for _, value in values.values()) / max(len(values), 1)

    def _write(self) -> None:
        if self.main:
            self.results.run.artifacts = list(self._artifacts)
            write_results(self.results, self.directory)

    # ---------------------------------------------------------------------------------------------------------- ending

    def finish(
        self,
        config: Config,
        model: Mixture | Retrained,
        tokenizer: "PreTrainedTokenizerBase",
        texts: Beginnings | None,
    ) -> None:
        """Draw, continue the texts, export and report; the first process alone.

        Args:
            texts: what the dense and the final model are given to continue, to be read in the report.
        """
        results, meter = self.results, self.meter
        assert meter is not None
        chain = model.chain()
        results.overlap = expert_overlap(model.mixture.experts)
        compare_routing(results)
        read_tokens(results, tokenizer)
        results.parameters = parameters(config, model, chain)
        results.timings = {stage.name: stage.seconds for stage in results.stages}
        if not self.evaluates:
            results.timings["reconstructed"] = model.mixture.experts.seconds
        if not self.main:
            return
        model = model.materialised()
        curves = {stage.training.name: stage.curve(config.retrain.log_every) for stage in chain}
        draw(results, curves, self.directory / "plots")
        if self.evaluates and texts is not None:
            rows = write_on(self, {"dense": model.dense, "moe": model}, texts, tokenizer)
            results.generations = [Continuation(**row) for row in rows]
        exporting = time.monotonic()
        results.timings["total"] = exporting - self.started
        notes = _serving_notes(model.mixture, experts=config.moe.experts)
        if notes:
            log.warning("the export does not serve in every engine: %s", " ".join(notes))
        card = model_card(results, notes, base=card_data(config.model.path, config.model.revision))
        where = export(config.model, model, tokenizer, self.directory, card=card)
        meter.exported(where, time.monotonic() - exporting)
        results.export = str(where)
        results.plan = PlanResult(planned=read_as(Planned, meter.plan.summary(), "plan"), actual=meter.summary())
        results.timings["total"] = time.monotonic() - self.started
        self._write()
        self._report(config, meter)

    def finish_evaluation(self, model: Dense) -> None:
        """Parameters and times of a finished model that was measured."""
        self.results.parameters = checkpoint_parameters(model)
        self.results.timings = {stage.name: stage.seconds for stage in self.results.stages}
        self.results.timings["total"] = time.monotonic() - self.started
        self._write()

    def _report(self, config: Config, meter: Meter) -> None:
        """Page, trackers and the last lines in the terminal."""
        results, directory = self.results, self.directory
        report = write_report(directory) if self.evaluates else None  # else nothing was measured that it could show
        lines = [] if report is None else [f"report   {report}"]
        lines += [
            f"results  {directory / 'results.json'}",
            f"model    {results.export}",
            f"plots    {directory / 'plots'}",
        ]
        for logger in (*self.trackers, *self._boards):
            told = finish(logger, results, directory, plain(config), self.store.root)
            if told is not None:
                lines.append(f"{told[0]:<8} {told[1]}")
        show(*([results_table(results)] if self.evaluates else []), *task_tables(results))
        show(*lines, f"planned  {meter.line()}")


def _shapes(matrices: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(matrix.shape) for name, matrix in matrices.items()}


def _measured(data: Inputs) -> Measured:
    return Measured(
        domains=list(data.fingerprints),
        sets=list(data.texts.sets),
        tasks={name: AskedTask(**how) for name, how in data.tasks.describe().items()},
    )


def read_tokens(results: Results, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Say what the tokens read that experts are known by, and those of the texts that were followed through the routers."""
    routing = results.routing
    if routing is None:
        return
    for token in (token for expert in routing.tokens or [] for token in expert):
        token.text = str(tokenizer.decode([token.id]))
    for text in routing.texts or []:
        text.tokens = [str(tokenizer.decode([number])) for number in text.ids]


def compare_routing(results: Results) -> None:
    """Record how far the experts serve the groups of the affinity map, where there are both."""
    mined, routing = results.affinity, results.routing
    if mined is None or mined.groups is None or routing is None or not routing.share or not routing.share_by_layer:
        return
    rand = adjusted_rand_index(mined.groups, favourite_groups(routing.share))
    within, between = routing_overlap(routing.share_by_layer, mined.groups)
    mined.routing = RoutingAgreement(rand=rand, within=within, between=between)


def _serving_notes(mixture: Mixture, *, experts: int) -> list[str]:
    form, dense = mixture.form, mixture.dense.source.config
    return [each.said for each in chosen_twin(dense.model_type, form.twin).unserved(form, dense, experts=experts)]


def parameters(config: Config, model: Mixture | Retrained, chain: Sequence[Retrained]) -> ParameterCounts:
    """Parameters of the dense model, of one pruned expert, total and active ones, and all that any stage trained."""
    source = model.dense.source.config
    channels, sized = model.dense.channels, partial(moe_config, source, form=model.mixture.form)
    width, shared = config.moe.widths(config.pruning, channels)
    dense, _ = count_parameters(source)
    pruned, _ = count_parameters(sized(width=config.pruning.width(channels), experts=1, top_k=1))
    total, active = count_parameters(
        sized(width=width, experts=config.moe.experts, top_k=config.moe.top_k, shared=shared)
    )
    trained: dict[str, int] = {}
    for stage in chain:
        trained |= stage.sizes
    return ParameterCounts(dense=dense, pruned=pruned, total=total, active=active, trained=sum(trained.values()))


def checkpoint_parameters(model: Dense) -> ParameterCounts:
    """Total and active parameters of a finished model, of the families whose experts we know."""
    if model.source.config.model_type not in KNOWN:
        return ParameterCounts()
    total, active = count_parameters(model.source.config)
    return ParameterCounts(total=total, active=active)


def write_config(config: Config, directory: Path) -> None:
    """The composed configuration, as ``--config-dir`` of a later run can take it."""
    from omegaconf import OmegaConf

    OmegaConf.save(OmegaConf.create(plain(config)), directory / "config.yaml")
