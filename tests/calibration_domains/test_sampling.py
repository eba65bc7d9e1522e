"""Crops, windows and blocks. A token here is one character: documents say where their tokens come from."""

from itertools import pairwise

import pytest
import torch

from dive.calibration_domains.sampling import (
    PIECE,
    calibration_tokens,
    evaluation_windows,
    pieces,
)
from dive.errors import UserError
from dive.model.chat import Conversation


def tokenize(text: str) -> list[int]:
    return [ord(character) for character in text]


# Document i is the character 100 + i, 12 times.
DOCUMENTS = [chr(100 + i) * 12 for i in range(40)]
SETTINGS = {"samples": 8, "measured": 3, "length": 20, "seed": 1, "domain": "law"}


def crops(**overrides: object) -> tuple[torch.Tensor, torch.Tensor]:
    return calibration_tokens(DOCUMENTS, tokenize, **{**SETTINGS, **overrides})  # type: ignore[arg-type]


def test_shapes() -> None:
    calibration, measured = crops()
    assert calibration.shape == (8, 20)
    assert measured.shape == (3, 20)
    assert calibration.dtype == measured.dtype == torch.int64


def test_crops_follow_seed_and_domain_alone() -> None:
    calibration, measured = crops()
    for again, same in zip(crops(), (calibration, measured), strict=True):
        assert torch.equal(again, same)
    assert not torch.equal(crops(seed=2)[0], calibration)
    assert not torch.equal(crops(domain="code")[0], calibration)


def test_documents_are_joined_and_none_is_used_twice_in_a_round() -> None:
    calibration, measured = crops()
    seen: list[int] = []
    for crop in torch.cat([calibration, measured]).tolist():
        # Two documents of 12 give 24 tokens; a crop of 20 holds at least 8 of each, in one run each.
        runs = [crop[0]] + [b for a, b in pairwise(crop) if a != b]
        assert len(runs) == 2
        assert min(crop.count(character) for character in runs) >= 8
        seen += runs
    assert len(seen) == len(set(seen)) == 22


def test_crops_begin_anywhere() -> None:
    starts = {crop.count(crop[0]) for seed in range(5) for crop in crops(seed=seed)[0].tolist()}
    assert starts >= {9, 10, 11, 12}


def test_calibration_and_measured_share_no_document() -> None:
    # 40 documents make 20 crops a round: with 17 calibration crops a second round begins, but not on what is measured.
    for seed in range(5):
        for samples, count in ((15, 5), (17, 3), (3, 9), (1, 1)):
            calibration, measured = crops(samples=samples, measured=count, seed=seed)
            assert not set(calibration.unique().tolist()) & set(measured.unique().tolist())


@pytest.mark.parametrize("repeat", [False, True])
def test_no_draw_moves_another(repeat: bool) -> None:
    calibration, measured = crops(repeat=repeat)
    for count in (0, 1, 2, 5):  # affinity.samples, and nothing where no groups are mined
        assert torch.equal(crops(measured=count, repeat=repeat)[0], calibration)
    for samples in (1, 5, 15):
        assert torch.equal(crops(samples=samples, repeat=repeat)[1], measured)
    assert torch.equal(crops(samples=15, repeat=repeat)[0][:8], calibration)  # more samples are the same and others


def test_a_short_text_is_repeated_and_kept_apart() -> None:
    documents = DOCUMENTS[:8]  # 96 tokens
    settings = {"length": 20, "seed": 0, "domain": "a", "repeat": True}
    calibration, measured = calibration_tokens(documents, tokenize, samples=30, measured=9, **settings)  # type: ignore[arg-type]
    assert (calibration.shape, measured.shape) == ((30, 20), (9, 20))
    assert not set(calibration.unique().tolist()) & set(measured.unique().tolist())
    without, _ = calibration_tokens(documents, tokenize, samples=30, measured=0, **settings)  # type: ignore[arg-type]
    assert torch.equal(calibration, without)
    with pytest.raises(
        UserError, match=r"has 36 tokens .*not even one sequence of each .*lower calibration_domains\.length"
    ):
        calibration_tokens(DOCUMENTS[:3], tokenize, samples=1, measured=1, **settings)  # type: ignore[arg-type]


def test_all_the_text_calibrates_where_nothing_is_measured() -> None:
    # 8 · 12 = 96 tokens of 96 are asked for; a fifth would be missing if it were kept for what is not measured.
    calibration, _ = calibration_tokens(DOCUMENTS[:8], tokenize, samples=8, measured=0, length=12, seed=0, domain="a")
    assert len(calibration) == 8
    with pytest.raises(
        UserError, match=r"\(8 \+ 1 for affinity\) × 12 = 108 are asked for, and it lacks at least 12; lower"
    ):
        calibration_tokens(DOCUMENTS[:8], tokenize, samples=8, measured=1, length=12, seed=0, domain="a")


def test_one_document_cannot_be_set_apart() -> None:
    with pytest.raises(
        UserError, match=r"its documents are too few to keep those for affinity apart; lower .*affinity\.samples"
    ):
        calibration_tokens(["x" * 500], tokenize, samples=2, measured=2, length=20, seed=0, domain="a")


def test_nothing_measured() -> None:
    calibration, measured = crops(measured=0)
    assert calibration.shape == (8, 20)
    assert measured.shape == (0, 20)
    assert measured.dtype == torch.int64


def test_further_rounds_crop_elsewhere() -> None:
    # 10 documents of 30 tokens are 300; a round gives 10 crops of 20, of 21 tokens and more; 15 · 20 = 300 are asked for.
    documents = ["".join(chr(1000 * i + j) for j in range(30)) for i in range(1, 11)]
    calibration, _ = calibration_tokens(documents, tokenize, samples=15, measured=0, length=20, seed=0, domain="a")
    assert len({tuple(crop) for crop in calibration.tolist()}) > 10


@pytest.mark.parametrize(
    ("characters", "samples", "measured", "lacks"),
    [
        (100, 8, 0, 60),  # 160 asked for
        (159, 8, 0, 20),  # never less than one sequence
        (81, 8, 0, 79),  # more than half of it is not enough
        (200, 8, 4, 40),  # 240 asked for
        (20, 1, 0, 20),  # a crop needs a token more than its length
        (0, 1, 0, 20),
        (10, 1, 1, 30),
    ],
)
def test_too_little_text_says_how_much(characters: int, samples: int, measured: int, lacks: int) -> None:
    documents = ["x" * 10] * (characters // 10) + ["y" * (characters % 10)]
    count = rf"\({samples} \+ {measured} for affinity\)" if measured else f"{samples}"
    asked = f"{count} × 20 = {(samples + measured) * 20} are asked for"
    message = rf"domain 'law' has {characters} tokens of training text, {asked}, and it lacks at least {lacks};"
    with pytest.raises(UserError, match=message):
        calibration_tokens(documents, tokenize, samples=samples, measured=measured, length=20, seed=0, domain="law")


def test_long_documents_are_cut_into_pieces() -> None:
    book = "a" * PIECE + "b" * PIECE + "c" * 5
    assert pieces([book, "short", "  "]) == ["a" * PIECE, "b" * PIECE, "c" * 5, "short"]


# --------------------------------------------------------------------------------------------------------- windows


def test_windows_do_not_overlap_and_go_over_documents() -> None:
    found = evaluation_windows(["abcd", "efg", "hij"], tokenize, length=3, windows=None, name="x")
    assert found.tolist() == [tokenize("abc"), tokenize("def"), tokenize("ghi")]  # the j fills no window
    assert found.dtype == torch.int64


@pytest.mark.parametrize(("windows", "count"), [(1, 1), (2, 2), (3, 3), (9, 3), (None, 3)])
def test_at_most_so_many_windows(windows: int | None, count: int) -> None:
    found = evaluation_windows(["abcd", "efg", "hij"], tokenize, length=3, windows=windows, name="x")
    assert found.tolist() == [tokenize(w) for w in ("abc", "def", "ghi")[:count]]


def test_a_very_long_document_is_not_tokenised_whole() -> None:
    text = "".join(chr(100 + i % 50) for i in range(1_000_000))
    seen = []

    def counted(part: str) -> list[int]:
        seen.append(len(part))
        return [ord(character) for character in part.replace("x", "")]  # most tokens are far shorter than a document

    found = evaluation_windows(["short", text], counted, length=10, windows=4, name="x")
    assert found.flatten().tolist() == tokenize("short" + text.replace("x", ""))[:40]
    assert sum(seen) < 5000
    sparse = "y" * 1_000_000 + text  # the tokens are so few that more of the text is needed
    found = evaluation_windows([sparse], lambda part: tokenize(part.lstrip("y")), length=10, windows=4, name="x")
    assert found.flatten().tolist() == tokenize(text)[:40]


def test_a_text_that_fills_no_window_is_refused() -> None:
    with pytest.raises(UserError, match=r"the test text of 'law' has 5 tokens, a window 6"):
        evaluation_windows(["abc", "de"], tokenize, length=6, windows=2, name="law")


def test_a_conversation_is_never_cut_before_its_tokens_are() -> None:
    said = Conversation("ab" * PIECE)
    assert pieces([said, "c" * (PIECE + 1), Conversation(" ")]) == [said, "c" * PIECE, "c"]
    assert isinstance(pieces([said])[0], Conversation)
    asked: list[str] = []

    def whole(text: str) -> list[int]:
        asked.append(text)
        return tokenize(text)

    found = evaluation_windows([said], whole, length=4, windows=2, name="talk")
    assert found.tolist() == [[97, 98, 97, 98]] * 2
    assert asked == [said]
    assert isinstance(asked[0], Conversation)
