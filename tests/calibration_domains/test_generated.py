"""Text that a model writes: drawn from its own distribution, the same again from the same seed."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dive.calibration_domains import generated
from dive.calibration_domains.generated import beginnings, read_text, sample, write_text
from tests.conftest import Build
from tests.workplace import Bench, Ready


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_text_begins_with_the_boundary_and_any_token(tokenizer: PreTrainedTokenizerFast) -> None:
    found = beginnings(tokenizer, count=4000, generator=draw())
    assert found.shape == (4000, 2)
    assert set(found[:, 0].tolist()) == {tokenizer.bos_token_id}
    assert set(found[:, 1].tolist()) == set(range(len(tokenizer))) - set(tokenizer.all_special_ids)


def test_a_tokenizer_of_no_boundary_has_the_drawn_token_alone(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generated, "boundary_token", lambda _: None)
    assert beginnings(tokenizer, count=5, generator=draw()).shape == (5, 1)


@pytest.fixture
def opinionated(build: Build) -> PreTrainedModel:
    """A model that has more than chance to say, and a file of its own that would change what it says."""
    model = build("llama", vocab_size=12)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    model.generation_config.update(
        do_sample=True, repetition_penalty=5.0, top_k=2, temperature=0.1, eos_token_id=list(range(12))
    )
    return model


def test_tokens_are_drawn_from_the_models_own_distribution(opinionated: PreTrainedModel) -> None:
    """Shares of 20 thousand draws, against the softmax of one forward pass: four standard errors."""
    rows = 20_000
    begun = torch.tensor([[3, 7]])
    with torch.no_grad():
        expected = opinionated(begun).logits[0, -1].softmax(-1)
    drawn = sample(opinionated, begun.expand(rows, -1), length=3, seed=1)[:, 2]
    found = torch.bincount(drawn, minlength=12) / rows
    assert expected.max() < 0.9
    assert ((found - expected).abs() < 4 * (expected * (1 - expected) / rows).sqrt() + 1e-6).all()


def test_a_text_that_ends_goes_on(opinionated: PreTrainedModel) -> None:
    """Every token would end this model's texts, and none is padded."""
    found = sample(opinionated, torch.full((50, 1), 3), length=20, seed=2)
    assert found.shape == (50, 20)
    assert (found[:, 1:] != 0).any(dim=1).all()


def test_what_else_is_drawn_at_random_is_left_alone(opinionated: PreTrainedModel) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    sample(opinionated, torch.full((2, 1), 3), length=4, seed=2)
    assert torch.equal(torch.rand(3), expected)


def test_texts_rest_in_the_store(
    build: Build, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generated, "ROWS", 4)
    model = build("llama")

    def text(loaded: PreTrainedModel | None, *, samples: int = 10, seed: int = 3) -> Tensor:
        run = Bench(tmp_path)
        return read_text(write_text(run, tokenizer, model=Ready(loaded), samples=samples, length=9, seed=seed))

    found = text(model)
    assert (found.shape, found.dtype) == ((10, 9), torch.int64)
    assert torch.equal(text(None), found)  # read, not written again
    starts = beginnings(tokenizer, count=10, generator=draw(3))
    assert torch.equal(found[:, :2], starts)
    for number, rows in enumerate((slice(0, 4), slice(4, 8), slice(8, 10))):
        assert torch.equal(found[rows], sample(model, starts[rows], length=9, seed=3 + number))
    assert not torch.equal(text(model, seed=4), found)
