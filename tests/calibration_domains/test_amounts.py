"""Sequences that groups of domains have, before anything is read."""

import pytest

from dive.calibration_domains.amounts import check_amounts
from dive.cli import composed
from dive.errors import UserError

NAMES = ["a", "b", "c", "d"]
MINED = ["affinity=mined", "moe.experts=4"]
GIVEN = ["affinity=given", "affinity.groups=[[a,b,c],[d]]", "moe.experts=2"]


def check(*overrides: str) -> None:
    check_amounts(composed(["calibration_domains.samples=32", *overrides]), NAMES)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        # Mined groups may be of one domain.
        (
            [*MINED, "calibration_domains.group_samples=33"],
            r"takes 33 .*an expert has 1, and .*samples is 32; raise .*\.samples to 33, or lower .*group_samples to 32$",
        ),
        ([*GIVEN, "calibration_domains.group_samples=40"], r"takes 40 .*an expert has 1, .*group_samples to 32$"),
        (
            ["affinity=random", "moe.experts=2", "calibration_domains.group_samples=65"],
            r"takes 33 .*an expert has 2, .*samples to 64$",
        ),
        # Experts that begin with tokens share all domains.
        (
            ["moe.experts=8", "calibration_domains.group_samples=17"],
            r"takes 34 .*8 experts share 4, .*group_samples to 16$",
        ),
    ],
)
def test_more_than_a_group_has_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=rf"^calibration_domains\.group_samples \(\d+\) {message}"):
        check(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        [*MINED, "calibration_domains.group_samples=32"],
        [*GIVEN, "calibration_domains.group_samples=32"],
        ["affinity=random", "moe.experts=2", "calibration_domains.group_samples=64"],
        ["moe.experts=8", "calibration_domains.group_samples=16"],
        ["moe=plain", "moe.experts=1", "calibration_domains.group_samples=128"],
    ],
)
def test_as_much_as_a_group_has_is_taken(overrides: list[str]) -> None:
    check(*overrides)


@pytest.mark.parametrize("given", [[], ["calibration_domains.group_samples=256"]])
@pytest.mark.parametrize("affinity", [[], ["affinity=mined"], ["affinity=random"], ["affinity=published/llama2_75"]])
def test_the_papers_amounts_are_there(given: list[str], affinity: list[str]) -> None:
    config = composed(["budget=paper", "calibration_domains=paper", *affinity, *given])
    check_amounts(config, list(config.calibration_domains.hub))


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([*MINED, "moe=plain", "calibration_domains.samples=3"], "samples"),
        ([*GIVEN, "moe=plain", "calibration_domains.group_samples=3"], "group_samples"),
        (["moe.experts=2", "calibration_domains.group_samples=3"], "group_samples"),  # of the pruned baseline
    ],
)
def test_too_few_to_choose_a_ridge_are_refused(overrides: list[str], name: str) -> None:
    message = rf"^pruning\.ridge=null .* may have 3 only; raise calibration_domains\.{name}, or set pruning\.ridge"
    with pytest.raises(UserError, match=message):
        check(*overrides, "pruning.ridge=null")
    check(*overrides)
    check(*(o.replace("=3", "=4") for o in overrides), "pruning.ridge=null")
