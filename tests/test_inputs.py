"""What a run starts from."""

import pytest
import torch
from torch import Tensor

from dive.inputs import tokens_of
from dive.model.architecture import read_architecture
from dive.plan.job import describe_job
from tests.workplace import Workplace

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
