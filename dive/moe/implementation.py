"""Which code computes a model's experts: one of transformers' experts implementations, or ours."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dive.config import ExpertsBy
from dive.errors import UserError, one_line, require
from dive.model.families import moe_blocks
from dive.moe import experts as experts_module
from dive.moe.experts import is_aligned

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUPED = ExpertsBy.grouped_mm.value
AUTO = "trainer.experts=auto"


@dataclass(frozen=True, slots=True)
class Choice:
    """An experts implementation, by the name that transformers finds it under."""

    name: str
    why: str

    def __str__(self) -> str:
        ours = self.name == experts_module.IMPLEMENTATION
        return f"experts run by {'our grouped products' if ours else f'transformers {self.name!r}'}: {self.why}"


def use_experts(model: "PreTrainedModel", wanted: ExpertsBy = ExpertsBy.auto, *, autocast: str | None = None) -> Choice:
    """Choose what computes the experts of a model as it is now, and set it.

    Args:
        wanted: ``trainer.experts``.
        autocast: element type of mixed precision; none where products are computed in the weights' own.

    Raises:
        UserError: what is wanted would leave out adapters or biases.
    """
    choice = _choose(moe_blocks(model)[0].experts, wanted, autocast)
    experts_module.register()
    model.set_experts_implementation(choice.name)
    return choice


def _choose(experts: Any, wanted: ExpertsBy, autocast: str | None) -> Choice:
    ours = experts_module.IMPLEMENTATION
    lacking = _unknown_to_stock(experts)
    if wanted is ExpertsBy.ours:
        return Choice(ours, "trainer.experts=ours")
    if wanted is not ExpertsBy.auto:
        require(lacking is None, f"trainer.experts={wanted.value}: {lacking}; set {AUTO}")
        return Choice(wanted.value, f"trainer.experts={wanted.value}")
    if lacking is not None:
        return Choice(ours, lacking)
    _, hidden, width = experts.down_proj.shape
    dtype = experts.down_proj.dtype
    if autocast not in (None, _named(dtype)):
        return Choice(ours, f"mixed precision leaves {GROUPED!r} in the weights' {_named(dtype)}")
    if not (is_aligned(hidden, dtype) and is_aligned(width, dtype)):
        return Choice(ours, f"{GROUPED!r} takes no rows of {width} numbers of {_named(dtype)}")
    return Choice(GROUPED, "no adapters, no biases")


def _unknown_to_stock(experts: Any) -> str | None:
    """What of a layer's experts transformers' own implementations would leave out; none if nothing."""
    if hasattr(experts, "index"):  # dive.moe.indexed.IndexedExperts
        return "they are index sets into the dense FFNs"
    if hasattr(experts, "lora_gate"):
        return "they have LoRA adapters"
    return "they have biases" if hasattr(experts, "down_bias") else None


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def stock_implementation(width: int, dtype: torch.dtype) -> str:
    """The fastest of transformers' own implementations for experts of this width."""
    return GROUPED if is_aligned(width, dtype) else ExpertsBy.eager.value


def use_stock_experts(model: "PreTrainedModel") -> None:
    """Run the experts by transformers' own code."""
    width = moe_blocks(model)[0].experts.down_proj.shape[-1]
    model.set_experts_implementation(stock_implementation(width, model.dtype))


def check_aligned(wanted: ExpertsBy, *, hidden: int, width: int, dtype: torch.dtype) -> None:
    """Refuse ``grouped_mm`` for experts whose rows it does not take.

    Args:
        hidden: D of the model.
        width: channels of an expert.
        dtype: of the experts' weights.

    Raises:
        UserError: names the override.
    """
    require(
        wanted is not ExpertsBy.grouped_mm or (is_aligned(hidden, dtype) and is_aligned(width, dtype)),
        f"trainer.experts=grouped_mm takes rows of multiples of 16 bytes; experts of {width} channels and hidden size "
        f"{hidden} in {_named(dtype)} have others; set {AUTO}, or pruning.width_multiple=8",
    )


def check_kernel(wanted: ExpertsBy, *, activation: str) -> None:
    """Load the kernel that ``trainer.experts=sonicmoe`` asks for, so that its absence ends a run at its beginning.

    Args:
        activation: of the model's FFN, as its configuration names it.

    Raises:
        UserError: it cannot be loaded here, or does not know the activation.
    """
    if wanted is not ExpertsBy.sonicmoe:
        return
    try:
        from transformers.integrations.sonicmoe import ACT_MAP, load_sonicmoe_kernel

        load_sonicmoe_kernel()
    except Exception as error:  # the hub's client, its import and its compiler raise types of many kinds
        raise UserError(f"trainer.experts=sonicmoe cannot run here ({one_line(error)}); set {AUTO}") from error
    require(activation in ACT_MAP, f"trainer.experts=sonicmoe knows no activation {activation!r}; set {AUTO}")
