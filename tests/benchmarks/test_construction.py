"""Each part of building experts is timed, and takes the operations that the plan says."""

import json

import pytest

from benchmarks.construction import BARE, PARTS, REST, WRITING, main
from dive.cli import composed
from dive.model.architecture import read_architecture
from dive.plan import construction, flops
from dive.plan.parameters import shapes
from tests.benchmarks.tables import read_table
from tests.workplace import Workplace

OVERRIDES = [
    "moe.experts=3",
    "pruning.ratio=0.5",
    "moe.refined.steps=4",
    "moe.refined.batch=64",
    "moe.distillation.steps=5",
]


def test_table(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    domains = [
        "calibration_domains=local",
        f"calibration_domains.path={workplace.root / 'domains'}",
        "calibration_domains.length=32",
        "calibration_domains.samples=6",
    ]
    sizes = ["--model", str(workplace.root / "dense"), "--layers", "1", "--tokens", "768", "--device", "cpu"]
    assert main([*sizes, *domains, *OVERRIDES]) == 0
    rows = {row.pop("part"): row for row in read_table(capsys.readouterr().out)}
    assert list(rows) == [BARE, *PARTS, WRITING, REST, "building, all of it"]
    counted = {name: 1e9 * float(row["GFLOP"]) for name, row in rows.items()}

    config = composed([*domains, *OVERRIDES])
    s = shapes(read_architecture(json.loads((workplace.root / "dense" / "config.json").read_text())), config)
    tokens, length = 768, 32
    assert counted[BARE] == pytest.approx(tokens * flops.dense_layer(s, length), rel=0.05)
    derived = tokens * 2 * s.ffn + construction.moments(s, tokens)
    assert 1.5 * derived < counted["second moments"] < 2.01 * derived  # the first of two from some of the tokens
    each = tokens * 2 * s.experts * s.expert
    assert counted["errors of all experts"] == pytest.approx(2 * each, rel=0.01)
    steps = 4 * 64 * 14 * s.hidden * s.width
    assert steps < counted["local steps"] < 2.05 * steps  # one expert a token, or two
    assert counted["elimination"] == pytest.approx(2 * 3 * construction.eliminate(s), rel=0.2)
