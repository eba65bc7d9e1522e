"""Tokens, time and disk of the stages, by hand."""

import os

import pytest

from dive.config import DeviceConfig
from dive.model.architecture import locate_architecture
from dive.plan.memory import Memory
from dive.plan.stages import Plan, Stage, plan, seconds
from tests.model.test_architecture import with_toy_texts


def planned(*overrides: str) -> Plan:
    stages = [] if any(o.startswith(("experiment=", "retrain=")) for o in overrides) else ["retrain=two_stages"]
    config = with_toy_texts(*stages, *overrides)
    return plan(config, locate_architecture(config.model))


def by_name(it: Plan) -> dict[str, Stage]:
    return {stage.name: stage for stage in it.stages}


def test_where_tokens_choose_their_experts_affinity_is_mapped_from_a_few_sequences() -> None:
    stages = by_name(planned())
    assert list(stages) == ["mining", "pruned", "reconstructed", "router", "retrain", "evaluation", "export"]
    assert stages["mining"].tokens == 16 * 16 * 64
    assert stages["mining"].operations < 0.01 * sum(stage.operations for stage in stages.values())
    assert "mining" not in by_name(planned("affinity.mapped=0"))
    assert "mining" not in by_name(planned("moe.experts=1"))


def test_tokens_of_a_run_that_mines() -> None:
    stages = by_name(planned("affinity=mined"))
    assert list(stages) == [
        "calibration",
        "mining",
        "pruned",
        "reconstructed",
        "router",
        "retrain",
        "evaluation",
        "export",
    ]
    assert stages["calibration"].tokens == 16 * 32 * 256
    assert stages["mining"].tokens == 16 * 16 * 8 * 256
    assert stages["reconstructed"].tokens == 16 * 32 * 256
    assert (stages["router"].tokens, stages["retrain"].tokens) == (16384, 114688)
    # dense, pruned, reconstructed and two stages; and the routing of the last three
    assert stages["evaluation"].tokens == (5 + 3) * 16 * 12 * 256


def test_tasks_are_sequences_of_every_model() -> None:
    without = by_name(planned())["evaluation"]
    asked = ("eval.tasks=[a,b]", "eval.task_limit=10", "+eval.task_settings={b:{shots:3,limit:7}}")
    more = by_name(planned(*asked, "plan.answers=4", "plan.question_tokens=50"))["evaluation"]
    sequences = 4 * (10 * 50 + 7 * (1 + 3) * 50)
    assert more.tokens - without.tokens == 5 * sequences  # dense, pruned, reconstructed and two stages
    assert more.memory.host_peak > without.memory.host_peak


def test_given_groups_are_not_mined() -> None:
    stages = by_name(planned("budget=paper", "calibration_domains=paper", "affinity=published/tinyllama_50"))
    assert stages["mining"].tokens == 24 * 4 * 256  # the map alone
    assert "calibration" not in stages
    # 1024 sequences a group, split evenly: 8 domains × 128, 1 × 1024, 3 × 341 + 1, ...
    assert stages["reconstructed"].tokens == 8 * 1024 * 256


def test_text_that_experts_are_built_from() -> None:
    paper = ("budget=paper", "calibration_domains=paper")
    stages = by_name(planned(*paper))  # 1024 sequences for each expert, of all 24 domains together
    assert stages["pruned"].tokens == 1024 * 256
    assert stages["reconstructed"].tokens == 8 * 1024 * 256
    few = by_name(planned(*paper, "calibration_domains.domains=[c4,race]", "moe.experts=4"))
    assert few["reconstructed"].tokens == 2 * 1024 * 256  # there is no more
    assert few["pruned"].tokens == 1024 * 256
    assert by_name(planned("moe.experts=4"))["pruned"].tokens == 16 * 32 * 256  # without a limit all there is


def test_text_that_the_model_writes() -> None:
    """100 sequences in two batches of at most 64 rows, 256 tokens of each: all weights are read 512 times."""
    without, stages = (
        by_name(planned("model=tinyllama")),
        by_name(planned("model=tinyllama", "calibration_domains.generated=100")),
    )
    assert list(stages) == ["generated", *without]
    writing = stages["generated"]
    assert writing.tokens == 100 * 256
    assert sum(writing.flops.values()) == pytest.approx(2 * 1.03e9 * 100 * 256, rel=0.1)  # and attention
    cache = 64 * 256 * 22 * 2 * 256 * 2
    assert writing.moved == pytest.approx(2 * 256 * (2 * 1_100_048_384 + 1.5 * cache))
    assert writing.memory.device["keys and values"] == 2 * cache
    for name in ("pruned", "reconstructed"):
        assert stages[name].tokens - without[name].tokens == 100 * 256


def test_one_expert_is_pruning_alone_unless_it_is_refined() -> None:
    assert "reconstructed" not in by_name(planned("moe=plain", "moe.experts=1"))
    stages = by_name(planned("moe.experts=1"))
    assert stages["reconstructed"].seconds > stages["pruned"].seconds > 0
    assert list(by_name(planned("moe.experts=1", "model.load=streamed", "retrain=none"))) == [
        "reconstructed",
        "export",
    ]


def test_a_stage_is_rounded_up_to_whole_steps() -> None:
    stages = by_name(planned("retrain.stages.router.tokens=5000"))
    assert stages["router"].tokens == 2 * 16 * 256


def test_disk() -> None:
    it = planned("model=tinyllama", "experiment=paper_1_8", "trainer=cpu", "model.dtype=bfloat16")
    stages = by_name(it)
    assert stages["calibration"].written == 16 * 22 * 5632 * 16  # 16 embedded domains, mean and deviations in float64
    layer = 8 * 3 * 2048 * 2816 * 2 + 2 * 8 * 2048 * 2 + 8 * 5632  # experts, router and bias, masks
    assert stages["reconstructed"].written == 22 * layer
    retrained = stages["retrain"]
    assert retrained.written - 4 * retrained.tokenised == 21_358_592 * 2  # 32-true keeps them in bfloat16
    assert stages["retrain"].temporary == 2 * 3 * 21_358_592 * 2  # with Adam's states; the old beside the new
    assert it.export == 2 * (3_384_207_360 + 360_448)
    tied = planned("model=llama3.2-1b", "retrain=none", "model.dtype=bfloat16")  # whose head is written as well
    assert tied.export == 2 * (tied.parameters["total"] + 128_256 * 2048)


def test_seconds() -> None:
    device = DeviceConfig(
        bfloat16=100.0, float32=10.0, float64=1.0, utilisation=0.5, bandwidth=1000.0, link=10.0, memory=1e9
    )
    stage = Stage(
        "x",
        "experts",
        0,
        {"bfloat16": 500.0, "float32": 50.0, "float64": 5.0},
        Memory(),
        moved=2000.0,
        linked=30.0,
        clustered=4000.0,
        tokenised=1.2e6,
        written=40.0,
        processes=2,
    )
    assert seconds(stage, device, 20.0, cores=4) == (10 + 10 + 10 + 2 + 3) / 2 + 4 + 1 + 2


def test_text_is_tokenised_once_and_in_whole_parts() -> None:
    """Parts of 2^17, 2^18, ... tokens: stages of 16384 and 114688 tokens fill the first one; one token more begins the second."""
    settings = ("budget=toy", "retrain=two_stages")
    made = {name: stage.tokenised for name, stage in by_name(planned(*settings)).items() if stage.tokenised}
    assert made == {"router": 2**17}
    longer = by_name(planned(*settings, "retrain.stages.retrain.tokens=114689"))
    assert (longer["router"].tokenised, longer["retrain"].tokenised) == (2**17, 2**18)
    assert longer["retrain"].written == by_name(planned(*settings))["retrain"].written + 4 * 2**18
    other = by_name(planned(*settings, "retrain.stages.router.text=calibration", "retrain.corpus.path=x"))
    assert (other["router"].tokenised, other["retrain"].tokenised) == (2**17, 2**17)  # of two texts


def test_clusters_of_tokens_are_one_devices_work() -> None:
    """5 layers of 32768 rows of 192: 7 · 4 candidates after the first, 10 rounds of two products with 8 centres; each product
    reads the rows, and so do the mean, what takes it off and the squares."""
    building = by_name(planned("calibration_domains.samples=1000"))["reconstructed"]
    assert building.alone == 5 * 32768 * 2 * 192 * (1 + 28 + 160)
    assert building.clustered == 5 * 32768 * 192 * 4 * (3 + 8 + 20)
    assert by_name(planned())["pruned"].clustered == 0
    for otherwise in ("moe.experts=1", "moe=plain", "affinity=random", "moe.refined.start=random"):
        stages = planned(otherwise).stages
        assert all(stage.clustered == 0 for stage in stages)
        assert all(stage.alone == 0 for stage in stages if stage.kind == "experts")


def test_training_divides_by_the_processes() -> None:
    one, eight = (
        planned("model=tinyllama", "affinity=mined", "trainer=gpu", "retrain.stages.retrain.batch=16"),
        planned("model=tinyllama", "affinity=mined", "trainer=ddp", "retrain.stages.retrain.batch=16"),
    )
    first, second = by_name(one)["retrain"], by_name(eight)["retrain"]
    assert second.operations == first.operations
    assert second.seconds < first.seconds / 3
    assert by_name(eight)["mining"].seconds == pytest.approx(by_name(one)["mining"].seconds / 8)
    for name in ("calibration", "reconstructed", "evaluation"):  # written, clustered or answered by one of them in part
        several, alone = by_name(eight)[name], by_name(one)[name]
        assert several.operations == alone.operations
        assert alone.seconds / 8 <= several.seconds < alone.seconds


def test_a_faster_device_is_faster() -> None:
    times = [planned("model=llama2-7b", f"plan.device={name}").seconds for name in ("h100", "a100-80", "cpu")]
    assert times == sorted(times)


def test_cores_share_the_work_of_a_cpu() -> None:
    one, two, eight = (planned("plan.device=cpu", f"plan.cores={cores}") for cores in (1, 2, 8))
    assert [stage.operations for stage in one.stages] == [stage.operations for stage in eight.stages]
    assert one.seconds / 2 < two.seconds < one.seconds
    assert one.seconds / 8 < eight.seconds < two.seconds
    assert two.summary()["cores"] == 2
    gpu = planned("plan.device=h100", "plan.cores=8")
    assert gpu.seconds == planned("plan.device=h100", "plan.cores=1").seconds
    assert gpu.summary()["cores"] is None


def test_null_is_as_many_cores_as_this_process_would_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert planned("plan.device=cpu").summary()["cores"] == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert planned("plan.device=cpu").summary()["cores"] == len(os.sched_getaffinity(0))


def test_the_summary_is_for_json() -> None:
    found = planned().summary()
    assert found["device"] == "cpu"
    assert found["seconds"] == pytest.approx(sum(stage["seconds"] for stage in found["stages"]))
    assert found["parameters"]["trained"] > 0


SHARED = ("retrain=none", "model=llama3.2-1b", "model.twin=qwen2_moe", "moe.gates=probabilities", "plan.device=h100")


def test_one_pruned_expert_shares_nothing() -> None:
    alone, beside = planned(*SHARED), planned(*SHARED, "moe.shared_expert=0.5")
    assert by_name(beside)["pruned"] == by_name(alone)["pruned"]
    assert by_name(beside)["reconstructed"].operations < by_name(alone)["reconstructed"].operations


def test_scaling_to_the_gates_is_counted() -> None:
    """Llama-3.2-1B: 16 layers, D 2048, F 8192, experts of a quarter of it."""
    expert = 3 * 2048 * 2048
    for construction, sampled_passes in (("moe=default", None), ("moe=random_split", 1)):
        with_, without = (
            by_name(planned(*SHARED, construction, gates))["reconstructed"]
            for gates in ("moe.gates=probabilities", "moe.gates=renormalised")
        )
        seen = with_.tokens if sampled_passes is None else min(32768, with_.tokens)
        each = 2 * expert + (0 if sampled_passes is None else 2 * 3 * 2048 * 8192)
        assert with_.operations - without.operations == pytest.approx(16 * seen * each, rel=1e-6)
