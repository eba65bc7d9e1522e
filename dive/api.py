"""The method without configuration files: what ``dive.load_tokens`` and ``dive.reconstruct`` are."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum
from functools import cache, partial
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from dive.calibration_domains.sampling import evaluation_windows
from dive.calibration_domains.texts import load_domains
from dive.cli import composed
from dive.config import Compensation, Config, Metric, RouterInit, TextSource
from dive.errors import UserError, require
from dive.inputs import sample_tokens
from dive.model.chat import conversation
from dive.model.families import check_chosen, form_of
from dive.model.load import document_tokens
from dive.moe.assemble import assemble
from dive.moe.build import build_layers
from dive.pruning.statistics import ChannelStatistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

E = TypeVar("E", bound=Enum)


def load_tokens(
    tokenizer: "PreTrainedTokenizerBase",
    overrides: Sequence[str] = (),
    *,
    path: str | PathLike[str] | None = None,
    domains: Sequence[str] | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int | None = None,
    split: Literal["train", "test"] = "train",
) -> dict[str, Tensor]:
    """Read the text of each domain and cut it into tokens.

    Args:
        tokenizer: of the dense model.
        overrides: of the command line, such as ``["calibration_domains=paper"]``.
        path: directory with ``<domain>/{train,test}.jsonl|txt|parquet``; the texts that come with the package if None.
        domains: names of the domains to read; all if None.
        samples: sequences per domain; of the test split at most so many, from the start.
        length: tokens per sequence.
        seed: seed of the random crops.
        split: ``train`` to calibrate on, as random crops; ``test`` to measure on, as windows that do not overlap.

    Returns:
        {domain: (samples, length) int64}

    Raises:
        UserError: a domain is unknown, unreadable, empty, or has less text than is asked for.
    """
    require(split in ("train", "test"), f"split={split!r}: choose one of ['train', 'test']")
    config = _composed(tuple(overrides))
    stated = {"path": None if path is None else fspath(path), "samples": samples, "length": length}
    names = None if domains is None else list(domains)
    source = None if path is None else TextSource.local
    settings = replace(config.calibration_domains, **_stated({**stated, "domains": names, "source": source}))
    config = replace(config, calibration_domains=settings, **_stated({"seed": seed}))
    chat, tokenize = partial(conversation, tokenizer), partial(document_tokens, tokenizer)
    texts = load_domains(settings, seed=config.seed, chat=chat)
    if split == "train":
        return sample_tokens(config, {domain.name: domain.train for domain in texts}, tokenize)[0]
    cut = partial(evaluation_windows, tokenize=tokenize, length=settings.length, windows=settings.samples)
    return {domain.name: cut(domain.test, name=domain.name) for domain in texts}


def reconstruct(
    model: "PreTrainedModel",
    groups: Mapping[str, Tensor] | Sequence[Tensor] | Sequence[ChannelStatistics],
    overrides: Sequence[str] = (),
    *,
    ratio: float | None = None,
    experts: int | None = None,
    top_k: int | None = None,
    metric: str | None = None,
    compensation: str | None = None,
    router_init: str | None = None,
    width_multiple: int | None = None,
    seed: int | None = None,
) -> "PreTrainedModel":
    """Build the Mixture-of-Experts.

    What is not said here is as on the command line. Only statistics are another matter: they make one expert a group, as the
    paper does, with ``moe=plain`` and ``pruning.metric=wifv``.

    Args:
        model: dense model.
        groups: what experts are built from.

            - {domain: tokens (N, T) int64}: all text together, which each layer divides among the experts itself.
            - A list of such matrices: an expert begins with each.
            - A list of statistics over all layers, of :func:`dive.collect_statistics`: an expert is pruned on each. The
              statistics of a group of domains are the sum of theirs.
        overrides: of the command line, such as ``["moe.refined.steps=0"]`` or ``["moe=coactivation"]``.
        ratio: share of every FFN's channels that each expert loses, in (0, 1).
        experts: how many; as many as there are groups, where there are any.
        top_k: experts that each token is sent to.
        metric: see :class:`dive.config.Metric`.
        compensation: ``least_squares``, ``bias`` or ``none``.
        router_init: ``distilled`` or ``random``, from statistics.
        width_multiple: the kept width is rounded to this multiple.
        seed: seed of everything that is drawn at random.

    Returns:
        The Mixture-of-Experts: the stock class, with routers of ours until it is saved.

    Raises:
        UserError: the settings contradict each other, or the statistics lack what they need.
    """
    require(len(groups) > 0, "groups is empty")
    matrices = [torch.cat(list(groups.values()))] if isinstance(groups, Mapping) else groups
    from_statistics = any(isinstance(group, ChannelStatistics) for group in matrices)
    config = _composed(("moe=plain", "pruning.metric=wifv", *overrides) if from_statistics else tuple(overrides))
    pruning = {
        "ratio": ratio,
        "metric": None if metric is None else _chosen(Metric, "metric", metric),
        "compensation": None if compensation is None else _chosen(Compensation, "compensation", compensation),
        "width_multiple": width_multiple,
    }
    moe = {
        "experts": len(groups) if experts is None and not isinstance(groups, Mapping) else experts,
        "top_k": top_k,
    }
    plain = config.moe.plain
    if router_init is not None:
        if plain is None:
            raise UserError("router_init goes with moe=plain, which statistics mean; name another in overrides")
        plain = replace(plain, router_init=_chosen(RouterInit, "router_init", router_init))
    config = replace(
        config,
        pruning=replace(config.pruning, **_stated(pruning)),
        moe=replace(config.moe, plain=plain, **_stated(moe)),
        **_stated({"seed": seed}),
    )
    form = form_of(config, model.config.model_type)
    check_chosen(form, model.config, model.config.name_or_path or "the given one")
    layers = build_layers(
        model, matrices, config.pruning, config.moe, batch=config.calibration_domains.batch, seed=config.seed
    )
    return assemble(model, layers, top_k=config.moe.top_k, form=form)


@cache
def _composed(overrides: tuple[str, ...]) -> Config:
    return composed(overrides)


def _stated(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _chosen(choices: type[E], name: str, value: str) -> E:
    names = [choice.value for choice in choices]
    require(value in names, f"{name}={value!r}: choose one of {names}")
    return choices(value)
