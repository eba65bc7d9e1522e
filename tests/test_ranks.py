"""Two processes that compute together give what one gives alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing
from transformers import LlamaConfig, LlamaForCausalLM

import dive
from dive.affinity.matrix import cross_domain_perplexity
from dive.config import CoactivationConfig, Gates, MoEConfig, PlainConfig, PruningConfig, RefinedConfig
from dive.errors import UserError
from dive.eval.evaluate import EvaluationTexts, evaluate
from dive.eval.routing import routing_share
from dive.moe.assemble import assemble
from dive.moe.build import build_layers
from dive.ranks import Ranks, Share, sequences_of

SETS = {"a": (5, 16), "b": (1, 24), "c": (4, 16)}
"""{name: (sequences, length)} of the calibration text: two processes part it inside of ``a``."""


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    built = LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=64, **shape)).eval()
    return built.requires_grad_(False)


def text() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randint(64, shape, generator=generator) for name, shape in SETS.items()}


def built(ranks: Ranks, pruning: PruningConfig, moe: MoEConfig) -> dict[str, Tensor]:
    groups = list(text().values())
    layers = list(build_layers(model(), groups[: max(moe.experts, 2)], pruning, moe, batch=2, seed=0, ranks=ranks))
    return {f"{number}.{name}": t for number, layer in enumerate(layers) for name, t in layer.tensors().items()}


def refined(experts: int = 3, **settings: Any) -> MoEConfig:
    steps = RefinedConfig(rounds=1, steps=6, batch=64, start=settings.pop("start", None))
    return MoEConfig(experts=experts, refined=steps, **{"top_k": 1, **settings})


PRUNING = PruningConfig(ratio=0.5, ridge=1e-3)
WORK: dict[str, Callable[[Ranks], dict[str, Tensor]]] = {
    "refined": lambda ranks: built(ranks, PRUNING, refined()),
    "two experts a token": lambda ranks: built(ranks, PruningConfig(ratio=0.5), refined(top_k=2)),
    "probabilities": lambda ranks: built(ranks, PRUNING, refined(top_k=2, gates=Gates.probabilities)),
    "shared expert": lambda ranks: built(ranks, PRUNING, refined(shared_expert=0.5)),
    "plain": lambda ranks: built(ranks, PRUNING, MoEConfig(experts=3, top_k=1, plain=PlainConfig())),
    "coactivation": lambda ranks: built(
        ranks, PRUNING, MoEConfig(experts=3, top_k=1, coactivation=CoactivationConfig())
    ),
    "taylor": lambda ranks: {
        name: found.taylor
        for name, found in dive.collect_statistics(model(), text(), batch=2, taylor=True, ranks=ranks).items()
        if found.taylor is not None
    },
    "statistics": lambda ranks: {
        f"{name} {field}": getattr(found, field)
        for name, found in dive.collect_statistics(model(), text(), batch=2, inputs=7, ranks=ranks).items()
        for field in ("mean", "squared_deviations", "second_moment", "inputs")
    },
    "mining": lambda ranks: {"perplexity": mined(ranks)},
    "evaluation": lambda ranks: evaluated(ranks),
}


def mined(ranks: Ranks) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    masks = {name: torch.rand(2, 48, generator=generator) < 0.5 for name in SETS}
    return cross_domain_perplexity(model(), text(), masks, batch=2, ranks=ranks)


def evaluated(ranks: Ranks) -> dict[str, Tensor]:
    dense = model()
    moe = assemble(dense, build_layers(dense, list(text().values()), PRUNING, refined(), seed=0), top_k=1)
    texts = EvaluationTexts(domains={16: {name: tokens for name, tokens in text().items() if name != "b"}})
    values = evaluate(moe, texts, batch=2, description="moe", ranks=ranks)
    routing = routing_share(moe, texts.domains[16], batch=2, ranks=ranks)
    return {name: torch.tensor(value) for name, value in values.items()} | routing.share


def work(rank: int, processes: int, names: list[str], directory: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=processes
    )
    for name in names:
        torch.save(WORK[name](Ranks(rank, processes)), directory / f"{name} {rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def several(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files' directory and a name to fill in, of each process."""
    directory, processes = tmp_path_factory.mktemp("ranks"), request.param
    multiprocessing.start_processes(
        work, args=(processes, list(WORK), directory), nprocs=processes, start_method="spawn"
    )
    return [directory / f"{{}} {rank}.pt" for rank in range(processes)]


@pytest.mark.parametrize("name", WORK)
def test_several_processes_give_what_one_gives(several: list[Path], name: str) -> None:
    expected = WORK[name](Ranks())
    assert expected
    for file in several:
        found = torch.load(str(file).format(name), weights_only=True)
        assert found.keys() == expected.keys()
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, expected[key], rtol=2e-4, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}")


def test_sequences_are_shared_out_in_runs() -> None:
    ranks = [Ranks(number, 3) for number in range(3)]
    found = [sequences_of(place, [2, 1, 4]) for place in ranks]  # 7 sequences: 0-1, 2-3, 4-6
    assert found == [
        [slice(0, 2), slice(0, 0), slice(0, 0)],
        [slice(2, 2), slice(0, 1), slice(0, 1)],
        [slice(2, 2), slice(1, 1), slice(1, 4)],
    ]


def test_too_few_sequences_are_refused() -> None:
    with pytest.raises(UserError, match="2 calibration sequences cannot be shared out over 3 processes"):
        sequences_of(Ranks(0, 3), [1, 1])


def test_a_share_knows_its_rows() -> None:
    share = Share((3, 2), Ranks(1, 2))
    assert (share.count, share.here) == (5, slice(3, 5))
    assert share.own(torch.tensor([4, 0, 3, 2])).tolist() == [1, 0]
