"""What every stage starts from: texts cut into tokens, the corpus, tasks; and what can be refused before any of it is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dive.affinity.groups import Groups
from dive.calibration_domains.amounts import check_amounts
from dive.calibration_domains.generated import read_text, write_text
from dive.calibration_domains.sampling import Tokenize, calibration_tokens
from dive.calibration_domains.texts import DomainTexts, domain_names, fingerprint, load_domains
from dive.config import Config, Dtype, EvalConfig, EvaluateConfig, Grouping, Load, StageText
from dive.errors import require
from dive.eval.contamination import contamination
from dive.eval.evaluate import EvaluationTexts, evaluation_texts
from dive.eval.generation import Beginnings
from dive.eval.tasks import TaskSuite, load_tasks
from dive.model.chat import conversation
from dive.model.families import check_chosen, form_of
from dive.model.load import DenseSource, document_tokens, load_tokenizer, tokens_of_documents
from dive.model.recipe import Dense
from dive.moe.implementation import check_aligned, check_kernel
from dive.results import GENERATED
from dive.retrain.corpus import Corpus, Generated, local_documents, open_corpora
from dive.retrain.freezing import check_policy
from dive.store import HasStages, HasStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True, kw_only=True)
class Inputs:
    """What a model is measured on."""

    tokenizer: "PreTrainedTokenizerBase"
    texts: EvaluationTexts
    tasks: TaskSuite
    fingerprints: dict[str, dict[str, str]]
    """{domain: {"train" | "test": SHA-256 of its documents}}"""
    contamination: dict[str, Any]
    """How much of each evaluation set stands in the training text."""


@dataclass(slots=True, kw_only=True)
class TrainingInputs(Inputs):
    """The same, and what experts are built and retrained on."""

    tokens: dict[str, Tensor]
    """{domain: (samples, length) int64} for calibration."""
    generated: Tensor | None
    """(samples, length) int64 that the dense model wrote, for calibration beside the domains."""
    measured: dict[str, Tensor]
    """{domain: (samples, length) int64} for affinity."""
    corpora: dict[StageText, Corpus]
    """For retraining."""

    def calibration(self) -> dict[str, Tensor]:
        """All calibration sequences, (samples, length) int64 of each domain and of what the model wrote."""
        return self.tokens | ({} if self.generated is None else {GENERATED: self.generated})


def prepare(run: HasStages, config: Config, dense: Dense) -> TrainingInputs:
    """Read tasks and texts and cut these into tokens; let the dense model write the text that is asked of it.

    Raises:
        UserError: a task or text is missing, unreadable, too short, or on both sides of the split.
    """
    source = dense.source
    tokenizer = load_tokenizer(source)
    tasks = load_tasks(config.eval, tokenizer)
    tokenize = partial(document_tokens, tokenizer)
    chat = partial(conversation, tokenizer, where=source.where)
    domains = load_domains(config.calibration_domains, seed=config.seed, chat=chat)
    train = {domain.name: domain.train for domain in domains}
    local = local_documents(config.retrain.corpus, chat=chat)
    texts = evaluation_texts(config.eval, domains, tokenize, corpus=local, chat=chat)
    tokens, measured = sample_tokens(config, train, tokenize)
    generated = written_by(run, config, dense, tokenizer)
    return TrainingInputs(
        tokenizer=tokenizer,
        texts=texts,
        tasks=tasks,
        fingerprints=fingerprints(domains),
        contamination=contamination(run, config.eval, domains, texts, tasks, corpus=local),
        tokens=tokens,
        generated=generated,
        measured=measured,
        corpora=open_corpora(
            *(config.retrain, train, local, partial(tokens_of_documents, tokenizer)),
            seed=config.seed,
            chat=chat,
            generated=None if generated is None else Generated(generated, share=generated_share(config)),
        ),
    )


def written_by(run: HasStages, config: Config, dense: Dense, tokenizer: "PreTrainedTokenizerBase") -> Tensor | None:
    """Calibration sequences (N, length) int64 that the dense model writes; none if none are asked for."""
    wanted = config.calibration_domains
    if not wanted.generated:
        return None
    with run.stage(GENERATED):
        text = write_text(run, tokenizer, model=dense, samples=wanted.generated, length=wanted.length, seed=config.seed)
    return read_text(text)


def generated_share(config: Config) -> int:
    """Blocks of generated text for each block of a domain: as in calibration, and one at least."""
    return max(round(config.calibration_domains.generated / config.calibration_domains.samples), 1)


def prepare_evaluation(run: HasStore, config: EvaluateConfig, source: DenseSource) -> Inputs:
    """The same for measuring a finished model.

    Raises:
        UserError: a task or text is missing, unreadable or too short.
    """
    tokenizer = load_tokenizer(source)
    tasks = load_tasks(config.eval, tokenizer)
    wanted = config.calibration_domains
    chat = partial(conversation, tokenizer, where=source.where)
    domains = load_domains(wanted, seed=config.seed, chat=chat) if wanted is not None else []
    texts = evaluation_texts(config.eval, domains, partial(document_tokens, tokenizer), chat=chat)
    return Inputs(
        tokenizer=tokenizer,
        texts=texts,
        tasks=tasks,
        fingerprints=fingerprints(domains),
        contamination=contamination(run, config.eval, domains, texts, tasks),
    )


def fingerprints(domains: Sequence[DomainTexts]) -> dict[str, dict[str, str]]:
    """{domain: {"train" | "test": SHA-256 of its documents}}"""
    return {domain.name: {"train": fingerprint(domain.train), "test": fingerprint(domain.test)} for domain in domains}


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


def tokens_of(
    tokens: Mapping[str, Tensor],
    groups: Sequence[Sequence[str]],
    *,
    generated: Tensor | None = None,
    group_samples: int | None,
    experts: int,
) -> list[Tensor]:
    """Calibration sequences of each group, (N, length): all of its domains', or ``group_samples`` split evenly over them.

    One group of all domains has as many sequences as groups of ``experts`` experts would have together. Each group has the
    ``generated`` ones (N, length) beside its own.
    """
    beside = [] if generated is None else [generated]
    if group_samples is None:
        return [torch.cat([*(tokens[domain] for domain in group), *beside]) for group in groups]
    wanted = group_samples * experts if len(groups) == 1 else group_samples
    found = []
    for group in groups:
        shares = [wanted // len(group) + (number < wanted % len(group)) for number in range(len(group))]
        taken = [tokens[domain][:share] for domain, share in zip(group, shares, strict=True)]
        found.append(torch.cat([*taken, *beside]))
    return found


def beginnings(config: EvalConfig, texts: EvaluationTexts, groups: Groups) -> Beginnings | None:
    """Beginnings of test texts to be continued: of the first domain of each group, then of the second, and so on."""
    domains = groups.dealt()[: config.generations]
    if not domains:
        return None
    return Beginnings.of(next(iter(texts.domains.values())), domains, tokens=config.generated_tokens)


# ---------------------------------------------------------------------------------------------------------------- checks


def check(config: Config, source: DenseSource) -> None:
    """Everything that can be refused without weights and texts.

    Raises:
        UserError: names the override to change.
    """
    resume = config.retrain.resume
    require(
        resume is None or resume == "last" or Path(resume).expanduser().is_file(),
        f"retrain.resume={resume}: no such checkpoint; `last` finds the newest one of a stage by itself, null starts anew",
    )
    check_chosen(form_of(config, source.config.model_type), source.config, config.model.path)
    config.moe.widths(config.pruning, source.channels)
    check_experts(config, source)
    for name, stage in config.retrain.stages.items():
        check_policy(stage.train, source.config, where=f"retrain.stages.{name}")
    lengths = {
        "calibration_domains.length": [config.calibration_domains.length],
        "retrain.length": [config.retrain.length] if config.retrain.stages else [],
        "eval.lengths": config.eval.lengths,
    }
    check_lengths(lengths, config.eval, source)
    names = domain_names(config.calibration_domains)
    check_amounts(config, names)
    check_names(config.eval, names)
    check_groups(config, names)
    check_generated(config, names)


def check_evaluation(config: EvaluateConfig, source: DenseSource) -> None:
    """The same for measuring a finished model.

    Raises:
        UserError: names the override to change.
    """
    wanted = config.calibration_domains
    check_lengths({"eval.lengths": config.eval.lengths if wanted is not None else []}, config.eval, source)
    check_names(config.eval, domain_names(wanted) if wanted is not None else [])


def check_experts(config: Config, source: DenseSource) -> None:
    """Refuse an experts implementation that cannot compute this model's experts, or that is not there."""
    if not config.retrain.stages:
        return
    wanted, precision = config.trainer.experts, config.trainer.precision
    width, _ = config.moe.widths(config.pruning, source.channels)
    stated = config.model.dtype or Dtype.float32
    dtype: torch.dtype = source.config.dtype if stated is Dtype.auto else getattr(torch, stated.value)
    if precision.endswith("16-true"):
        dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float16
    check_aligned(wanted, hidden=source.config.hidden_size, width=width, dtype=dtype)
    check_kernel(wanted, activation=source.config.hidden_act)


def check_groups(config: Config, names: Sequence[str]) -> None:
    """Refuse more experts than domains, and groups of other domains."""
    if config.grouping is not None:
        require(
            config.moe.experts <= len(names),
            f"moe.experts ({config.moe.experts}) exceeds the number of calibration domains ({len(names)}); lower moe.experts "
            "or add domains",
        )
    if config.affinity.groups is not None and config.affinity.grouping is Grouping.given:
        unknown = sorted({d for group in config.affinity.groups for d in group} - set(names))
        require(not unknown, f"affinity.groups: {unknown} not among the calibration domains {names}")
    for members in config.affinity.groups or []:
        require(bool(set(members) & set(names)), f"affinity.groups: none of {members} is a calibration domain here")


def check_generated(config: Config, names: Sequence[str]) -> None:
    """Refuse text of the model's own where nothing has a place for it."""
    if not config.calibration_domains.generated:
        return
    wanted = f"calibration_domains.generated={config.calibration_domains.generated}"
    require(
        config.grouping is None,
        f"{wanted}: it belongs to no group of domains, and experts begin with groups here; set affinity=default and moe=default, "
        "or calibration_domains.generated=0",
    )
    require(
        config.model.load is not Load.streamed,
        f"{wanted}: model.load=streamed would read every weight for each token that it writes; set model.load=full, or "
        "calibration_domains.generated=0",
    )
    require(GENERATED not in names, f"{wanted}: a calibration domain is called {GENERATED!r} as well; rename it")


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
