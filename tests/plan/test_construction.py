"""What building experts costs, by hand for Llama-2-7B's shapes."""

from dataclasses import replace

import pytest

from dive.config import Config, DistillationConfig, MoEConfig, PlainConfig, RefinedConfig
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
    assert construction.moments(llama, 1000) == 2 * 1000 * 11008**2


def test_least_squares(llama: Shapes) -> None:
    d, f, w = 4096, 11008, 2752
    assert llama.width == w
    assert construction.solve(llama) == 2 * d * f * w + w**3 // 3 + 2 * d * w * w
    assert construction.solve_bytes(llama) == 8 * (f * f + d * f + w * w + f * w + d * w)


def test_elimination(llama: Shapes) -> None:
    d, f, gone = 4096, 11008, 8256
    # Cholesky factor and the inverse from it, weights times the inverse, then rank-16 updates of both
    assert construction.eliminate(llama) == f**3 + 2 * d * f * f + 516 * 2 * 16 * f * (f + d)
    assert gone == 516 * 16
    assert construction.eliminate_moved(llama, 16) == 516 * 4 * 8 * f * (f + d)
    assert construction.eliminate_bytes(llama) == 4 * 8 * f * f + 2 * 8 * d * f


def test_router(llama: Shapes) -> None:
    settings = DistillationConfig(tokens=2048, steps=10, batch=512)
    errors = 2048 * (6 * 4096 * 11008 + 8 * 6 * 4096 * 2752)
    assert construction.router_fit(llama, settings, 2048) == errors + 10 * 512 * 4 * 8 * 4096


def test_refinement(llama: Shapes) -> None:
    settings = Refinement(derivations=3, steps=10, batch=64, active=2)
    d, f, w, n, length = 4096, 11008, 2752, 1000, 256
    one_round = n * 4 * d * f + n * 2 * d * f + n * 2 * f * f  # gate and up, cross and second moments
    steps = 10 * 64 * 2 * 3 * 6 * d * w  # forward, and twice that backward
    forward = n * (2 * 4 * d * d + 4 * length * d + 2 * 8 * d + 6 * d * w + 6 * d * f)  # and the dense FFN's target
    assert construction.refine(llama, settings, n, length) == 3 * one_round + steps + forward
    assert construction.refine_solves(llama, settings) == 3 * 8 * construction.solve(llama)
    # dense and rebuilt states, what the dense FFN made and the next inputs in float32; the rebuilt prefix in bfloat16
    assert construction.refine_host_bytes(llama, n, 2) == n * d * (4 * 4 + 2)
    held, more = (construction.refine_device_bytes(llama, replace(settings, batch=n)) for n in (100_000, 100_064))
    assert construction.refine_device_bytes(llama, settings) == 2 * 4 * f * f + construction.eliminate_bytes(llama)
    assert more - held == 64 * 2 * (4 * w + 3 * d) * 4


def test_refinement_of_a_configuration() -> None:
    used = Config(moe=MoEConfig(refined=RefinedConfig(rounds=4, steps=6, batch=7), top_k=3))
    assert construction.refinement(used) == Refinement(derivations=5, steps=6, batch=7, active=3)  # derived once more
    single = Config(moe=MoEConfig(experts=1, refined=RefinedConfig(rounds=4, steps=0)))
    assert construction.refinement(single) == Refinement(derivations=1, steps=0, batch=4096, active=1)
    assert construction.refinement(Config(moe=MoEConfig(plain=PlainConfig()))) is None
