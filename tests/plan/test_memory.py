"""Memory by hand, and against what autograd really keeps."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from dive.calibration_domains import generated
from dive.config import ExpertsBy, Freezing, FreezingConfig, Mode, StageConfig, TeacherConfig
from dive.eval.perplexity import token_nll
from dive.model.architecture import locate_architecture, read_architecture
from dive.model.families import decoder_layers, empty_moe, moe_config
from dive.moe.implementation import use_experts
from dive.moe.plug import plug_routers, routers
from dive.plan import memory
from dive.plan.job import Job, describe_job
from dive.plan.stages import Plan
from dive.plan.stages import plan as plan_of
from dive.retrain import loss
from dive.retrain.freezing import apply_policy
from dive.retrain.module import MoERetraining
from dive.retrain.training import Training
from dive.trainer.build import build_trainer
from tests.conftest import Build
from tests.model.test_architecture import typed, with_toy_texts


def job_of(*overrides: str) -> Job:
    config = with_toy_texts(*overrides)
    return describe_job(config, locate_architecture(config.model), config.plan.device)


def peak(run: Callable[[], object]) -> int:
    """Bytes of tensors that a computation has alive at once, beside what was there before, by torch's own account."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    assert recorded.profiler is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def of_model(dense: PreTrainedModel, *overrides: str, device: str = "cpu") -> Job:
    return describe_job(typed(*overrides), read_architecture(dense.config.to_dict()), device)


LARGE = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "vocab_size": 8192,
    "initializer_range": 0.1,
}
"""A vocabulary 256 times the width, as SmolLM2's is 85 times."""


@pytest.mark.parametrize("channels", [64, 512])  # where attention and where the FFN has the peak
def test_a_dense_layer_holds_what_was_planned(build: Build, channels: int) -> None:
    dense = build("llama", hidden_size=64, intermediate_size=channels, num_hidden_layers=3)
    rows = torch.randint(320, (4, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        measured = peak(lambda: dense.base_model(input_ids=rows, use_cache=False))
    assert memory.dense_layer(of_model(dense), 200) == pytest.approx(measured, rel=0.06)


def test_what_calibration_keeps_by_hand() -> None:
    job = job_of("model=tinyllama", "plan.device=h100", "calibration_domains.samples=10")
    found = memory.calibration(job, sequences=16 * 10, length=256)
    assert found.device["dense model"] == 2 * 1_100_048_384
    assert found.host["hidden states"] == 16 * 10 * 256 * 2048 * 2  # 16 embedded domains
    assert found.host["statistics"] == 16 * 22 * 5632 * 2 * 8


@pytest.mark.parametrize("variant", ["llama", "llama-tied"])
def test_evaluation_of_a_large_vocabulary(build: Build, variant: str) -> None:
    dense = build(variant, **LARGE)
    job = of_model(dense, "eval.lengths=[48]", "eval.batch=8")
    windows = torch.randint(8192, (8, 48), generator=torch.Generator().manual_seed(0))
    assert memory.evaluation(job).host["logits"] == pytest.approx(
        peak(lambda: token_nll(dense, windows, batch=8)), rel=0.05
    )


NEXT_TO_TRAINING = ("process", "allocator", "dense model", "Mixture-of-Experts")


@pytest.mark.parametrize(
    ("teacher", "checkpointing"),
    [(TeacherConfig(logits=0.5, hidden=4.0), False), (TeacherConfig(), False), (TeacherConfig(hidden=4.0), True)],
    ids=["teacher", "text alone", "checkpointed"],
)
@pytest.mark.parametrize("experts", [Freezing.full, Freezing.lora])
def test_training_with_a_large_vocabulary_and_tied_embeddings(
    build: Build, tmp_path: Path, teacher: TeacherConfig, checkpointing: bool, experts: Freezing
) -> None:
    """A whole stage by Lightning: forward and backward pass, teacher, loss, gradients, Adam."""
    dense = build("llama-tied", **LARGE)
    overrides = ["pruning.ratio=0.5", "moe.experts=4", "retrain.length=64", "retrain.lora.dropout=0"]
    job = of_model(dense, *overrides, f"trainer.gradient_checkpointing={str(checkpointing).lower()}")
    train = FreezingConfig(router=Freezing.full, norms=Freezing.full, experts=experts)
    stage = StageConfig(tokens=2 * 4 * 64, batch=4, train=train, teacher=teacher)
    student = empty_moe(moe_config(dense.config, width=48, experts=4, top_k=1), torch.float32)
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    plug_routers(student)
    apply_policy(student, stage.train, job.config.retrain.lora)
    if checkpointing:
        student.activation_checkpointing_enable({"use_reentrant": False})
    text = torch.randint(8192, (16, 64), generator=torch.Generator().manual_seed(0))
    module = MoERetraining(
        student,
        Training(
            name="retrain",
            stage=stage,
            lora=job.config.retrain.lora,
            length=64,
            noise=0.0,
            precision="32-true",
            clip=1.0,
            seed=0,
            passes=None,
        ),
        lambda number: text[number],
        key="",
        first_block=0,
        accumulation=1,
        log_every=1,
        shard=False,
        teacher=dense if teacher.wanted else None,
    )
    trainer = build_trainer(
        job.config.trainer,
        layer_class=type(decoder_layers(student)[0]),
        steps=module.steps,
        accumulation=1,
        checkpoints=tmp_path,
        checkpoint_every=100,
        loggers=[],
    )
    found = memory.retraining(job, stage, []).host
    planned = sum(size for name, size in found.items() if name not in NEXT_TO_TRAINING)
    planned -= found["adapters"]  # plugged before
    assert planned == pytest.approx(peak(lambda: trainer.fit(module)), rel=0.12)


def test_a_teacher_shares_what_is_frozen() -> None:
    shared = 22 * 2 * 2048 * (2048 + 256) + 2 * 32000 * 2048  # attention, embeddings and head of TinyLlama
    found = {}
    for hidden in (0, 4):
        job = job_of("model=tinyllama", "trainer=gpu", f"retrain.stages.retrain.teacher={{logits:0,hidden:{hidden}}}")
        stage = job.config.retrain.stages["retrain"]
        found[hidden] = memory.retraining(job, stage, []).device["Mixture-of-Experts"]
    assert found[0] - found[4] == 2 * shared


def test_the_loss_is_taken_in_the_same_chunks() -> None:
    assert memory.LOSS_CHUNK == loss.CHUNK


def test_text_is_written_in_the_same_batches() -> None:
    assert memory.GENERATED_ROWS == generated.ROWS


def test_on_a_cpu_everything_is_in_the_hosts_memory() -> None:
    found = memory.calibration(job_of("model=tinyllama", "trainer=cpu"), sequences=512, length=256)
    assert not found.device
    assert found.host["dense model"] == 4 * 1_100_048_384  # in float32


def test_weights_reach_a_gpu_by_way_of_the_host() -> None:
    found = memory.evaluation(job_of("model=llama2-7b", "plan.device=h100"))
    assert found.host["loading"] == found.device["dense model"] == 2 * 6_738_415_616
    layer = memory.evaluation(job_of("model=llama2-7b", "trainer=cpu")).host["loading"]
    assert layer == 4 * (2 * 8 * 3 * 4096 * 2752)  # two layers' experts, in float32


def test_second_moments_of_every_group() -> None:
    job = job_of("model=llama2-7b", "plan.device=h100", "moe=plain", "moe.experts=8")
    found = memory.building(job, experts=8, groups=8, sequences=512, refined=None)
    assert found.device["second moments"] == (8 + 2) * 484_704_256
    without = job_of("model=llama2-7b", "plan.device=h100", "moe=plain", "pruning=wanda_sp", "moe.experts=8")
    found = memory.building(without, experts=8, groups=8, sequences=512, refined=None)
    assert found.device["second moments"] == 0


def test_processes_of_one_machine_add_up() -> None:
    one = job_of("model=tinyllama", "trainer=gpu")
    eight = job_of("model=tinyllama", "trainer=ddp", "trainer.devices=8")
    stage = one.config.retrain.stages["retrain"]
    single, many = (memory.retraining(job, stage, []) for job in (one, eight))
    assert many.host_peak == pytest.approx(8 * single.host_peak)


def test_optimiser_by_hand() -> None:
    job = job_of("model=tinyllama", "trainer=gpu", "experiment=paper_1_8")
    stages = job.config.retrain.stages
    found = memory.retraining(job, stages["retrain"], [stages["router"]]).device
    assert found["Adam"] == 2 * 21_358_592 * 4  # float32 under mixed precision
    assert found["Mixture-of-Experts"] == 2 * (3_384_207_360 + 360_448)  # FLAP's biases
    lora, noise = 20_545_536, 360_448
    # What is trained in full grows to float32.
    assert found["adapters"] == (lora + noise) * 4 + (2 * 360_448 + 92_160) * 2


STAGES = {
    "router, dense": StageConfig(mode=Mode.dense, tokens=1, train=FreezingConfig(router=Freezing.full)),
    "paper": StageConfig(
        tokens=1, train=FreezingConfig(router=Freezing.full, norms=Freezing.full, experts=Freezing.lora)
    ),
    "full": StageConfig(
        tokens=1, train=FreezingConfig(router=Freezing.full, norms=Freezing.full, experts=Freezing.full)
    ),
}


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("by", ["auto", "ours", "eager", "batched_mm"])
def test_saved_activations_are_what_autograd_keeps(build: Build, stage: StageConfig, top_k: int, by: str) -> None:
    if stage.train.experts is Freezing.lora and by not in ("auto", "ours"):
        pytest.skip("transformers' own know no adapters")
    dense = build("llama", hidden_size=64, intermediate_size=192, num_hidden_layers=6)
    overrides = (
        "pruning.ratio=0.5",
        "moe.experts=4",
        f"moe.top_k={top_k}",
        "retrain.lora.rank=4",
        "retrain.lora.dropout=0",
        f"trainer.experts={by}",
    )
    job = of_model(dense, *overrides)
    moe = empty_moe(moe_config(dense.config, width=96, experts=4, top_k=top_k), torch.float32)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    plug_routers(moe)
    apply_policy(moe, stage.train, job.config.retrain.lora)
    use_experts(moe, ExpertsBy(by))
    for router in routers(moe):
        router.mode = stage.mode
    moe.train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in moe.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # alive, so that no other takes its address
        return tensor

    rows = torch.randint(320, (4, 50), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = moe(input_ids=rows, use_cache=False).logits
        functional.cross_entropy(logits.flatten(0, 1), rows.flatten())
    of_logits = 200 * 320 * 4
    measured = sum(storage.nbytes() for storage in kept.values()) - of_logits
    # Nothing below the first layer's router is trained in the first of them, so that its copies of weights are not kept.
    near = 0.2 if by == "batched_mm" else 0.15
    assert memory.saved_activations(job, stage, 200)["activations"] == pytest.approx(measured, rel=near)


def test_indexed_experts_need_little_beside_the_dense_model() -> None:
    settings = [
        "model=llama2-7b",
        "plan.device=h100",
        "moe=plain",
        "retrain=lora",
        "pruning.ratio=0.5",
        "pruning.metric=wifv",
    ]
    found = {}
    for storage in ("materialised", "indexed"):
        for compensation in ("least_squares", "none"):
            job = job_of(*settings, f"retrain.storage={storage}", f"pruning.compensation={compensation}")
            stage = job.config.retrain.stages["retrain"]
            found[storage, compensation] = memory.retraining(job, stage, []).device["Mixture-of-Experts"]
    norms, router, down = 65 * 4096, 32 * 8 * 4096, 32 * 8 * 4096 * 5504  # everything else is the teacher's
    assert found["materialised", "none"] == found["materialised", "least_squares"] == 2 * (norms + router + 3 * down)
    assert found["indexed", "none"] == 2 * (norms + router)
    assert found["indexed", "least_squares"] == 2 * (norms + router + down)


def test_streamed_runs_hold_one_layer_and_write_the_type_that_is_asked_for() -> None:
    settings = ["model=tinyllama", "trainer=cpu", "model.dtype=float32", "affinity=random", "retrain=none", "moe=plain"]
    streamed = plan(*settings, "model.load=streamed", "model.export_dtype=bfloat16")
    assert [stage.name for stage in streamed.stages] == ["reconstructed", "export"]
    building, export = streamed.stages
    layer = 3 * 2048 * 5632 + 2 * 2048 * (2048 + 256) + 2 * 2048
    assert building.memory.host["dense model"] == 4 * (layer + 2048 * 5633)  # and the tensor that is being read
    assert export.memory.host["a shard"] == 1 << 30
    assert export.written == 2 * streamed.parameters["total"]
    full = plan(*settings)
    assert full.stages[-1].written == 4 * full.parameters["total"]
    assert full.host > 3 * streamed.host


def plan(*overrides: str) -> Plan:
    config = with_toy_texts(*overrides)
    return plan_of(config, locate_architecture(config.model), device="cpu")
