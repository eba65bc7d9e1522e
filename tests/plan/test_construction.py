"""What building experts costs, by hand for Llama-2-7B's shapes."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dive.config import Config, DistillationConfig, MoEConfig, PlainConfig, RefinedConfig
from dive.moe import clustering
from dive.moe.constructions import refined
from dive.plan import construction
from dive.plan.construction import Refinement
from dive.plan.parameters import Shapes, shapes
from tests.model.test_architecture import typed


@pytest.fixture(scope="module")
def llama() -> Shapes:
    config = typed("model=llama2-7b", "pruning.ratio=0.75", "moe.experts=8")
    assert config.model.architecture is not None
    return shapes(config.model.architecture, config)


def test_second_moments(llama: Shapes) -> None:
    assert construction.moment_bytes(llama) == 11008 * 11008 * 4 == 484_704_256  # 485 MB a layer and group
    # rows 1 to 8 of the eighths of a square of 8 × 8, from the diagonal on: 8 + 7 + ... + 1 = 36 of 64
    assert construction.moments(llama, 1000) == 2 * 1000 * 11008**2 * 36 // 64


def test_least_squares(llama: Shapes) -> None:
    d, f, w = 4096, 11008, 2752
    assert llama.width == w
    assert construction.solve(llama) == 2 * d * f * w + w**3 // 3 + 2 * d * w * w
    assert construction.solve_bytes(llama) == 8 * (f * f + d * f + w * w + f * w + d * w)


def test_elimination(llama: Shapes) -> None:
    d, f, w = 4096, 11008, 2752
    # Cholesky factor and the inverse from it, weights times the inverse, then a rank-1 update of what is left for each channel
    updates = sum(2 * left * (left + d) for left in range(w, f))
    assert construction.eliminate(llama) == pytest.approx(f**3 + 2 * d * f * f + updates, rel=1e-3)
    assert construction.eliminate_bytes(llama) == 4 * 8 * f * f + 2 * 8 * d * f


def test_router(llama: Shapes) -> None:
    settings = DistillationConfig(tokens=2048, steps=10, batch=512)
    errors = 2048 * 8 * 6 * 4096 * 2752
    assert construction.router_fit(llama, settings, 2048) == errors + 10 * 512 * 4 * 8 * 4096


def test_refinement(llama: Shapes) -> None:
    settings = Refinement(derivations=3, steps=10, batch=64, active=2, pairs=1.5)
    router = DistillationConfig(tokens=2048, steps=10, batch=512)
    d, f, w, n, length = 4096, 11008, 2752, 1000, 256
    one_round = n * 6 * d * f + construction.moments(llama, n) + construction.router_fit(llama, router, n)
    assert construction.ROUND_TOKENS == refined.ROUND_TOKENS
    assert construction.KMEANS_TOKENS == refined.KMEANS_TOKENS
    assert construction.KMEANS_ROUNDS == clustering.ROUNDS
    # forward; gradients of three matrices, and of what goes into the last
    steps = 10 * 64 * 1.5 * (3 + 3 + 1) * 2 * d * w
    forward = n * (6 * d * f + 2 * 4 * d * d + 4 * length * d + 2 * 8 * d + 6 * d * w)
    assert construction.refine(llama, settings, router, n, length) == 3 * one_round + steps + forward
    both = construction.solve(llama) + construction.eliminate(llama)
    assert construction.refine_solves(llama, settings, eliminates=True) == 3 * 8 * both
    assert construction.refine_solves(llama, settings, eliminates=False) == 3 * 8 * construction.solve(llama)
    most = 8 * 4 * f  # tokens of all rounds but the last
    less = construction.refine(llama, settings, router, 3 * most, length) - construction.refine(
        llama, replace(settings, derivations=2), router, 3 * most, length
    )
    assert less == most * 6 * d * f + construction.moments(llama, most) + construction.router_fit(llama, router, 2048)
    # dense and rebuilt states, what the dense FFN made and the next inputs in float32; the rebuilt prefix in bfloat16
    assert construction.refine_host_bytes(llama, n, 2) == n * d * (4 * 4 + 2)
    held, more = (construction.refine_device_bytes(llama, replace(settings, batch=n)) for n in (100_000, 100_064))
    experts = 8 * 3 * d * w * (4 + 4 + 4 + 8 + 4)  # before, after, gradients, Adam's states, and a step's own
    assert construction.refine_device_bytes(llama, settings) == experts + 64 * 2 * (4 * w + 3 * d) * 4
    one = replace(llama, experts=1)
    assert construction.refine_device_bytes(one, settings) == 2 * 4 * f * f + construction.eliminate_bytes(llama)
    assert more - held == 64 * 2 * (4 * w + 3 * d) * 4


def test_clusters_of_tokens_are_what_torch_counts(llama: Shapes) -> None:
    tokens, hidden = 4096, 32
    small = replace(llama, hidden=hidden)
    with FlopCounterMode(display=False) as counter:
        clustering.kmeans(torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(0)), 8, seed=0)
    assert construction.kmeans(small, tokens) == counter.get_total_flops()
    assert construction.kmeans_sample(llama, 10**6) == 32768 * 4096 * 4
    assert construction.kmeans_moved(llama, 10**6) == 32768 * 4096 * 4 * (3 + 8 + 20)


def test_refinement_of_a_configuration() -> None:
    used = Config(moe=MoEConfig(refined=RefinedConfig(rounds=4, steps=6, batch=7), top_k=3))
    assert construction.refinement(used) == Refinement(
        derivations=5, steps=6, batch=7, active=3, pairs=3.0
    )  # derived once more
    single = Config(moe=MoEConfig(experts=1, refined=RefinedConfig(rounds=4, steps=0)))
    assert construction.refinement(single) == Refinement(derivations=1, steps=0, batch=4096, active=1, pairs=1.0)
    assert construction.refinement(Config(moe=MoEConfig(plain=PlainConfig()))) is None
