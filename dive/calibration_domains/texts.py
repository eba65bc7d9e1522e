"""The texts of each domain, from wherever the configuration says."""

import hashlib
import itertools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dive.calibration_domains.local import domain_directories, passed_over, read_documents, split_file
from dive.config import CalibrationDomainsConfig, EvalSetConfig, HubTextConfig, TextSource
from dive.errors import UserError
from dive.model.chat import Chat, Conversation, passages
from dive.store import identity

log = logging.getLogger(__name__)

log = logging.getLogger(__name__)

HUB_DOCUMENTS = 50_000
"""Documents read of each hub data set at most; the largest have hundreds of millions."""


@dataclass(slots=True)
class DomainTexts:
    """Documents of one domain."""

    name: str
    train: list[str]
    """For calibration and retraining."""
    test: list[str]
    """For evaluation alone."""


def domain_names(config: CalibrationDomainsConfig) -> list[str]:
    """Names of the domains, without reading their texts.

    Raises:
        UserError: a domain is unknown.
    """
    if config.source is TextSource.embedded:
        from dive.calibration_domains.embedded import DOMAINS

        return list(config.domains or DOMAINS)
    if config.source is TextSource.local:
        assert config.path is not None
        return list(domain_directories(config.path, config.domains, where="calibration_domains"))
    return list(config.domains or config.hub)


def load_domains(config: CalibrationDomainsConfig, *, seed: int, chat: Chat | None = None) -> list[DomainTexts]:
    """Texts of every domain, train and test.

    Args:
        seed: of the order in which hub data sets are read.
        chat: what makes documents of lists of messages; there may be none without it.

    Raises:
        UserError: a domain is unknown, unreadable or empty.
    """
    where = "calibration_domains"
    if config.source is TextSource.embedded:
        from dive.calibration_domains.embedded import embedded_texts

        return [DomainTexts(name, *splits) for name, splits in embedded_texts(config.domains).items()]
    if config.source is TextSource.local:
        assert config.path is not None
        others = passed_over(config.path) if config.domains is None else []
        if others:
            log.warning(
                "%s.path=%s: no domains, as they have no train.jsonl, train.txt or train.parquet: %s",
                *(where, config.path, ", ".join(others)),
            )
        return [
            DomainTexts(
                name,
                *(
                    read_documents(
                        split_file(directory, split, where=where), field=config.text_field, where=where, chat=chat
                    )
                    for split in ("train", "test")
                ),
            )
            for name, directory in domain_directories(config.path, config.domains, where=where).items()
        ]
    return [
        DomainTexts(
            name,
            train=hub_documents(config.hub[name], "train", where=f"{where}.hub.{name}", seed=seed, chat=chat),
            test=hub_documents(config.hub[name], "test", where=f"{where}.hub.{name}", seed=None, chat=chat),
        )
        for name in (config.domains or config.hub)
    ]


def hub_documents(
    source: HubTextConfig,
    which: Literal["train", "test"],
    *,
    where: str,
    seed: int | None,
    keep_empty: bool = False,
    chat: Chat | None = None,
) -> list[str]:
    """Documents of the ``train`` or ``test`` split of a hub data set, at most :data:`HUB_DOCUMENTS`.

    Args:
        seed: of the order in which they are read; their own order if none.
        keep_empty: keep blank documents, which count where a text is joined from its lines.
        chat: as in :func:`load_domains`.

    Raises:
        UserError: it cannot be reached, or holds no text.
    """
    from dive.calibration_domains.hub import hub_texts

    texts = hub_texts(source, which, where=where, seed=seed, keep_empty=keep_empty, chat=chat)
    return list(itertools.islice(texts, HUB_DOCUMENTS))


def load_eval_set(name: str, config: EvalSetConfig, *, chat: Chat | None = None) -> list[str]:
    """Documents of a named evaluation set, blank ones included where it comes from the hub.

    Args:
        chat: as in :func:`load_domains`.

    Raises:
        UserError: it cannot be read.
    """
    where = f"eval.sets.{name}"
    if config.source is TextSource.hub:
        assert config.hub is not None
        return hub_documents(config.hub, "test", where=f"{where}.hub", seed=None, keep_empty=True, chat=chat)
    assert config.path is not None
    if config.source is TextSource.embedded:
        from dive.calibration_domains.embedded import embedded_texts

        return embedded_texts([config.path])[config.path][1]
    return read_documents(Path(config.path).expanduser(), field=config.text_field, where=where, chat=chat)


def fingerprint(documents: Iterable[str]) -> str:
    """SHA-256 over the documents in order; a conversation is none of the text that it is written as."""
    digest = hashlib.sha256()
    for document in documents:
        encoded = document.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
        if isinstance(document, Conversation):  # makes other tokens; no text is as long as this
            digest.update(b"\xff" * 8 + fingerprint(document.spoken).encode())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Documents:
    """Documents as an input of a step."""

    items: Sequence[str]


@identity.register
def _(value: Documents) -> str:
    return fingerprint(value.items)


def training_documents(documents: Iterable[str]) -> frozenset[str]:
    """Documents that a model may have seen, for :func:`refuse_overlap`: without regard to case and white space.

    Those under 32 characters are left out: they are too short to tell.
    """
    return frozenset(text for document in documents if len(text := _normal(document)) >= 32)


def refuse_overlap(training: frozenset[str], test: Sequence[str], *, name: str) -> None:
    """Refuse evaluation on documents that calibration or retraining may see, compared whole.

    Args:
        training: of :func:`training_documents`.

    Raises:
        UserError: at least one document of ``test`` stands in the training text.
    """
    inside = sum(_normal(document) in training for document in test)
    if inside:
        raise UserError(
            f"{name}: {inside} of {len(test)} evaluation documents stand in the calibration or retraining text as well; take "
            "them out, leave the domain out by calibration_domains.domains, or accept it by eval.allow_overlap=true"
        )


def _normal(document: str) -> str:
    return " ".join(" ".join(passages(document)).casefold().split())
