"""Which code computes the experts: chosen by what they are, the same numbers whichever it is, and impossible ones refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dive.api import reconstruct
from dive.config import Config, ExpertsBy, Freezing, FreezingConfig, LoRAConfig
from dive.errors import UserError
from dive.moe.experts import IMPLEMENTATION
from dive.moe.implementation import check_aligned, check_kernel, use_experts
from dive.moe.plug import plug_expert_lora, plug_routers
from dive.pruning.calibrate import collect_statistics
from dive.retrain.freezing import apply_policy
from tests.conftest import Build
from tests.model.test_architecture import typed

STOCK = [by for by in ExpertsBy if by not in (ExpertsBy.auto, ExpertsBy.ours, ExpertsBy.sonicmoe)]
LORA = LoRAConfig(rank=4, alpha=8.0)


@pytest.fixture
def make(build: Build, tokens: Callable[..., Tensor]) -> Callable[..., Any]:
    def make(**settings: Any) -> PreTrainedModel:
        model = build("llama")
        statistics = collect_statistics(model, {"a": tokens(3, 16), "b": tokens(3, 16, seed=1)})
        moe = reconstruct(model, list(statistics.values()), **{"ratio": 0.5, "router_init": "random", **settings})
        plug_routers(moe)
        return moe

    return make


def runs(model: PreTrainedModel) -> str:
    return str(model.config._experts_implementation)


def test_stock_runs_where_it_can(make: Callable[..., Any]) -> None:
    model = make()
    assert runs(model) == "grouped_mm"
    assert str(use_experts(model)) == "experts run by transformers 'grouped_mm': no adapters, no biases"


def test_adapters_and_biases_are_ours(make: Callable[..., Any]) -> None:
    model = make()
    plug_expert_lora(model, LORA)
    assert runs(model) == IMPLEMENTATION
    assert str(use_experts(model)) == "experts run by our grouped products: they have LoRA adapters"
    biased = make(compensation="bias")
    assert runs(biased) == IMPLEMENTATION
    assert use_experts(biased).why == "they have biases"
    for stock in (*STOCK, ExpertsBy.sonicmoe):
        for lacking in (model, biased):
            with pytest.raises(
                UserError, match=f"^trainer.experts={stock.value}: they have .*set trainer.experts=auto"
            ):
                use_experts(lacking, stock)


def test_mixed_precision_is_ours_where_weights_are_wider(make: Callable[..., Any]) -> None:
    model = make()
    choice = use_experts(model, autocast="bfloat16")
    assert (choice.name, runs(model)) == (IMPLEMENTATION, IMPLEMENTATION)
    assert "float32" in choice.why
    assert use_experts(model.bfloat16(), autocast="bfloat16").name == "grouped_mm"


def test_odd_widths_are_ours(make: Callable[..., Any]) -> None:
    model = make(width_multiple=1, ratio=0.55)  # 22 of 48 channels: 88 bytes
    assert use_experts(model).name == IMPLEMENTATION
    check_aligned(ExpertsBy.eager, hidden=32, width=22, dtype=torch.float32)
    check_aligned(ExpertsBy.grouped_mm, hidden=32, width=24, dtype=torch.float32)
    with pytest.raises(UserError, match=r"experts of 22 channels .* float32 .* set trainer\.experts=auto"):
        check_aligned(ExpertsBy.grouped_mm, hidden=32, width=22, dtype=torch.float32)


@pytest.mark.parametrize("by", [ExpertsBy.ours, *STOCK])
def test_training_is_the_same_by_each(make: Callable[..., Any], by: ExpertsBy, tokens: Callable[..., Tensor]) -> None:
    found = []
    for chosen in (ExpertsBy.auto, by):
        model = make(top_k=2)
        apply_policy(model, FreezingConfig(router=Freezing.full, experts=Freezing.full, norms=Freezing.full), LORA)
        assert use_experts(model, chosen).name == (IMPLEMENTATION if chosen is ExpertsBy.ours else runs(model))
        ids = tokens(3, 11)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append((loss, [p.grad for p in model.parameters() if p.requires_grad]))
    (one, ours), (other, theirs) = found
    torch.testing.assert_close(one, other)
    for gradient, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, its, rtol=1e-4, atol=1e-6)


def test_under_autocast_ours_computes_in_its_type_and_grouped_mm_does_not(make: Callable[..., Any]) -> None:
    """Why mixed precision is ours."""
    model, seen = make(), {}
    experts: Any = model.model.layers[0].mlp.experts
    monitored = nn.functional.grouped_mm if hasattr(nn.functional, "grouped_mm") else torch._grouped_mm
    for by in (ExpertsBy.ours, ExpertsBy.grouped_mm):
        use_experts(model, by)
        kinds = seen.setdefault(by, set())

        class Watch(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if function in (monitored, torch._grouped_mm):
                    kinds.add(args[1].dtype)  # noqa: B023
                return function(*args, **(kwargs or {}))

        with torch.autocast("cpu", torch.bfloat16), Watch():
            experts(torch.randn(6, 32), torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1))
    assert seen == {ExpertsBy.ours: {torch.bfloat16}, ExpertsBy.grouped_mm: {torch.float32}}


def test_a_kernel_that_is_not_here_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("may be here")
    check_kernel(ExpertsBy.auto, activation="silu")
    with pytest.raises(UserError, match=r"^trainer.experts=sonicmoe cannot run here \(.*\); set trainer.experts=auto$"):
        check_kernel(ExpertsBy.sonicmoe, activation="silu")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["retrain=lora", "trainer.experts=eager"],
            r"retrain\.stages\.retrain\.train\.experts=lora has some; set trainer\.e",
        ),
        (
            ["retrain=full", "moe=plain", "pruning=flap", "pruning.compensation=bias", "trainer.experts=grouped_mm"],
            "knows no biases of experts, and pruning.compensation=bias",
        ),
        (["trainer.experts=sonicmoe"], "is a kernel for GPUs; set trainer.experts=auto"),
        (["trainer=gpu", "trainer.experts=sonicmoe"], "trainer.precision=bf16-mixed keeps .* in float32; set"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_composed(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        typed(*overrides)


def test_what_trains_nothing_asks_for_nothing() -> None:
    config: Config = typed("trainer.experts=sonicmoe", "retrain=none")
    assert config.trainer.experts is ExpertsBy.sonicmoe
