"""Our router against the stock ones, and its dense mode by hand."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, PreTrainedModel, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from dive.api import reconstruct
from dive.config import Gate, Mode
from dive.model.families import moe_block
from dive.moe.balance import overload, z_loss
from dive.moe.plug import plug_routers, unplug
from dive.moe.router import Router
from dive.pruning.calibrate import collect_statistics

HIDDEN, EXPERTS = 8, 4


def stock_router(family: str, top_k: int) -> torch.nn.Module:
    if family == "mixtral":
        router: torch.nn.Module = MixtralTopKRouter(
            MixtralConfig(hidden_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=top_k)
        )
    else:
        router = Qwen3MoeTopKRouter(
            Qwen3MoeConfig(hidden_size=HIDDEN, num_experts=EXPERTS, num_experts_per_tok=top_k, norm_topk_prob=True)
        )
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    return router


def unnormalised_router(top_k: int) -> torch.nn.Module:
    router: torch.nn.Module = Qwen2MoeTopKRouter(
        Qwen2MoeConfig(hidden_size=HIDDEN, num_experts=EXPERTS, num_experts_per_tok=top_k, norm_topk_prob=False)
    )
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    return router


def rows(count: int = 10) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_sparse_mode_is_the_stock_router(family: str, top_k: int) -> None:
    stock = stock_router(family, top_k)
    ours = Router(stock, experts=EXPERTS, top_k=top_k)
    for training in (True, False):
        ours.train(training)
        for found, expected in zip(ours(rows()), stock(rows()), strict=True):
            assert torch.equal(found, expected)


def test_an_annealed_gate_by_hand() -> None:
    router, gates, selected, gradient = trained_gate(Gate.annealed, 1, exponent=0.5)
    assert gates.shape[1] == 2
    torch.testing.assert_close(gates, selected**2 / (selected**2).sum(dim=1, keepdim=True))  # softmax(log p / 0.5)
    assert float(gradient.abs().max()) > 1e-2
    load, _ = router.take_observations()
    first = torch.nn.functional.one_hot(router.eval()(rows())[2][:, 0], EXPERTS).float().mean(dim=0)
    torch.testing.assert_close(load, first)  # of the expert that the model will have
    _, gates, selected, _ = trained_gate(Gate.annealed, 1, exponent=0.0)  # as cold as it gets
    torch.testing.assert_close(gates, torch.softmax(selected.log() / 0.05, dim=1))


@pytest.mark.parametrize("gate", list(Gate))
@pytest.mark.parametrize("top_k", [1, 2])
def test_gates_that_are_probabilities_are_the_stock_routers_and_teach_it(top_k: int, gate: Gate) -> None:
    stock = unnormalised_router(top_k)
    ours = Router(stock, experts=EXPERTS, top_k=top_k, renormalise=False)
    ours.gate = gate
    for training in (True, False):
        ours.train(training)
        for found, expected in zip(ours(rows()), stock(rows()), strict=True):
            assert torch.equal(found, expected)
    gradients = []
    for router in (ours, stock):
        stock.weight.grad = None
        router(rows())[1].square().sum().backward()
        gradients.append(stock.weight.grad)
    assert gradients[0].abs().max() > 1e-3
    assert torch.equal(*gradients)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_gates_in_bfloat16_have_the_stock_element_type_and_value(family: str, top_k: int) -> None:
    stock = stock_router(family, top_k).bfloat16()
    ours = Router(stock, experts=EXPERTS, top_k=top_k)
    for found, expected in zip(ours.eval()(rows().bfloat16()), stock(rows().bfloat16()), strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("variant", ["llama", "qwen3"])
def test_in_bfloat16_a_plugged_model_has_the_logits_of_its_export(
    build: Callable[..., PreTrainedModel], tokens: Callable[..., Tensor], variant: str
) -> None:
    model = build(variant)
    statistics = collect_statistics(model, {name: tokens(2, 16, seed=seed) for seed, name in enumerate("abcd")})
    moe = reconstruct(model, list(statistics.values()), ratio=0.5, router_init="random", top_k=2).bfloat16()
    ids = tokens(2, 16, seed=9)
    plug_routers(moe)
    plugged = moe(input_ids=ids).logits
    unplug(moe)
    assert torch.equal(moe(input_ids=ids).logits, plugged)


def test_sparse_gates_by_hand() -> None:
    # Logits ln 1, ln 2, ln 5, 0 → softmax 1, 2, 5, 1 over 9; the two largest renormalised: 5/7 and 2/7.
    router = Router(stock_router("mixtral", 2), experts=EXPERTS, top_k=2).eval()
    router.weight.data.zero_()
    router.weight.data[:4, 0] = torch.tensor([1.0, 2.0, 5.0, 1.0]).log()
    router.weight.data[4:, 0] = -30.0
    _, gates, chosen = router(torch.eye(router.weight.shape[1])[:1])
    assert chosen.tolist() == [[2, 1]]
    assert gates[0].tolist() == pytest.approx([5 / 7, 2 / 7])


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.05])
def test_dense_mode_is_a_softmax_over_all_experts(temperature: float) -> None:
    stock = stock_router("mixtral", 1)
    router = Router(stock, experts=EXPERTS, top_k=1).eval()
    router.mode, router.temperature = Mode.dense, temperature
    logits, gates, chosen = router(rows(3))
    for token in range(3):
        powers = [math.exp(x / temperature) for x in logits[token].tolist()]
        assert gates[token].tolist() == pytest.approx([p / sum(powers) for p in powers], rel=1e-4)
        assert chosen[token].tolist() == list(range(EXPERTS))


def test_temperature_does_not_touch_the_sparse_mode() -> None:
    router = Router(stock_router("mixtral", 2), experts=EXPERTS, top_k=2).eval()
    before = router(rows())[1]
    router.temperature = 0.05
    assert torch.equal(router(rows())[1], before)


def test_noise_in_training_only() -> None:
    stock = stock_router("mixtral", 2)
    router = Router(stock, experts=EXPERTS, top_k=2, noise=0.5)
    clean = torch.nn.functional.linear(rows(), stock.weight)
    torch.manual_seed(0)
    noisy = router.train()(rows())[0]
    # The noise weights start at zero: softplus(0) = ln 2.
    torch.manual_seed(0)
    torch.testing.assert_close(noisy, clean + torch.randn_like(clean) * math.log(2) * 0.5)
    assert torch.equal(router.eval()(rows())[0], clean)


def test_without_noise_there_are_no_noise_weights() -> None:
    router = Router(stock_router("mixtral", 2), experts=EXPERTS, top_k=2)
    assert [name for name, _ in router.named_parameters()] == ["weight"]


def test_noise_weights_are_trained_by_the_gates() -> None:
    router = Router(stock_router("mixtral", 2), experts=EXPERTS, top_k=2, noise=0.5).train()
    router(rows())[1][:, 0].sum().backward()
    assert router.noise_weight is not None
    assert router.noise_weight.grad is not None
    assert router.noise_weight.grad.abs().sum() > 0


def test_observations_by_hand() -> None:
    stock = stock_router("mixtral", 1)
    stock.weight.data.zero_()
    stock.weight.data[0, 0] = stock.weight.data[1, 1] = math.log(3)  # softmax 3, 1, 1, 1 over 6
    router = Router(stock, experts=EXPERTS, top_k=1)
    first, second = torch.eye(HIDDEN)[0], torch.eye(HIDDEN)[1]
    router.train()(torch.stack([first, first, first, second]))
    router.eval()(first[None])  # evaluation is not counted
    load, entropy = router.take_observations()
    assert load.tolist() == [0.75, 0.25, 0.0, 0.0]
    assert float(entropy) == pytest.approx(0.5 * math.log(2) + 3 / 6 * math.log(6), rel=1e-5)
    assert router.take_observations()[0].tolist() == [0.0] * EXPERTS


def test_dense_mode_observes_gates() -> None:
    stock = stock_router("mixtral", 1)
    stock.weight.data.zero_()
    stock.weight.data[0, 0] = math.log(3)
    router = Router(stock, experts=EXPERTS, top_k=1).train()
    router.mode = Mode.dense
    router(torch.eye(HIDDEN)[:2])  # gates (3, 1, 1, 1) / 6 and 1/4 each
    load, entropy = router.take_observations()
    assert load.tolist() == pytest.approx([0.375, 0.625 / 3, 0.625 / 3, 0.625 / 3])
    assert float(entropy) == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(6) + math.log(4)) / 2, rel=1e-5)


@pytest.mark.parametrize("variant", ["llama", "qwen3"])
def test_a_whole_block_in_dense_mode_is_the_weighted_sum_of_all_experts(
    build: Callable[..., PreTrainedModel], tokens: Callable[..., Tensor], variant: str
) -> None:
    model = build(variant)
    statistics = collect_statistics(model, {"a": tokens(2, 16), "b": tokens(2, 16, seed=1)})
    moe = reconstruct(model, list(statistics.values()), ratio=0.5, router_init="random")
    plug_routers(moe)
    block = moe_block(moe, 1)
    block.gate.mode, block.gate.temperature = Mode.dense, 0.5
    hidden = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(2))
    weights = torch.softmax(hidden[0] @ block.gate.weight.T / 0.5, dim=-1)
    expected = torch.zeros(6, 32)
    for expert in range(2):
        gate, up = block.experts.gate_up_proj[expert].chunk(2)
        channels = torch.nn.functional.silu(hidden[0] @ gate.T) * (hidden[0] @ up.T)
        expected += weights[:, expert, None] * (channels @ block.experts.down_proj[expert].T)
    torch.testing.assert_close(block(hidden)[0], expected, rtol=1e-4, atol=1e-4)


def trained_gate(gate: Gate, top_k: int, exponent: float = 1.0) -> tuple[Router, Tensor, Tensor, Tensor]:
    """(router, gates, probabilities of the selected experts, gradient of Σ gates · 1…K in the router's weight)"""
    router = Router(stock_router("mixtral", top_k), experts=EXPERTS, top_k=top_k).train()
    router.gate, router.exponent = gate, exponent
    logits, gates, chosen = router(rows())
    (gates * torch.arange(1, gates.shape[1] + 1)).sum().backward()
    assert router.weight.grad is not None
    return router, gates, torch.softmax(logits, dim=-1).gather(1, chosen), router.weight.grad


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_straight_through_gate_has_stock_values_and_a_gradient(top_k: int) -> None:
    _, stock, _, without = trained_gate(Gate.renormalised, top_k)
    _, gates, _, gradient = trained_gate(Gate.straight_through, top_k)
    torch.testing.assert_close(gates, stock)
    if top_k == 1:
        assert float(without.abs().max()) == 0.0  # the trap that it is for
    assert float((gradient - without).abs().max()) > 1e-2


def test_a_switch_gate_by_hand() -> None:
    _, gates, selected, gradient = trained_gate(Gate.switch, 1, exponent=0.5)
    torch.testing.assert_close(gates, selected**0.5)
    assert float(gradient.abs().max()) > 1e-2
    _, gates, selected, _ = trained_gate(Gate.switch, 2, exponent=1.0)
    torch.testing.assert_close(gates, selected)
    _, gates, *_ = trained_gate(Gate.switch, 1, exponent=0.0)
    torch.testing.assert_close(gates, torch.ones_like(gates))


@pytest.mark.parametrize("gate", list(Gate))
@pytest.mark.parametrize("top_k", [1, 2])
def test_evaluation_is_the_stock_router_whatever_the_gate(gate: Gate, top_k: int) -> None:
    router, *_ = trained_gate(gate, top_k)
    router.eval()
    for found, expected in zip(router(rows()), stock_router("mixtral", top_k)(rows()), strict=True):
        assert torch.equal(found, expected)


def test_penalties_are_those_of_the_last_pass_in_training() -> None:
    router = Router(stock_router("mixtral", 1), experts=EXPERTS, top_k=1)
    router.balance, router.max_load, router.z_loss = 0.5, 1.1, 0.25
    logits, _, chosen = router.train()(rows())
    expected = 0.5 * overload(torch.softmax(logits, dim=-1), chosen, max_load=1.1) + 0.25 * z_loss(logits)
    assert router.penalty is not None
    torch.testing.assert_close(router.penalty, expected)
    assert float(expected.detach()) > 0
    router.balance = router.z_loss = 0.0
    router(rows())
    assert router.penalty is None
    assert router.take_penalty() is None


def test_a_penalty_is_taken_once() -> None:
    router = Router(stock_router("mixtral", 1), experts=EXPERTS, top_k=1).train()
    router.z_loss = 1.0
    router(rows())
    assert router.take_penalty() is not None
    assert router.take_penalty() is None


def test_what_is_not_recorded_leaves_no_penalty_and_no_load() -> None:
    router = Router(stock_router("mixtral", 1), experts=EXPERTS, top_k=1).train()
    router.z_loss, router.recording = 1.0, False
    router(rows())
    assert router.penalty is None
    assert float(router.tokens) == float(router.load.sum()) == 0.0
