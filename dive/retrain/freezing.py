"""The freezing policy: which parameters a stage trains."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from dive.config import PARTS, Freezing, FreezingConfig, LoRAConfig
from dive.errors import require
from dive.model.families import UNTRAINED, attention_projections, decoder_layers, part_of, shared_projections
from dive.moe.plug import plug_expert_lora, plug_linear_lora

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def check_policy(policy: FreezingConfig, config: "PretrainedConfig", *, where: str) -> None:
    """Refuse a policy that the model's tied embeddings make contradictory.

    Raises:
        UserError: head and embeddings are one tensor, but the policy treats them differently or adapts them.
    """
    if not config.tie_word_embeddings:
        return
    require(
        policy.head == policy.embeddings and policy.head is not Freezing.lora,
        f"{where}.train.head={policy.head.value} and {where}.train.embeddings={policy.embeddings.value}: this model ties the "
        "two into one tensor; set both to full, or both to frozen",
    )


def apply_policy(
    model: "PreTrainedModel", policy: FreezingConfig, lora: LoRAConfig, *, master_weights: bool = False
) -> None:
    """Set ``requires_grad`` of every parameter, after giving parts under ``lora`` their adapters.

    Args:
        master_weights: keep what is trained in float32, for mixed precision: steps of an optimiser are lost in bfloat16.
    """
    plug_adapters(model, policy, lora)
    for name, parameter in model.named_parameters():
        part = part_of(model, name)
        choice = Freezing.frozen if part == UNTRAINED else getattr(policy, part)
        if name.endswith("down_bias"):
            parameter.requires_grad_(False)  # FLAP's bias is not trained, as in the paper
        else:
            parameter.requires_grad_(choice is (Freezing.lora if is_adapter(name) else Freezing.full))
        if parameter.requires_grad and master_weights:
            parameter.data = parameter.data.float()


def plug_adapters(model: "PreTrainedModel", policy: FreezingConfig, lora: LoRAConfig) -> None:
    """Give the parts under ``lora`` their adapters; existing ones are kept."""
    if policy.experts is Freezing.lora:
        plug_expert_lora(model, lora)
        for module in shared_projections(model):
            plug_linear_lora(module, lora)
    if policy.attention is Freezing.lora:
        for layer in range(len(decoder_layers(model))):
            for module in attention_projections(model, layer):
                plug_linear_lora(module, lora)
    if policy.embeddings is Freezing.lora:
        plug_linear_lora(model.get_input_embeddings(), lora)
    if policy.head is Freezing.lora:
        plug_linear_lora(model.get_output_embeddings(), lora)


def is_adapter(name: str) -> bool:
    """Whether a parameter is one of a low-rank adapter's two matrices."""
    parts = name.split(".")
    return parts[-1] in ("a", "b") and parts[-2].startswith("lora")


def trained_table(model: "PreTrainedModel", *, idle_routers: bool = False) -> list[tuple[str, int, int]]:
    """(part, parameters, of which trained) for every part of the policy, and what no policy speaks of where there is any.

    Args:
        idle_routers: no gradient reaches the routers, so that they do not count as trained.
    """
    parts = (*PARTS, UNTRAINED)
    totals = dict.fromkeys(parts, 0)
    trained = dict.fromkeys(parts, 0)
    for name, parameter in model.named_parameters():
        part = part_of(model, name)
        totals[part] += parameter.numel()
        trained[part] += parameter.numel() if parameter.requires_grad else 0
    if idle_routers:
        trained["router"] = 0
    return [(part, totals[part], trained[part]) for part in parts if part in PARTS or totals[part]]


def trained_parameters_table(stage: str, rows: Sequence[tuple[str, int, int]]) -> Table:
    """What a stage trains, part by part."""
    table = Table(title=f"Stage {stage}: trained parameters")
    for name in ("part", "parameters", "trained", "share"):
        table.add_column(name, justify="left" if name == "part" else "right")
    total, trained = sum(row[1] for row in rows), sum(row[2] for row in rows)
    for part, all_of_it, of_which in (*rows, ("all", total, trained)):
        share = of_which / all_of_it if all_of_it else 0.0
        table.add_row(part, f"{all_of_it:,}", f"{of_which:,}", f"{share:.2%}")
    return table
