"""What a run starts from."""

import json
import shutil
from itertools import chain, pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dive.config import StageText
from dive.errors import UserError
from dive.inputs import TrainingInputs, prepare, tokens_of
from dive.model.architecture import read_architecture
from dive.model.recipe import Dense
from dive.plan.job import describe_job
from tests.workplace import Bench, Workplace

TOKENS = {name: torch.full((6, 4), number) for number, name in enumerate(("sums", "cats", "code", "news"))}
GROUPS = [["sums", "code"], ["cats", "news"]]
TOGETHER = [["sums", "code", "cats", "news"]]


def counts(found: list[Tensor]) -> list[dict[int, int]]:
    """{domain's number: sequences} of each group."""
    return [{int(n): int((matrix[:, 0] == n).sum()) for n in matrix[:, 0].unique()} for matrix in found]


def test_a_group_has_all_text_of_its_domains() -> None:
    assert counts(tokens_of(TOKENS, GROUPS, group_samples=None, experts=2)) == [{0: 6, 2: 6}, {1: 6, 3: 6}]


def test_a_limit_is_split_evenly_over_the_domains_of_a_group() -> None:
    assert counts(tokens_of(TOKENS, GROUPS, group_samples=3, experts=2)) == [{0: 2, 2: 1}, {1: 2, 3: 1}]


def test_text_together_is_as_much_as_that_of_all_groups() -> None:
    assert counts(tokens_of(TOKENS, TOGETHER, group_samples=3, experts=2)) == [{0: 2, 1: 1, 2: 2, 3: 1}]


def test_what_the_model_wrote_stands_beside_all_domains() -> None:
    written = torch.full((5, 4), 9)
    for limit, domains in ((None, {0: 6, 1: 6, 2: 6, 3: 6}), (3, {0: 2, 1: 1, 2: 2, 3: 1})):
        found = tokens_of(TOKENS, TOGETHER, generated=written, group_samples=limit, experts=2)
        assert counts(found) == [domains | {9: 5}]


@pytest.mark.parametrize(("affinity", "groups"), [("affinity=default", TOGETHER), ("affinity=given", GROUPS)])
def test_as_much_text_as_was_planned_is_built_from(
    untrained: Workplace, affinity: str, groups: list[list[str]]
) -> None:
    given = ["affinity.groups=[[sums,code],[cats,news]]"] if affinity == "affinity=given" else []
    config = untrained.compose(affinity, *given, "calibration_domains.group_samples=3")
    settings = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 4, "vocab_size": 320, "max_position_embeddings": 64}
    job = describe_job(config, read_architecture(settings), "cpu")
    for count, experts, members in ((job.groups, config.moe.experts, groups), (1, 1, TOGETHER)):
        found = tokens_of(TOKENS, members, group_samples=3, experts=experts)
        assert sum(map(len, found)) == job.building_sequences(count, experts=experts)
        job.config.calibration_domains.generated = 5
        assert sum(map(len, found)) + 5 == job.building_sequences(count, experts=experts)
        job.config.calibration_domains.generated = 0


def test_conversations_are_read_by_the_chat_template(
    workplace: Workplace, chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Calibration, evaluation and retraining, from files and as the hub has them."""
    shutil.copytree(workplace.root / "dense", tmp_path / "dense")
    chat_tokenizer.save_pretrained(tmp_path / "dense")
    talks = [
        [{"role": "user", "content": f"{n} + {n}"}, {"role": "assistant", "content": f"{n} adds up to {2 * n}"}]
        for n in range(100)
    ]
    (tmp_path / "domains" / "sums").mkdir(parents=True)
    for split, part in (("train", talks[:80]), ("test", talks[80:90])):
        rows = "".join(json.dumps({"messages": talk}) + "\n" for talk in part)
        (tmp_path / "domains" / "sums" / f"{split}.jsonl").write_text(rows)
    (tmp_path / "more.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks[90:]))
    expected = [chat_tokenizer.apply_chat_template(talk)["input_ids"] for talk in talks]

    def read(*overrides: str) -> TrainingInputs:
        settings = [f"model.path={tmp_path / 'dense'}", f"calibration_domains.path={tmp_path / 'domains'}"]
        settings += ["calibration_domains.text_field=messages", "affinity=default", "eval.windows=null"]
        settings += [f"+eval.sets={{more:{{path:{tmp_path / 'more.jsonl'},text_field:messages,lengths:[16]}}}}"]
        config = workplace.compose(*settings, *overrides)
        return prepare(Bench(tmp_path / "store"), config, Dense.locate(config.model))

    data = read()
    tested = [*chain(*expected[80:90])]
    windows = data.texts.domains[32]["sums"].flatten().tolist()
    assert windows == tested[: len(windows)]
    more = data.texts.sets["more@16"].flatten().tolist()  # no separator between conversations
    assert more == [*chain(*expected[90:])][: len(more)]
    trained = [tuple(row) for row in expected[:80]]
    for row in data.tokens["sums"].tolist():  # crops: between two BOS stands a whole conversation
        starts = [place for place, token in enumerate(row) if token == 0]
        assert all(tuple(row[a:b]) in trained for a, b in pairwise(starts))
    local = read(f"retrain.corpus.path={tmp_path / 'more.jsonl'}", "retrain.corpus.text_field=messages")
    (tmp_path / "set").mkdir()
    shutil.copy(tmp_path / "more.jsonl", tmp_path / "set" / "train.jsonl")
    hub = read(f"retrain.corpus.hub.path={tmp_path / 'set'}", 'retrain.corpus.hub.template="{messages}"')
    texts = ((data, expected[:80]), (local, expected[90:]), (hub, expected[90:]))
    for corpus, known in [(given.corpora[StageText.corpus], known) for given, known in texts] + [
        (given.corpora[StageText.calibration], expected[:80]) for given in (data, local, hub)
    ]:
        blocks = corpus.stream()
        stream = torch.cat([next(blocks) for _ in range(8)]).tolist()
        starts = [place for place, token in enumerate(stream) if token == 0]
        assert len(starts) > 4
        assert all(stream[a:b] in known for a, b in pairwise(starts))

    (tmp_path / "dense" / "chat_template.jinja").unlink()
    with pytest.raises(
        UserError, match=r"train\.jsonl:1: .* no chat template; set model\.path to a model that has one"
    ):
        read()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["affinity=mined"], "belongs to no group of domains"),
        (["model.load=streamed"], "set model.load=full"),
        (["calibration_domains.length=2"], "raise calibration_domains.length to 3"),
    ],
)
def test_where_nothing_has_a_place_for_it_generated_text_is_refused(
    untrained: Workplace, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        untrained.run("refused", "affinity=default", "calibration_domains.generated=4", "retrain=none", *overrides)


def test_a_domain_of_the_name_of_generated_text_is_refused(untrained: Workplace, tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / "generated").mkdir(exist_ok=True)
        (tmp_path / "generated" / f"{split}.txt").write_text("one two three\n" * 100)
    with pytest.raises(UserError, match="a calibration domain is called 'generated' as well"):
        untrained.run(
            "named",
            "affinity=default",
            "retrain=none",
            "calibration_domains.generated=4",
            f"calibration_domains.path={tmp_path}",
        )
