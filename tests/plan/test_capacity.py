"""A run without room is refused, and one that goes on is not."""

from pathlib import Path

import pytest

from dive.errors import UserError
from dive.model.architecture import locate_architecture
from dive.plan.capacity import Capacity, here, refuse, shortages
from dive.plan.stages import Plan, plan
from tests.model.test_architecture import with_toy_texts


def planned(*overrides: str) -> Plan:
    stages = [] if any(o.startswith(("experiment=", "retrain=")) for o in overrides) else ["retrain=two_stages"]
    config = with_toy_texts(*stages, *overrides)
    return plan(config, locate_architecture(config.model))


LARGE = ("model=llama2-7b", "trainer=gpu", "trainer.accumulation=1")


def test_with_room_for_all_nothing_is_short() -> None:
    assert shortages(planned(), Capacity(host=1e12, device=1e12, store=1e12)) == []
    refuse(planned(), Capacity(host=1e12, store=1e12))


def test_unknown_room_is_not_held_against_a_run() -> None:
    assert shortages(planned("model=llama2-13b"), Capacity()) == []


def test_too_little_memory_names_what_fills_it_and_the_override() -> None:
    found = shortages(planned(*LARGE), Capacity(device=20e9))
    assert len(found) == 1
    assert "device memory" in found[0]
    assert "there is 20 GB" in found[0]
    assert "trainer.accumulation" in found[0]
    with pytest.raises(UserError, match=r"plan\.enforce=false"):
        refuse(planned(*LARGE), Capacity(device=20e9))
    refuse(planned(*LARGE, "plan.enforce=false"), Capacity(device=20e9))


def test_weights_in_float32_on_a_small_host() -> None:
    found = shortages(
        planned("model=llama2-7b", "model.dtype=float32", "retrain=none", "eval.batch=1"), Capacity(host=2e10)
    )
    assert "model.dtype=bfloat16" in found[0]


def test_the_disk_counts_store_checkpoints_and_export() -> None:
    it = planned("model=llama2-7b", "plan.device=h100")
    assert shortages(it, Capacity(store=it.disk + 1)) == []
    assert "set store=DIR" in shortages(it, Capacity(store=it.disk - 1))[0]


def test_the_export_may_lie_on_another_disk() -> None:
    it = planned("model=llama2-7b", "plan.device=h100")
    assert shortages(it, Capacity(store=it.disk - it.export + 1, outputs=it.export + 1)) == []
    assert "hydra.run.dir" in shortages(it, Capacity(store=it.disk, outputs=it.export - 1))[0]


def test_what_lies_in_the_store_is_not_written_again() -> None:
    it = planned("model=llama2-7b", "plan.device=h100")
    experts = sum(stage.written for stage in it.stages if stage.kind == "experts")
    full = Capacity(store=it.disk - experts + 1)
    assert shortages(it, full)
    assert shortages(it, Capacity(store=full.store, stored={"experts": experts})) == []
    # of one kind alone: experts in abundance make no room for checkpoints
    assert shortages(it, Capacity(store=it.export, stored={"experts": 100 * experts}))


def test_a_pass_that_is_too_large_is_to_be_cut_up() -> None:
    model = ("model=llama2-13b", "retrain=lora", "trainer=gpu", "trainer.accumulation=1")
    # Both models fit. With the activations of 8 sequences they do not.
    assert "raise trainer.accumulation" in shortages(planned(*model), Capacity(device=80e9))[0]
    cut = planned(*model[:3], "retrain.length=1024")
    assert "lower trainer.pass_tokens" in shortages(cut, Capacity(device=80e9))[0]
    assert shortages(planned(*model, "trainer.accumulation=8"), Capacity(device=80e9)) == []
    assert "lower moe.experts" in shortages(planned(*model), Capacity(device=60e9))[0]


def test_a_pass_that_is_as_small_as_can_be() -> None:
    small = ("model=tinyllama", "retrain=default", "trainer.accumulation=8", "trainer.gradient_checkpointing=true")
    it = planned(*small, "retrain.length=2048")
    peak = max(stage.memory.device_peak for stage in it.stages)
    assert "; set retrain=lora" in shortages(it, Capacity(device=peak - 1e8))[0]
    less = planned(*small[:3], "retrain.length=4096", "trainer.gradient_checkpointing=false")
    peak = max(stage.memory.device_peak for stage in less.stages)
    assert "; set trainer.gradient_checkpointing=true" in shortages(less, Capacity(device=peak - 1e8))[0]


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (["calibration_domains.samples=4096"], "lower calibration_domains.samples, or set moe=plain"),
        (["budget=paper", "calibration_domains=paper"], "lower calibration_domains.group_samples, or set moe=plain"),
    ],
)
def test_text_that_does_not_fit_the_host_is_to_be_less(overrides: list[str], remedy: str) -> None:
    it = planned("model=llama2-7b", "plan.device=h100", *overrides)
    assert shortages(it, Capacity(host=64e9))[0].endswith(remedy)


def test_this_machine(tmp_path: Path) -> None:
    store = tmp_path / "store"
    for folder, size in (
        ("experts/abc", 1000),
        ("partial/experts-def", 500),
        ("partial/retrained-def", 20),
        ("tokens/ghi", 8),
    ):
        (store / folder).mkdir(parents=True)
        (store / folder / "file").write_bytes(bytes(size))
    found = here(store, tmp_path / "not" / "there" / "yet", device=None)
    assert found.stored == {"experts": 1500.0, "partial": 20.0, "retrained": 8.0}  # finished layers, and checkpoints
    assert found.outputs is None  # the same disk
    assert found.host is not None
    assert found.store is not None
    assert found.host > 1e6
    assert found.store > 1e6
