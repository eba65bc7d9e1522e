"""The stages of an experiment, in order. Data flows one way, and every result rests in the store.

texts → tokens → channel statistics → cross-domain perplexity → groups → experts → Mixture-of-Experts → retrained stages
→ evaluation → export.

Each stage is a function of its slice of the configuration and of what came before; it returns an artifact.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dive.affinity.grouping import (
    adjusted_rand_index,
    affinity,
    cluster_distances,
    distances,
    random_groups,
    similarity_distances,
)
from dive.affinity.matrix import cross_domain_perplexity
from dive.affinity.similarity import importance_similarity, overlap_similarity
from dive.artifacts import Artifact, Store, plain, write_json
from dive.calibration_domains.sampling import Tokenize, calibration_tokens
from dive.calibration_domains.texts import domain_names, fingerprint, load_domains
from dive.config import (
    AffinityConfig,
    Compensation,
    Config,
    Construction,
    Dtype,
    EvalConfig,
    Grouping,
    Load,
    Measure,
    Metric,
    MoEConfig,
    PruningConfig,
    RouterInit,
    Start,
    Storage,
    require,
)
from dive.eval.contamination import contamination
from dive.eval.evaluate import EvaluationTexts, evaluate, evaluation_texts
from dive.eval.generation import Beginnings, continue_greedily
from dive.eval.routing import mask_overlap, routing_share
from dive.eval.tasks import Metrics, TaskSuite, headline, load_tasks
from dive.export import has_expert_bias, save, save_streamed, save_with_expert_bias
from dive.logger.build import build_evaluation_loggers, build_wandb, log_evaluation
from dive.logger.wandb_run import close, log_results
from dive.model.architecture import check_architecture, read_architecture
from dive.model.families import count_parameters, moe_config
from dive.model.load import (
    DenseSource,
    document_tokens,
    load_tokenizer,
    load_weights,
    locate_dense,
    resolve_device,
)
from dive.model.streamed import load_streamed
from dive.moe.layer import ExpertLayer
from dive.moe.reconstruct import assemble, assemble_shared, build_layers, build_refined_layers
from dive.plan.actual import Meter
from dive.plan.capacity import here, refuse
from dive.plan.stages import Plan, plan
from dive.plan.table import headline as plan_headline
from dive.progress import quiet_libraries
from dive.pruning.calibrate import collect_statistics, stream_statistics
from dive.pruning.metrics import importance_of_layers, keep_masks
from dive.pruning.statistics import ChannelStatistics
from dive.report import plots
from dive.report.run import write_report
from dive.report.text import model_card, show, stage_table, task_tables
from dive.retrain.corpus import Blocks, corpus_blocks, local_documents
from dive.retrain.freezing import check_policy
from dive.retrain.stage import RetrainedStage, retrain_stage, retrained_model
from dive.trainer.build import check_devices, process_rank

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Dense = Callable[[], "PreTrainedModel"]
"""Loads the dense model when a stage first needs its weights; a run that finds everything in the store never does."""


@dataclass(slots=True)
class Inputs:
    """What every stage starts from."""

    source: DenseSource
    dense: Dense
    tokenizer: "PreTrainedTokenizerBase"
    tokens: dict[str, Tensor]
    """{domain: (samples, length)} for calibration."""
    measured: dict[str, Tensor]
    """{domain: (samples, length)} for affinity."""
    texts: EvaluationTexts
    blocks: Blocks
    """The retraining corpus."""
    corpus: str
    """Identifies the corpus: its text, order and tokens."""
    fingerprints: dict[str, dict[str, str]]
    """{domain: SHA-256 of its train and test documents}"""
    tasks: TaskSuite = field(default_factory=TaskSuite)
    contamination: dict[str, Any] = field(default_factory=dict)
    """How much of each evaluation set stands in the training text."""

    def identity(self) -> dict[str, Any]:
        """What calibration depends on: model, element type and the tokens themselves."""
        return {
            "model": self.source.fingerprint,
            "dtype": self.source.dtype,
            "tokens": hash_tokens(self.tokens),
        }


# ---------------------------------------------------------------------------------------------------------------- stages


def calibrate(store: Store, inputs: Inputs, *, batch: int, taylor: bool) -> Artifact:
    """Channel statistics of every domain, in one pass over the dense model; Taylor scores take a second one."""

    def compute(directory: Path) -> None:
        statistics = collect_statistics(
            inputs.dense(), inputs.tokens, batch=batch, second_moments=False, inputs=0, taylor=taylor
        )
        for domain, found in statistics.items():
            tensors = {"mean": found.mean, "squared_deviations": found.squared_deviations}
            if found.taylor is not None:
                tensors["taylor"] = found.taylor
            save_file(tensors, directory / f"{domain}.safetensors", metadata={"count": str(found.count)})

    return store.get("statistics", inputs.identity() | ({"taylor": True} if taylor else {}), compute)


def read_statistics(artifact: Artifact, tokens: Mapping[str, Tensor]) -> dict[str, ChannelStatistics]:
    """{domain: statistics} of :func:`calibrate`."""
    found = {}
    for domain, matrix in tokens.items():
        tensors = load_file(artifact.path / f"{domain}.safetensors")
        found[domain] = ChannelStatistics(
            matrix.numel(), tensors["mean"], tensors["squared_deviations"], taylor=tensors.get("taylor")
        )
    return found


def mine(
    store: Store,
    inputs: Inputs,
    statistics: Artifact,
    pruning: PruningConfig,
    *,
    batch: int,
    seed: int,
    only_if_there: bool = False,
) -> Artifact | None:
    """Perplexity of the model pruned on each domain, measured on every domain; none if ``only_if_there`` and it is not."""
    with_bias = pruning.compensation is not Compensation.none

    def compute(directory: Path) -> None:
        found = read_statistics(statistics, inputs.tokens)
        masks = domain_masks(inputs, found, pruning, seed=seed)
        means = {domain: s.mean for domain, s in found.items()} if with_bias else None
        matrix = cross_domain_perplexity(inputs.dense(), inputs.measured, masks, means=means, batch=batch)
        write_json(directory / "matrix.json", {"domains": list(masks), "perplexity": matrix.tolist()})

    depends = matrix_inputs(inputs, statistics, pruning, seed=seed)
    return store.find("matrix", depends) if only_if_there else store.get("matrix", depends, compute)


def matrix_inputs(inputs: Inputs, statistics: Artifact, pruning: PruningConfig, *, seed: int) -> dict[str, Any]:
    """What :func:`mine` depends on."""
    return {
        "statistics": statistics.key,
        "measured": hash_tokens(inputs.measured),
        "width": pruning.width(inputs.source.channels),
        "metric": pruning.score_metric,
        "with_bias": pruning.compensation is not Compensation.none,
        "seed": seed if pruning.metric.value == "random" else None,
    }


def domain_masks(
    inputs: Inputs, statistics: Mapping[str, ChannelStatistics], pruning: PruningConfig, *, seed: int
) -> dict[str, Tensor]:
    """{domain: (L, F) bool}, the channels kept for each domain."""
    return {
        domain: keep_masks(
            inputs.dense(),
            s,
            metric=pruning.score_metric,
            ratio=pruning.ratio,
            width_multiple=pruning.width_multiple,
            seed=seed + number,
        )
        for number, (domain, s) in enumerate(statistics.items())
    }


def compare(
    store: Store, inputs: Inputs, statistics: Artifact, pruning: PruningConfig, measure: Measure, *, seed: int
) -> Artifact:
    """Similarity of every two domains by a measure that needs their statistics alone."""

    def compute(directory: Path) -> None:
        found = read_statistics(statistics, inputs.tokens)
        if measure is Measure.importance:
            scores = [importance_of_layers(inputs.dense(), s, pruning.score_metric, seed=seed) for s in found.values()]
            matrix = importance_similarity(torch.stack(scores))
        else:
            matrix = overlap_similarity(torch.stack(list(domain_masks(inputs, found, pruning, seed=seed).values())))
        write_json(directory / "matrix.json", {"domains": list(found), "similarity": matrix.tolist()})

    depends = matrix_inputs(inputs, statistics, pruning, seed=seed) | {"measure": measure}
    for unused in ("measured", "with_bias"):
        depends.pop(unused)
    return store.get("similarity", depends, compute)


def group(store: Store, matrix: Artifact, config: AffinityConfig, *, experts: int) -> Artifact:
    """Groups of domains by hierarchical clustering of the matrix of :func:`mine` or :func:`compare`."""

    def compute(directory: Path) -> None:
        mined = json.loads((matrix.path / "matrix.json").read_text())
        by_perplexity = "perplexity" in mined
        distance = distances(mined["perplexity"]) if by_perplexity else similarity_distances(mined["similarity"])
        found = cluster_distances(distance, mined["domains"], experts=experts, method=config.linkage)
        write_json(
            directory / "groups.json",
            {
                "groups": found.groups,
                "tree": found.tree.tolist(),
                "cophenetic": found.cophenetic,
                "silhouette": found.silhouette,
            },
        )

    return store.get("groups", {"matrix": matrix.key, "experts": experts, "linkage": config.linkage}, compute)


def build_experts(
    store: Store,
    inputs: Inputs,
    groups: Sequence[Sequence[str]],
    pruning: PruningConfig,
    moe: MoEConfig,
    *,
    batch: int,
    group_samples: int | None,
    seed: int,
) -> Artifact:
    """Experts and routers of every layer, from a second pass over the calibration tokens, layer after layer.

    An interrupted construction goes on from its last whole layer.
    """
    if group_samples is not None and len(groups) == 1:
        group_samples *= moe.experts  # the same text as for groups, of all of them together
    tokens = {str(number): group_tokens(inputs.tokens, group, group_samples) for number, group in enumerate(groups)}
    wants_inputs = moe.router_init is RouterInit.distilled and moe.experts > 1
    clusters = moe.construction is Construction.coactivation and moe.experts > 1
    scales_by_top_k = clusters and pruning.compensation is Compensation.none

    refined = moe.refinement.needs_tokens
    held_out = pruning.ridge is None and pruning.compensation is Compensation.least_squares

    def layers(finished: Sequence[Path]) -> Iterator[ExpertLayer]:
        dense = inputs.dense()
        if refined:
            before = map(read_layer, finished)
            return build_refined_layers(
                dense, list(tokens.values()), pruning, moe, batch=batch, seed=seed, finished=before
            )
        parts = dict(tokens)
        if held_out:  # every fourth sequence chooses the ridge
            parts = {name: matrix[torch.arange(len(matrix)) % 4 != 3] for name, matrix in tokens.items()}
            parts |= {f"{name} held out": matrix[3::4] for name, matrix in tokens.items()}
        statistics = stream_statistics(
            dense,
            parts,
            batch=batch,
            second_moments=pruning.compensation is Compensation.least_squares,
            inputs=-(-moe.distillation.tokens // len(tokens)) if wants_inputs else 0,
            taylor=pruning.metric is Metric.taylor,
            active_channels=moe.active_channels if clusters else 0,
            description=f"building {moe.experts} experts" if moe.experts > 1 else "pruning",
            first_layer=len(finished),
        )
        return build_layers(dense, statistics, pruning, moe, seed=seed, first_layer=len(finished))

    def compute(directory: Path) -> float:
        start = time.monotonic()
        place = store.partial("experts", depends)
        place.mkdir(parents=True, exist_ok=True)
        finished = whole_layers(place)
        before = 0.0
        if finished:
            log.info("experts: going on after layer %d", len(finished))
            with contextlib.suppress(OSError, ValueError):  # cut short: the time is not worth more than the layers
                before = float((place / "seconds").read_text())
        wanted = inputs.source.config.num_hidden_layers
        if len(finished) < wanted:
            numbers = itertools.count(len(finished))  # enumerate would hold a layer while the next is built
            for layer in layers(finished):
                tensors = {name: tensor.cpu().contiguous() for name, tensor in layer.tensors().items()}
                save_file(tensors, place / "unfinished")
                with (place / "unfinished").open("rb") as written:
                    os.fsync(written.fileno())  # or a power cut leaves a file of the right size without its content
                write_json(place / "seconds", before + time.monotonic() - start)
                os.replace(place / "unfinished", place / LAYER_FILE.format(next(numbers)))
                del layer, tensors
        built = whole_layers(place)
        assert len(built) == wanted, f"{len(built)} of {wanted} layers"
        for file in built:  # which stay until the artifact is whole
            try:
                os.link(file, directory / file.name)
            except OSError:  # a file system without links
                shutil.copyfile(file, directory / file.name)
        return before

    construction = plain(moe)
    unused = {
        "noise": True,
        "storage": True,
        "top_k": not (scales_by_top_k or refined),
        "refinement": not refined,
        "distillation": not wants_inputs,
        "active_channels": not clusters,
    }
    for settings in (name for name, without_influence in unused.items() if without_influence):
        construction.pop(settings)
    depends = inputs.identity() | {
        "groups": [list(g) for g in groups],
        "pruning": pruning,
        "moe": construction,
        "seed": seed,
    }
    if group_samples is not None:
        depends["samples"] = [len(matrix) for matrix in tokens.values()]
    if refined and moe.refinement.sequential and inputs.source.dtype != "float32":
        depends["prefix"] = "experts as stored"  # not as they were before they were rounded
    if moe.refinement.start is Start.kmeans and moe.experts > 1:
        depends["numbering"] = "as the layer before"
    artifact = store.get("experts", depends, compute)
    store.forget_partial("experts", depends)
    return artifact


def group_tokens(tokens: Mapping[str, Tensor], group: Sequence[str], samples: int | None) -> Tensor:
    """Calibration sequences of a group, (N, length): all of its domains', or ``samples`` split evenly over them."""
    if samples is None:
        return torch.cat([tokens[domain] for domain in group])
    shares = [samples // len(group) + (number < samples % len(group)) for number in range(len(group))]
    return torch.cat([tokens[domain][:share] for domain, share in zip(group, shares, strict=True)])


LAYER_FILE = "layer_{:03d}.safetensors"


def read_experts(artifact: Artifact) -> Iterator[ExpertLayer]:
    """Layers of :func:`build_experts`, one at a time."""
    return map(read_layer, layer_files(artifact.path))


def read_layer(file: Path) -> ExpertLayer:
    """One layer of :func:`build_experts`."""
    return ExpertLayer(**load_file(file))


def layer_files(directory: Path) -> list[Path]:
    """Files of :func:`build_experts`, in the order of the layers."""
    return sorted(directory.glob("layer_*.safetensors"))


def whole_layers(directory: Path) -> list[Path]:
    """The first layers' files up to the first one that is missing or cut short."""
    found: list[Path] = []
    for number, file in enumerate(layer_files(directory)):
        try:
            with safe_open(file, framework="pt"):  # checks the size of the file against its header
                pass
        except SafetensorError:
            break
        if file.name != LAYER_FILE.format(number):
            break
        found.append(file)
    return found


def measure(
    store: Store,
    name: str,
    depends: Mapping[str, Any],
    texts: EvaluationTexts,
    model: Callable[[], "PreTrainedModel"],
    *,
    batch: int,
    routing: bool,
    tasks: TaskSuite,
) -> Artifact:
    """Perplexities and tasks of one model, and its routing if it has routers."""

    def compute(directory: Path) -> None:
        ready = model()
        found: dict[str, Any] = {"perplexity": evaluate(ready, texts, batch=batch, description=name)}
        if tasks.tasks:
            found["tasks"] = tasks.measure(store, model_key, ready)
        if routing:
            first = next(iter(texts.domains.values()))
            found["routing"] = routing_share(ready, first, batch=batch).summary()
        write_json(directory / "evaluation.json", found)

    model_key = dict(depends)
    windows = {key: hash_tokens({key: matrix}) for key, matrix in texts.all().items()}
    depends = {
        **depends,
        "windows": windows,
        "means_over": [[n, *by] for n, by in texts.domains.items()],
        "routing": routing,
    }
    if tasks.tasks:
        depends["tasks"] = tasks.identity()
    return store.get("evaluation", depends, compute)


def write_on(
    store: Store,
    inputs: Inputs,
    beginnings: Beginnings,
    models: Mapping[str, tuple[Mapping[str, Any], Callable[[], "PreTrainedModel"]]],
) -> list[dict[str, str]]:
    """The same beginnings continued by each model, {name: (what it depends on, how to get it)}, as text."""
    tokenizer, tokens = inputs.tokenizer, beginnings.references.shape[1]
    prompts = hash_tokens({"prompts": beginnings.prompts})

    def text(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    rows = [
        {"domain": domain, "prompt": text(prompt.tolist()), "reference": text(reference.tolist())}
        for domain, prompt, reference in zip(beginnings.domains, beginnings.prompts, beginnings.references, strict=True)
    ]
    for name, (depends, model) in models.items():

        def compute(directory: Path, model: Callable[[], "PreTrainedModel"] = model) -> None:
            ids = continue_greedily(model(), beginnings.prompts, tokens=tokens, end=tokenizer.eos_token_id)
            write_json(directory / "continuations.json", ids)

        artifact = store.get("continuations", {**depends, "prompts": prompts, "tokens": tokens}, compute)
        for row, ids in zip(rows, json.loads((artifact.path / "continuations.json").read_text()), strict=True):
            row[name] = text(ids)
    return rows


# --------------------------------------------------------------------------------------------------------------- the run


def check(config: Config, source: DenseSource) -> None:
    """Everything that can be refused without weights and texts.

    Raises:
        UserError: names the override to change.
    """
    check_devices(config.trainer)
    config.pruning.width(source.channels)
    for name, stage in config.retrain.stages.items():
        check_policy(stage.train, source.config, where=f"retrain.stages.{name}")
    lengths = {
        "calibration_domains.length": [config.calibration_domains.length],
        "retrain.length": [config.retrain.length] if config.retrain.stages else [],
        "eval.lengths": config.eval.lengths,
    }
    check_lengths(lengths, config.eval, source)
    names = domain_names(config.calibration_domains)
    if config.moe.needs_groups:
        require(
            config.moe.experts <= len(names),
            f"moe.experts ({config.moe.experts}) exceeds the number of calibration domains ({len(names)}); lower moe.experts "
            "or add domains",
        )
    check_names(config.eval, names)
    if config.affinity.groups is not None and config.affinity.grouping is Grouping.given:
        unknown = sorted({d for group in config.affinity.groups for d in group} - set(names))
        require(not unknown, f"affinity.groups: {unknown} not among the calibration domains {names}")
    for members in config.affinity.groups or []:
        require(
            bool(set(members) & set(names)),
            f"affinity.groups: none of {members} is a calibration domain here",
        )


def check_lengths(lengths: Mapping[str, Sequence[int]], config: EvalConfig, source: DenseSource) -> None:
    """Refuse sequences that are longer than the model's positions: ``lengths``, and those of ``eval.sets``."""
    positions = int(source.config.max_position_embeddings)
    sets = {f"eval.sets.{name}.lengths": entry.lengths for name, entry in config.sets.items()}
    for where, values in {**lengths, **sets}.items():
        for length in values:
            require(length <= positions, f"{where} ({length}) exceeds the {positions} positions of {source.path}")


def check_names(config: EvalConfig, domains: Sequence[str]) -> None:
    """Refuse evaluation sets with names of domains: both would be one key of the results."""
    taken = sorted(set(config.sets) & set(domains))
    require(not taken, f"eval.sets: {taken} are names of calibration domains; rename the sets")


@dataclass(slots=True)
class Run:
    """Results as they come, on disk after every stage."""

    directory: Path
    main_process: bool
    results: dict[str, Any]
    loggers: list[Any] = field(default_factory=list)

    def stage(
        self,
        name: str,
        evaluation: Artifact | None,
        *,
        made: Artifact | None = None,
        seconds: float | None = None,
        tokens: int = 0,
        trained: int = 0,
    ) -> None:
        """Record one finished stage: the artifact that made its model, and its evaluation (the main process has one)."""
        if evaluation is None:
            return
        source = made or evaluation
        found = json.loads((evaluation.path / "evaluation.json").read_text())
        self.results["stages"].append(
            {
                "name": name,
                "tokens": tokens,
                "seconds": source.seconds if seconds is None else seconds,
                "reused": source.reused,
                "trained": trained,
                "perplexity": found["perplexity"],
            }
        )
        if "tasks" in found:
            self.results["stages"][-1] |= task_results(found["tasks"], self.results["evaluation"]["tasks"])
        if "routing" in found:
            self.results["routing"] = found["routing"]
        log.info("%s: perplexity %.2f", name, found["perplexity"]["mean"])
        values = {f"eval/{name}/{key}": value for key, value in found["perplexity"].items()}
        for task, metrics in found.get("tasks", {}).items():
            values |= {f"eval/{name}/{task}/{key}": value for key, value in metrics.items()}
        for logger in self.loggers:
            log_evaluation(logger, values, tokens=sum(stage["tokens"] for stage in self.results["stages"]))
        self.write()

    def write(self) -> None:
        """Write ``results.json``."""
        if self.main_process:
            write_json(self.directory / "results.json", self.results)


def task_results(tasks: Mapping[str, Metrics], described: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage records of its tasks: all metrics, and the mean of one a task, the chosen or first one."""
    values = {
        task: headline(metrics, described.get(task, {}).get("metric")) for task, metrics in tasks.items() if metrics
    }
    for task, (metric, value) in values.items():
        log.info("%s: %s %.4f", task, metric, value)
    return {"tasks": dict(tasks), "tasks_mean": sum(value for _, value in values.values()) / max(len(values), 1)}


def run(config: Config, directory: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The whole method.

    Args:
        directory: of this run's outputs.
        overrides: of the command line, for the record.

    Returns:
        What ``results.json`` holds.

    Raises:
        UserError: something that the user can mend.
    """
    start = time.monotonic()
    quiet_libraries()
    main_process = process_rank() == 0
    if not main_process:
        logging.getLogger("dive").setLevel(logging.WARNING)
    source = locate_dense(config.model.path, config.model.revision, dtype=config.model.dtype.value)
    check(config, source)
    device = resolve_device(config.model.device)
    store = Store(Path(config.store))
    planned = plan_here(config, source, device, directory)
    meter = Meter(planned)
    store.finished = meter.record
    if main_process:
        show(*plan_headline(planned))
    inputs = prepare(config, source, device, store)
    texts, tokenizer, dense = inputs.texts, inputs.tokenizer, inputs.dense
    record = Run(directory, main_process, new_results(config, inputs, overrides, device))
    wandb = None
    if main_process:
        directory.mkdir(parents=True, exist_ok=True)
        write_config(config, directory)
        if config.logger.wandb is not None:
            wandb = build_wandb(config.logger.wandb, directory, plain(config), store.root)
        record.loggers = build_evaluation_loggers(config.logger, directory, wandb)

    streamed = config.model.load is Load.streamed
    if streamed:
        record.results["evaluation"]["skipped"] = "model.load=streamed: no model is whole in memory"
        log.info("model.load=streamed: nothing is evaluated; measure the export by `python -m dive.evaluate`")

    def measured_as(name: str, depends: Mapping[str, Any], model: Dense, *, routing: bool) -> Artifact | None:
        if not main_process or streamed:
            return None  # the others wait in the next stage's training
        return measure(store, name, depends, texts, model, batch=config.eval.batch, routing=routing, tasks=inputs.tasks)

    model_key = {"model": source.fingerprint, "dtype": source.dtype}
    record.stage("dense", measured_as("dense", model_key, model=dense, routing=False))

    groups, clustering = choose_groups(config, store, inputs)
    record.results["groups"] = groups if config.moe.needs_groups or config.moe.experts == 1 else []
    if clustering is not None:
        record.results["affinity"] = {k: v for k, v in clustering.items() if k != "groups"}

    built = partial(
        build_experts,
        store,
        inputs,
        pruning=config.pruning,
        batch=config.calibration_domains.batch,
        group_samples=config.calibration_domains.group_samples,
        seed=config.seed,
    )
    one_shot = config.moe.experts == 1 and not config.moe.refinement.needs_tokens
    one = partial(built, [list(inputs.tokens)], moe=MoEConfig(experts=1, top_k=1))
    if streamed and not one_shot:  # the single pruned expert is there to be measured
        pruned = experts = built(groups, moe=config.moe)
    else:
        pruned = one()
        experts = pruned if one_shot else built(groups, moe=config.moe)

    def assembled(layers: Artifact, top_k: int) -> "PreTrainedModel":
        return assemble(dense(), read_experts(layers), top_k=top_k)

    def stored(layers: Artifact, top_k: int) -> "PreTrainedModel":  # as it is retrained and measured
        build = assemble_shared if config.moe.storage is Storage.shared else assemble
        return build(dense(), read_experts(layers), top_k=top_k)

    record.stage(
        "pruned",
        measured_as("pruned", {"experts": pruned.key, "top_k": 1}, model=partial(assembled, pruned, 1), routing=False),
        made=pruned,
    )
    top_k = config.moe.top_k
    reconstructed = partial(stored, experts, top_k)
    record.stage(
        "reconstructed",
        measured_as("reconstructed", {"experts": experts.key, "top_k": top_k}, model=reconstructed, routing=True),
        made=experts,
    )
    record.results["overlap"] = expert_overlap(experts)
    record.results["parameters"] = parameters(config, source)

    finished: list[RetrainedStage] = []
    for name in config.retrain.stages:
        log.info("stage %s", name)
        finished.append(
            retrain_stage(
                store,
                name,
                config,
                reconstructed,
                dense,
                finished,
                inputs.blocks,
                depends={"experts": experts.key, "top_k": top_k, "corpus": inputs.corpus},
                directory=directory,
                wandb=wandb,
                main_process=main_process,
            )
        )
        latest = finished[-1]
        record.stage(
            name,
            measured_as(
                name,
                {"stage": latest.artifact.key},
                model=partial(retrained_model, reconstructed, config, list(finished)),
                routing=True,
            ),
            made=latest.artifact,
            seconds=latest.seconds,
            tokens=latest.tokens,
            trained=latest.trained,
        )
    record.results["parameters"]["trained"] = len_of_union(finished)
    record.results["timings"] = {s["name"]: s["seconds"] for s in record.results["stages"]}
    record.results["timings"] |= {"reconstructed": experts.seconds} if streamed else {}
    record.results["timings"]["total"] = time.monotonic() - start
    if main_process:
        draw(record, clustering, finished)
        exporting = time.monotonic()
        if streamed:
            record.results["export"] = export_streamed(dense(), experts, tokenizer, record, config, source)
        else:
            materialised = partial(assembled, experts, top_k)
            final = retrained_model(materialised, config, finished) if finished else materialised()
            final_key = {"stage": finished[-1].artifact.key} if finished else {"experts": experts.key, "top_k": top_k}
            beginnings = choose_beginnings(config, texts, groups)
            if beginnings is not None:
                models = {"dense": (model_key, dense), "moe": (final_key, lambda: final)}
                record.results["generations"] = write_on(store, inputs, beginnings, models)
            exporting = time.monotonic()
            record.results["export"] = export(final, tokenizer, record, config, source)
        meter.exported(Path(record.results["export"]), time.monotonic() - exporting)
        record.results["plan"] = {"planned": planned.summary(), "actual": meter.summary()}
        record.results["timings"]["total"] = time.monotonic() - start
        record.write()
        report = None if streamed else write_report(directory)  # nothing was measured that it could show
        if wandb is not None:
            if report is not None:
                wandb.experiment.save(str(report), base_path=str(directory), policy="now")
            log_results(wandb.experiment, record.results, directory)
            run_at = wandb.experiment.url or f"wandb sync {Path(wandb.experiment.dir).parent}"  # no address offline
            close(wandb.experiment, plain(config), store.root)
        show(*([] if streamed else [stage_table(record.results)]), *task_tables(record.results))
        show(
            *([] if report is None else [f"report   {report}"]),
            f"results  {directory / 'results.json'}",
            f"model    {record.results['export']}",
            f"plots    {directory / 'plots'}",
            *([] if wandb is None else [f"wandb    {run_at}"]),
            f"planned  {meter.line()}",
        )
    return record.results


# -------------------------------------------------------------------------------------------------------------- its parts


def plan_here(config: Config, source: DenseSource, device: torch.device, directory: Path) -> Plan:
    """What the run will cost on this machine.

    Raises:
        UserError: ``model.architecture`` is another model's, or there is no room.
    """
    architecture = read_architecture(source.config.to_dict())
    check_architecture(config.model, architecture)
    planned = plan(config, architecture, device="cpu" if device.type == "cpu" else None)
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    refuse(planned, here(Path(config.store), directory, device=memory))
    return planned


def prepare(config: Config, source: DenseSource, device: torch.device, store: Store) -> Inputs:
    """Read tasks and texts and cut these into tokens; the weights wait until they are needed.

    Raises:
        UserError: a task or text is missing, unreadable, too short, or on both sides of the split.
    """
    tokenizer = load_tokenizer(source)
    tasks = load_tasks(config.eval, tokenizer)
    tokenize = partial(document_tokens, tokenizer)
    domains = load_domains(config.calibration_domains, seed=config.seed)
    train = {domain.name: domain.train for domain in domains}
    local = local_documents(config.retrain.corpus)
    texts = evaluation_texts(config.eval, domains, tokenize, corpus=local)
    tokens, measured = sample_tokens(config, train, tokenize)
    blocks, corpus = corpus_blocks(config.retrain, train, local, tokenize, seed=config.seed)

    @cache
    def dense() -> "PreTrainedModel":
        dtype = source.dtype if source.dtype == "auto" else getattr(torch, source.dtype)
        load = load_streamed if config.model.load is Load.streamed else load_weights
        return load(source, dtype=dtype, device=device)

    return Inputs(
        source=source,
        dense=dense,
        tokenizer=tokenizer,
        tokens=tokens,
        measured=measured,
        texts=texts,
        blocks=blocks,
        corpus=corpus,
        fingerprints={d.name: {"train": fingerprint(d.train), "test": fingerprint(d.test)} for d in domains},
        tasks=tasks,
        contamination=contamination(store, config.eval, domains, texts, tasks, corpus=local),
    )


def sample_tokens(
    config: Config, texts: Mapping[str, Sequence[str]], tokenize: Tokenize
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """({domain: calibration tokens}, {domain: tokens to measure affinity on})."""
    domains = config.calibration_domains
    calibration, measured = {}, {}
    for name, documents in texts.items():
        calibration[name], measured[name] = calibration_tokens(
            documents,
            tokenize,
            samples=domains.samples,
            measured=config.affinity.samples if config.mines else 0,
            length=domains.length,
            seed=config.seed,
            domain=name,
            repeat=domains.repeat,
        )
    return calibration, measured


def choose_groups(config: Config, store: Store, inputs: Inputs) -> tuple[list[list[str]], dict[str, Any] | None]:
    """The domains of each expert; and for mined ones the matrix, tree and quality of the clustering.

    ``agreement`` is the adjusted Rand index between these groups and those by the other measures. The cheap ones are always
    computed, cross-domain perplexity only if it is the measure.
    """
    names = list(inputs.tokens)
    grouping, experts = config.affinity.grouping, config.moe.experts
    if not config.moe.needs_groups:
        return [names], None
    if grouping is Grouping.random:
        return random_groups(names, experts=experts, seed=config.seed), None
    if grouping is not Grouping.mined:
        assert config.affinity.groups is not None
        groups = [[d for d in members if d in names] for members in config.affinity.groups]
        absent = [d for members in config.affinity.groups for d in members if d not in names]
        unused = [d for d in names if d not in {d for members in groups for d in members}]
        if absent or unused:
            log.warning("affinity.groups: not here %s; in no group %s", absent or "none", unused or "none")
        return groups, None
    taylor = config.pruning.metric is Metric.taylor
    statistics = calibrate(store, inputs, batch=config.calibration_domains.batch, taylor=taylor)
    chosen = config.affinity.measure
    matrices = {
        measure: mine(
            store,
            inputs,
            statistics,
            config.pruning,
            batch=config.calibration_domains.batch,
            seed=config.seed,
            only_if_there=chosen is not measure,
        )
        if measure is Measure.perplexity
        else compare(store, inputs, statistics, config.pruning, measure, seed=config.seed)
        for measure in Measure
    }
    clustered = {
        measure: json.loads((group(store, matrix, config.affinity, experts=experts).path / "groups.json").read_text())
        for measure, matrix in matrices.items()
        if matrix is not None
    }
    found = clustered[chosen]
    agreement = {
        measure.value: adjusted_rand_index(found["groups"], other["groups"])
        for measure, other in clustered.items()
        if measure is not chosen
    }
    matrix = matrices[chosen]
    assert matrix is not None
    measured = json.loads((matrix.path / "matrix.json").read_text())
    seconds = statistics.seconds + matrix.seconds
    return found["groups"], found | measured | {"measure": chosen.value, "agreement": agreement, "seconds": seconds}


def expert_overlap(experts: Artifact) -> list[list[float]]:
    """Jaccard index of the channels of every pair of experts, averaged over layers."""
    masks = []
    for file in layer_files(experts.path):
        with safe_open(file, framework="pt") as tensors:  # the masks alone: the weights may be tens of gigabytes
            masks.append(tensors.get_tensor("masks"))
    overlap: list[list[float]] = mask_overlap(torch.stack(masks)).tolist()
    return overlap


def parameters(config: Config, source: DenseSource) -> dict[str, int]:
    """Parameters of the dense model, and total and active ones of the Mixture-of-Experts."""
    dense, _ = count_parameters(source.config)
    width = config.pruning.width(source.channels)
    total, active = count_parameters(
        moe_config(source.config, width=width, experts=config.moe.experts, top_k=config.moe.top_k)
    )
    pruned, _ = count_parameters(moe_config(source.config, width=width, experts=1, top_k=1))
    return {"dense": dense, "pruned": pruned, "total": total, "active": active, "trained": 0}


def len_of_union(stages: Sequence[RetrainedStage]) -> int:
    """Distinct parameters that any stage trained."""
    sizes: dict[str, int] = {}
    for stage in stages:
        sizes |= stage.sizes
    return sum(sizes.values())


def choose_beginnings(config: Config, texts: EvaluationTexts, groups: Sequence[Sequence[str]]) -> Beginnings | None:
    """Beginnings of test texts: of the first domain of each group, then of the second, and so on."""
    dealt = [domain for row in itertools.zip_longest(*groups) for domain in row if domain is not None]
    domains = list(dict.fromkeys(dealt))[: config.eval.generations]
    first = next(iter(texts.domains.values()))
    return Beginnings.of(first, domains, tokens=config.eval.generated_tokens) if domains else None


def draw(record: Run, clustering: dict[str, Any] | None, stages: Sequence[RetrainedStage]) -> None:
    """Write the plots."""
    folder = record.directory / "plots"
    if clustering is not None and len(clustering["domains"]) > 1:
        by_perplexity = "perplexity" in clustering
        plots.affinity_heatmap(
            affinity(clustering["perplexity"]) if by_perplexity else np.array(clustering["similarity"]),
            np.array(clustering["tree"]),
            clustering["domains"],
            record.results["groups"],
            folder / "affinity.png",
        )
    if record.results["routing"]:
        plots.routing_heatmap(record.results["routing"]["share"], record.results["groups"], folder / "routing.png")
    if stages:
        plots.loss_curves({stage.name: stage.curve for stage in stages}, folder / "loss.png")


def export(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    record: Run,
    config: Config,
    source: DenseSource,
) -> str:
    """Write the reloadable directory; with expert biases a custom one, under a name that says so."""
    card = model_card(record.results, plain(config), config.model.path)
    if not has_expert_bias(model):
        dtype = export_dtype(config, source)
        return str(save(model, tokenizer, record.directory / "checkpoint", card=card, dtype=dtype))
    log.warning(
        "pruning.compensation=bias: experts have biases, which no stock class has a place for; the export is a custom "
        "directory that only dive.load_with_expert_bias reads"
    )
    return str(save_with_expert_bias(model, tokenizer, record.directory / "checkpoint_with_expert_bias", card=card))


def export_streamed(
    dense: "PreTrainedModel",
    experts: Artifact,
    tokenizer: "PreTrainedTokenizerBase",
    record: Run,
    config: Config,
    source: DenseSource,
) -> str:
    """Write the reloadable directory, a layer after the other."""
    written = save_streamed(
        dense,
        read_experts(experts),
        tokenizer,
        record.directory / "checkpoint",
        top_k=config.moe.top_k,
        card=model_card(record.results, plain(config), config.model.path),
        dtype=export_dtype(config, source),
    )
    return str(written)


def export_dtype(config: Config, source: DenseSource) -> torch.dtype | None:
    """Element type of the export; none for that of the weights in memory."""
    wanted = config.model.export_dtype
    if wanted is None:
        return None
    if wanted is Dtype.auto:
        stored: torch.dtype | None = source.config.dtype
        return stored
    named: torch.dtype = getattr(torch, wanted.value)
    return named


def new_results(config: Config, inputs: Inputs, overrides: Sequence[str], device: torch.device) -> dict[str, Any]:
    """``results.json`` before the first stage: what was run, on what."""
    return {
        "run": {
            "command": ["python", "-m", "dive.train", *overrides],
            "seed": config.seed,
            "device": str(device),
            "versions": package_versions(inputs.tasks),
            "fingerprints": {
                "model": inputs.source.fingerprint,
                "domains": inputs.fingerprints,
                "retraining_corpus": inputs.corpus,
            },
            "samples": {
                "calibration": {name: list(matrix.shape) for name, matrix in inputs.tokens.items()},
                "evaluation": {name: list(matrix.shape) for name, matrix in inputs.texts.all().items()},
            },
            "config": plain(config),
        },
        "evaluation": {
            "domains": list(inputs.tokens),
            "sets": list(inputs.texts.sets),
            "tasks": inputs.tasks.describe(),
        },
        "contamination": inputs.contamination,
        "groups": [],
        "parameters": {},
        "stages": [],
        "routing": {},
        "timings": {},
    }


def package_versions(tasks: TaskSuite) -> dict[str, str]:
    """{package: version} of everything that figures depend on."""
    packages = (
        "dive-moe",
        "torch",
        "transformers",
        "tokenizers",
        "lightning",
        "datasets",
        "safetensors",
        "numpy",
        "scipy",
        *(["lm-eval"] if tasks.tasks else []),
    )
    return {"python": platform.python_version()} | {name: _version(name) for name in packages}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def write_config(config: Config, directory: Path) -> None:
    """The composed configuration, as ``--config-dir`` of a later run can take it."""
    from omegaconf import OmegaConf

    OmegaConf.save(OmegaConf.create(plain(config)), directory / "config.yaml")


def hash_tokens(tokens: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values."""
    digest = hashlib.sha256()
    for name, matrix in tokens.items():
        digest.update(f"{name}{tuple(matrix.shape)}".encode())
        digest.update(matrix.contiguous().numpy().tobytes())
    return digest.hexdigest()
