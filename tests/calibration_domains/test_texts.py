"""Domains from wherever the configuration says, fingerprints, and the check for leaks."""

import json
from pathlib import Path

import pytest

from dive.calibration_domains.embedded import embedded_texts
from dive.calibration_domains.texts import (
    DomainTexts,
    domain_names,
    fingerprint,
    load_domains,
    load_eval_set,
    refuse_overlap,
    training_documents,
)
from dive.config import CalibrationDomainsConfig, EvalSetConfig, HubTextConfig, TextSource
from dive.errors import UserError
from dive.model.chat import Conversation


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Domains law (jsonl, its text in ``body``) and code (txt and jsonl)."""
    for domain in ("law", "code"):
        (tmp_path / domain).mkdir()
    for split in ("train", "test"):
        rows = [json.dumps({"body": f"law {split} {i}"}) for i in range(3)]
        (tmp_path / "law" / f"{split}.jsonl").write_text("\n".join(rows))
    (tmp_path / "code" / "train.txt").write_text("code train")
    (tmp_path / "code" / "test.jsonl").write_text(json.dumps({"body": "code test"}))
    return tmp_path


def local(corpus: Path, **overrides: object) -> CalibrationDomainsConfig:
    settings = {"source": TextSource.local, "path": str(corpus), "text_field": "body", **overrides}
    return CalibrationDomainsConfig(**settings)  # type: ignore[arg-type]


def test_local_domains(corpus: Path) -> None:
    code = DomainTexts("code", ["code train"], ["code test"])
    law = DomainTexts("law", [f"law train {i}" for i in range(3)], [f"law test {i}" for i in range(3)])
    assert load_domains(local(corpus), seed=0) == [code, law]
    assert load_domains(local(corpus, domains=["law"]), seed=0) == [law]
    assert domain_names(local(corpus)) == ["code", "law"]
    assert domain_names(local(corpus, domains=["law", "code"])) == ["law", "code"]


def test_folders_without_training_text_are_named(corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    (corpus / "drafts").mkdir()
    (corpus / "drafts" / "test.jsonl").write_text(json.dumps({"body": "draft"}))
    with caplog.at_level("WARNING", logger="dive"):
        assert [found.name for found in load_domains(local(corpus), seed=0)] == ["code", "law"]
    assert caplog.messages == [
        f"calibration_domains.path={corpus}: no domains, as they have no train.jsonl, train.txt or train.parquet: drafts"
    ]
    caplog.clear()
    load_domains(local(corpus, domains=["law"]), seed=0)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "texts"}, r"calibration_domains\.path has no say .*source=embedded; set calibration_domains=local"),
        ({"text_field": "body"}, r"calibration_domains\.text_field has no say .*source=embedded"),
        ({"hub": {"a": HubTextConfig(path="x/y")}}, r"calibration_domains\.hub has no say .*source=embedded"),
        (
            {"source": TextSource.local, "path": "texts", "hub": {"a": HubTextConfig(path="x/y")}},
            r"hub has no say .*local",
        ),
        (
            {"source": TextSource.hub, "path": "texts", "hub": {"a": HubTextConfig(path="x/y")}},
            r"path has no say .*source=hub",
        ),
    ],
)
def test_what_another_source_is_given_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=f"^.*{message}"):
        CalibrationDomainsConfig(**{"source": TextSource.embedded, **settings})  # type: ignore[arg-type]


def test_a_domain_without_test_text(corpus: Path) -> None:
    (corpus / "law" / "test.jsonl").unlink()
    with pytest.raises(UserError, match=r"no test\.jsonl"):
        load_domains(local(corpus), seed=0)


def test_embedded_domains() -> None:
    config = CalibrationDomainsConfig(source=TextSource.embedded, domains=["calendar", "arithmetic"])
    found = load_domains(config, seed=0)
    assert [domain.name for domain in found] == domain_names(config) == ["calendar", "arithmetic"]
    for domain in found:
        assert domain.train
        assert domain.test
        assert not set(domain.train) & set(domain.test)


def test_hub_domains_by_name_alone() -> None:
    config = CalibrationDomainsConfig(
        source=TextSource.hub, hub={"a": HubTextConfig(path="x/y"), "b": HubTextConfig(path="x/z")}
    )
    assert domain_names(config) == ["a", "b"]


def test_evaluation_sets(corpus: Path) -> None:
    local = EvalSetConfig(path=str(corpus / "law" / "test.jsonl"), text_field="body")
    assert load_eval_set("law", local) == ["law test 0", "law test 1", "law test 2"]
    embedded = EvalSetConfig(source=TextSource.embedded, path="arithmetic")
    assert load_eval_set("sums", embedded) == embedded_texts(["arithmetic"])["arithmetic"][1]


def test_evaluation_sets_name_their_override(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^eval\.sets\.w: .*none\.txt cannot be read"):
        load_eval_set("w", EvalSetConfig(path=str(tmp_path / "none.txt")))
    with pytest.raises(UserError, match="not among the embedded"):
        load_eval_set("w", EvalSetConfig(source=TextSource.embedded, path="nothing"))


def test_fingerprints_follow_the_documents_and_where_they_end() -> None:
    prints = {
        fingerprint(documents) for documents in (["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"], ["ab", "c", ""], [])
    }
    assert len(prints) == 6
    assert fingerprint(["ab", "c"]) == fingerprint(iter(["ab", "c"]))
    assert len(fingerprint(["\ud800"])) == 64  # half a surrogate pair, as found in web text


LONG = "The quick brown fox jumps over the lazy dog."


@pytest.mark.parametrize("leak", [LONG, LONG.upper(), f"  {LONG}\n", LONG.replace(" ", "\n\t")])
def test_evaluation_text_in_the_training_text_is_refused(leak: str) -> None:
    seen = training_documents(["something else altogether, of some length", leak])
    with pytest.raises(
        UserError, match=r"^law: 1 of 2 evaluation documents stand in the calibration or retraining text"
    ):
        refuse_overlap(seen, [LONG, "new text"], name="law")


@pytest.mark.parametrize("train", [[], ["Yes."], [f"{LONG} And more."], [LONG[:-5]]])
def test_other_or_short_text_is_accepted(train: list[str]) -> None:
    refuse_overlap(training_documents(train), [LONG, "Yes."], name="law")


def test_a_conversation_is_not_the_text_that_it_is_written_as() -> None:
    text = "<s>user: hi</s>"
    written = [[text], [Conversation(text, ["hi"])], [Conversation(text, ["h", "i"])], [text, "hi"]]
    assert len({fingerprint(documents) for documents in written}) == 4
    assert fingerprint(written[1]) == fingerprint([Conversation(text, ["hi"])])


def test_conversations_overlap_by_what_is_spoken_in_them() -> None:
    spoken = ["how long does a lease of a flat last?", "a year"]
    training = training_documents([Conversation("be kind. " + spoken[0], spoken), Conversation("x" * 40, ["hi"])])
    refuse_overlap(training, [Conversation("x" * 40, ["hi"])], name="short")  # too short to tell
    with pytest.raises(UserError, match="1 of 2 evaluation documents"):
        refuse_overlap(training, [Conversation("another prompt", spoken), "other"], name="same")
