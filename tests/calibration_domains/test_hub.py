"""Templates, and data sets read by ``datasets`` itself from files made here."""

import gzip
import json
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerFast

from dive import connection
from dive.calibration_domains import hub
from dive.calibration_domains.hub import hub_texts, render
from dive.cli import CONF
from dive.config import HubTextConfig
from dive.connection import hub_answers
from dive.errors import UserError
from dive.model.chat import Conversation, conversation

WHERE = "calibration_domains.hub.toy"


@pytest.fixture(autouse=True)
def no_network_and_empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing answers at the hub's address, and the caches are the test's own."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    monkeypatch.setattr(connection, "getproxies", dict)
    hub_answers.cache_clear()
    yield
    hub_answers.cache_clear()


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(str(path))


def rows_of(*texts: str) -> list[dict[str, Any]]:
    return [{"text": text} for text in texts]


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A data set of two configurations, described by a card as on the hub."""
    root = tmp_path / "toy"
    write_parquet(root / "red" / "train-0.parquet", rows_of("r0", "r1", "r2", "r3"))
    write_parquet(root / "red" / "test-0.parquet", rows_of("t0", "t1"))
    write_parquet(root / "blue" / "train-0.parquet", rows_of("b0"))
    (root / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: red\n  data_files:\n"
        "  - {split: train, path: red/train-*}\n  - {split: test, path: red/test-*}\n"
        "- config_name: blue\n  data_files:\n  - {split: train, path: blue/train-*}\n---\n"
    )
    return root


# ---------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("streaming", [False, True])
def test_both_splits_of_a_configuration(toy: Path, streaming: bool) -> None:
    source = HubTextConfig(path=str(toy), config="red", test="test", streaming=streaming)
    assert list(hub_texts(source, "train", where=WHERE)) == ["r0", "r1", "r2", "r3"]
    assert list(hub_texts(source, "test", where=WHERE)) == ["t0", "t1"]
    blue = HubTextConfig(path=str(toy), config="blue", streaming=streaming)
    assert list(hub_texts(blue, "train", where=WHERE)) == ["b0"]


def test_a_slice_of_a_split(toy: Path) -> None:
    source = HubTextConfig(path=str(toy), config="red", train="train[1:]", test="train[:1]")
    assert list(hub_texts(source, "train", where=WHERE)) == ["r1", "r2", "r3"]
    assert list(hub_texts(source, "test", where=WHERE)) == ["r0"]


@pytest.mark.parametrize("streaming", [False, True])
def test_some_files_instead_of_a_whole_split(tmp_path: Path, streaming: bool) -> None:
    root = tmp_path / "large"
    write_jsonl(root / "en" / "train.0.json.gz", rows_of("first"))
    write_jsonl(root / "en" / "train.1.json.gz", rows_of("second"))
    write_jsonl(root / "en" / "validation.0.json.gz", rows_of("v0", "v1", "v2"))
    source = HubTextConfig(
        path=str(root),
        data_files="en/train.0.json.gz",
        test="validation" if streaming else "validation[:2]",
        test_data_files="en/validation.0.json.gz",
        streaming=streaming,
    )
    assert list(hub_texts(source, "train", where=WHERE)) == ["first"]
    assert list(hub_texts(source, "test", where=WHERE))[:2] == ["v0", "v1"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_seed_gives_an_order_that_repeats(toy: Path, streaming: bool) -> None:
    write_parquet(toy / "red" / "train-0.parquet", rows_of(*(f"r{i}" for i in range(50))))
    source = HubTextConfig(path=str(toy), config="red", streaming=streaming)
    plain = list(hub_texts(source, "train", where=WHERE))
    shuffled = list(hub_texts(source, "train", where=WHERE, seed=1))
    assert shuffled != plain
    assert sorted(shuffled) == sorted(plain)
    assert list(hub_texts(source, "train", where=WHERE, seed=1)) == shuffled
    assert list(hub_texts(source, "train", where=WHERE, seed=2)) != shuffled


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_of_conversations(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast, streaming: bool) -> None:
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the cat"}]
    write_parquet(tmp_path / "set" / "train.parquet", [{"messages": said, "id": 1}, {"messages": [], "id": 2}])
    source = HubTextConfig(path=str(tmp_path / "set"), template="{messages}", streaming=streaming)
    (found,) = hub_texts(source, "train", where=WHERE, chat=partial(conversation, chat_tokenizer))
    assert isinstance(found, Conversation)
    assert found == "<s>user: hi</s>assistant: the cat</s>"


@pytest.mark.parametrize(
    ("template", "column", "message"),
    [
        ("Talk: {messages}", [{"role": "user", "content": "hi"}], "has to be all there is in the template"),
        ("{messages}{id}", [{"role": "user", "content": "hi"}], "has to be all there is in the template"),
        ("{messages}", [{"from": "human", "value": "hi"}], r"\{messages\}: message 1 needs a text under each"),
    ],
)
def test_conversations_that_do_not_fit(
    chat_tokenizer: PreTrainedTokenizerFast, template: str, column: list[Any], message: str
) -> None:
    chat = partial(conversation, chat_tokenizer)
    with pytest.raises(UserError, match=f"^here: .*{message}"):
        render(template, {"messages": column, "id": 1}, where="here", chat=chat)


def test_empty_texts_and_rows_that_lack_a_value_are_left_out(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"a": "x", "b": ["1"]},
        {"a": " ", "b": [" "]},
        {"a": "y", "b": []},
        {"a": None, "b": ["2"]},
    ]
    write_jsonl(tmp_path / "set" / "train.jsonl", rows)
    source = HubTextConfig(path=str(tmp_path / "set"), template="{a}{b[0]}")
    assert list(hub_texts(source, "train", where=WHERE)) == ["x1"]
    assert list(hub_texts(source, "train", where=WHERE, keep_empty=True)) == ["x1", "  "]


def test_structures_survive_parquet(tmp_path: Path) -> None:
    row = {
        "ctx": "One",
        "label": "1",
        "answers": {"text": ["a", "b"], "start": [0, 1]},
        "p": [["q"], ["r", "s"]],
    }
    write_parquet(tmp_path / "set" / "train.parquet", [row])
    source = HubTextConfig(path=str(tmp_path / "set"), template="{ctx} {answers[text][label]} {p:/}")
    assert list(hub_texts(source, "train", where=WHERE)) == ["One b q/r/s"]


# ------------------------------------------------------------------------------------ without network, errors


def hub_cache(tmp_path: Path, name: str, revision: str = "main") -> Path:
    """The directory where ``hf download`` leaves the files of a data set."""
    folder = tmp_path / "hub" / f"datasets--{name.replace('/', '--')}"
    reference = folder / "refs" / revision
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text("a" * 40)
    return folder / "snapshots" / ("a" * 40)


@pytest.mark.parametrize("streaming", [False, True])
def test_without_network_files_that_hf_download_fetched_are_found(toy: Path, tmp_path: Path, streaming: bool) -> None:
    shutil.copytree(toy, hub_cache(tmp_path, "acme/toy"))
    source = HubTextConfig(path="acme/toy", config="red", streaming=streaming)
    assert list(hub_texts(source, "train", where=WHERE)) == ["r0", "r1", "r2", "r3"]


def test_without_network_a_parquet_revision_is_found(tmp_path: Path) -> None:
    folder = hub_cache(tmp_path, "acme/toy", "refs/convert/parquet")
    write_parquet(folder / "default" / "train" / "0000.parquet", rows_of("a"))
    write_parquet(folder / "default" / "validation" / "0000.parquet", rows_of("b"))
    (folder / "default" / "train" / "index.duckdb").write_bytes(b"\0")
    source = HubTextConfig(path="acme/toy", revision="refs/convert/parquet", test="validation")
    assert list(hub_texts(source, "train", where=WHERE)) == ["a"]
    assert list(hub_texts(source, "test", where=WHERE)) == ["b"]
    with pytest.raises(UserError, match="cannot be reached"):
        hub_texts(HubTextConfig(path="acme/toy"), "train", where=WHERE)


def test_without_network_what_an_earlier_run_prepared_is_found(toy: Path, tmp_path: Path) -> None:
    list(hub_texts(HubTextConfig(path=str(toy), config="red"), "train", where=WHERE))
    (prepared,) = (tmp_path / "datasets").glob("**/dataset_info.json")
    # Where datasets keeps what it prepared from the hub, rather than from a directory.
    shutil.copytree(prepared.parent, tmp_path / "datasets" / "acme___toy" / "red" / "0.0.0" / ("a" * 40))
    source = HubTextConfig(path="acme/toy", config="red")
    assert list(hub_texts(source, "train", where=WHERE)) == ["r0", "r1", "r2", "r3"]


@pytest.mark.parametrize("by_variable", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_without_network_a_missing_data_set_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, streaming: bool, by_variable: bool
) -> None:
    if by_variable:  # HF_HUB_OFFLINE=1
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    source = HubTextConfig(
        path="acme/toy", data_files="en/a.jsonl", revision="refs/convert/parquet", streaming=streaming
    )
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        hub_texts(source, "train", where=WHERE)
    assert time.monotonic() - start < 5
    message = str(caught.value)
    assert message.startswith(f"{WHERE}: data set 'acme/toy'")
    assert str(tmp_path / "hub") in message
    assert "hf download --repo-type dataset acme/toy en/a.jsonl --revision refs/convert/parquet" in message
    assert "HF_HOME" in message
    assert "\n" not in message
    assert datasets.config.HF_HUB_OFFLINE is by_variable


def test_a_directory_that_does_not_exist() -> None:
    with pytest.raises(UserError, match="'/nowhere/at/all' is neither a directory"):
        hub_texts(HubTextConfig(path="/nowhere/at/all"), "train", where=WHERE)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_wrong_split_names_the_splits_and_the_override(toy: Path, streaming: bool) -> None:
    source = HubTextConfig(path=str(toy), config="red", train="dev", test="training", streaming=streaming)
    with pytest.raises(UserError, match=r"calibration_domains\.hub\.toy\.train: .*dev.*\['train', 'test'\]"):
        hub_texts(source, "train", where=WHERE)
    with pytest.raises(UserError, match=r"calibration_domains\.hub\.toy\.test: .*training"):
        hub_texts(source, "test", where=WHERE)


def test_no_test_split() -> None:
    with pytest.raises(UserError, match=r"calibration_domains\.hub\.toy\.test is null"):
        hub_texts(HubTextConfig(path="acme/toy"), "test", where=WHERE)


@pytest.mark.parametrize("config", ["green", None])
def test_a_wrong_configuration_names_the_configurations(toy: Path, config: str | None) -> None:
    with pytest.raises(UserError, match=r"calibration_domains\.hub\.toy\.config: .*'red', 'blue'"):
        hub_texts(HubTextConfig(path=str(toy), config=config), "train", where=WHERE)


def test_a_loading_script_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "old.py").write_text("raise SystemExit\n")
    with pytest.raises(UserError, match=r"calibration_domains\.hub\.toy\.revision=refs/convert/parquet"):
        hub_texts(HubTextConfig(path=str(tmp_path / "old")), "train", where=WHERE)


def test_a_broken_file(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "a"}\n{"text"\n')
    with pytest.raises(UserError, match=r"calibration_domains\.hub\.toy: .*set' cannot be read"):
        hub_texts(HubTextConfig(path=str(tmp_path / "set")), "train", where=WHERE)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (datasets.exceptions.DatasetNotFoundError("Dataset 'acme/toy' doesn't exist."), r"toy\.path and "),
        (ConnectionError("no answer"), "'acme/toy' cannot be read: no answer"),
        (hub._http_error(HfHubHTTPError)("too slow"), "'acme/toy' cannot be read: too slow"),
    ],
)
def test_errors_of_the_hub(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    with pytest.raises(UserError, match=message):
        hub_texts(HubTextConfig(path="acme/toy"), "train", where=WHERE)


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    with pytest.raises(RuntimeError, match="a bug"):
        hub_texts(HubTextConfig(path="acme/toy"), "train", where=WHERE)


def test_a_split_without_any_text(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "set" / "train.jsonl", [{"options": ["a", "b"], "label": -1}])
    source = HubTextConfig(path=str(tmp_path / "set"), template="{options[label]}")
    with pytest.raises(UserError, match=r"no row of .* split 'train'.*toy\.template"):
        list(hub_texts(source, "train", where=WHERE))


def test_a_missing_column_names_the_columns_and_the_override(toy: Path) -> None:
    source = HubTextConfig(path=str(toy), config="red", template="{question}")
    with pytest.raises(UserError, match=r"^calibration_domains\.hub\.toy\.template: .*'question'.*text$"):
        list(hub_texts(source, "train", where=WHERE))


# -------------------------------------------------------------------------------------------------- templates

ROW: dict[str, object] = {
    "q": "Why?",
    "n": 3,
    "yes": True,
    "none": None,
    "empty": [],
    "list": ["a", "b", "c"],
    "nested": [["a", ""], [], ["b"]],
    "struct": {"text": ["x", "y"], "id": "7"},
    "structs": [{"text": "x"}],
    "label": 1,
    "text_label": "2",
    "letter": "C",
    "small_letter": "b",
    "hidden": -1,
    "hidden_text": "",
    "high": 9,
    "word": "entailment",
    "one": "first",
    "two": "second",
    "a-1": 0,
}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{q}", "Why?"),
        ("Q: {q}\nA: {n}", "Q: Why?\nA: 3"),
        ("{yes}", "True"),
        ("{{{q}}}", "{Why?}"),
        ("{struct[id]}", "7"),
        ("{struct[text][0]}", "x"),
        ("{list[2]}", "c"),
        ("{list}", "a b c"),
        ("{list:, }", "a, b, c"),
        ("{list:\n}", "a\nb\nc"),
        ("{nested:/}", "a/b"),
        ("{list[label]}", "b"),
        ("{list[text_label]}", "c"),
        ("{list[letter]}", "c"),
        ("{list[small_letter]}", "b"),
        ("{list[label-1]}", "a"),
        ("{list[a-1]}", "a"),
        ("{struct[text][label]}", "y"),
        ("{one|two[label]}", "second"),
        ("{one|two[text_label-1]}", "second"),
    ],
)
def test_what_a_field_becomes(template: str, text: str) -> None:
    assert render(template, ROW) == text


@pytest.mark.parametrize(
    "template",
    [
        "{none}",
        "{q} {none}",
        "{empty}",
        "{empty[0]}",
        "{list[5]}",
        "{list[hidden]}",
        "{list[hidden_text]}",
        "{list[none]}",
        "{list[high]}",
        "{one|two[hidden]}",
        "{none[0]}",
    ],
)
def test_a_row_that_lacks_a_value_has_no_text(template: str) -> None:
    assert render(template, ROW) is None


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{nothing}", r"eval\.x\.template: \{nothing\} needs a column 'nothing'; the columns are q, n, "),
        ("{list[nothing]}", "needs a column 'nothing'"),
        ("{q|nothing[label]}", "needs a column 'nothing'"),
        ("{struct[nothing]}", "needs a key 'nothing'; the keys are text, id"),
        ("{struct}", "is a structure; choose a key of text, id"),
        ("{structs}", "a list of structures"),
        ("{list[word]}", "word holds 'entailment'"),
        ("{q[0]}", "reaches inside a str"),
        ("{q:, }", "is not a list"),
        ("{q!r}", "is none of"),
        ("{}", "is none of"),
        ("{q|n}", "is none of"),
        ("{q|[label]}", "is none of"),
        ("{q[]}", "is none of|malformed"),
        ("{q.__class__}", "needs a column 'q.__class__'"),
        ("{q", "malformed"),
        ("q}", "malformed"),
    ],
)
def test_a_template_that_does_not_fit(template: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        render(template, ROW, where="eval.x.template")


# ---------------------------------------------------------------------------------------- the paper's domains

PAIR = {
    "text1": "The lamp is lit.",
    "text2": "It is bright.",
    "label": 0,
    "idx": 4,
    "label_text": "entailment",
}
PAIR_TEXT = "The lamp is lit.\nIt is bright."

# A row of each data set, with the columns of its documentation and a text of our own; and what it becomes.
PAPER_ROWS: dict[str, tuple[dict[str, object], str]] = {
    "wikitext2": ({"text": " The ferry left at noon . \n"}, " The ferry left at noon . \n"),
    "c4": (
        {
            "text": "Our shop opens at nine.",
            "timestamp": "2019-04-25T12:00:00Z",
            "url": "https://shop.example",
        },
        "Our shop opens at nine.",
    ),
    "mnli": (PAIR, PAIR_TEXT),
    "qnli": (PAIR, PAIR_TEXT),
    "rte": (PAIR, PAIR_TEXT),
    "qqp": (PAIR, PAIR_TEXT),
    "mrpc": (PAIR, PAIR_TEXT),
    "anli": (
        {
            "uid": "u1",
            "premise": "Mia rows.",
            "hypothesis": "Mia sails.",
            "label": 2,
            "reason": "Oars, no sail.",
        },
        "Mia rows.\nMia sails.\nOars, no sail.",
    ),
    "squad2": (
        {
            "id": "s1",
            "title": "Bridges",
            "context": "The bridge has two arches.",
            "question": "How many towers has it?",
            "answers": {"text": [], "answer_start": []},
        },
        "The bridge has two arches.\nQuestion: How many towers has it?",
    ),
    "boolq": (
        {"question": "is tin a metal", "answer": True, "passage": "Tin is a soft metal."},
        "Tin is a soft metal.\nQuestion: is tin a metal?\nAnswer: True",
    ),
    "piqa": (
        {"goal": "Dry a wet shoe.", "sol1": "Fill it with paper.", "sol2": "Fill it with milk.", "label": 0},
        "Question: Dry a wet shoe.\nAnswer: Fill it with paper.",
    ),
    "drop": (
        {
            "section_id": "d1",
            "query_id": "q1",
            "passage": "The Reds led 7 to 3.",
            "question": "By how many did the Reds lead?",
            "answers_spans": {"spans": ["4"], "types": ["number"]},
        },
        "The Reds led 7 to 3.\nQuestion: By how many did the Reds lead?\nAnswer: 4",
    ),
    "coqa": (
        {
            "id": "c1",
            "source": "example",
            "story": "Ben fed the hens.",
            "questions": {"input_text": ["Who fed them?", "Fed what?"], "turn_id": [1, 2]},
            "answers": {
                "span_start": [0, 4],
                "span_end": [3, 16],
                "span_text": ["Ben", "fed the hens"],
                "input_text": ["Ben", "the hens"],
                "turn_id": [1, 2],
            },
        },
        "Ben fed the hens.\nQuestion: Who fed them?\nAnswer: Ben",
    ),
    "logiqa": (
        {
            "context": "All swifts fly. Pip is a swift.",
            "query": "What follows?",
            "options": ["Pip swims.", "Pip flies.", "Pip sleeps.", "Pip sings."],
            "correct_option": 1,
        },
        "All swifts fly. Pip is a swift.\nQuestion: What follows?\nAnswer: Pip flies.",
    ),
    "record": (
        {
            "passage": "Ana of Porto won the race.",
            "query": "@placeholder was the fastest.",
            "entities": ["Ana", "Porto"],
            "entity_spans": {"text": ["Ana", "Porto"], "start": [0, 7], "end": [3, 12]},
            "answers": ["Ana"],
            "idx": {"passage": 0, "query": 0},
        },
        "Ana of Porto won the race.\nQuestion: @placeholder was the fastest.\nAnswer: Ana",
    ),
    "gsm8k": (
        {"question": "Two bags of 6 figs: how many figs?", "answer": "2*6=<<2*6=12>>12\n#### 12"},
        "Question: Two bags of 6 figs: how many figs?\nAnswer: 2*6=<<2*6=12>>12\n#### 12",
    ),
    "mathqa": (
        {
            "Problem": "what is 5 percent of 40 ?",
            "Rationale": "0.05 * 40 = 2 . answer : b",
            "options": "a ) 1 , b ) 2 , c ) 3 , d ) 4 , e ) 5",
            "correct": "b",
            "annotated_formula": "multiply(40, divide(5, 100))",
            "linear_formula": "divide(n0,const_100)|multiply(n1,#0)|",
            "category": "gain",
        },
        "Question: what is 5 percent of 40 ?\nOptions: a ) 1 , b ) 2 , c ) 3 , d ) 4 , e ) 5\n"
        "Answer: 0.05 * 40 = 2 . answer : b",
    ),
    "sciq": (
        {
            "question": "What do bees make?",
            "distractor1": "silk",
            "distractor2": "milk",
            "distractor3": "wool",
            "correct_answer": "honey",
            "support": "Bees make honey from nectar.",
        },
        "Question: What do bees make?\nAnswer: honey\nBees make honey from nectar.",
    ),
    "qasper": (
        {
            "id": "p1",
            "title": "A Small Parser",
            "abstract": "We parse short sentences.",
            "full_text": {
                "section_name": ["Introduction", "Method"],
                "paragraphs": [["Parsing is old.", "It is slow."], ["We skip words."]],
            },
            "qas": {"question": ["How fast is it?"], "question_id": ["k1"], "answers": []},
        },
        "A Small Parser\nWe parse short sentences.\nParsing is old.\nIt is slow.\nWe skip words.",
    ),
    "pubmedqa": (
        {
            "pubid": 1,
            "question": "Does tea help sleep?",
            "context": {"contexts": ["Tea was given.", "Sleep was timed."], "labels": ["AIM", "METHOD"]},
            "long_answer": "It did not help.",
            "final_decision": "no",
        },
        "Tea was given.\nSleep was timed.\nQuestion: Does tea help sleep?\nAnswer: It did not help.",
    ),
    "race": (
        {
            "example_id": "high1.txt",
            "article": "Kai paints boats.",
            "answer": "D",
            "question": "Kai paints  _  .",
            "options": ["cars", "walls", "cats", "boats"],
        },
        "Kai paints boats.\nQuestion: Kai paints  _  .\nAnswer: boats",
    ),
    "winogrande": (
        {
            "sentence": "The cup beat the mug since _ was lighter.",
            "option1": "cup",
            "option2": "mug",
            "answer": "1",
        },
        "The cup beat the mug since _ was lighter.\nAnswer: cup",
    ),
    "hellaswag": (
        {
            "ind": 4,
            "activity_label": "Baking",
            "ctx_a": "A man kneads dough.",
            "ctx_b": "he",
            "ctx": "A man kneads dough. he",
            "endings": ["swims away.", "sings.", "paints it.", "lets it rest."],
            "source_id": "x",
            "split": "train",
            "split_type": "indomain",
            "label": "3",
        },
        "A man kneads dough. he lets it rest.",
    ),
    "sst2": ({"idx": 0, "sentence": "a dull , slow film ", "label": 0}, "a dull , slow film "),
}


def paper_templates() -> dict[str, str]:
    loaded = OmegaConf.load(CONF / "calibration_domains" / "paper.yaml")
    return {name: source.get("template", HubTextConfig().template) for name, source in loaded.hub.items()}


def test_every_domain_of_the_paper_has_a_row_here() -> None:
    assert set(PAPER_ROWS) == set(paper_templates())


@pytest.mark.parametrize("domain", PAPER_ROWS)
def test_the_templates_of_the_paper(domain: str) -> None:
    row, text = PAPER_ROWS[domain]
    assert render(paper_templates()[domain], row) == text


@pytest.mark.parametrize(
    ("domain", "hidden"),
    [("piqa", {"label": -1}), ("winogrande", {"answer": ""}), ("hellaswag", {"label": ""})],
)
def test_hidden_answers_are_left_out(domain: str, hidden: dict[str, object]) -> None:
    row, _ = PAPER_ROWS[domain]
    assert render(paper_templates()[domain], row | hidden) is None
