"""Tasks: the harness's accuracy against one counted by hand, what decides it, and what is refused before any work."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import dive
from dive.api import reconstruct
from dive.config import EvalConfig, TaskConfig
from dive.errors import UserError
from dive.eval.tasks import TaskSuite, headline, load_tasks
from dive.store import identity
from tests.conftest import Build
from tests.workplace import Bench, Ready, write_task

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an optional extra: pip install 'dive-moe[tasks]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks ``cats`` and ``more``, a group and a tag of both, and one that allows no examples."""
    root = tmp_path_factory.mktemp("tasks")
    write_task(root, "cats", yaml="tag: felines\n")
    write_task(root, "more", seed=1, yaml="tag: felines\n")
    write_task(root, "bare", questions=4, yaml="num_fewshot: 0\n")
    (root / "both.yaml").write_text(
        "group: both\ntask: [cats, more]\naggregate_metric_list:\n  - {metric: acc, weight_by_size: true}\n"
    )
    return root


def config(folder: Path | None, *tasks: str, **settings: Any) -> EvalConfig:
    return EvalConfig(tasks=list(tasks), task_path=str(folder) if folder else None, **settings)


def rows(folder: Path, name: str = "cats") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}_test.jsonl").read_text().splitlines()]


def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, questions: list[dict[str, Any]], prefix: list[int]
) -> float:
    """Share of questions whose right word has the highest log-probability after the start of the sentence."""
    right = 0
    for row in questions:
        start = prefix + tokenizer(row["start"], add_special_tokens=False)["input_ids"]
        scores = []
        for word in row["next"]:
            whole = prefix + tokenizer(f"{row['start']} {word}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                likely = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(float(likely[i - 1, whole[i]]) for i in range(len(start), len(whole))))
        right += int(np.argmax(scores)) == row["right"]
    return right / len(questions)


def pruned(dense: PreTrainedModel, tokens: Callable[..., torch.Tensor], experts: int) -> PreTrainedModel:
    statistics = dive.collect_statistics(dense, {str(i): tokens(2, 16, seed=i) for i in range(experts)})
    return reconstruct(dense, list(statistics.values()), ratio=0.5, top_k=1, router_init="random")


@pytest.mark.parametrize("kind", ["dense", "pruned", "moe"])
@pytest.mark.parametrize("bos", [None, True])
def test_accuracy_is_that_counted_by_hand(
    kind: str,
    bos: bool | None,
    build: Build,
    tokens: Callable[..., torch.Tensor],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    tmp_path: Path,
) -> None:
    model = build("llama-tied")
    if kind != "dense":
        model = pruned(model, tokens, {"pruned": 1, "moe": 3}[kind])
    suite = load_tasks(config(folder, "cats", add_bos_token=bos), tokenizer)
    found = suite.measure(Bench(tmp_path), Ready(model))
    by_hand = accuracy(model, tokenizer, rows(folder), prefix=[0] if bos else [])
    assert found["cats"]["acc"] == pytest.approx(by_hand)
    assert found["cats"]["acc_stderr"] == pytest.approx((by_hand * (1 - by_hand) / 23) ** 0.5)
    assert set(found["cats"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}


def test_the_bos_token_matters_here(build: Build, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    answers = [
        [accuracy(build("llama-tied"), tokenizer, [row], prefix) for row in rows(folder)] for prefix in ([], [0])
    ]
    assert answers[0] != answers[1]


def test_neither_tokenizer_nor_random_state_are_touched(
    build: Build, tokenizer: PreTrainedTokenizerFast, folder: Path, tmp_path: Path
) -> None:
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    expected = random.random(), float(np.random.random()), float(torch.rand(1))
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    load_tasks(config(folder, "cats", task_limit=2, add_bos_token=True), tokenizer).measure(
        Bench(tmp_path), Ready(build())
    )
    assert (random.random(), float(np.random.random()), float(torch.rand(1))) == expected
    assert tokenizer.pad_token is None
    assert tokenizer("the cat")["input_ids"][0] != tokenizer.bos_token_id


def test_examples_and_limits(build: Build, tokenizer: PreTrainedTokenizerFast, folder: Path, tmp_path: Path) -> None:
    settings = {"cats": TaskConfig(shots=3, limit=5, metric="acc_norm")}
    suite = load_tasks(config(folder, "cats", "more", task_settings=settings, task_limit=7), tokenizer)
    assert suite.describe() == {
        "cats": {"shots": 3, "limit": 5, "metric": "acc_norm", "questions": 5, "members": []},
        "more": {"shots": 0, "limit": 7, "metric": None, "questions": 7, "members": []},
    }
    (member,) = suite.tasks[0].members.values()
    prompt = member.fewshot_context(rows(folder)[0], num_fewshot=member.config.num_fewshot)
    assert prompt.endswith("\n\n" + rows(folder)[0]["start"])
    assert prompt.count("\n\n") == 3
    found = suite.measure(Bench(tmp_path), Ready(build()))
    assert (found["cats"]["acc"] * 5).is_integer()
    assert headline(found["cats"], "acc_norm") == ("acc_norm", found["cats"]["acc_norm"])
    assert headline(found["more"], None) == ("acc", found["more"]["acc"])


def test_groups_have_their_own_figure_and_tags_those_of_their_members(
    build: Build, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    root = write_task(write_task(tmp_path / "tasks", "cats", yaml="tag: felines\n"), "more", seed=1)
    write_task(root, "third", seed=2, yaml="tag: felines\n")
    run = Bench(tmp_path / "store")
    tag = load_tasks(config(root, "felines"), tokenizer).measure(run, Ready(build()))
    assert list(tag) == ["cats", "third"]
    alone = load_tasks(config(root, "third"), tokenizer).measure(run, Ready(build()))
    assert alone["third"] == tag["third"]


@pytest.mark.slow  # reads the harness's index of 14 000 tasks
def test_a_groups_mean_is_its_members(
    build: Build, tokenizer: PreTrainedTokenizerFast, folder: Path, tmp_path: Path
) -> None:
    run = Bench(tmp_path)
    both = load_tasks(config(folder, "both"), tokenizer)
    assert both.describe()["both"]["members"] == ["cats", "more"]
    found = both.measure(run, Ready(build()))
    apart = load_tasks(config(folder, "cats", "more"), tokenizer).measure(run, Ready(build()))
    assert list(found) == ["both"]
    assert found["both"]["acc"] == pytest.approx((apart["cats"]["acc"] + apart["more"]["acc"]) / 2)


def test_a_task_is_measured_once_a_model(
    build: Build, tokenizer: PreTrainedTokenizerFast, folder: Path, tmp_path: Path
) -> None:
    run = Bench(tmp_path)
    first = load_tasks(config(folder, "cats", task_limit=4), tokenizer).measure(run, Ready(build(), "a"))
    again = load_tasks(config(folder, "cats", task_limit=4), tokenizer).measure(run, Ready(None, "a"))
    assert again == first
    for changed in (
        {"task_limit": 5},
        {"task_limit": 4, "task_settings": {"cats": TaskConfig(shots=1)}},
        {"task_limit": 4, "add_bos_token": True},
    ):
        with pytest.raises(Exception, match="nobody may load"):
            load_tasks(config(folder, "cats", **changed), tokenizer).measure(run, Ready(None, "a"))
    with pytest.raises(Exception, match="nobody may load"):
        load_tasks(config(folder, "cats", task_limit=4), tokenizer).measure(run, Ready(None, "b"))


def test_identity_follows_the_questions_and_not_their_place(
    tokenizer: PreTrainedTokenizerFast, folder: Path, tmp_path: Path
) -> None:
    def asked(root: Path) -> list[Any]:
        found: list[Any] = identity(load_tasks(config(root, "cats"), tokenizer))
        return found

    assert asked(write_task(tmp_path / "moved", "cats", yaml="tag: felines\n")) == asked(folder)
    other = write_task(tmp_path / "other", "cats", yaml="tag: felines\n")
    file = other / "cats_test.jsonl"
    file.write_text(file.read_text().replace("cat", "dog"))
    assert asked(other) != asked(folder)
    worded = write_task(tmp_path / "worded", "cats", yaml='description: "Cats. "\n')
    assert asked(worded) != asked(folder)


def test_documents_are_all_texts_of_a_row(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    documents = list(load_tasks(config(folder, "cats", task_limit=2), tokenizer).tasks[0].documents())
    assert documents == [[row["start"], *row["next"]] for row in rows(folder)[:2]]


def test_no_tasks_need_no_harness(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dive.eval.tasks.find_spec", lambda _: None)
    assert load_tasks(EvalConfig(), tokenizer) == TaskSuite(tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"pip install 'dive-moe\[tasks\]'"):
        load_tasks(EvalConfig(tasks=["sciq"]), tokenizer)


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("cats", TaskConfig(shots=9), r"'cats' with 9 examples fails .* lower eval\.task_settings\.cats\.shots"),
        ("bare", TaskConfig(shots=1), r"eval\.task_settings\.bare\.shots \(1\): the task 'bare' allows none"),
        ("cats", TaskConfig(metric="f1"), r"eval\.task_settings\.cats\.metric: 'f1' is none of acc, acc_norm"),
    ],
)
def test_settings_that_do_not_fit_the_task(
    task: str, settings: TaskConfig, message: str, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    with pytest.raises(UserError, match=message):
        load_tasks(config(folder, task, task_settings={task: settings}), tokenizer)


def test_tasks_that_run_the_models_code_are_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    root = write_task(tmp_path, "cats", yaml="unsafe_code: true\n")
    with pytest.raises(UserError, match="'cats' runs code that the model writes"):
        load_tasks(config(root, "cats"), tokenizer)


def spoil(root: Path, how: str) -> None:
    file = root / "cats_test.jsonl"
    if how == "empty":
        file.write_text("")
    elif how == "gone":
        file.unlink()
    elif how == "column":
        file.write_text(file.read_text().replace("start", "beginning"))
    else:
        yaml = (root / "cats.yaml").read_text()
        (root / "cats.yaml").write_text(yaml.replace("dataset_path: json", "dataset_path: nobody/nothing"))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("empty", r"^eval\.tasks: 'cats'"),
        ("gone", r"^eval\.tasks: 'cats' cannot be loaded from .*cats\.yaml"),
        ("column", r"^eval\.tasks: 'cats'"),
        ("network", r"^eval\.tasks: 'cats': its data is not in the cache .* eval\.task_path=DIR"),
    ],
)
def test_data_that_cannot_be_had(how: str, message: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    root = write_task(tmp_path, "cats")
    spoil(root, how)
    with pytest.raises(UserError, match=message) as caught:
        load_tasks(config(root, "cats"), tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("make", "message"), [(False, "no such directory"), (True, "no task there")])
def test_a_task_path_without_tasks(
    make: bool, message: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    if make:
        (tmp_path / "place").mkdir()
    with pytest.raises(UserError, match=rf"eval\.task_path=.*{message}"):
        load_tasks(config(tmp_path / "place", "cats"), tokenizer)


@pytest.mark.slow  # reads the harness's index of 14 000 tasks
def test_an_unknown_task_is_named_with_its_neighbours(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    with pytest.raises(UserError, match=r"eval\.tasks: no task 'hellaswagg' \(near: .*hellaswag.*eval\.task_path=DIR"):
        load_tasks(config(None, "hellaswagg"), tokenizer)
    settings = {"sciqq": TaskConfig(shots=1)}
    with pytest.raises(UserError, match=r"eval\.task_settings: no task 'sciqq'"):
        load_tasks(config(folder, "cats", task_settings=settings), tokenizer)


def test_our_logiqa_asks_what_the_harness_asks() -> None:
    import yaml
    from lm_eval.tasks.logiqa.utils_logiqa import doc_to_text
    from lm_eval.utils import apply_template

    from dive.eval.tasks import OWN_TASKS

    ours = yaml.safe_load((OWN_TASKS / "logiqa_parquet.yaml").read_text())
    options = ["red", "green", "blue", "none"]
    theirs = doc_to_text({"context": "It is late.", "question": "Which colour?", "options": options})
    row = {"context": "It is late.", "query": "Which colour?", "options": options, "correct_option": 2}
    assert apply_template(ours["doc_to_text"], row) == theirs
    assert apply_template(ours["doc_to_target"], row) == "2"
