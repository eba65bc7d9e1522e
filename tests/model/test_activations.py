"""Hidden states come back as they were put, wherever they rest."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dive.errors import UserError
from dive.model import activations
from dive.model.activations import HiddenStates, Place, choose_place, free_host_memory
from dive.model.families import ffn
from dive.model.layers import Track

CPU = torch.device("cpu")


@pytest.mark.parametrize("place", Place)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_come_back_as_they_were(place: Place, dtype: torch.dtype) -> None:
    states = HiddenStates(CPU, 0, place=place)
    first, second, third = (
        torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(n)).to(dtype) for n in range(3)
    )
    states.append(first)
    states.append(second)
    before = states[0]
    states[0] = third
    assert len(states) == 2
    assert torch.equal(before, first)  # written over on disk, not in the hand that holds it
    for found, expected in zip(states, (third, second), strict=True):
        assert torch.equal(found, expected)
        assert found.dtype == dtype


def test_files_go_with_the_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations.tempfile, "tempdir", str(tmp_path))
    states = HiddenStates(CPU, 0, place=Place.disk)
    states.append(torch.ones(1, 2, 3))
    assert len(list(tmp_path.glob("dive-*/*.safetensors"))) == 1
    del states
    assert not list(tmp_path.iterdir())


def test_the_place_follows_from_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "free_host_memory", lambda: 1000.0)
    assert choose_place(CPU, 500) is Place.host
    assert choose_place(CPU, 501) is Place.disk
    with pytest.raises(UserError, match=r"take 1000000\.0 GB.*calibration_domains\.samples.*TMPDIR"):
        choose_place(CPU, 10**15)


def test_free_memory_is_less_than_there_is() -> None:
    assert 1e6 < free_host_memory() < 1e14


def test_walking_and_tracks_are_the_same_from_disk(
    build: Callable[..., PreTrainedModel], tokens: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    batches = [tokens(2, 12, seed=1), tokens(3, 7, seed=2)]

    def everything() -> list[Tensor]:
        whole = Track(model, batches)
        found = [seen.channels for number in range(2) for seen in whole.run(number)]
        track = Track(model, batches)
        for number in range(2):
            weights = ffn(model, number)
            track.add(torch.cat([weights.channels(rows) @ weights.down.T for rows in track.attend(number)]))
        assert track.hidden.place is expected
        return [*found, track.states()]

    expected = Place.host
    on_host = everything()
    monkeypatch.setattr(activations, "free_host_memory", lambda: 0.0)
    expected = Place.disk
    assert all(torch.equal(one, other) for one, other in zip(on_host, everything(), strict=True))
