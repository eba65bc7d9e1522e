"""The texts that come with every installation."""

import hashlib
import os
import re
import subprocess
import sys
from datetime import date, timedelta

import pytest

from dive.calibration_domains.embedded import DOCUMENT_CHARACTERS, DOMAINS, MONTHS, embedded_texts, split
from dive.errors import UserError

DIGEST = """
import hashlib
from dive.calibration_domains.embedded import embedded_texts
print(hashlib.sha256(repr(embedded_texts()).encode()).hexdigest())
"""


def test_at_least_ten_domains_have_enough_text() -> None:
    texts = embedded_texts()
    assert tuple(texts) == DOMAINS
    assert len(DOMAINS) >= 10
    for name, (train, test) in texts.items():
        assert sum(map(len, train)) >= 60_000, name
        assert sum(map(len, test)) >= 12_000, name


def test_documents_are_short_and_on_one_side_only() -> None:
    for name, (train, test) in embedded_texts().items():
        assert max(map(len, train + test)) <= DOCUMENT_CHARACTERS, name
        assert len(set(train)) == len(train), name
        assert len(set(test)) == len(test), name
        learned = "\n".join(map(squeezed, train))
        assert not [document for document in test if squeezed(document) in learned], name


def squeezed(text: str) -> str:
    """Without case and white space."""
    return "".join(text.lower().split())


def test_the_texts_do_not_depend_on_the_process() -> None:
    """Another seed of Python's string hashes, which orders sets differently."""
    digest = subprocess.run(
        [sys.executable, "-c", DIGEST],
        env={**os.environ, "PYTHONHASHSEED": "5", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        check=True,
        text=True,
    ).stdout.strip()
    assert digest == hashlib.sha256(repr(embedded_texts()).encode()).hexdigest()


def test_a_choice_of_domains_keeps_its_order() -> None:
    assert list(embedded_texts(["calendar", "arithmetic"])) == ["calendar", "arithmetic"]


def test_the_caller_may_change_its_lists() -> None:
    embedded_texts(["arithmetic"])["arithmetic"][0].clear()
    assert embedded_texts(["arithmetic"])["arithmetic"][0]


def test_an_unknown_domain_names_the_override() -> None:
    with pytest.raises(UserError, match=r"calibration_domains\.domains: \['poetry'\].*python_code"):
        embedded_texts(["arithmetic", "poetry"])


def test_a_source_file_stays_on_one_side() -> None:
    sources = [(f"file {n}", f"{n}\n" * 3000) for n in range(100)]
    train, test = split(iter(sources))
    assert train
    assert test
    assert not {text.split()[0] for text in train} & {text.split()[0] for text in test}


def test_a_text_of_two_sources_is_taken_once() -> None:
    train, test = split((f"file {n}", "the same text " * 30) for n in range(100))
    assert len(train) + len(test) == 1


def test_every_equality_sign_of_arithmetic_holds() -> None:
    checked = 0
    for document in embedded_texts(["arithmetic"])["arithmetic"][1]:
        for chain in re.findall(r"\d[\d+*\- ]*(?: = \d[\d+*\- ]*)+", document):
            values = {calculate(side) for side in chain.split(" = ")}
            assert len(values) == 1, chain
            checked += 1
    assert checked > 1000


def calculate(side: str) -> int:
    """Value of sums and differences of products; left to right, products first."""
    total, sign = 0, 1
    for part in re.split(r"([+-])", side):
        if part in ("+", "-"):
            sign = 1 if part == "+" else -1
            continue
        product = 1
        for factor in part.split("*"):
            product *= int(factor)
        total += sign * product
    return total


def test_calendar_facts_are_right() -> None:
    pattern = re.compile(
        r"(\S+) was a (\w+), day (\d+) of the year \d+ and in week (\d+)\. "
        r"(\d+) days after (\w+), (\d+) (\w+) (\d+) came (\w+), (\d+) (\w+) (\d+)\."
    )
    found = [match for document in embedded_texts(["calendar"])["calendar"][1] for match in pattern.findall(document)]
    assert len(found) > 300
    for iso, weekday, ordinal, week, ahead, weekday_1, d1, m1, y1, weekday_2, d2, m2, y2 in found:
        day = date.fromisoformat(iso)
        assert day == date(int(y1), MONTHS.index(m1) + 1, int(d1))
        later = date(int(y2), MONTHS.index(m2) + 1, int(d2))
        assert later == day + timedelta(days=int(ahead))
        assert (weekday, weekday_1) == (f"{day:%A}",) * 2
        assert weekday_2 == f"{later:%A}"
        assert (int(ordinal), int(week)) == (day.timetuple().tm_yday, day.isocalendar()[1])
