"""What the whole configuration refuses."""

import re
from typing import Any

import pytest

from dive.cli import composed
from dive.config import (
    MAX_SEED,
    RESERVED_STAGES,
    AffinityConfig,
    DeviceConfig,
    EvaluateConfig,
    Freezing,
    FreezingConfig,
    LoRAConfig,
    PlanConfig,
    PruningConfig,
    RetrainConfig,
    StageConfig,
)
from dive.errors import UserError
from dive.generate import GenerateConfig
from dive.model.architecture import locate_architecture
from dive.plan.capacity import Capacity, shortages
from dive.plan.stages import plan
from dive.retrain.stage import find_checkpoint


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PruningConfig(ratio=1.0), "pruning.ratio (1.0) must be at least 0 and below 1"),
        (lambda: PruningConfig(ridge=-1.0), "pruning.ridge (-1.0) must be at least 0 and at most 1000, or null"),
        (
            lambda: RetrainConfig(lora=LoRAConfig(alpha=0.0)),
            "retrain.lora.alpha (0.0) must be above 0 and at most 100000",
        ),
        (lambda: GenerateConfig(seed=-1), "seed (-1) must be at least 0 and at most 4294967295"),
        (lambda: EvaluateConfig(seed=2**32), "seed (4294967296) must be at least 0 and at most 4294967295"),
    ],
)
def test_groups_made_without_a_command_line_are_checked_as_well(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        make()


EXPERTS = "retrain.stages.retrain"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["retrain.lora.alpha=-1"], "retrain.lora.alpha (-1.0) must be above 0"),
        (["retrain.lora.rank=10000000000"], "retrain.lora.rank (10000000000) must be at least 1 and at most 4096"),
        ([f"{EXPERTS}.weight_decay=-1"], f"{EXPERTS}.weight_decay (-1.0) must be at least 0 and at most 10"),
        ([f"{EXPERTS}.weight_decay=42"], f"{EXPERTS}.weight_decay (42.0) must be at least 0 and at most 10"),
        ([f"{EXPERTS}.balance=1e30"], f"{EXPERTS}.balance (1e+30) must be at least 0 and at most 10000"),
        ([f"{EXPERTS}.teacher.temperature=1e-30"], f"{EXPERTS}.teacher.temperature (1e-30) must be at least 0.01"),
        ([f"{EXPERTS}.teacher.temperature=inf"], f"{EXPERTS}.teacher.temperature (inf) must be at least 0.01"),
        ([f"{EXPERTS}.learning_rate=nan"], f"{EXPERTS}.learning_rate (nan) must be above 0 and at most 10"),
        (
            [f"{EXPERTS}.tokens=1000000000000000"],
            f"{EXPERTS}.tokens (1000000000000000) must be at least 1 and at most 1e14",
        ),
        (["eval.generations=999999999999"], "eval.generations (999999999999) must be at least 0 and at most 10000"),
        (["eval.lengths=[256,1]"], "eval.lengths[1] (1) must be at least 2"),
        (["calibration_domains.samples=1000000000"], "calibration_domains.samples (1000000000) must be at least 1"),
        (["calibration_domains.length=99999999"], "calibration_domains.length (99999999) must be at least 2"),
        (["seed=4294967296"], "seed (4294967296) must be at least 0 and at most 4294967295"),
        (
            ["moe.gates=probabilities", f"{EXPERTS}.gate=switch"],
            f"{EXPERTS}.gate=switch is for gates that teach a router nothing, and moe.gates=probabilities do",
        ),
        (["store="], "store is empty: set store=DIR"),
        (["moe=[default,plain]"], "moe=[default,plain]: the group moe takes one of its options; set moe=default"),
        (["retrain=[default,lora]"], "retrain=[default,lora]: the group retrain takes one of its options"),
        (["model=[]"], "model=[]: the group model takes one of its options"),
        (["logger=csv", "logger.wandb.name=x"], "logger.wandb.name=x: logger.wandb is null and has nothing to set"),
        (["logger=[[csv]]"], "logger=[[csv]]: a list of the group's options, such as logger=[csv,wandb]"),
        (["affinity.groups=[sst2,rte]"], "affinity.groups[0] must be a list"),
        ([f"+{EXPERTS}.nope=1"], f"{EXPERTS}.nope: no such option"),
        ([f"+{EXPERTS}.teacher.nope=1"], f"{EXPERTS}.teacher.nope: no such option"),
        (["+eval.sets.a.path=x"], "add it whole, as in '+eval.sets={a:{...}}'"),
        (["eval.tasks=[[sciq]]"], "eval.tasks[0] must be text, not a list"),
        (["seed=" + "9" * 5000], "seed=999"),
        (["moe=null"], "moe=null: a group takes the name of one of its options"),
        (["~plan.devices.cpu"], "plan.device=cpu: plan.devices has none of this name"),
        (["model.architecture={dtype:int8}"], "model.architecture={dtype:int8}: model.architecture is null"),
        (["model=qwen3-8b", "model.architecture.dtype=int8"], "model.architecture.dtype (int8) is none of float64"),
        (["retrain.resume=/nope.ckpt"], "retrain.resume=/nope.ckpt: no such checkpoint; `last` finds the newest"),
        (["retrain.resume='a\nb'"], "retrain.resume=a b: no such checkpoint"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_what_was_taken_in_silence_or_ended_in_a_traceback_is_one_line(overrides: list[str], message: str) -> None:
    from tests.test_fuzz_config import begin

    with pytest.raises(UserError, match=re.escape(message)) as raised:
        begin(composed(overrides))
    assert len(str(raised.value).splitlines()) == 1


def test_the_largest_seed_seeds_every_generator() -> None:
    import lightning
    import numpy as np
    import torch

    assert composed([f"seed={MAX_SEED}"]).seed == MAX_SEED
    lightning.seed_everything(MAX_SEED, verbose=False)
    np.random.default_rng([MAX_SEED, 1])
    torch.Generator().manual_seed(MAX_SEED + 1000 * 10_000)


# ------------------------------------------------------------------------------------------------------------- stages


def stage() -> StageConfig:
    return StageConfig(tokens=1, train=FreezingConfig(router=Freezing.full))


@pytest.mark.parametrize("name", ["evaluation", *RESERVED_STAGES])
def test_a_stage_cannot_have_a_name_that_the_run_uses(name: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"retrain.stages.{name}: ")):
        RetrainConfig(stages={name: stage()})


@pytest.mark.parametrize("name", ["a/b", "..", "", " ", "x" * 65, "a b", "-a"])
def test_a_stages_name_is_one_of_a_folder(name: str) -> None:
    with pytest.raises(UserError, match="a stage's name has up to 64 letters"):
        RetrainConfig(stages={name: stage()})


@pytest.mark.parametrize(
    "overrides", [[], ["affinity=mined", "moe=plain"], ["model.load=streamed", "retrain=none", "eval.generations=0"]]
)
def test_every_name_of_the_plan_is_reserved(overrides: list[str]) -> None:
    config = composed(overrides)
    own = {stage.name for stage in plan(config, locate_architecture(config.model)).stages} - set(config.retrain.stages)
    assert own <= set(RESERVED_STAGES)


# ----------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    "content", [b"root:x:0:0:root:/root:/bin/bash\n", b"", b"\x80\x02}q\x00.", b"PK\x03\x04", b"\x00" * 99]
)
def test_another_file_is_no_checkpoint(tmp_path: Any, content: bytes) -> None:
    file = tmp_path / "other"
    file.write_bytes(content)
    with pytest.raises(UserError, match="is not a checkpoint of this project"):
        find_checkpoint(str(file), tmp_path / "partial", "retrain")


# ---------------------------------------------------------------------------------------------------------- small disks


def test_a_small_disk_is_told_in_its_own_unit() -> None:
    config = composed(["retrain=none"])
    (line,) = shortages(plan(config, locate_architecture(config.model)), Capacity(store=2e5))
    assert re.search(r"the run writes [0-9.]+ MB, 200 kB are free; set store=DIR", line)


def test_a_device_of_ones_own_is_held_to_bounds() -> None:
    figures = dict.fromkeys(("bfloat16", "float32", "float64", "link", "bandwidth"), 1e9)
    with pytest.raises(
        UserError, match=r"plan\.devices\.mine\.utilisation \(2\.0\) must be at least 1e-06 and at most 1"
    ):
        PlanConfig(devices={"mine": DeviceConfig(**figures, utilisation=2.0)})


def test_the_map_is_taken_from_the_beginnings_of_many_sequences() -> None:
    affinity = AffinityConfig(mapped=1000)
    assert affinity.mapped_of(32, 256) == (16, 63)  # 62.5 tokens of each
    assert affinity.mapped_of(3, 256) == (3, 256)  # no more than there are
    assert affinity.mapped_of(3, 2048) == (3, 334)


@pytest.mark.parametrize(
    ("ratio", "width"), [(0.75, 192), (0.76, 184), (0.0, 771)]
)  # no multiple of 8 where all are kept
def test_channels_kept(ratio: float, width: int) -> None:
    assert PruningConfig(ratio=ratio).width(771) == width
