"""The schemes that an export is quantised by, which tool makes each, and the shapes that their kernels take."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dive.errors import UserError
from dive.model.families import twin_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GROUPS = (128, 64, 32)
"""Neighbouring columns that share a scale, the best for speed first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How numbers are stored, and what can compute with them."""

    name: str
    tool: str
    """``llm_compressor`` or ``llama_cpp``, see :mod:`dive.engines.quantiser`."""
    stored: str
    """For people; with ``{group}`` where there are groups."""
    calibrated: bool = False
    """Whether rounding is chosen by what comes in (GPTQ), so that every expert has to see tokens."""
    grouped: bool = False
    """Whether columns share scales in groups."""
    hidden_multiple: int = 1
    width_multiple: int = 1
    """Of the hidden size, and of experts' widths, that the kernels take."""
    otherwise: str = ""
    """What happens with other shapes."""

    @property
    def is_gguf(self) -> bool:
        """Whether it is one GGUF file and no directory of safetensors."""
        return self.tool == "llama_cpp"


MARLIN = "vLLM's and SGLang's Marlin kernels take no such shape"
BLOCKS = "llama.cpp stores its rows, in blocks of 256, in a larger type instead"
SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            name="fp8",
            tool="llm_compressor",
            stored="FP8 (E4M3) weights with a scale a row; activations are rounded to FP8 for each token as they come",
            hidden_multiple=16,
            width_multiple=16,
            otherwise="FP8 products take no such shape",
        ),
        Scheme(
            name="int8",
            tool="llm_compressor",
            stored="8-bit integers with a scale a row; activations are rounded to 8 bits for each token as they come",
            hidden_multiple=16,
            width_multiple=16,
            otherwise="8-bit products take no such shape",
        ),
        Scheme(
            name="w8a16",
            tool="llm_compressor",
            stored="8-bit integers with a scale a row, four in a word; activations stay",
            hidden_multiple=128,
            width_multiple=64,
            otherwise=MARLIN,
        ),
        Scheme(
            name="w4a16",
            tool="llm_compressor",
            stored="4-bit integers, eight in a word, rounded by GPTQ, with a scale for every {group} columns; activations stay",
            calibrated=True,
            grouped=True,
            hidden_multiple=128,
            width_multiple=64,
            otherwise=MARLIN,
        ),
        Scheme(name="q8_0", tool="llama_cpp", stored="GGUF, 8-bit integers with a scale for every 32 columns"),
        *(
            Scheme(
                name=name,
                tool="llama_cpp",
                stored=f"GGUF, {bits} a weight, K-quants in blocks of 256 columns",
                hidden_multiple=256,
                width_multiple=256,
                otherwise=BLOCKS,
            )
            for name, bits in (("q6_k", "6.6 bits"), ("q5_k_m", "5.7 bits"), ("q4_k_m", "4.8 bits"))
        ),
    )
}


def expert_widths(config: "PretrainedConfig") -> list[int]:
    """Channels of a routed expert, and of the shared one where there is one."""
    own = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    shared = getattr(config, "shared_expert_intermediate_size", None)
    return [int(own)] if not twin_of(config.model_type).shared or not shared else [int(own), int(shared)]


def unsuited(scheme: Scheme, config: "PretrainedConfig") -> Iterator[str]:
    """What of a Mixture-of-Experts' shape a scheme's kernels do not take, each with what mends it."""
    hidden = int(config.hidden_size)
    if hidden % scheme.hidden_multiple:
        yield (
            f"{scheme.name} wants a hidden size of a multiple of {scheme.hidden_multiple}, and this is {hidden}: "
            f"{scheme.otherwise}; it is the dense model's, so choose another scheme"
        )
    for width in expert_widths(config):
        if width % scheme.width_multiple:
            yield (
                f"{scheme.name} wants experts of a multiple of {scheme.width_multiple} channels, and these have {width}: "
                f"{scheme.otherwise}; run again with pruning.width_multiple={scheme.width_multiple}"
            )


def group_size(scheme: Scheme, config: "PretrainedConfig", wanted: int | None) -> int | None:
    """Columns that share a scale; none where the scheme has no groups.

    Raises:
        UserError: the columns of a matrix are no multiple of it.
    """
    if not scheme.grouped:
        return None
    heads = int(config.num_attention_heads) * int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    columns = {int(config.hidden_size), heads, *expert_widths(config)}
    fitting = [size for size in ([wanted] if wanted else GROUPS) if not any(count % size for count in columns)]
    if not fitting:
        stated = f"group={wanted}" if wanted else f"scheme={scheme.name}"
        raise UserError(
            f"{stated}: matrices of {', '.join(map(str, sorted(columns)))} columns are no multiples of "
            f"{wanted or GROUPS[-1]}; set {'another group' if wanted else 'scheme=int8'}, or run again with "
            "pruning.width_multiple=128"
        )
    return fitting[0]
