"""The bench of methods: equal sizes and budgets, texts kept apart, figures worked out by hand, and one small run of it all."""

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import quality
from benchmarks.quality import (
    METHODS,
    Setting,
    dev_texts,
    held_out,
    held_out_sets,
    main,
    stage_overrides,
    summarise,
    table,
)
from dive.calibration_domains.local import read_documents
from dive.calibration_domains.texts import load_eval_set
from dive.cli import composed
from dive.config import Compensation, Config, StageText
from dive.errors import UserError
from tests.workplace import WORDS, Workplace

SETTINGS = ["ratio0.75-top1", "ratio0.875-top2", "ratio0.5-top1"]


def of(method: str, setting: str) -> Config:
    return composed(METHODS[method].overrides(Setting.parse(setting)))


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_method_but_the_dense_model_has_the_same_active_width(setting: str) -> None:
    size = Setting.parse(setting)
    active = {m: (c := of(m, setting)).moe.top_k * c.pruning.width(768) for m in METHODS}
    assert active.pop("dense_retrained") == 768
    assert set(active.values()) == {round(size.top_k * (1 - size.ratio) * 768)}
    assert str(size) == setting


@pytest.mark.parametrize(
    "setting", ["0.75", "ratio0.75", "ratio1.5-top1", "ratio0.5-top2", "ratio0.5-top0", "ratio.5-top"]
)
def test_other_settings_are_refused(setting: str) -> None:
    with pytest.raises(UserError, match="--settings"):
        Setting.parse(setting)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [100_000, 500_000, 2_000_000])
def test_every_method_trains_on_the_same_tokens_with_the_same_optimiser(method: str, budget: int) -> None:
    overrides = METHODS[method].overrides(Setting.parse("ratio0.75-top1"))
    stages = stage_overrides(composed(overrides), tokens=budget, learning_rate=None, train="full")
    config = composed([*overrides, *stages])
    read = {name: stage for name, stage in config.retrain.stages.items() if stage.text is StageText.corpus}
    last = list(read.values())[-1]
    step = last.batch * config.retrain.length
    assert sum(stage.tokens for stage in read.values()) == budget // step * step
    assert {stage.batch for stage in read.values()} == {8}
    assert (last.learning_rate, last.schedule.value, last.warmup, last.floor) == (1.5e-3, "cosine", 0.1, 0.1)
    assert last.train.experts.value == "full"
    assert list(read) == (["router", "retrain"] if method == "paper" else ["retrain"])
    calibrated = {"dive_end_to_end": ["end_to_end"], "dive_generated": ["end_to_end"]}
    assert [name for name in config.retrain.stages if name not in read] == calibrated.get(method, [])


@pytest.mark.parametrize("method", ["dive_end_to_end", "dive_generated"])
def test_a_stage_on_calibration_text_stays_where_nothing_is_retrained(method: str) -> None:
    overrides = METHODS[method].overrides(Setting.parse("ratio0.75-top1"))
    stages = stage_overrides(composed(overrides), tokens=0, learning_rate=None, train="full")
    found = composed([*overrides, *stages])
    assert list(found.retrain.stages) == ["end_to_end"]
    texts = found.calibration_domains
    sampled = (23 * texts.samples + texts.generated) * texts.length
    assert sampled + found.retrain.stages["end_to_end"].tokens <= 23 * 32 * 256


def test_only_ours_and_the_method_that_says_so_learn_from_the_dense_model() -> None:
    taught = {m for m in METHODS if of(m, "ratio0.75-top1").retrain.stages["retrain"].teacher.logits}
    ours = {m for m in METHODS if m.startswith("dive")} - {"dive_untaught"}
    assert taught == ours | {"dense_retrained", "flap_ls_taught"}


def test_the_paper_has_its_own_shares_and_temperature() -> None:
    for setting, temperature in (("ratio0.75-top1", 0.05), ("ratio0.875-top2", 0.5)):
        config = of("paper", setting)
        assert config.retrain.stages["router"].temperature == temperature
        assert config.pruning.compensation is Compensation.bias
        # 0.5 B and 5 B tokens in the paper: an eleventh of 110 steps is 10.
        found = stage_overrides(config, tokens=110 * 2048, learning_rate=0.01, train="lora")
        assert found == [
            f"retrain.stages.router.tokens={10 * 2048}",
            f"retrain.stages.retrain.tokens={100 * 2048}",
            "retrain.stages.retrain.learning_rate=0.01",
            "retrain.stages.retrain.train.experts=lora",
        ]
    assert stage_overrides(of("paper", "ratio0.75-top1"), tokens=0, learning_rate=0.01, train="full") == [
        "retrain=none"
    ]
    with pytest.raises(UserError, match=r"--tokens 3000: stage retrain is left with less than a step"):
        stage_overrides(of("paper", "ratio0.75-top1"), tokens=3000, learning_rate=None, train="full")


def test_domains_are_held_out_in_rotation() -> None:
    names = [f"d{i}" for i in range(9)]
    assert held_out(names, 0, 3) == [[]]
    folds = held_out(names, 3, 3)
    assert sorted(name for fold in folds for name in fold) == names
    assert folds == held_out(names, 3, 3)
    assert held_out(names, 3, 1) == folds[:1]
    for count, rounds in ((3, 4), (9, 1)):
        with pytest.raises(UserError, match="there are 9 domains only"):
            held_out(names, count, rounds)


# ----------------------------------------------------------------------------------------------------- texts


def config_of(workplace: Workplace, *overrides: str) -> Config:
    return composed(["calibration_domains=local", f"calibration_domains.path={workplace.root / 'domains'}", *overrides])


def test_held_out_domains_are_measured_on_their_own_test_text(workplace: Workplace) -> None:
    config = config_of(workplace)
    measured = composed(held_out_sets(config, ["cats", "news"])).eval.sets
    assert list(measured) == ["cats", "news"]
    for name, entry in measured.items():
        test = read_documents(workplace.root / "domains" / name / "test.jsonl", field="text", where="test")
        assert load_eval_set(name, entry) == test
        assert entry.separator is None  # as the domains' own: documents one after another
        assert entry.lengths == config.eval.lengths
    embedded = composed(held_out_sets(composed([]), ["json"])).eval.sets
    assert embedded["json"].source.value == "embedded"


def test_the_learning_rate_is_chosen_on_training_text_alone(workplace: Workplace, tmp_path: Path) -> None:
    root = dev_texts(config_of(workplace), ["cats", "news"], tmp_path / "dev")
    assert sorted(path.name for path in root.iterdir()) == ["cats", "news", "written"]
    for name in ("cats", "news"):
        real = workplace.root / "domains" / name
        train, test = (read_documents(real / f"{s}.jsonl", field="text", where="x") for s in ("train", "test"))
        kept, dev = (read_documents(root / name / f"{s}.jsonl", field="text", where="x") for s in ("train", "test"))
        assert sorted(kept + dev) == sorted(train)
        assert len(dev) == 6  # of 60
        assert not set(dev) & set(test)


# ------------------------------------------------------------------------------------------------------ tables


def result(perplexity: float, held: float, load: float) -> dict[str, Any]:
    return {
        "cell": {"learning_rate": 0.01},
        "perplexity": {"mean": perplexity, "a@256": held, "b@256": 4 * held},
        "dense": {"mean": 10.0, "a@256": 4.0, "b@256": 9.0},
        "sets": ["a@256", "b@256"],
        "tokens": 5,
        "parameters": {"dense": 100, "total": 300, "active": 60},
        "load_max_over_mean": load,
        "load_entropy": 1.0,
        "calibration_tokens": 7,
        "seconds": 3.0,
    }


def test_means_gaps_and_deviations_by_hand() -> None:
    found = {
        ("s", "flap", 0): [result(20.0, 4.0, 1.5), result(22.0, 6.0, 2.5), result(24.0, 5.0, 2.0)],
        ("s", "flap", 8): [],
    }
    dense, row = summarise(found)
    assert (dense["perplexity"], dense["perplexity_sd"], dense["total"], dense["active"]) == (10.0, 0.0, 100, 100)
    assert dense["held_out_perplexity"] == pytest.approx(6.0)  # of 4 and 9
    assert dense["gap"] == 0.0
    assert (row["perplexity"], row["perplexity_sd"], row["runs"]) == (22.0, 2.0, 3)
    assert row["gap"] == pytest.approx((math.log(2) + math.log(2.2) + math.log(2.4)) / 3)
    assert row["held_out_perplexity"] == pytest.approx(10.0)  # 2 · 4, 2 · 6, 2 · 5
    assert row["held_out_perplexity_sd"] == pytest.approx(2.0)
    assert row["held_out_gap"] == pytest.approx(math.log(8 * 12 * 10 / 6**3) / 3)
    assert row["load_max_over_mean"] == 2.5
    [single] = summarise({("s", "flap", 0): [result(20.0, 4.0, 1.5)]})[1:]
    assert single["perplexity_sd"] is None


def test_the_table_has_a_method_a_line_and_tokens_as_columns() -> None:
    found = {
        ("s", "flap", 0): [result(20.0, 4.0, 1.5), result(22.0, 6.0, 2.5)],
        ("s", "flap", 500_000): [result(15.0, 4.0, 1.5)],
    }
    assert table(summarise(found), "perplexity") == [
        "| method | parameters | active | 0 tokens | 0.5 M tokens |",
        "| --- | --- | --- | --- | --- |",
        "| dense | 0.0001 M | 0.0001 M | 10.00 ± 0.00 |  |",
        "| FLAP, one expert | 0.0003 M | 6e-05 M | 21.00 ± 1.41 | 15.00 |",
    ]


# ------------------------------------------------------------------------------------------------------ runs


@pytest.fixture
def command(workplace: Workplace, tmp_path: Path) -> list[str]:
    own = ("model", "budget", "eval=", "calibration_domains", "logger", "pruning", "retrain.stages", "retrain=")
    settings = [s for s in workplace.settings if not s.startswith(own) or s.startswith("calibration_domains.l")]
    return [
        *("--model", str(workplace.root / "dense"), "--domains", str(workplace.root / "domains")),
        *(
            "--methods",
            "flap_ls,coactivation,dive",
            "--settings",
            "ratio0.5-top1",
            "--tokens",
            "0,1024",
            "--seeds",
            "1,2",
        ),
        *("--held-out", "1", "--windows", "3", "--samples", "6", "--out", str(tmp_path / "bench")),
        *(part for setting in [*settings, "retrain.stages.retrain.batch=4"] for part in ("--override", setting)),
    ]


@pytest.mark.slow
def test_a_whole_bench_and_what_it_does_not_run_again(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = [*command, "--methods", "flap_ls,coactivation"]
    assert main(command) == 0
    out = tmp_path / "bench"
    assert len(list((out / "cells").iterdir())) == 8
    rows = json.loads((out / "quality.json").read_text())["rows"]
    assert [(r["method"], r["tokens"], r["runs"]) for r in rows] == [
        ("dense", 0, 2),
        ("flap_ls", 0, 2),
        ("flap_ls", 1024, 2),
        ("coactivation", 0, 2),
        ("coactivation", 1024, 2),
    ]
    values = {(r["method"], r["tokens"]): r for r in rows}
    assert values["flap_ls", 1024]["perplexity"] < values["flap_ls", 0]["perplexity"]
    assert values["flap_ls", 0]["trained_tokens"] == 0
    assert values["flap_ls", 1024]["trained_tokens"] == 1024
    one_router = 2 * 32  # layers · D for each expert
    assert (
        values["coactivation", 0]["active"]
        == values["flap_ls", 0]["active"] + one_router
        < values["dense", 0]["active"]
    )
    assert all(r["held_out_perplexity"] > 1 and r["perplexity_sd"] is not None for r in rows)
    left_out = {json.dumps(json.loads(f.read_text())["sets"]) for f in (out / "cells").iterdir()}
    [names] = [json.loads(text) for text in left_out]
    assert [name.removesuffix("@32") for name in names] == held_out(sorted(WORDS), 1, 1)[0]
    assert "| FLAP with least squares, one expert |" in (out / "quality.md").read_text()
    assert len(list(csv.DictReader((out / "quality.csv").open()))) == len(rows)
    assert (out / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert not list((out / "runs").glob("*/checkpoint*"))

    def no_run(*_: Any) -> None:
        raise AssertionError("a cell was run again")

    printed = capsys.readouterr().out
    monkeypatch.setattr(quality, "run_cell", no_run)
    assert main(command) == 0
    assert capsys.readouterr().out == printed
    with pytest.raises(AssertionError, match="run again"):
        main([*command, "--seeds", "3"])
    assert main([*command, "--seeds", "3", "--report-only"]) == 1


@pytest.mark.slow
def test_a_learning_rate_is_chosen_for_each_method(command: list[str], tmp_path: Path) -> None:
    command = [*command, "--methods", "flap_ls", "--tokens", "1024", "--seeds", "1", "--learning-rates", "1e-9,1e-2"]
    assert main(command) == 0
    cells = [json.loads(file.read_text()) for file in (tmp_path / "bench" / "cells").iterdir()]
    assert sorted((c["cell"]["dev"], c["cell"]["learning_rate"]) for c in cells) == [
        (False, 1e-2),
        (True, 1e-9),
        (True, 1e-2),
    ]
    dev = {c["cell"]["learning_rate"]: c["perplexity"]["mean"] for c in cells if c["cell"]["dev"]}
    assert dev[1e-2] < dev[1e-9]
    assert all(c["sets"] == [] for c in cells if c["cell"]["dev"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "flap,magic"], r"--methods: \['magic'\] not among"),
        (["--settings", "half"], "--settings half"),
        (["--seeds", ","], "--seeds is empty"),
        (["--held-out", "99"], "--held-out 99"),
        (["--domains", "/nowhere"], "/nowhere: no such directory"),
        (["--override", "pruning.rati=1"], "pruning.rati"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_work_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--out", str(tmp_path)]) == 1
    found = capsys.readouterr().err
    assert found.startswith("error: ")
    assert len(found.splitlines()) == 1
    assert re.search(message, found)
