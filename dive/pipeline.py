"""The stages of an experiment, in order. Data flows one way, and every result rests in the store.

texts → tokens → channel statistics → cross-domain perplexity → groups → experts → Mixture-of-Experts → retrained stages
→ evaluation → export.

Each stage is a function of its slice of the configuration and of what came before; it returns an artifact.
"""

import hashlib
import itertools
import json
import logging
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dive.affinity.grouping import affinity, cluster_domains, random_groups
from dive.affinity.matrix import cross_domain_perplexity
from dive.artifacts import Artifact, Store, plain, write_json
from dive.calibration_domains.sampling import Tokenize, calibration_tokens
from dive.calibration_domains.texts import domain_names, fingerprint, load_domains
from dive.config import (
    AffinityConfig,
    Compensation,
    Config,
    Construction,
    Grouping,
    MoEConfig,
    PruningConfig,
    RouterInit,
    require,
)
from dive.eval.evaluate import EvaluationTexts, evaluate, evaluation_texts
from dive.eval.generation import Beginnings, continue_greedily
from dive.eval.routing import mask_overlap, routing_share
from dive.export import has_expert_bias, save, save_with_expert_bias
from dive.logger.build import build_wandb
from dive.model.families import count_parameters, moe_config
from dive.model.load import (
    DenseSource,
    document_tokens,
    load_tokenizer,
    load_weights,
    locate_dense,
    resolve_device,
)
from dive.moe.reconstruct import ExpertLayer, assemble, build_layers
from dive.progress import quiet_libraries
from dive.pruning.calibrate import collect_statistics, stream_statistics
from dive.pruning.metrics import keep_masks
from dive.pruning.statistics import ChannelStatistics
from dive.report import plots
from dive.report.run import write_report
from dive.report.text import model_card, show, stage_table
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

    def identity(self) -> dict[str, Any]:
        """What calibration depends on: model, element type and the tokens themselves."""
        return {
            "model": self.source.fingerprint,
            "dtype": self.source.dtype,
            "tokens": hash_tokens(self.tokens),
        }


# ---------------------------------------------------------------------------------------------------------------- stages


def calibrate(store: Store, inputs: Inputs, *, batch: int) -> Artifact:
    """Channel statistics of every domain, in one pass over the dense model."""

    def compute(directory: Path) -> None:
        statistics = collect_statistics(inputs.dense(), inputs.tokens, batch=batch, second_moments=False, inputs=0)
        for domain, found in statistics.items():
            tensors = {"mean": found.mean, "squared_deviations": found.squared_deviations}
            save_file(tensors, directory / f"{domain}.safetensors", metadata={"count": str(found.count)})

    return store.get("statistics", inputs.identity(), compute)


def read_statistics(artifact: Artifact, tokens: Mapping[str, Tensor]) -> dict[str, ChannelStatistics]:
    """{domain: statistics} of :func:`calibrate`."""
    found = {}
    for domain, matrix in tokens.items():
        tensors = load_file(artifact.path / f"{domain}.safetensors")
        found[domain] = ChannelStatistics(matrix.numel(), tensors["mean"], tensors["squared_deviations"])
    return found


def mine(
    store: Store, inputs: Inputs, statistics: Artifact, pruning: PruningConfig, *, batch: int, seed: int
) -> Artifact:
    """Perplexity of the model pruned on each domain, measured on every domain."""
    with_bias = pruning.compensation is not Compensation.none

    def compute(directory: Path) -> None:
        found = read_statistics(statistics, inputs.tokens)
        masks = {
            domain: keep_masks(
                inputs.dense(),
                s,
                metric=pruning.metric,
                ratio=pruning.ratio,
                width_multiple=pruning.width_multiple,
                seed=seed + number,
            )
            for number, (domain, s) in enumerate(found.items())
        }
        means = {domain: s.mean for domain, s in found.items()} if with_bias else None
        matrix = cross_domain_perplexity(inputs.dense(), inputs.measured, masks, means=means, batch=batch)
        write_json(directory / "matrix.json", {"domains": list(masks), "perplexity": matrix.tolist()})

    width = pruning.width(inputs.source.channels)
    depends = {"statistics": statistics.key, "measured": hash_tokens(inputs.measured), "width": width}
    depends |= {
        "metric": pruning.metric,
        "with_bias": with_bias,
        "seed": seed if pruning.metric.value == "random" else None,
    }
    return store.get("matrix", depends, compute)


def group(store: Store, matrix: Artifact, config: AffinityConfig, *, experts: int) -> Artifact:
    """Groups of domains by hierarchical clustering of the mined matrix."""

    def compute(directory: Path) -> None:
        mined = json.loads((matrix.path / "matrix.json").read_text())
        found = cluster_domains(mined["perplexity"], mined["domains"], experts=experts, method=config.linkage)
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
    """Experts and routers of every layer, from a second pass over the calibration tokens, layer after layer."""
    tokens = {str(number): group_tokens(inputs.tokens, group, group_samples) for number, group in enumerate(groups)}
    wants_inputs = moe.router_init is RouterInit.distilled and moe.experts > 1

    def compute(directory: Path) -> None:
        statistics = stream_statistics(
            inputs.dense(),
            tokens,
            batch=batch,
            second_moments=pruning.compensation is Compensation.least_squares,
            inputs=-(-moe.distillation.tokens // len(tokens)) if wants_inputs else 0,
            description=f"building {moe.experts} experts" if moe.experts > 1 else "pruning",
        )
        for number, layer in enumerate(build_layers(inputs.dense(), statistics, pruning, moe, seed=seed)):
            tensors = {name: tensor.cpu().contiguous() for name, tensor in layer.tensors().items()}
            save_file(tensors, directory / f"layer_{number:03d}.safetensors")

    construction = plain(moe)
    for settings in ("top_k", "noise", *(() if wants_inputs else ("distillation",))):
        construction.pop(settings)  # of no influence on the experts
    depends = inputs.identity() | {
        "groups": [list(g) for g in groups],
        "pruning": pruning,
        "moe": construction,
        "seed": seed,
    }
    return store.get("experts", depends, compute)


def group_tokens(tokens: Mapping[str, Tensor], group: Sequence[str], samples: int | None) -> Tensor:
    """Calibration sequences of a group, (N, length): all of its domains', or ``samples`` split evenly over them."""
    if samples is None:
        return torch.cat([tokens[domain] for domain in group])
    shares = [samples // len(group) + (number < samples % len(group)) for number in range(len(group))]
    return torch.cat([tokens[domain][:share] for domain, share in zip(group, shares, strict=True)])


def read_experts(artifact: Artifact) -> Iterator[ExpertLayer]:
    """Layers of :func:`build_experts`, one at a time."""
    for file in layer_files(artifact):
        yield ExpertLayer(**load_file(file))


def layer_files(artifact: Artifact) -> list[Path]:
    """Files of :func:`build_experts`, in the order of the layers."""
    return sorted(artifact.path.glob("layer_*.safetensors"))


def measure(
    store: Store,
    name: str,
    depends: Mapping[str, Any],
    texts: EvaluationTexts,
    model: Callable[[], "PreTrainedModel"],
    *,
    batch: int,
    routing: bool,
) -> Artifact:
    """Perplexities of one model, and its routing if it has routers."""

    def compute(directory: Path) -> None:
        ready = model()
        found: dict[str, Any] = {"perplexity": evaluate(ready, texts, batch=batch, description=name)}
        if routing:
            first = next(iter(texts.domains.values()))
            found["routing"] = routing_share(ready, first, batch=batch).summary()
        write_json(directory / "evaluation.json", found)

    windows = {key: hash_tokens({key: matrix}) for key, matrix in texts.all().items()}
    depends = {**depends, "windows": windows, "headline": list(texts.domains), "routing": routing}
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
    positions = int(source.config.max_position_embeddings)
    lengths = {
        "calibration_domains.length": [config.calibration_domains.length],
        "retrain.length": [config.retrain.length] if config.retrain.stages else [],
        "eval.lengths": config.eval.lengths,
    } | {f"eval.sets.{name}.lengths": entry.lengths for name, entry in config.eval.sets.items()}
    for where, values in lengths.items():
        for length in values:
            require(length <= positions, f"{where} ({length}) exceeds the {positions} positions of {source.path}")

    names = domain_names(config.calibration_domains)
    if config.moe.construction is Construction.dive:
        require(
            config.moe.experts <= len(names),
            f"moe.experts ({config.moe.experts}) exceeds the number of calibration domains ({len(names)}); lower moe.experts "
            "or add domains",
        )
    taken = sorted(set(config.eval.sets) & set(names))
    require(not taken, f"eval.sets: {taken} are names of calibration domains; rename the sets")
    if config.affinity.groups is not None and config.affinity.grouping is Grouping.given:
        unknown = sorted({d for group in config.affinity.groups for d in group} - set(names))
        require(not unknown, f"affinity.groups: {unknown} not among the calibration domains {names}")
    for members in config.affinity.groups or []:
        require(
            bool(set(members) & set(names)),
            f"affinity.groups: none of {members} is a calibration domain here",
        )


KEPT_OF_CLUSTERING = ("domains", "perplexity", "tree", "cophenetic", "silhouette", "seconds")
"""What the results say of the mined affinity."""


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
        if "routing" in found:
            self.results["routing"] = found["routing"]
        log.info("%s: perplexity %.2f", name, found["perplexity"]["mean"])
        for logger in self.loggers:
            summary = {f"eval/{name}/{key}": value for key, value in found["perplexity"].items()}
            logger.experiment.summary.update(summary)
        self.write()

    def write(self) -> None:
        """Write ``results.json``."""
        if self.main_process:
            write_json(self.directory / "results.json", self.results)


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
    inputs = prepare(config, source, device)
    texts, tokenizer, dense = inputs.texts, inputs.tokenizer, inputs.dense
    record = Run(directory, main_process, new_results(config, inputs, overrides, device))
    wandb = None
    if main_process:
        directory.mkdir(parents=True, exist_ok=True)
        write_config(config, directory)
        if config.logger.wandb is not None:
            wandb = build_wandb(config.logger.wandb, directory, plain(config))
            record.loggers.append(wandb)

    def measured_as(name: str, depends: Mapping[str, Any], model: Dense, *, routing: bool) -> Artifact | None:
        if not main_process:
            return None  # the others wait in the next stage's training
        return measure(store, name, depends, texts, model, batch=config.eval.batch, routing=routing)

    model_key = {"model": source.fingerprint, "dtype": source.dtype}
    record.stage("dense", measured_as("dense", model_key, model=dense, routing=False))

    groups, clustering = choose_groups(config, store, inputs)
    record.results["groups"] = groups
    if clustering is not None:
        record.results["affinity"] = {key: clustering[key] for key in KEPT_OF_CLUSTERING}

    built = partial(
        build_experts,
        store,
        inputs,
        pruning=config.pruning,
        batch=config.calibration_domains.batch,
        group_samples=config.calibration_domains.group_samples,
        seed=config.seed,
    )
    pruned = built([list(inputs.tokens)], moe=MoEConfig(experts=1, top_k=1))
    experts = pruned if config.moe.experts == 1 else built(groups, moe=config.moe)

    def assembled(layers: Artifact, top_k: int) -> "PreTrainedModel":
        return assemble(dense(), read_experts(layers), top_k=top_k)

    record.stage(
        "pruned",
        measured_as("pruned", {"experts": pruned.key, "top_k": 1}, model=partial(assembled, pruned, 1), routing=False),
        made=pruned,
    )
    top_k = config.moe.top_k
    reconstructed = partial(assembled, experts, top_k)
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
    record.results["timings"]["total"] = time.monotonic() - start
    if main_process:
        draw(record, clustering, finished)
        final = retrained_model(reconstructed, config, finished) if finished else reconstructed()
        final_key = {"stage": finished[-1].artifact.key} if finished else {"experts": experts.key, "top_k": top_k}
        beginnings = choose_beginnings(config, texts, groups)
        if beginnings is not None:
            models = {"dense": (model_key, dense), "moe": (final_key, lambda: final)}
            record.results["generations"] = write_on(store, inputs, beginnings, models)
        record.results["export"] = export(final, tokenizer, record, config)
        record.results["timings"]["total"] = time.monotonic() - start
        record.write()
        report = write_report(directory)
        if wandb is not None:
            wandb.experiment.save(str(report), base_path=str(directory), policy="now")
            wandb.experiment.finish()
        show(stage_table(record.results))
        show(
            f"report   {report}",
            f"results  {directory / 'results.json'}",
            f"model    {record.results['export']}",
            f"plots    {directory / 'plots'}",
        )
    return record.results


# -------------------------------------------------------------------------------------------------------------- its parts


def prepare(config: Config, source: DenseSource, device: torch.device) -> Inputs:
    """Read the texts and cut them into tokens; the weights wait until they are needed.

    Raises:
        UserError: a text is missing, unreadable, too short, or on both sides of the split.
    """
    tokenizer = load_tokenizer(source)
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
        return load_weights(source, dtype=dtype, device=device)

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
    )


def sample_tokens(
    config: Config, texts: Mapping[str, Sequence[str]], tokenize: Tokenize
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """({domain: calibration tokens}, {domain: tokens to measure affinity on})."""
    domains = config.calibration_domains
    mines = config.affinity.grouping is Grouping.mined and config.moe.construction is Construction.dive
    calibration, measured = {}, {}
    for name, documents in texts.items():
        calibration[name], measured[name] = calibration_tokens(
            documents,
            tokenize,
            samples=domains.samples,
            measured=config.affinity.samples if mines else 0,
            length=domains.length,
            seed=config.seed,
            domain=name,
            repeat=domains.repeat,
        )
    return calibration, measured


def choose_groups(config: Config, store: Store, inputs: Inputs) -> tuple[list[list[str]], dict[str, Any] | None]:
    """The domains of each expert; and for mined ones the matrix, tree and quality of the clustering."""
    names = list(inputs.tokens)
    grouping, experts = config.affinity.grouping, config.moe.experts
    if config.moe.construction is not Construction.dive or experts == 1:
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
    statistics = calibrate(store, inputs, batch=config.calibration_domains.batch)
    matrix = mine(store, inputs, statistics, config.pruning, batch=config.calibration_domains.batch, seed=config.seed)
    clustered = json.loads((group(store, matrix, config.affinity, experts=experts).path / "groups.json").read_text())
    mined = {"seconds": statistics.seconds + matrix.seconds}
    return clustered["groups"], clustered | mined | json.loads((matrix.path / "matrix.json").read_text())


def expert_overlap(experts: Artifact) -> list[list[float]]:
    """Jaccard index of the channels of every pair of experts, averaged over layers."""
    masks = []
    for file in layer_files(experts):
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
        plots.affinity_heatmap(
            affinity(clustering["perplexity"]),
            np.array(clustering["tree"]),
            clustering["domains"],
            record.results["groups"],
            folder / "affinity.png",
        )
    if record.results["routing"]:
        plots.routing_heatmap(record.results["routing"]["share"], record.results["groups"], folder / "routing.png")
    if stages:
        plots.loss_curves({stage.name: stage.curve for stage in stages}, folder / "loss.png")


def export(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", record: Run, config: Config) -> str:
    """Write the reloadable directory; with expert biases a custom one, under a name that says so."""
    card = model_card(record.results, plain(config), config.model.path)
    if not has_expert_bias(model):
        return str(save(model, tokenizer, record.directory / "checkpoint", card=card))
    log.warning(
        "pruning.compensation=bias: experts have biases, which no stock class has a place for; the export is a custom "
        "directory that only dive.load_with_expert_bias reads"
    )
    return str(save_with_expert_bias(model, tokenizer, record.directory / "checkpoint_with_expert_bias", card=card))


def new_results(config: Config, inputs: Inputs, overrides: Sequence[str], device: torch.device) -> dict[str, Any]:
    """``results.json`` before the first stage: what was run, on what."""
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
    )
    return {
        "run": {
            "command": ["python", "-m", "dive.train", *overrides],
            "seed": config.seed,
            "device": str(device),
            "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
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
        "evaluation": {"domains": list(inputs.tokens), "sets": list(inputs.texts.sets)},
        "groups": [],
        "parameters": {},
        "stages": [],
        "routing": {},
        "timings": {},
    }


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
