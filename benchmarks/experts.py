"""Time of one training step of an FFN block: our sparse experts against what they could be replaced by.

    python -m benchmarks.experts                                       # TinyLlama's ratio of widths, D 1024, 8 experts
    python -m benchmarks.experts --hidden 2048 --channels 5632 --tokens 8192 --device cuda --dtype bfloat16

A step is forward and backward pass of one block on random tokens, gradients of its input included (as in a layer that has
layers below it), without optimiser. Compared, at the same active width, tokens and trained parameters:

* ours: the stock Mixtral block with our router and our grouped products, as retraining runs it with LoRA;
* dense: one FFN as wide as the active experts together;
* loop: one module of three linear layers an expert, each given its selected rows by index in a Python loop, as in the
  authors' block; LoRA as one adapter for each of these linear layers;
* eager, grouped_mm: transformers' own implementations of the stock block, which know no LoRA. ``grouped_mm`` is what retraining
  runs without. ``batched_mm`` is one too, where it is asked for: it copies an expert's weights for every token.

Variants take turns over several rounds; printed are the median and the median over the rounds of the ratio to the dense FFN
in the same round. Prints one table.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, MixtralConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from benchmarks.timing import interleaved, machine, median_ratio
from dive.config import LoRAConfig
from dive.moe import experts as experts_module
from dive.moe.experts import GroupedLoRA
from dive.moe.plug import plug_linear_lora
from dive.moe.router import Router

STOCK = ("eager", "grouped_mm", "batched_mm")
VARIANTS = ("dense", "ours", "loop", "eager", "grouped_mm")
"""What is compared unless other names are given."""


class LoopBlock(nn.Module):
    """Experts as modules of their own, run one after another on the rows that selected them."""

    def __init__(self, block: MixtralSparseMoeBlock) -> None:
        super().__init__()
        self.gate = block.gate
        gate_up, down = block.experts.gate_up_proj, block.experts.down_proj
        count, hidden, width = down.shape
        config = LlamaConfig(hidden_size=hidden, intermediate_size=width, num_attention_heads=1)
        with torch.device("meta"):
            self.experts = nn.ModuleList(LlamaMLP(config) for _ in range(count))
        for expert, both, out in zip(self.experts, gate_up.detach(), down.detach(), strict=True):
            for name, weight in (("gate_proj", both[:width]), ("up_proj", both[width:]), ("down_proj", out)):
                getattr(expert, name).weight = nn.Parameter(weight.clone())

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.flatten(0, -2)
        _, gates, chosen = self.gate(rows)
        output = torch.zeros_like(rows)
        mask = nn.functional.one_hot(chosen, num_classes=len(self.experts)).permute(2, 1, 0)
        for number, expert in enumerate(self.experts):
            position, tokens = torch.where(mask[number])
            found = expert(rows[tokens]) * gates[tokens, position, None]
            output.index_add_(0, tokens, found.to(output.dtype))
        return output.view_as(hidden)


def stock_block(settings: argparse.Namespace, *, width: int, top_k: int, implementation: str) -> Any:
    """A Mixtral block of random weights, the same ones for each implementation; our router with our experts."""
    config = MixtralConfig(
        hidden_size=settings.hidden,
        intermediate_size=width,
        num_local_experts=settings.experts,
        num_experts_per_tok=top_k,
        experts_implementation=implementation,
    )
    block: Any = MixtralSparseMoeBlock(config)
    generator = torch.Generator().manual_seed(settings.seed)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
    if implementation == experts_module.IMPLEMENTATION:
        block.gate = Router(block.gate, experts=settings.experts, top_k=top_k)
    return block


def plug_lora(experts: Any, lora: LoRAConfig) -> None:
    """What :func:`dive.moe.plug.plug_expert_lora` does to each layer of a model."""
    _, hidden, width = experts.down_proj.shape
    for name, (inside, outside) in (
        ("lora_gate", (hidden, width)),
        ("lora_up", (hidden, width)),
        ("lora_down", (width, hidden)),
    ):
        adapter = GroupedLoRA(
            experts.down_proj,
            len(experts.down_proj),
            inside,
            outside,
            rank=lora.rank,
            alpha=lora.alpha,
            dropout=lora.dropout,
        )
        setattr(experts, name, adapter)


def build(settings: argparse.Namespace, name: str, *, width: int, top_k: int, lora: bool) -> Any:
    """One variant, its trained parameters chosen; None if it knows no LoRA."""
    adapters = LoRAConfig(rank=settings.rank, alpha=2.0 * settings.rank, dropout=settings.dropout)
    if name in STOCK and lora:
        return None
    block: Any
    if name == "dense":
        torch.manual_seed(settings.seed)
        block = LlamaMLP(
            LlamaConfig(hidden_size=settings.hidden, intermediate_size=top_k * width, num_attention_heads=1)
        )
    else:
        implementation = {"ours": experts_module.IMPLEMENTATION, "loop": "eager"}.get(name, name)
        block = stock_block(settings, width=width, top_k=top_k, implementation=implementation)
        if name == "loop":
            block = LoopBlock(block)
    block.to(settings.device, settings.dtype)
    if lora:
        block.requires_grad_(False)
        if name == "ours":
            plug_lora(block.experts, adapters)
        else:
            for module in list(block.modules()):
                if isinstance(module, nn.Linear):
                    plug_linear_lora(module, adapters)
        if name != "dense":
            block.gate.weight.requires_grad_(True)
    return block.train()


def step(block: nn.Module, hidden: Tensor, gradient: Tensor) -> Tensor:
    """Forward and backward pass; the gradient of the input."""
    block.zero_grad(set_to_none=True)
    inputs = hidden.detach().requires_grad_()
    output = block(inputs)
    (output[0] if isinstance(output, tuple) else output).backward(gradient)
    assert inputs.grad is not None
    return inputs.grad


def measure(
    settings: argparse.Namespace, *, top_k: int, width: int, lora: bool
) -> tuple[dict[str, list[float]], float]:
    """Seconds of every variant in each round, and the load of the busiest expert over the mean."""
    generator = torch.Generator().manual_seed(settings.seed + 1)
    shape = (1, settings.tokens, settings.hidden)
    hidden, gradient = (torch.randn(shape, generator=generator).to(settings.device, settings.dtype) for _ in range(2))
    runs: dict[str, Callable[[], Tensor]] = {}
    load = float("nan")
    for name in settings.variants:
        block = build(settings, name, width=width, top_k=top_k, lora=lora)
        if block is None:
            continue
        runs[name] = partial(step, block, hidden, gradient)
        if name == "ours":
            runs[name]()
            load = float(block.gate.take_observations()[0].max()) * settings.experts
    return interleaved(runs, rounds=settings.rounds, device=settings.device), load


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024, help="D")
    parser.add_argument("--channels", type=int, default=2816, help="F of the dense model")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument(
        "--settings", nargs="+", default=["1:0.5", "2:0.75"], help="TOP_K:RATIO, RATIO is what is pruned"
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=8, help="of LoRA")
    parser.add_argument("--dropout", type=float, default=0.0, help="of LoRA")
    parser.add_argument("--trained", nargs="+", choices=("full", "lora"), default=["full", "lora"])
    parser.add_argument("--variants", nargs="+", choices=(*VARIANTS, "batched_mm"), default=VARIANTS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args(arguments)
    settings.variants = ["dense", *(v for v in settings.variants if v != "dense")]
    experts_module.register()

    rows = []
    for text in settings.settings:
        top_k, ratio = int(text.partition(":")[0]), float(text.partition(":")[2])
        width = round(settings.channels * (1 - ratio) / 8) * 8
        base: list[float] | None = None  # dense FFN, fully trained
        for trained in settings.trained:
            seconds, load = measure(settings, top_k=top_k, width=width, lora=trained == "lora")
            if trained == "full":
                base = seconds["dense"]
            for name, found in seconds.items():
                median = statistics.median(found)
                full = f"{median / statistics.median(base):.2f}" if base else ""
                loop = f"{median_ratio(seconds['loop'], found):.2f}" if "loop" in seconds else ""
                rows.append(
                    f"| {top_k} | {width} | {trained} | {name} | {median * 1e3:.0f} ms | "
                    f"{settings.tokens / median:.0f} | {median_ratio(found, seconds['dense']):.2f} | {full} | {loop} | "
                    f"{f'{load:.2f}' if name == 'ours' else ''} |"
                )
    print(
        f"\n{settings.experts} experts, D {settings.hidden}, F {settings.channels}, {settings.tokens} tokens, ", end=""
    )
    print(f"{settings.dtype}, LoRA rank {settings.rank}; {settings.rounds} rounds; {machine(settings.device)}\n")
    print(
        "| top-k | width | trained | block | step | tokens/s | / dense | / dense, full | loop / it | busiest expert |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
