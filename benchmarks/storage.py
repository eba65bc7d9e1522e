"""Peak memory of the retraining stage by what the experts rest in, against the dense model's own LoRA training.

    python benchmarks/storage.py                     # a Llama of 0.3 B parameters, 8 experts at 50%
    python benchmarks/storage.py --shape tinyllama   # 12 GB of memory

Each row is a process of its own: the dense model with low-rank adapters on its FFNs, or a Mixture-of-Experts made of it
with adapters of the same rank on every expert, a few steps of AdamW on the same random tokens. The kernel reports peak
resident memory. Weights are random, float32. Prints one table.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dive.config import Freezing, FreezingConfig, LoRAConfig
from dive.model.families import decoder_layers, ffn, ffn_projections
from dive.moe.assemble import assemble, assemble_indexed
from dive.moe.layer import ExpertLayer
from dive.moe.plug import plug_linear_lora, plug_routers
from dive.retrain.freezing import apply_policy
from dive.retrain.teacher import share_frozen

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "vocab_size": 256},
    "medium": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "vocab_size": 8192},
    "tinyllama": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "vocab_size": 32000},
}
ROWS = {
    "dense": "dense model, LoRA on its FFNs",
    "indexed": "indexed, no refit (gate, up and down are the dense model's)",
    "indexed_refit": "indexed, least squares (down of every expert is its own)",
    "materialised": "materialised",
}


def slices(model: "PreTrainedModel", settings: argparse.Namespace, *, refit: bool) -> Iterator[ExpertLayer]:
    """Experts of random channels; ``refit`` gives each a down projection of its own."""
    generator = torch.Generator().manual_seed(settings.seed)
    for number in range(len(decoder_layers(model))):
        weights = ffn(model, number)
        channels, hidden = weights.gate.shape
        kept = torch.stack(
            [torch.randperm(channels, generator=generator)[: channels // 2].sort().values for _ in range(8)]
        )
        masks = torch.zeros(8, channels, dtype=torch.bool).scatter_(1, kept, True)
        down = torch.stack([weights.down[:, mask] for mask in masks])
        yield ExpertLayer(
            masks=masks,
            gate_up=torch.stack([torch.cat([weights.gate[mask], weights.up[mask]]) for mask in masks]),
            down=down * 1.01 if refit else down,
            router=torch.randn(8, hidden, generator=generator),
        )


def train(settings: argparse.Namespace) -> None:
    """Build one row's model, train it, and print peak memory in bytes and seconds a step."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings.seed)
    config = LlamaConfig(**SHAPES[settings.shape], num_attention_heads=16, num_key_value_heads=4)
    dense: PreTrainedModel = LlamaForCausalLM(config).eval().requires_grad_(False)
    lora = LoRAConfig(rank=settings.rank, alpha=2.0 * settings.rank)
    if settings.row == "dense":
        model = dense
        for number in range(config.num_hidden_layers):
            for projection in ffn_projections(dense, number):
                plug_linear_lora(projection, lora)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora." in name or "norm" in name)
    else:
        build = assemble if settings.row == "materialised" else assemble_indexed
        model = build(dense, slices(dense, settings, refit=settings.row == "indexed_refit"), top_k=1)
        plug_routers(model)
        policy = FreezingConfig(router=Freezing.full, experts=Freezing.lora, norms=Freezing.full)
        apply_policy(model, policy, lora)
        share_frozen(dense, model)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    generator = torch.Generator().manual_seed(settings.seed)
    start = time.monotonic()
    for _ in range(settings.steps):
        ids: Tensor = torch.randint(config.vocab_size, (settings.batch, settings.length), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    seconds = (time.monotonic() - start) / settings.steps
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"peak": peak, "seconds": seconds}))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="medium")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.row is not None:
        train(settings)
        return
    found = {}
    for row in settings.rows:
        print(f"{row} ...", end=" ", flush=True, file=sys.stderr)
        command = [sys.executable, __file__, *sys.argv[1:], "--row", row]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[row] = json.loads(done.stdout.splitlines()[-1])
        print(f"{found[row]['peak'] / 1e9:.2f} GB", file=sys.stderr)
    first = found[settings.rows[0]]
    print(
        f"\n{settings.shape}, 8 experts at 50%, rank {settings.rank}, {settings.batch} × {settings.length} tokens a step; ",
        end="",
    )
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads\n")
    print("| experts | peak resident | over the first row | a step |\n| --- | --- | --- | --- |")
    for row, values in found.items():
        ratio = f"{values['peak'] / first['peak']:.2f}"
        print(f"| {ROWS[row]} | {values['peak'] / 1e9:.2f} GB | {ratio} | {values['seconds']:.2f} s |")


if __name__ == "__main__":
    main()
