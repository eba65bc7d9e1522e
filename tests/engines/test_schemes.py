"""Which shapes a scheme's kernels take."""

import pytest
from transformers import MixtralConfig, Qwen2MoeConfig

from dive.engines.schemes import SCHEMES, expert_widths, group_size, unsuited
from dive.errors import UserError
from dive.quantise import SchemeName


def mixtral(hidden: int, width: int) -> MixtralConfig:
    return MixtralConfig(hidden_size=hidden, intermediate_size=width, num_attention_heads=4, head_dim=hidden // 4)


def test_every_scheme_can_be_chosen() -> None:
    assert [scheme.name for scheme in SchemeName] == list(SCHEMES)


@pytest.mark.parametrize(
    ("scheme", "hidden", "width", "said"),
    [
        ("w4a16", 2048, 1408, []),
        ("w4a16", 2048, 1416, ["experts of a multiple of 64 channels, and these have 1416"]),
        ("w8a16", 576, 384, ["a hidden size of a multiple of 128, and this is 576"]),
        ("int8", 576, 384, []),
        ("fp8", 576, 380, ["experts of a multiple of 16 channels, and these have 380"]),
        ("q4_k_m", 2048, 1408, ["experts of a multiple of 256 channels, and these have 1408"]),
        ("q4_k_m", 576, 384, ["a hidden size of a multiple of 256", "experts of a multiple of 256"]),
        ("q8_0", 576, 384, []),
    ],
)
def test_a_shape_that_no_kernel_takes(scheme: str, hidden: int, width: int, said: list[str]) -> None:
    found = list(unsuited(SCHEMES[scheme], mixtral(hidden, width)))
    assert len(found) == len(said)
    assert all(part in line for part, line in zip(said, found, strict=True))


def test_the_override_that_mends_a_width_is_named() -> None:
    (line,) = unsuited(SCHEMES["w4a16"], mixtral(256, 100))
    assert line.endswith("run again with pruning.width_multiple=64")


def test_a_shared_expert_has_a_width_as_well() -> None:
    config = Qwen2MoeConfig(hidden_size=256, moe_intermediate_size=128, shared_expert_intermediate_size=40)
    assert expert_widths(config) == [128, 40]
    (line,) = unsuited(SCHEMES["w4a16"], config)
    assert "these have 40" in line


@pytest.mark.parametrize(("hidden", "width", "size"), [(2048, 1408, 128), (576, 384, 64), (544, 384, 32)])
def test_the_largest_group_that_divides_all_columns(hidden: int, width: int, size: int) -> None:
    assert group_size(SCHEMES["w4a16"], mixtral(hidden, width), None) == size
    assert group_size(SCHEMES["fp8"], mixtral(hidden, width), None) is None


def test_columns_that_no_group_divides() -> None:
    with pytest.raises(
        UserError, match=r"^scheme=w4a16: matrices of 72, 384 columns are no multiples of 32; set scheme=int8"
    ):
        group_size(SCHEMES["w4a16"], mixtral(72, 384), None)
    with pytest.raises(
        UserError, match=r"^group=128: matrices of 384, 576 columns are no multiples of 128; set another group"
    ):
        group_size(SCHEMES["w4a16"], mixtral(576, 384), 128)
