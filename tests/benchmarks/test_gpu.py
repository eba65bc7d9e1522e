"""The benchmark for GPUs runs its stages for real on a CPU; where there is a GPU, on that."""

import pytest
import torch

from benchmarks.gpu import configured, main
from dive.config import Mode
from tests.benchmarks.tables import read_table

SIZES = [
    "--shape",
    "tiny",
    "--length",
    "32",
    "--micro-batch",
    "2",
    "--accumulation",
    "2",
    "--steps",
    "3",
    "--warm-up",
    "1",
]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_table(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here")
    faster = ["retrain.stages.retrain.learning_rate=0.05", "retrain.stages.retrain.warmup=0"]
    assert main(["--device", device, *SIZES, "--peak", "1", *faster]) == 0
    printed = capsys.readouterr().out
    assert "median of 3 steps" in printed
    rows = read_table(printed)
    assert [(row["DIVE"], row["stage"]) for row in rows] == [
        ("1/8", "router"),
        ("1/8", "retrain"),
        ("2/8", "router"),
        ("2/8", "retrain"),
    ]
    assert all(float(row["tokens/s"]) > 0 and float(row["peak memory"].split()[0]) >= 0 for row in rows)
    for row in rows:
        first, last = map(float, row["loss, first to last"].split(" to "))
        assert 5 < last < 6.5  # near ln 320
        if row["stage"] == "retrain":
            assert last < first  # the steps are real ones; routers alone learn little
    # D 32, 8 experts, 2 layers: routers with noise weights; with the experts 5 norms, and A and B of rank 8 beside.
    routers, norms = 2 * 2 * 8 * 32, 5 * 32
    adapters = [2 * 8 * 3 * 8 * (32 + width) for width in (32, 16)]
    expected = [routers, routers + norms + adapters[0], routers, routers + norms + adapters[1]]
    assert [row["trained"] for row in rows] == [f"{count / 1e6:.3f} M" for count in expected]


def test_the_recipes_are_the_papers() -> None:
    import argparse

    options = argparse.Namespace(
        device="cuda", length=1024, micro_batch=4, accumulation=2, steps=5, warm_up=1, overrides=[]
    )
    for setting, top_k, ratio in (("1/8", 1, 0.5), ("2/8", 2, 0.75)):
        config = configured(setting, options)
        assert (config.moe.experts, config.moe.top_k, config.pruning.ratio) == (8, top_k, ratio)
        assert [(n, s.mode) for n, s in config.retrain.stages.items()] == [
            ("router", Mode.dense),
            ("retrain", Mode.sparse),
        ]
        assert config.trainer.precision == "bf16-mixed"
        assert {stage.tokens for stage in config.retrain.stages.values()} == {6 * 8 * 1024}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--device", "cuda"], "torch finds no GPU"), (["--device", "cpu", "moe.expert=3"], "moe.expert")],
)
def test_what_cannot_work_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main([*arguments, *SIZES]) == 1
    found = capsys.readouterr().err
    assert found.startswith("error: ")
    assert len(found.splitlines()) == 1
    assert message in found
