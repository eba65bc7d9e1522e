"""Models as recipes: what tells them apart, and that no more than one is assembled at a time."""

import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dive.config import PruningConfig, Storage
from dive.model.load import DenseSource, locate_dense
from dive.model.recipe import Dense, Slot
from dive.moe.build import ONE_EXPERT, build_experts
from dive.moe.mixture import Mixture
from dive.store import Store

Build = Callable[..., PreTrainedModel]
CPU = torch.device("cpu")


class Bench:
    """What a step needs of a run."""

    def __init__(self, root: Path) -> None:
        self.store = Store(root)


def dense(build: Build, directory: Path, dtype: str = "float32", **settings: int) -> tuple[Dense, list[int]]:
    """A model on disk, and one entry for each time that it was loaded."""
    if not directory.exists():
        build("llama", **settings).save_pretrained(directory)
    loads: list[int] = []

    def make(_: DenseSource) -> PreTrainedModel:
        loads.append(1)
        return build("llama", **settings)

    return Dense(locate_dense(str(directory), dtype=dtype), CPU, make), loads


def test_keys_follow_from_weights_and_their_type(build: Build, tmp_path: Path) -> None:
    one, _ = dense(build, tmp_path / "one")
    same, _ = dense(build, tmp_path / "one")
    other, _ = dense(build, tmp_path / "other", seed=1)
    half, _ = dense(build, tmp_path / "one", dtype="bfloat16")
    assert one.key == same.key
    assert len({one.key, other.key, half.key}) == 3


def test_the_dense_model_is_loaded_once(build: Build, tmp_path: Path) -> None:
    model, loads = dense(build, tmp_path / "one")
    assert not loads
    assert model.load() is model.load()
    assert loads == [1]


def test_one_mixture_at_a_time(build: Build, tokens: Callable[..., Tensor], tmp_path: Path) -> None:
    model, _ = dense(build, tmp_path / "one")
    run = Bench(tmp_path / "store")
    inputs = {"model": model, "tokens": [tokens(4, 8)], "moe": ONE_EXPERT, "seed": 0}
    made = [build_experts(run, 4, pruning=PruningConfig(ratio=ratio), **inputs) for ratio in (0.5, 0.75)]
    half, quarter = (Mixture(model, experts, 1) for experts in made)
    assert half.key != quarter.key
    assert half.key != Mixture(model, made[0], 1, Storage.indexed).key
    first = half.load()
    assert half.load() is first
    alive = weakref.ref(first)
    del first
    quarter.load()
    assert alive() is None  # before the other one was assembled
    taken = quarter.take()
    assert quarter.load() is not taken  # who takes a model may change it


def test_the_slot_lets_go_before_it_makes() -> None:
    slot, order = Slot(), []

    class Model:
        def __init__(self, name: str) -> None:
            order.append(f"make {name}")
            weakref.finalize(self, order.append, f"drop {name}")

    for name in ("a", "b"):
        slot.get(name, lambda name=name: Model(name))  # type: ignore[misc, arg-type, return-value]
    assert order == ["make a", "drop a", "make b"]


def test_a_model_in_a_circle_goes_with_the_slots() -> None:
    """As Lightning leaves it: references alone would keep it."""

    class Circle:
        def __init__(self) -> None:
            self.own, self.weights = self, torch.zeros(4)

    slot, left = Slot(), Circle()
    gone = weakref.ref(left.weights)
    del left
    assert gone() is not None
    slot.clear()
    assert gone() is None
